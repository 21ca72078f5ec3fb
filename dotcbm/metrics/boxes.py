"""Boxes: from maps, from masks, around points, and how much two of them overlap.

B pictures, N patches (grid_h * grid_w, row by row), M concepts, P parts, X anything, H W pixels. A box is x0, y0, x1, y1 in
fractions of the picture; NaN where there is none. Overlap of boxes is the same in fractions as in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.metrics.localization import peak_points

__all__ = ["box_iou", "boxes_around_points", "map_boxes", "part_boxes"]


def map_boxes(map_BNM: Tensor, *, grid: tuple[int, int], threshold: float = 0.6) -> Tensor:
    """(B, M, 4) float64: the one box around all patches of at least `threshold` times a map's maximum.

    As `dotcbm.explain.heatmaps.box`, for many maps at once.

    Args:
        map_BNM: (B, N, M).
        grid: (grid_h, grid_w) of the map.
        threshold: Share of the maximum in (0, 1]; the paper's is 0.6.

    Returns:
        NaN for a map that is nowhere positive.

    Raises:
        ValueError: A threshold out of range, or a map that does not fit the grid or holds NaN.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}: it is a share of the map's maximum")
    peak_points(map_BNM[:, :, :1], grid=grid)  # for its check of the shape
    highest_BM = map_BNM.amax(1)
    if highest_BM.isnan().any():
        picture, concept = highest_BM.isnan().nonzero()[0].tolist()
        raise ValueError(f"the map of picture {picture}, concept {concept} holds NaN; the model that made it has diverged")
    hot_BHWM = (map_BNM >= threshold * highest_BM[:, None]).unflatten(1, grid)
    box_BM4 = _enclosing(hot_BHWM.any(2).transpose(1, 2), hot_BHWM.any(1).transpose(1, 2))
    return torch.where((highest_BM > 0)[..., None], box_BM4, torch.nan)


def part_boxes(part_masks_BPHW: Tensor) -> Tensor:
    """(B, P, 4) float64: the box around each mask, NaN for an empty one (a part that cannot be seen)."""
    masks_BPHW = part_masks_BPHW.bool()
    return _enclosing(masks_BPHW.any(3), masks_BPHW.any(2))


def boxes_around_points(point_BX2: Tensor, *, box_B4: Tensor, divisor: float = 1.4) -> Tensor:
    """(B, X, 4) float64: boxes centred at points, of the object's width and height divided by `divisor`.

    Near the border a box is moved inside the picture and not cut, as in the released code of Xu et al. 2020.

    Args:
        point_BX2: (B, X, 2) x and y; NaN gives NaN.
        box_B4: (B, 4) box of the object.
        divisor: 1.4 in our protocol (`dotcbm.metrics.detection.correct_parts`).

    Raises:
        ValueError: A divisor below 1, for which a box may not fit into the picture.
    """
    if divisor < 1:
        raise ValueError(f"divisor is {divisor}; below 1 the boxes of parts would be larger than the object")
    size_B12 = ((box_B4[:, 2:] - box_B4[:, :2]).double() / divisor)[:, None]
    corner_BX2 = torch.minimum(point_BX2.double() - size_B12 / 2, 1 - size_B12).clamp(min=0)
    return torch.cat([corner_BX2, corner_BX2 + size_B12], -1)


def box_iou(a_X4: Tensor, b_X4: Tensor) -> Tensor:
    """Area of intersection over area of union, in [0, 1]; NaN where either box is NaN, 0 for boxes without area.

    Args:
        a_X4: (..., 4).
        b_X4: (..., 4); the leading dimensions broadcast.
    """
    low, high = torch.maximum(a_X4[..., :2], b_X4[..., :2]), torch.minimum(a_X4[..., 2:], b_X4[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    either = (a_X4[..., 2:] - a_X4[..., :2]).prod(-1) + (b_X4[..., 2:] - b_X4[..., :2]).prod(-1) - both
    return both / either.clamp(min=torch.finfo(either.dtype).tiny)


def _enclosing(row_XH: Tensor, column_XW: Tensor) -> Tensor:
    """(..., 4) box around the rows and columns that are True; NaN where none is."""
    (y0, y1), (x0, x1) = _first_and_last(row_XH), _first_and_last(column_XW)
    box_X4 = torch.stack([x0, y0, x1, y1], -1)
    return torch.where(row_XH.any(-1)[..., None], box_X4, torch.nan)


def _first_and_last(true_XL: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first True begins and the last one ends, as fractions of the length."""
    length = true_XL.shape[-1]
    place_L = torch.arange(length, dtype=torch.float64, device=true_XL.device)
    return torch.where(true_XL, place_L, length).amin(-1) / length, torch.where(true_XL, place_L + 1, 0.0).amax(-1) / length
