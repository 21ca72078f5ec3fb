"""Background shares against pixels and chance; gaps between splits against their intervals."""

from __future__ import annotations

import math

import pytest
import torch

from dotcbm.metrics.intervals import newcombe, paired_bootstrap
from dotcbm.metrics.localization import peak_points, pointing_in_mask
from dotcbm.metrics.robustness import background_area, background_share, independent_gap, paired_gap


def test_background_share_counts_what_lies_outside_pixel_by_pixel() -> None:
    g = torch.Generator().manual_seed(0)
    maps, mask = torch.randn(4, 12, 3, generator=g, dtype=torch.float64), torch.rand(4, 3, 4, generator=g) > 0.5
    got = background_share(maps, grid=(3, 4), foreground_BHW=mask)
    for b in range(4):
        for j in range(3):
            heat = [max(value, 0.0) for value in maps[b, :, j].tolist()]
            outside = sum(value for value, inside in zip(heat, mask[b].flatten().tolist()) if not inside)
            assert got[b, j].item() == pytest.approx(outside / sum(heat))
    nobody = background_share(maps, grid=(3, 4), foreground_BHW=torch.zeros_like(mask))
    assert nobody.isnan().all()
    assert background_area(torch.zeros_like(mask)).isnan().all()


def test_a_uniform_map_and_the_mean_of_random_ones_have_the_backgrounds_area() -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 10, 10, generator=g) > 0.7
    area = background_area(mask).item()
    assert area == pytest.approx(1 - mask.double().mean().item())
    assert background_share(torch.ones(1, 25, 1), grid=(5, 5), foreground_BHW=mask).item() == pytest.approx(area)
    random = background_share(torch.rand(1, 25, 4000, generator=g), grid=(5, 5), foreground_BHW=mask)
    assert random.mean().item() == pytest.approx(area, abs=0.01)


def test_peaks_of_random_maps_point_at_a_part_as_often_as_it_covers_cells() -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 1, 5, 5, generator=g) > 0.6
    maps = torch.rand(1, 25, 20_000, generator=g)
    hits = pointing_in_mask(maps, grid=(5, 5), part_masks_BPHW=mask, part_mask_MP=torch.ones(20_000, 1, dtype=torch.bool))
    assert hits.mean().item() == pytest.approx(mask.double().mean().item(), abs=0.012)
    assert peak_points(maps, grid=(5, 5)).mean((0, 1)).tolist() == pytest.approx([0.5, 0.5], abs=0.012)


def test_gaps() -> None:
    g = torch.Generator().manual_seed(0)
    inside, outside = torch.rand(200, generator=g) < 0.9, torch.rand(200, generator=g) < 0.6
    gap = paired_gap(inside, outside)
    assert gap[0] == pytest.approx(float(inside.double().mean() - outside.double().mean()))
    assert 0 < gap[1] < gap[0] < gap[2] < 1
    assert gap == paired_bootstrap(inside.double(), outside.double())
    left_out = outside.double()
    left_out[:50] = torch.nan
    assert paired_gap(inside, left_out)[0] == pytest.approx(float(inside[50:].double().mean() - outside[50:].double().mean()))
    assert independent_gap(inside, outside[:100]) == newcombe(int(inside.sum()), 200, int(outside[:100].sum()), 100)
    assert math.isnan(independent_gap(inside, outside[:0])[0])
    with pytest.raises(ValueError, match="same pictures"):
        paired_gap(inside, outside[:100])
