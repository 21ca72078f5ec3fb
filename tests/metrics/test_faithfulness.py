"""Regions, random regions and covered pictures: by definition, by property, and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d, label

from dotcbm.metrics.faithfulness import cover, occlusion_drop, random_region, region_of


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 1))
def test_the_region_is_the_smallest_set_of_cells_that_holds_the_share(seed: int, share: float) -> None:
    heat = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    positive = heat.clamp(min=0)
    region = region_of(heat, share=share, max_area=1)
    if positive.sum() == 0:
        assert not region.any()
        return
    wanted = share * positive.sum()
    assert positive[region].sum() >= wanted * (1 - 1e-9)
    fewer = int(region.sum()) - 1
    cells = positive.flatten().tolist()
    assert all(sum(chosen) < wanted for chosen in itertools.combinations(cells, fewer))
    assert positive[region].min() >= positive[~region].max() if (~region).any() else True


def test_the_region_is_capped_and_batches_are_maps_side_by_side() -> None:
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    regions = region_of(maps, share=0.9, max_area=0.25)
    assert regions.sum((1, 2)).tolist() == [4] * 5
    assert all(torch.equal(regions[i], region_of(maps[i], share=0.9, max_area=0.25)) for i in range(5))
    assert region_of(maps[0], max_area=0.01).sum() == 1
    assert region_of(torch.ones(4, 4), share=0.5, max_area=1).flatten().long().tolist() == [1] * 8 + [0] * 8
    assert not region_of(-maps).any()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.02, 0.98))
def test_a_random_region_is_contiguous_as_large_and_elsewhere_where_there_is_room(seed: int, share: float) -> None:
    region = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) < share
    drawn = random_region(region, seed=seed)
    assert drawn.sum() == region.sum()
    stretches, number = label(~region.numpy())
    if region.any():
        assert label(drawn.numpy())[1] == 1
    largest = max(((stretches == i + 1).sum() for i in range(number)), default=0)
    if largest >= region.sum():
        assert not (drawn & region).any()
    else:  # all of the largest stretch is used before the region is
        assert (drawn & ~region).sum() >= largest
    assert torch.equal(drawn, random_region(region, seed=seed))


def test_every_free_cell_is_met() -> None:
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[0, 0] = True
    met = torch.stack([random_region(region, seed=seed) for seed in range(300)]).double().mean(0)
    assert met[0, 0] == 0
    assert met.flatten()[1:].tolist() == pytest.approx([1 / 15] * 15, abs=0.045)  # three standard errors of 300 draws


def test_covering_with_the_mean_changes_the_region_and_nothing_else() -> None:
    picture = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[0, 1, 2] = region[1, 3, 0] = True
    covered = cover(picture, region)
    mask = torch.zeros(2, 1, 8, 12, dtype=torch.bool)
    mask[0, :, 2:4, 6:9] = mask[1, :, 6:8, :3] = True
    mean = picture.mean((2, 3), keepdim=True).expand_as(picture)
    torch.testing.assert_close(covered, torch.where(mask, mean, picture))
    whole = (picture[0] * 255).to(torch.uint8)
    assert cover(whole, region[0]).dtype == torch.uint8
    assert cover(whole, region[0])[0, 2, 6] == whole[0].float().mean().round()


def test_blurring_equals_scipy_and_leaves_the_rest() -> None:
    picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    covered = cover(picture, torch.ones(5, 5, dtype=torch.bool), fill="blur")
    expected = gaussian_filter1d(picture.double().numpy(), 4.0, axis=1, mode="nearest", radius=12)
    expected = gaussian_filter1d(expected, 6.0, axis=2, mode="nearest", radius=18)
    torch.testing.assert_close(covered.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert torch.equal(cover(picture, torch.zeros(5, 5, dtype=torch.bool), fill="blur"), picture)
    flat = torch.full((3, 8, 8), 0.3)
    torch.testing.assert_close(cover(flat, torch.ones(2, 2, dtype=torch.bool), fill="blur"), flat)


def test_drops() -> None:
    drop = occlusion_drop(torch.tensor([0.9, 0.2, torch.nan]), torch.tensor([0.4, 0.3, 0.1]))
    assert drop[:2].tolist() == pytest.approx([0.5, -0.1])
    assert drop[2].isnan()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="share is 0"):
        region_of(torch.ones(2, 2), share=0)
    with pytest.raises(ValueError, match="max_area is 2"):
        region_of(torch.ones(2, 2), max_area=2)
    with pytest.raises(ValueError, match="the map holds NaN"):
        region_of(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="one region at a time"):
        random_region(torch.ones(2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not fit"):
        cover(torch.ones(2, 3, 4, 4), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="fill is 'black'"):
        cover(torch.ones(3, 4, 4), torch.ones(2, 2, dtype=torch.bool), fill="black")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give pairs"):
        occlusion_drop(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="no probabilities"):
        occlusion_drop(torch.tensor([3.0]), torch.tensor([1.0]))
