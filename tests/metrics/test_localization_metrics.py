"""Pointing and relevance against loops written out pixel by pixel, and against answers known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.metrics.localization import (
    coverage,
    distance_to_parts,
    part_relevance_mass,
    peak_points,
    pointing_accuracy,
    pointing_distance,
    pointing_in_mask,
    positive_mean,
    prior_map,
    relevance_mass,
    relevance_rank,
    scored_pairs,
)


def case(seed: int, b: int = 3, grid: tuple[int, int] = (3, 4), m: int = 5, p: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    points = torch.rand(b, p, 3, generator=g)
    points[..., 2] = (points[..., 2] > 0.4).float()
    points[points[..., 2] == 0] *= torch.nan
    points[..., 2] = points[..., 2].nan_to_num(0)
    return {
        "map_BNM": torch.randn(b, n, m, generator=g),
        "points_BP3": points,
        "part_mask_MP": torch.rand(m, p, generator=g) > 0.5,
        "size_B2": torch.randint(50, 400, (b, 2), generator=g),
        "masks": torch.rand(b, p, 21, 30, generator=g) > 0.8,
        "target_BM": torch.randint(0, 2, (b, m), generator=g).float(),
    }


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_pointing_distance_equals_a_loop_in_pixels(seed: int) -> None:
    c, grid = case(seed), (3, 4)
    got = pointing_distance(c["map_BNM"], grid=grid, points_BP3=c["points_BP3"], part_mask_MP=c["part_mask_MP"], size_B2=c["size_B2"])
    for b in range(3):
        height, width = c["size_B2"][b].tolist()
        for j in range(5):
            best = max(range(12), key=lambda i: c["map_BNM"][b, i, j].item())
            x, y = (best % 4 + 0.5) / 4 * width, (best // 4 + 0.5) / 3 * height
            distances = [
                math.hypot(x - px * width, y - py * height) / math.hypot(width, height)
                for part, (px, py, visible) in enumerate(c["points_BP3"][b].tolist())
                if visible and c["part_mask_MP"][j, part]
            ]
            if distances:
                assert got[b, j].item() == pytest.approx(min(distances), abs=1e-6)
            else:
                assert got[b, j].isnan()


def test_distance_is_in_diagonals_of_the_original_picture_not_of_the_square_input() -> None:
    """A wide picture squashed onto a square: half its width is far, half its height is near."""
    points = torch.tensor([[[0.5, 1.0, 1.0], [1.0, 0.5, 1.0]]])
    got = distance_to_parts(
        torch.full((1, 2, 2), 0.5), points_BP3=points, part_mask_MP=torch.eye(2, dtype=torch.bool), size_B2=torch.tensor([[300, 400]])
    )
    assert got.tolist() == [pytest.approx([0.3, 0.4])]  # 150 / 500 and 200 / 500


def test_the_peak_is_the_first_highest_patch_and_a_flat_map_points_at_the_corner() -> None:
    flat = torch.zeros(1, 6, 1)
    assert peak_points(flat, grid=(2, 3))[0, 0].tolist() == pytest.approx([1 / 6, 1 / 4])
    flat[0, 5] = 1
    assert peak_points(flat, grid=(2, 3))[0, 0].tolist() == pytest.approx([5 / 6, 3 / 4])


def test_pointing_accuracy_counts_only_positive_measurable_pairs() -> None:
    distance = torch.tensor([[0.04, 0.2], [torch.nan, 0.09]])
    target = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert scored_pairs(distance, target).sum() == 2
    assert pointing_accuracy(distance, target, r=0.05).item() == 0.5
    assert pointing_accuracy(distance, target, r=0.1).item() == 1.0
    assert pointing_accuracy(distance, torch.full_like(target, torch.nan)).isnan()
    assert positive_mean(distance, target).item() == pytest.approx(0.065)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_pointing_in_mask_looks_up_the_pixel_under_the_peak(seed: int) -> None:
    c = case(seed)
    masks = c["masks"].clone()
    masks[0, 1] = False  # a hidden part
    got = pointing_in_mask(c["map_BNM"], grid=(3, 4), part_masks_BPHW=masks, part_mask_MP=c["part_mask_MP"])
    for b in range(3):
        for j in range(5):
            best = int(c["map_BNM"][b, :, j].argmax())
            y, x = int((best // 4 + 0.5) / 3 * 21), int((best % 4 + 0.5) / 4 * 30)
            own = masks[b][c["part_mask_MP"][j]]
            if own.any():
                assert got[b, j].item() == float(own[:, y, x].any())
            else:
                assert got[b, j].isnan()


def test_coverage_is_exact_where_patches_cut_pixels() -> None:
    mask = torch.rand(2, 7, 10, generator=torch.Generator().manual_seed(0)) > 0.5
    fine = mask.repeat_interleave(3, 1).repeat_interleave(4, 2).double()  # 21 x 40 pixels: a 3 x 4 grid cuts none of them
    expected = fine.view(2, 3, 7, 4, 10).mean((2, 4)).flatten(1)
    torch.testing.assert_close(coverage(mask, grid=(3, 4)), expected)
    torch.testing.assert_close(coverage(mask, grid=(7, 10)), mask.double().flatten(1))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_relevance_mass_is_a_share_and_a_uniform_map_gets_the_area(seed: int, scale: float) -> None:
    c = case(seed)
    c["map_BNM"] = c["map_BNM"].double()
    c["map_BNM"][:, 0] = c["map_BNM"][:, 0].abs() + 0.01  # some mass in every map
    mask = c["masks"][:, 0]
    share = relevance_mass(c["map_BNM"], grid=(3, 4), mask_BHW=mask)
    rest = relevance_mass(c["map_BNM"], grid=(3, 4), mask_BHW=~mask)
    torch.testing.assert_close(share + rest, torch.ones_like(share))
    torch.testing.assert_close(relevance_mass(scale * c["map_BNM"], grid=(3, 4), mask_BHW=mask), share)
    uniform = relevance_mass(torch.ones(3, 12, 2), grid=(3, 4), mask_BHW=mask)
    torch.testing.assert_close(uniform, mask.double().mean((1, 2))[:, None].expand(3, 2))
    positive = c["map_BNM"].double().clamp(min=0)
    inside = coverage(mask, grid=(3, 4))
    for b in range(3):
        for j in range(5):
            by_hand = sum(positive[b, i, j] * inside[b, i] for i in range(12)) / positive[b, :, j].sum()
            assert share[b, j].item() == pytest.approx(float(by_hand), abs=1e-9)


def test_relevance_mass_is_undefined_without_mass_or_mask() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0] = True
    maps = torch.ones(2, 4, 2)
    maps[0, :, 1] = -1
    got = relevance_mass(maps, grid=(2, 2), mask_BHW=mask)
    assert got[0, 0].item() == 0.25
    assert got.isnan().tolist() == [[False, True], [True, True]]


def test_part_relevance_mass_takes_the_union_of_each_concepts_parts() -> None:
    c = case(3)
    got = part_relevance_mass(c["map_BNM"], grid=(3, 4), part_masks_BPHW=c["masks"], part_mask_MP=c["part_mask_MP"])
    for j in range(5):
        if not c["part_mask_MP"][j].any():
            assert got[:, j].isnan().all()
            continue
        union = c["masks"][:, c["part_mask_MP"][j]].any(1)
        torch.testing.assert_close(got[:, j], relevance_mass(c["map_BNM"], grid=(3, 4), mask_BHW=union)[:, j])


def test_relevance_rank_is_one_for_the_mask_itself_and_counts_hits_among_the_top() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, :3] = True  # three patches of a 4 x 4 grid
    own = coverage(mask, grid=(4, 4))[..., None]
    assert relevance_rank(own, grid=(4, 4), mask_BHW=mask).item() == 1
    two_of_three = torch.zeros(1, 16, 1)
    two_of_three[0, [0, 1, 9], 0] = torch.tensor([3.0, 2.0, 5.0])
    assert relevance_rank(two_of_three, grid=(4, 4), mask_BHW=mask).item() == pytest.approx(2 / 3)
    assert relevance_rank(-own, grid=(4, 4), mask_BHW=mask).item() == 0
    assert relevance_rank(own, grid=(4, 4), mask_BHW=torch.zeros_like(mask)).isnan().all()
    small = torch.zeros(1, 8, 8, dtype=torch.bool)
    small[0, 0, 0] = True  # a quarter of one patch: the best patch still scores 1
    assert relevance_rank(coverage(small, grid=(4, 4))[..., None], grid=(4, 4), mask_BHW=small).item() == 1


def test_relevance_rank_of_tied_patches_is_that_of_a_random_order() -> None:
    # Rows 1 to 3 and 10 to 12 of a 14 x 14 grid: a map with one high patch says as little of the one as of the other.
    one_hot = torch.zeros(1, 196, 1)
    one_hot[0, 100] = 1.0
    for top in (1, 10):
        mask = torch.zeros(1, 14, 14, dtype=torch.bool)
        mask[0, top : top + 3, 2:6] = True
        assert relevance_rank(one_hot, grid=(14, 14), mask_BHW=mask).item() == pytest.approx(11 / 12 * 12 / 195)
        assert relevance_rank(torch.zeros(1, 196, 1), grid=(14, 14), mask_BHW=mask).item() == pytest.approx(12 / 196)
    g = torch.Generator().manual_seed(0)
    coarse, mask = torch.randint(0, 3, (2, 30, 4), generator=g).float(), torch.rand(2, 5, 6, generator=g) > 0.6
    drawn = [relevance_rank(coarse + 0.1 * torch.rand(2, 30, 4, generator=g), grid=(5, 6), mask_BHW=mask) for _ in range(2000)]
    torch.testing.assert_close(torch.stack(drawn).mean(0), relevance_rank(coarse, grid=(5, 6), mask_BHW=mask), atol=0.02, rtol=0)


def test_the_prior_scores_the_same_for_every_concept_and_permutation_permutes() -> None:
    c = case(1)
    theta = c["map_BNM"][..., 0].softmax(1)
    maps = prior_map(theta, num_concepts=5)
    mass = relevance_mass(maps, grid=(3, 4), mask_BHW=c["masks"][:, 0])
    torch.testing.assert_close(mass, mass[:, :1].expand(-1, 5))
    order = torch.tensor([4, 2, 0, 1, 3])
    arguments = {"points_BP3": c["points_BP3"], "size_B2": c["size_B2"], "grid": (3, 4)}
    plain = pointing_distance(c["map_BNM"], part_mask_MP=c["part_mask_MP"], **arguments)
    moved = pointing_distance(c["map_BNM"][..., order], part_mask_MP=c["part_mask_MP"][order], **arguments)
    torch.testing.assert_close(moved, plain[:, order], equal_nan=True)


def test_concepts_without_parts_are_undefined_even_if_the_data_set_has_no_parts_at_all() -> None:
    got = pointing_distance(
        torch.rand(2, 4, 3), grid=(2, 2), points_BP3=torch.zeros(2, 0, 3), part_mask_MP=torch.zeros(3, 0, dtype=torch.bool),
        size_B2=torch.full((2, 2), 10),
    )  # fmt: skip
    assert got.isnan().all()


def test_bad_maps_and_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 x 3 needs \(B, 6, M\)"):
        peak_points(torch.zeros(1, 5, 2), grid=(2, 3))
    broken = torch.zeros(2, 6, 2)
    broken[1, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="picture 1, concept 1 holds NaN"):
        relevance_mass(broken, grid=(2, 3), mask_BHW=torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 concepts and 4 parts"):
        pointing_in_mask(torch.zeros(1, 6, 2), grid=(2, 3), part_masks_BPHW=torch.ones(1, 4, 8, 8), part_mask_MP=torch.ones(3, 4))
    with pytest.raises(ValueError, match="1 pictures need"):
        distance_to_parts(torch.zeros(1, 2, 2), points_BP3=torch.zeros(2, 4, 3), part_mask_MP=torch.ones(2, 4), size_B2=torch.ones(1, 2))
    with pytest.raises(ValueError, match="both must be"):
        pointing_accuracy(torch.zeros(2, 3), torch.zeros(3, 2))
