"""Quantus (Hedström et al. 2023) and we give the same figures where the definitions meet: a pixel is a patch, maps are positive.

Quantus counts a tie for the peak as a hit if any of the tied pixels hits, and takes tied pixels in an order of its own; our maps here
have no ties. Its `AttributionLocalisation` adds 1e-9 to the total.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from dotcbm.metrics.localization import part_relevance_mass, pointing_in_mask, relevance_mass, relevance_rank
from dotcbm.metrics.robustness import background_share

quantus = pytest.importorskip("quantus")

B, H, W = 24, 9, 7


def scores(name: str, map_BN: torch.Tensor, mask_BHW: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What a Quantus metric says of ready attributions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = getattr(quantus, name)(abs=False, normalise=False, disable_warnings=True, **settings)
        said = metric(
            model=torch.nn.Identity(),  # never called: the attributions are given
            x_batch=np.zeros((B, 1, H, W), dtype=np.float32),
            y_batch=np.zeros(B, dtype=int),
            a_batch=map_BN.view(B, 1, H, W).numpy(),
            s_batch=mask_BHW[:, None].numpy(),
            channel_first=True,
        )
    return torch.tensor(np.asarray(said, dtype=float))


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mask_BHW = torch.rand(B, H, W, generator=g) > torch.linspace(0.05, 0.95, B)[:, None, None]
    assert mask_BHW.any((1, 2)).all()
    return torch.rand(B, H * W, 1, generator=g, dtype=torch.float64) + 0.2 * mask_BHW.flatten(1)[..., None], mask_BHW


def test_pointing_game(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    map_BN1, mask_BHW = case
    own = torch.ones(1, 1, dtype=torch.bool)
    ours = pointing_in_mask(map_BN1, grid=(H, W), part_masks_BPHW=mask_BHW[:, None], part_mask_MP=own)[:, 0]
    theirs = scores("PointingGame", map_BN1, mask_BHW)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert 0 < theirs.mean() < 1


def test_relevance_mass_accuracy(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    map_BN1, mask_BHW = case
    theirs = scores("RelevanceMassAccuracy", map_BN1, mask_BHW)
    torch.testing.assert_close(relevance_mass(map_BN1, grid=(H, W), mask_BHW=mask_BHW)[:, 0], theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(background_share(map_BN1, grid=(H, W), foreground_BHW=~mask_BHW)[:, 0], theirs, atol=1e-6, rtol=0)
    parts = torch.stack([mask_BHW & (torch.arange(W) < 3), mask_BHW & (torch.arange(W) >= 3)], 1)
    both = torch.ones(1, 2, dtype=torch.bool)
    ours = part_relevance_mass(map_BN1, grid=(H, W), part_masks_BPHW=parts, part_mask_MP=both)[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_attribution_localisation_is_the_same_figure(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    map_BN1, mask_BHW = case
    signed_BN1 = map_BN1 - 0.5
    theirs = scores("AttributionLocalisation", signed_BN1, mask_BHW, positive_attributions=True)
    torch.testing.assert_close(relevance_mass(signed_BN1, grid=(H, W), mask_BHW=mask_BHW)[:, 0], theirs, atol=1e-6, rtol=0)


def test_relevance_rank_accuracy(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    map_BN1, mask_BHW = case
    theirs = scores("RelevanceRankAccuracy", map_BN1, mask_BHW)
    torch.testing.assert_close(relevance_rank(map_BN1, grid=(H, W), mask_BHW=mask_BHW)[:, 0], theirs, atol=1e-6, rtol=0)
    assert 0 < theirs.min() < theirs.max() <= 1


def test_top_k_intersection_at_the_masks_own_size_is_the_rank(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    map_BN1, mask_BHW = case
    ours = relevance_rank(map_BN1, grid=(H, W), mask_BHW=mask_BHW)[:, 0]
    for picture in range(0, B, 5):
        theirs = scores("TopKIntersection", map_BN1, mask_BHW, k=int(mask_BHW[picture].sum()))
        assert ours[picture].item() == pytest.approx(theirs[picture].item(), abs=1e-6)
