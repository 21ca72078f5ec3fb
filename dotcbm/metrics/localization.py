"""Does a concept's map look at the concept's part? Peaks against key points and masks, and shares of relevance.

B pictures, N patches (grid_h * grid_w, row by row), M concepts, P parts, H W pixels. All points are fractions of the picture.

**The peak** is the centre of the patch with the highest value, the first one in row order among equals (so a flat map points
at the top left corner and gains nothing). Bilinear upsampling adds nothing to it: interpolated values never exceed their
neighbours, so the maximum stays at the centre of the highest patch, unless the pixels miss that centre and a patch of almost
the same value wins by chance. So figures are taken from the patch grid; to measure another upsampling, hand in the upsampled
map with its own, finer grid.

A value is NaN where nothing can be measured: the concept has no part, or none of its parts is visible in the picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "coverage",
    "distance_to_parts",
    "part_relevance_mass",
    "peak_points",
    "pointing_accuracy",
    "pointing_distance",
    "pointing_in_mask",
    "positive_mean",
    "prior_map",
    "relevance_mass",
    "relevance_rank",
    "scored_pairs",
]


def peak_points(map_BNM: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """(B, M, 2): x and y, as fractions of the picture, of the centre of each map's highest patch.

    Raises:
        ValueError: The map does not fit the grid, or holds NaN.
    """
    _check_map(map_BNM, grid)
    best_BM = map_BNM.argmax(1)
    row_BM, column_BM = best_BM // grid[1], best_BM % grid[1]
    return torch.stack([(column_BM + 0.5) / grid[1], (row_BM + 0.5) / grid[0]], -1)


def distance_to_parts(point_BM2: Tensor, *, points_BP3: Tensor, part_mask_MP: Tensor, size_B2: Tensor) -> Tensor:
    """Distance from a point to the nearest visible key point of a concept's parts, in diagonals of the original picture.

    With `point_BM2` at (0.5, 0.5) this is the centre-of-the-picture control.

    Args:
        point_BM2: (B, M, 2) x and y as fractions.
        points_BP3: (B, P, 3) x and y as fractions, and visible in {0, 1}.
        part_mask_MP: (M, P) bool: which parts a concept can be seen on (`ConceptSet.part_mask_MP`).
        size_B2: (B, 2) height and width of the original picture in pixels.

    Returns:
        (B, M) in [0, 1] for points inside the picture, NaN where no part of the concept is visible.

    Raises:
        ValueError: Shapes do not fit.
    """
    b, m = point_BM2.shape[:2]
    _check_parts(part_mask_MP, m, points_BP3.shape[1])
    if points_BP3.shape[0] != b or points_BP3.shape[2] != 3 or tuple(size_B2.shape) != (b, 2):
        raise ValueError(
            f"points_BP3 has shape {tuple(points_BP3.shape)} and size_B2 {tuple(size_B2.shape)}; {b} pictures need ({b}, P, 3) and ({b}, 2)"
        )
    point_BM2 = point_BM2.double()
    device = point_BM2.device
    points_BP3, height_width_B2 = points_BP3.to(device).double(), size_B2.to(device).double()
    width_height_B2 = height_width_B2.flip(1)
    counts_BMP = (points_BP3[..., 2] > 0.5)[:, None] & part_mask_MP.to(device)[None]
    # Invisible points may carry any coordinates, NaN among them.
    xy_BP2 = torch.where(points_BP3[..., 2:] > 0.5, points_BP3[..., :2], 0.0) * width_height_B2[:, None]
    distance_BMP = torch.cdist(point_BM2 * width_height_B2[:, None], xy_BP2, compute_mode="donot_use_mm_for_euclid_dist")
    nearest_BM = (
        distance_BMP.masked_fill(~counts_BMP, torch.inf).amin(-1) if counts_BMP.shape[-1] else point_BM2.new_full((b, m), torch.inf)
    )
    nearest_BM = nearest_BM / width_height_B2.norm(dim=1)[:, None]
    return nearest_BM.masked_fill(nearest_BM.isinf(), torch.nan)


def pointing_distance(map_BNM: Tensor, *, grid: tuple[int, int], points_BP3: Tensor, part_mask_MP: Tensor, size_B2: Tensor) -> Tensor:
    """(B, M): `distance_to_parts` of each map's peak. See there for arguments, range and errors."""
    peak_BM2 = peak_points(map_BNM, grid=grid)
    return distance_to_parts(peak_BM2, points_BP3=points_BP3, part_mask_MP=part_mask_MP, size_B2=size_B2)


def scored_pairs(value_BM: Tensor, target_BM: Tensor) -> Tensor:
    """(B, M) bool: the pairs of picture and concept that count, namely target 1 and a defined value. Their sum is the n to report."""
    if value_BM.shape != target_BM.shape:
        raise ValueError(
            f"values have shape {tuple(value_BM.shape)} and targets {tuple(target_BM.shape)}; both must be (pictures, concepts)"
        )
    return (target_BM.to(value_BM.device) == 1) & ~value_BM.isnan()


