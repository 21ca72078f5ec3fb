"""Boxes: shares add up over a partition, muting is exact, and each way of muting does what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dotcbm.explain.explanation import explain
from dotcbm.explain.regions import cells_in_box, concepts_in_box, mute_region
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.dot_product import DotProduct
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import PatchFeatures

Build = Callable[..., ConceptModel]
ALL = (0.0, 0.0, 1.0, 1.0)
NOTHING = (0.0, 0.0, 0.1, 0.4)  # left of the crop of a wide picture


@settings(max_examples=40)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(1, 9), st.integers(1, 9))
def test_cells_of_a_partition_add_up_to_one(x: float, y: float, h: int, w: int) -> None:
    boxes = [(0.0, 0.0, x, y), (x, 0.0, 1.0, y), (0.0, y, x, 1.0), (x, y, 1.0, 1.0)]
    cells = [cells_in_box(box, grid=(h, w)) for box in boxes]
    torch.testing.assert_close(torch.stack(cells).sum(0), torch.ones(h, w, dtype=torch.float64))
    assert float(cells[0].mean()) == pytest.approx(x * y)
    fine = torch.zeros(40, 40)
    fine[: round(y * 40), : round(x * 40)] = 1
    coarse = torch.nn.functional.adaptive_avg_pool2d(fine[None, None], (h, w))[0, 0]
    assert float((coarse - cells[0]).abs().max()) < 0.06 * max(h, w)  # edges are rounded to a fortieth


def test_shares_and_evidence_add_up_over_a_partition(build: Build, picture: Tensor) -> None:
    explanation = explain(build(PublishedDotCBM), picture)
    boxes = [(0.0, 0.0, 0.3, 0.55), (0.3, 0.0, 1.0, 0.55), (0.0, 0.55, 1.0, 1.0)]
    reports = [concepts_in_box(explanation, box) for box in boxes]
    assert sum(report.area for report in reports) == pytest.approx(1)
    assert explanation.evidence_MHW is not None
    for j, name in enumerate(explanation.concept_names):
        rows = [next(row for row in report.concepts if row.name == name) for report in reports]
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert sum(row.evidence or 0.0 for row in rows) == pytest.approx(float(explanation.evidence_MHW[j].sum()), abs=1e-5)
        assert all(row.lift == pytest.approx(row.share / report.area) for row, report in zip(rows, reports, strict=True))
    seen = [row.probability * row.share for row in reports[0].concepts]
    assert seen == sorted(seen, reverse=True)


def test_a_map_without_heat_lives_nowhere_and_a_model_without_evidence_says_so(
    build: Build, doubled: type[Bottleneck], picture: Tensor
) -> None:
    explanation = explain(build(doubled), picture)
    report = concepts_in_box(replace(explanation, heatmaps_MHW=torch.zeros(6, 4, 4)), (0.1, 0.1, 0.5, 0.5))
    assert all(row.share != row.share and row.evidence is None for row in report.concepts)


@pytest.mark.parametrize("kind", [CBM, DotProduct, PublishedDotCBM])
def test_muting_everything_leaves_the_bias(build: Build, kind: type[Bottleneck], picture: Tensor) -> None:
    model = build(kind)
    bottleneck = model.bottleneck
    if isinstance(bottleneck, CBM):  # what a picture of no evidence has: the bias less the mean that the scaling takes out
        output = model.eval()(model.prepare([picture]))
        bias_M = (output.concept_logit_BM - output.evidence_BNM.sum(1))[0].detach()
    else:
        with torch.no_grad():
            bottleneck.readout.beta_M.normal_()  # pyright: ignore
        bias_M = bottleneck.readout.beta_M.detach()  # pyright: ignore
    for how in ("evidence", "transport") if kind is PublishedDotCBM else ("evidence",):
        muted = mute_region(model, picture, ALL, how=how)  # pyright: ignore
        torch.testing.assert_close(muted.after.concept_logit_M, bias_M, atol=1e-4, rtol=1e-4)
        expected = bottleneck.classify(bias_M[None])[0].detach()
        torch.testing.assert_close(muted.after.class_logit_K, expected, atol=1e-4, rtol=1e-4)


def test_muted_evidence_is_taken_from_the_logit_and_nothing_else(build: Build, picture: Tensor) -> None:
    model, box = build(CBM), (0.0, 0.0, 0.6, 0.4)
    muted = mute_region(model, picture, box)
    assert muted.how == "evidence"
    assert muted.before.evidence_MHW is not None
    inside_M = (muted.before.evidence_MHW * cells_in_box(box, grid=(4, 4))).sum((1, 2)).float()
    torch.testing.assert_close(muted.after.concept_logit_M, muted.before.concept_logit_M - inside_M, atol=1e-5, rtol=1e-5)
    assert muted.after.evidence_MHW is not None
    assert float(muted.after.evidence_MHW[:, 0, :2].abs().max()) == 0
    torch.testing.assert_close(muted.before.class_logit_K, explain(model, picture).class_logit_K)


@pytest.mark.parametrize("settings_", [{}, {"null_concept": 0.0}, {"readout": "cosine"}])
def test_transport_is_solved_as_the_model_does(build: Build, picture: Tensor, settings_: dict[str, object]) -> None:
    """With a box that no patch is in, nothing changes; with a part of them muted, the rest is transported as if it were all there is."""

    def kind(problem):  # type: ignore[no-untyped-def]
        return PublishedDotCBM(problem, patch_prior="uniform", **settings_)

    model = build(kind, resize="crop").eval()
    wide = torch.cat([picture, picture], 2)
    same = mute_region(model, wide, NOTHING)
    assert same.how == "transport"
    torch.testing.assert_close(same.after.concept_logit_M, same.before.concept_logit_M)
    torch.testing.assert_close(same.after.heatmaps_MHW, same.before.heatmaps_MHW)

    squashed = build(kind).eval()
    muted = mute_region(squashed, picture, (0.0, 0.0, 1.0, 0.5))
    features = squashed.encoder(squashed.prepare([picture]))
    lower = squashed.bottleneck(PatchFeatures(features.patch_BND[:, 8:], features.global_BD, (2, 4)))
    torch.testing.assert_close(muted.after.concept_logit_M, lower.concept_logit_BM[0].detach(), atol=1e-4, rtol=1e-4)
    assert float(muted.after.heatmaps_MHW[:, :2].abs().max()) == 0


def test_covering_the_picture_changes_what_the_encoder_sees(build: Build, doubled: type[Bottleneck], picture: Tensor) -> None:
    model = build(doubled)
    muted = mute_region(model, picture, (0.0, 0.0, 0.5, 1.0), target_class="Dapple")
    assert muted.how == "picture"
    assert muted.after.target_class == muted.before.target_class == "Dapple"
    image = model.prepare([picture])
    image[..., :16] = image.mean((2, 3), keepdim=True)
    torch.testing.assert_close(muted.after.concept_logit_M, model.eval()(image).concept_logit_BM[0].detach(), atol=1e-5, rtol=1e-5)
    assert "encoder looked again" in muted.why


def test_the_mode_is_restored_and_bad_questions_are_answered(build: Build, doubled: type[Bottleneck], picture: Tensor) -> None:
    model = build(PublishedDotCBM).train()
    mute_region(model, picture, (0.2, 0.2, 0.4, 0.4))
    assert model.training
    assert model.bottleneck.training
    explanation = explain(model, picture)
    for box in ((0.5, 0, 0.5, 1), (0, 0, 1.2, 1), (0.6, 0, 0.2, 1), (0, float("nan"), 1, 1)):
        with pytest.raises(ValueError, match="is no box in the picture"):
            concepts_in_box(explanation, box)
        with pytest.raises(ValueError, match="is no box in the picture"):
            mute_region(model, picture, box)
    with pytest.raises(ValueError, match="outside"):
        concepts_in_box(explain(build(PublishedDotCBM, resize="crop"), torch.cat([picture, picture], 2)), NOTHING)
    with pytest.raises(ValueError, match="CBM transports nothing"):
        mute_region(build(CBM), picture, ALL, how="transport")
    with pytest.raises(ValueError, match="no sums over patches; cover the 'picture'"):
        mute_region(build(doubled), picture, ALL, how="evidence")
    with pytest.raises(ValueError, match="no way 'blur'"):
        mute_region(model, picture, ALL, how="blur")  # pyright: ignore
