"""What a model loses when the surroundings change, and how much of its maps lies there. Worst groups: `dotcbm.metrics.classes`.

B pictures of a batch, N patches of a map (or pictures of a split, for accuracies), M concepts, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.metrics.intervals import Interval, newcombe, paired_bootstrap
from dotcbm.metrics.localization import relevance_mass

__all__ = ["background_area", "background_share", "independent_gap", "paired_gap"]


def background_share(map_BNM: Tensor, *, grid: tuple[int, int], foreground_BHW: Tensor) -> Tensor:
    """(B, M) in [0, 1]: share of each map's positive mass outside the object.

    Args:
        map_BNM: (B, N, M); negative values count as zero.
        grid: (grid_h, grid_w) of the map.
        foreground_BHW: (B, H, W) bool mask of the object, averaged over each patch's area.

    Returns:
        NaN where the map has no positive mass or the mask is empty. A uniform map gets `background_area`, the chance level.

    Raises:
        ValueError: Shapes do not fit, or the map holds NaN.
    """
    return 1 - relevance_mass(map_BNM, grid=grid, mask_BHW=foreground_BHW)


def background_area(foreground_BHW: Tensor) -> Tensor:
    """(B,) in [0, 1): share of the picture outside the object; NaN where the mask is empty (the object is not known)."""
    area_B = foreground_BHW.double().mean((1, 2))
    return torch.where(area_B > 0, 1 - area_B, torch.nan)


def paired_gap(
    correct_in_N: Tensor, correct_out_N: Tensor, *, num_draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:  # fmt: skip
    """Accuracy in distribution minus out of it, for the same objects with other surroundings, row by row.

    Args:
        correct_in_N: (N,) bool: class predicted correctly in distribution; NaN in a float tensor leaves the row out.
        correct_out_N: (N,) the same out of distribution.
        num_draws, level, seed: Of the bootstrap over pictures.

    Returns:
        Gap in [-1, 1] and the ends of its interval.

    Raises:
        ValueError: The rows do not fit.
    """
    return paired_bootstrap(correct_in_N.double(), correct_out_N.double(), num_draws=num_draws, level=level, seed=seed)


def independent_gap(correct_in_N: Tensor, correct_out_X: Tensor, *, level: float = 0.95) -> Interval:
    """`paired_gap` for splits of different pictures: bool (N,) and (X,), interval of Newcombe 1998."""
    inside, outside = correct_in_N.bool(), correct_out_X.bool()
    return newcombe(int(inside.sum()), len(inside), int(outside.sum()), len(outside), level=level)
