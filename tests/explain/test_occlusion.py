"""Occlusion: what is covered is what the map says, and the numbers are the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dotcbm.explain.explanation import explain
from dotcbm.explain.occlusion import occlude
from dotcbm.metrics.faithfulness import cover, region_of
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.published_dot_cbm import PublishedDotCBM

Build = Callable[..., ConceptModel]


def test_numbers_are_the_models_on_covered_pictures(build: Build, picture: Tensor) -> None:
    model = build(PublishedDotCBM).train()
    found = occlude(model, picture, concepts=["crest", "red wing"], num_random=3, share=0.3, seed=5)
    assert model.training
    assert [row.name for row in found.concepts] == ["crest", "red wing"]
    model.eval()
    image = model.prepare([picture])[0]
    explanation = explain(model, picture)
    for row in found.concepts:
        j = explanation.concept(row.name).index
        assert torch.equal(row.region_hw, region_of(explanation.heatmaps_MHW[j], share=0.3, max_area=0.25))
        for region_hw, value in ((row.region_hw, row.covered), *zip(row.random_Rhw, row.random_R, strict=True)):
            expected = model(cover(image, region_hw)[None]).concept_BM[0, j]
            assert float(value) == pytest.approx(float(expected.detach()), abs=1e-6)
            assert int(region_hw.sum()) == int(row.region_hw.sum())
        assert not bool((row.random_Rhw & row.region_hw).any())  # there is room beside it
        assert row.drop == pytest.approx(row.probability - row.covered)
        assert row.random_drop == pytest.approx(row.probability - float(row.random_R.mean()))
    again = occlude(model, picture, concepts=["crest", "red wing"], num_random=3, share=0.3, seed=5)
    assert all(torch.equal(a.random_Rhw, b.random_Rhw) for a, b in zip(found.concepts, again.concepts, strict=True))
    assert "own place covered" in str(found)


def test_covering_what_a_concept_is_read_from_lowers_it_more(build: Build, picture: Tensor) -> None:
    """A concept that is red: one red cell in a picture without red, whose evidence is there and nowhere else."""
    model = build(CBM)
    with torch.no_grad():
        model.bottleneck.concept.weight.zero_()  # pyright: ignore
        model.bottleneck.concept.weight[0, 0] = 40.0  # pyright: ignore
        model.bottleneck.concept.bias.fill_(38.0)  # pyright: ignore
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0, 8:16, 16:24] = 255
    found = occlude(model, red, concepts=["red wing"], num_random=4, share=1.0)
    (row,) = found.concepts
    assert row.region_hw.nonzero().tolist() == [[1, 2]]
    assert row.drop > 0.3
    assert row.drop > row.random_drop + 0.3
    assert row.beaten == 1.0


def test_bad_settings_are_refused(build: Build, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(PublishedDotCBM)
    with pytest.raises(ValueError, match="without a random region"):
        occlude(model, picture, num_random=0)
    with pytest.raises(ValueError, match="did you mean"):
        occlude(model, picture, concepts=["crests"])
    with pytest.raises(ValueError, match="share is 0"):
        occlude(model, picture, concepts=["crest"], share=0)
    explanation = explain(model, picture)
    monkeypatch.setattr("dotcbm.explain.occlusion.explain", lambda *_, **__: replace(explanation, heatmaps_MHW=torch.zeros(6, 4, 4)))
    with pytest.raises(ValueError, match="map of 'crest' has no heat"):
        occlude(model, picture, concepts=["crest"])
    unseen = replace(explanation, concept_logit_M=torch.full((6,), -1.0))
    monkeypatch.setattr("dotcbm.explain.occlusion.explain", lambda *_, **__: unseen)
    with pytest.raises(ValueError, match="name the concepts to test"):
        occlude(model, picture)
