"""Views, boxes and peaks against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.data.transforms import prepare_sample
from dotcbm.explain.heatmaps import box, gate, heatmaps, natural_view, peak, upsample, visible_region
from dotcbm.metrics.localization import peak_points
from dotcbm.structures import ConceptOutput, ConceptSample, Preprocessing


def output(*, plan: bool = True, evidence: bool = True) -> ConceptOutput:
    g = torch.Generator().manual_seed(0)
    plan_BNM = torch.rand(2, 6, 4, generator=g)
    plan_BNM = plan_BNM / plan_BNM.sum((1, 2), keepdim=True)
    return ConceptOutput(
        concept_logit_BM=torch.randn(2, 4, generator=g),
        class_logit_BK=torch.randn(2, 3, generator=g),
        grid=(2, 3),
        evidence_BNM=torch.randn(2, 6, 4, generator=g) if evidence else None,
        plan_BNM=plan_BNM if plan else None,
        theta_BN=plan_BNM.sum(2) if plan else None,
        gamma_BM=plan_BNM.sum(1) if plan else None,
    )


def test_concept_view_spreads_each_concepts_mass_and_patch_view_divides_each_patch() -> None:
    out = output()
    assert out.plan_BNM is not None
    assert out.theta_BN is not None
    concept = heatmaps(out, view="concept")
    patch = heatmaps(out, view="patch")
    assert concept.shape == patch.shape == (2, 4, 2, 3)
    torch.testing.assert_close(concept.sum((2, 3)), torch.ones(2, 4))
    torch.testing.assert_close(patch.sum(1), torch.ones(2, 2, 3))
    # Row by row: patch 4 of a 2 x 3 grid is row 1, column 1.
    torch.testing.assert_close(patch[1, 2, 1, 1], out.plan_BNM[1, 4, 2] / out.theta_BN[1, 4])


def test_evidence_view_keeps_what_speaks_for_the_concept() -> None:
    out = output(plan=False)
    assert out.evidence_BNM is not None
    assert natural_view(out) == "evidence"
    assert natural_view(output()) == "concept"
    expected = out.evidence_BNM.clamp(min=0).transpose(1, 2).reshape(2, 4, 2, 3)
    torch.testing.assert_close(heatmaps(out), expected)


def test_patches_and_concepts_without_mass_give_zero_not_nan() -> None:
    plan, mass = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    out = ConceptOutput(torch.zeros(1, 2), torch.zeros(1, 2), (1, 2), plan_BNM=plan, theta_BN=mass, gamma_BM=mass)
    for view in ("concept", "patch"):
        assert heatmaps(out, view=view).tolist() == [[[[1.0, 0.0]], [[0.0, 0.0]]]]


def test_models_without_a_map_are_told_what_to_do() -> None:
    assert natural_view(output(plan=False, evidence=False)) == "gradcam"
    with pytest.raises(ValueError, match=r"holds neither a transport plan nor evidence.*made from the model"):
        heatmaps(output(plan=False, evidence=False))
    with pytest.raises(ValueError, match=r"^'lrp' is an attribution"):
        heatmaps(output(), view="lrp")
    with pytest.raises(ValueError, match="use view='evidence'"):
        heatmaps(output(plan=False), view="patch")
    with pytest.raises(ValueError, match="no 'evidence' view"):
        heatmaps(output(evidence=False), view="evidence")
    for view in ("concept", "evidence"):  # a hint must not send to another view that this model lacks
        with pytest.raises(ValueError, match="use view='gradcam'"):
            heatmaps(output(plan=False, evidence=False), view=view)
    with pytest.raises(ValueError, match="no view 'plan'"):
        heatmaps(output(), view="plan")  # pyright: ignore


def test_the_gate_scales_by_probability() -> None:
    maps = heatmaps(output())
    gated = gate(maps, torch.tensor([[0.0, 1.0, 0.5, 0.25]] * 2))
    assert gated[:, 0].abs().max() == 0
    torch.testing.assert_close(gated[:, 3], maps[:, 3] / 4)


@settings(max_examples=50)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_box_encloses_exactly_the_hot_cells_and_the_peak_is_the_metrics_peak(h: int, w: int, seed: int, threshold: float) -> None:
    heat = torch.rand(h, w, generator=torch.Generator().manual_seed(seed))
    hot = [(r, c) for r in range(h) for c in range(w) if heat[r, c] >= threshold * heat.max()]
    rows, columns = [r for r, _ in hot], [c for _, c in hot]
    expected = (min(columns) / w, min(rows) / h, (max(columns) + 1) / w, (max(rows) + 1) / h)
    assert box(heat, threshold=threshold) == pytest.approx(expected)
    assert peak(heat) == pytest.approx(peak_points(heat.reshape(1, -1, 1), grid=(h, w))[0, 0].tolist())
    found, spot = box(heat), peak(heat)
    assert found is not None
    assert spot is not None
    assert found[0] < spot[0] < found[2]
    assert found[1] < spot[1] < found[3]


def test_a_map_without_heat_has_no_box_and_no_peak() -> None:
    assert box(torch.zeros(3, 3)) is None
    assert peak(torch.zeros(3, 3)) is None
    with pytest.raises(ValueError, match="share of the map's maximum"):
        box(torch.ones(2, 2), threshold=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_upsampling_stays_in_range_and_keeps_the_peak_inside_its_cell(mode: str) -> None:
    maps = torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(1))
    big = upsample(maps, (60, 90), mode=mode)  # pyright: ignore
    assert big.shape == (5, 60, 90)
    assert (big.amax((1, 2)) <= maps.amax((1, 2)) + 1e-6).all()
    assert (big.amin((1, 2)) >= maps.amin((1, 2)) - 1e-6).all()
    if mode == "bilinear":  # pixels fall on the centres of cells here, and nothing lies above the highest cell
        for j in range(5):
            row, column = divmod(int(big[j].argmax()), 90)
            assert (row // 15, column // 15) == divmod(int(maps[j].argmax()), 6)


def test_a_cropped_pictures_map_lies_on_the_crop() -> None:
    """A wide picture, its middle square seen by the encoder."""
    preprocessing = Preprocessing(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1), resize="crop")
    region = visible_region(preprocessing, (100, 200))
    assert region == pytest.approx((0.25, 0, 0.75, 1))
    heat = torch.zeros(1, 2, 2)
    heat[0, 0, 0] = 1
    big = upsample(heat, (100, 200), region=region)[0]
    assert big[:, :50].abs().max() == 0
    assert big[:, 150:].abs().max() == 0
    assert big[10, 60] > 0.9
    assert peak(heat[0], region=region) == pytest.approx((0.375, 0.25))
    assert box(heat[0], region=region) == pytest.approx((0.25, 0, 0.5, 0.5))


@settings(max_examples=30)
@given(st.integers(40, 400), st.integers(40, 400), st.sampled_from([1.0, 0.875, 0.9]), st.sampled_from([(32, 32), (32, 64)]))
def test_the_visible_region_is_what_the_transform_shows(height: int, width: int, fraction: float, size: tuple[int, int]) -> None:
    """A key point in the middle of the encoder's input, and one off it, come from where `visible_region` says."""
    preprocessing = Preprocessing(size=size, mean=(0, 0, 0), std=(1, 1, 1), resize="crop", crop_fraction=fraction)
    x0, y0, x1, y1 = visible_region(preprocessing, (height, width))
    wanted = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    points = torch.stack([x0 + wanted[:, 0] * (x1 - x0), y0 + wanted[:, 1] * (y1 - y0), torch.ones(2)], 1)
    sample = ConceptSample(None, 0, torch.zeros(1), 0, "x", (height, width), points_P3=points)
    seen = prepare_sample(sample, preprocessing=preprocessing).points_P3
    assert seen is not None
    torch.testing.assert_close(seen[:, :2], wanted, atol=1.6 / 32, rtol=0)  # the transform rounds sizes to whole pixels