def positive_mean(value_BM: Tensor, target_BM: Tensor) -> Tensor:
    """Mean of a value over the pairs of picture and concept that count (`scored_pairs`): 0-d float64, NaN if there is none."""
    return value_BM[scored_pairs(value_BM, target_BM)].double().mean()


def pointing_accuracy(distance_BM: Tensor, target_BM: Tensor, *, r: float = 0.1) -> Tensor:
    """Share of the positive, measurable pairs of picture and concept whose peak lies within `r` diagonals of the part.

    Args:
        distance_BM: (B, M) from `pointing_distance`.
        target_BM: (B, M) in {0, 1}, NaN where unknown; only ones count.
        r: Radius as a share of the picture's diagonal; the protocol asks for 0.01, 0.02, 0.05 and 0.1.

    Returns:
        A 0-d float64 tensor; NaN if no pair counts.
    """
    return positive_mean(torch.where(distance_BM.isnan(), torch.nan, (distance_BM <= r).double()), target_BM)


def pointing_in_mask(map_BNM: Tensor, *, grid: tuple[int, int], part_masks_BPHW: Tensor, part_mask_MP: Tensor) -> Tensor:
    """(B, M) 1 where a map's peak lies on a visible part of its concept, 0 where beside it, NaN where no part is visible.

    Args:
        map_BNM: (B, N, M).
        grid: (grid_h, grid_w) of the map.
        part_masks_BPHW: (B, P, H, W) bool masks of the visible parts; they cover the same picture as the map.
        part_mask_MP: (M, P) bool: which parts a concept can be seen on.

    Raises:
        ValueError: Shapes do not fit, or the map holds NaN.
    """
    b, m = map_BNM.shape[0], map_BNM.shape[2]
    _check_parts(part_mask_MP, m, part_masks_BPHW.shape[1])
    h, w = part_masks_BPHW.shape[2:]
    peak_BM2 = peak_points(map_BNM, grid=grid)
    masks_BPS = part_masks_BPHW.to(peak_BM2.device).bool().flatten(2)
    pixel_BM = (peak_BM2[..., 1] * h).long() * w + (peak_BM2[..., 0] * w).long()
    hit_BPM = masks_BPS.gather(2, pixel_BM[:, None].expand(b, masks_BPS.shape[1], m))
    belongs_PM = part_mask_MP.to(hit_BPM.device).T
    inside_BM = (hit_BPM & belongs_PM).any(1)
    visible_BM = (masks_BPS.any(2)[..., None] & belongs_PM).any(1)
    return torch.where(visible_BM, inside_BM.double(), torch.nan)


