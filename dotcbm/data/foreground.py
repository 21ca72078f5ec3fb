"""What a frozen encoder itself takes for the foreground: the patches whose features are long.

No mask is read and nothing is trained, so it serves where nobody has drawn masks. The cut is a rough one: it finds the thing
that stands out, with a margin of about a patch.

B pictures; N patches of a grid; H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dotcbm.transport.priors import neighbour_mean

__all__ = ["predicted_foregrounds"]

_CUT = 0.8  # deviations above a picture's mean from which a place counts as foreground; of 0.3 to 1.4 among the best on birds (IoU 0.47)
_FLAT = 1e-6  # share of the mean: norms that deviate less differ by rounding alone


def predicted_foregrounds(norm_BN: Tensor, *, grid: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Tensor | None]:
    """Where pictures show what stands out to an encoder.

    The norms are averaged over 3 x 3 neighbouring patches (at an edge over those that exist), standardised in the picture,
    upsampled bicubically to the picture's size and cut at 0.8 deviations; at the median where that leaves nothing or all.

    Args:
        norm_BN: (B, N) norms of the patch features, not negative. The grid covers the whole picture.
        grid: (grid_h, grid_w) with grid_h * grid_w = N.
        sizes: B times (height, width) in pixels.

    Returns:
        B masks (H, W) bool with both values in each; None for a picture in which nothing stands out.

    Raises:
        ValueError: A grid or a number of sizes that does not fit the norms.
    """
    if norm_BN.ndim != 2 or norm_BN.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"the norms are {tuple(norm_BN.shape)}; expected (B, {grid[0] * grid[1]}) for the grid {grid}")
    if len(sizes) != len(norm_BN):
        raise ValueError(f"there are norms of {len(norm_BN)} pictures and sizes of {len(sizes)}; give one size for each picture")
    smooth_BN = neighbour_mean(norm_BN.double(), grid, side=3)
    mean_B, deviation_B = smooth_BN.mean(1), smooth_BN.std(1, correction=0)
    masks: list[Tensor | None] = []
    for smooth_N, mean, deviation, size in zip(smooth_BN, mean_B, deviation_B, sizes, strict=True):
        if deviation <= _FLAT * mean:
            masks.append(None)
            continue
        standard_hw = ((smooth_N - mean) / deviation).view(*grid).float()
        map_HW = F.interpolate(standard_hw[None, None], size=size, mode="bicubic", align_corners=False)[0, 0]
        cuts = (map_HW > _CUT, map_HW > map_HW.median())
        masks.append(next((mask_HW for mask_HW in cuts if mask_HW.any() and not mask_HW.all()), None))
    return masks