def coverage(mask_BHW: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """(B, N) float64 in [0, 1]: which share of each patch's area a mask covers; exact also where patches cut pixels."""
    mask_BHW = mask_BHW.double()
    rows_GH = _overlap(mask_BHW.shape[1], grid[0], mask_BHW)
    columns_GW = _overlap(mask_BHW.shape[2], grid[1], mask_BHW)
    return (rows_GH @ mask_BHW @ columns_GW.T).flatten(1)


def relevance_mass(map_BNM: Tensor, *, grid: tuple[int, int], mask_BHW: Tensor) -> Tensor:
    """Share of a map's mass that falls inside a mask (Arras et al. 2022, "relevance mass accuracy").

    Args:
        map_BNM: (B, N, M); negative values count as zero.
        grid: (grid_h, grid_w) of the map.
        mask_BHW: (B, H, W) bool, of the object for instance, averaged over each patch's area; or (B, grid_h, grid_w) with the shares of
            the patches that it covers.

    Returns:
        (B, M) float64 in [0, 1]; NaN where the map has no positive mass or the mask is empty. A uniform map gets the mask's
        share of the picture, which is the chance level to print beside it.

    Raises:
        ValueError: Shapes do not fit, or the map holds NaN.
    """
    _check_map(map_BNM, grid)
    return _mass_inside(map_BNM, coverage(mask_BHW.to(map_BNM.device), grid=grid)[..., None])


def part_relevance_mass(map_BNM: Tensor, *, grid: tuple[int, int], part_masks_BPHW: Tensor, part_mask_MP: Tensor) -> Tensor:
    """(B, M) float64: `relevance_mass` of each concept inside the union of its own visible parts; NaN where none is visible.

    Args:
        map_BNM: (B, N, M); negative values count as zero.
        grid: (grid_h, grid_w) of the map.
        part_masks_BPHW: (B, P, H, W) bool masks of the visible parts.
        part_mask_MP: (M, P) bool: which parts a concept can be seen on.
    """
    _check_map(map_BNM, grid)
    _check_parts(part_mask_MP, map_BNM.shape[2], part_masks_BPHW.shape[1])
    part_masks_BPHW = part_masks_BPHW.to(map_BNM.device).bool()
    # Many concepts share their parts (all bill shapes): one union for each distinct set.
    sets_SP, set_of_M = part_mask_MP.to(map_BNM.device).unique(dim=0, return_inverse=True)
    covered_BNS = torch.stack([coverage(part_masks_BPHW[:, row].any(1), grid=grid) for row in sets_SP], -1)
    return _mass_inside(map_BNM, covered_BNS[..., set_of_M])


def relevance_rank(map_BNM: Tensor, *, grid: tuple[int, int], mask_BHW: Tensor) -> Tensor:
    """How much of the mask the map's highest patches find (Arras et al. 2022, "relevance rank accuracy").

    The K highest patches, K the mask's area in patches (rounded, at least 1), are compared with the best K there are:
    covered area / largest area that K patches can cover. The paper counts pixels, which are in or out; patches are covered in
    part, hence the division. Where patches of equal value compete for the last places, each is counted with its chance in a random
    order, so that a map with few values (a maximum, a rectified gradient) gets no more and no less than it says.

    Args:
        map_BNM: (B, N, M).
        grid: (grid_h, grid_w) of the map.
        mask_BHW: (B, H, W) bool, or (B, grid_h, grid_w) with the shares of the patches that it covers.

    Returns:
        (B, M) float64 in [0, 1]; NaN where the mask is empty.

    Raises:
        ValueError: Shapes do not fit, or the map holds NaN.
    """
    _check_map(map_BNM, grid)
    covered_BN = coverage(mask_BHW.to(map_BNM.device), grid=grid)
    num_patches_B = covered_BN.sum(1).round().clamp(min=1)
    chosen_1N = torch.arange(covered_BN.shape[1], device=covered_BN.device)[None] < num_patches_B[:, None]
    best_B = (covered_BN.sort(1, descending=True).values * chosen_1N).sum(1)
    last_B1M = (num_patches_B.long() - 1)[:, None, None].expand(-1, 1, map_BNM.shape[2])
    least_B1M = map_BNM.sort(1, descending=True).values.gather(1, last_B1M)
    above_BNM, tied_BNM = (map_BNM > least_B1M).double(), (map_BNM == least_B1M).double()
    places_BM = num_patches_B[:, None] - above_BNM.sum(1)  # that the tied patches share
    found_BM = (covered_BN[..., None] * above_BNM).sum(1) + places_BM / tied_BNM.sum(1) * (covered_BN[..., None] * tied_BNM).sum(1)
    return found_BM / torch.where(best_B > 0, best_B, torch.nan)[:, None]


def prior_map(theta_BN: Tensor, *, num_concepts: int) -> Tensor:
    """(B, N, M): the patch prior as the map of every concept. What it scores is owed to the prior and not to the concepts."""
    return theta_BN[..., None].expand(-1, -1, num_concepts)


def _mass_inside(map_BNM: Tensor, covered_BNM: Tensor) -> Tensor:
    mass_BNM = map_BNM.double().clamp(min=0)
    total_BM = mass_BNM.sum(1)
    defined_BM = (total_BM > 0) & (covered_BNM.sum(1) > 0)
    return torch.where(defined_BM, (mass_BNM * covered_BNM).sum(1) / total_BM, torch.nan)


def _overlap(num_pixels: int, num_cells: int, like: Tensor) -> Tensor:
    """(cells, pixels): share of a cell's length that each pixel takes; rows sum to 1."""
    edge = torch.arange(num_pixels + 1, dtype=torch.float64, device=like.device) * (num_cells / num_pixels)
    cell = torch.arange(num_cells, dtype=torch.float64, device=like.device)[:, None]
    return (torch.minimum(edge[1:], cell + 1) - torch.maximum(edge[:-1], cell)).clamp(min=0)


def _check_map(map_BNM: Tensor, grid: tuple[int, int]) -> None:
    if map_BNM.ndim != 3 or map_BNM.shape[1] != math.prod(grid):
        raise ValueError(f"the map has shape {tuple(map_BNM.shape)}; a grid of {grid[0]} x {grid[1]} needs (B, {math.prod(grid)}, M)")
    if map_BNM.isnan().any():
        picture, _, concept = map_BNM.isnan().nonzero()[0].tolist()
        raise ValueError(f"the map of picture {picture}, concept {concept} holds NaN; the model that made it has diverged")


def _check_parts(part_mask_MP: Tensor, num_concepts: int, num_parts: int) -> None:
    if tuple(part_mask_MP.shape) != (num_concepts, num_parts):
        raise ValueError(
            f"part_mask_MP has shape {tuple(part_mask_MP.shape)}; {num_concepts} concepts and {num_parts} parts need "
            f"({num_concepts}, {num_parts})"
        )
