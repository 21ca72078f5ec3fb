"""Where each concept's mass lies, in three numbers, without the heatmap.

B pictures, N patches, M concepts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["HeatmapStatistics", "statistics_of_plan"]


class HeatmapStatistics(NamedTuple):
    """Of each concept's column of the plan. All zero for a concept without mass. Without gradient.

    Attributes:
        peak_BM: (B, M) int64, the patch that sends it most; the first of several.
        share_BM: (B, M) that patch's share of the concept's mass, in [1 / N, 1].
        spread_BM: (B, M) the effective number of patches, exp of the entropy of the shares, in [1, N].
    """

    peak_BM: Tensor
    share_BM: Tensor
    spread_BM: Tensor


@torch.no_grad()
def statistics_of_plan(plan_BNM: Tensor) -> HeatmapStatistics:
    """The statistics of (B, N, M) plans that are there."""
    mass_BM = plan_BNM.sum(1)
    most_BM, peak_BM = plan_BNM.max(1)
    present_BM = mass_BM > 0
    divisor_BM = mass_BM.where(present_BM, 1.0)
    entropy_BM = divisor_BM.log() - torch.special.xlogy(plan_BNM, plan_BNM).sum(1) / divisor_BM
    return HeatmapStatistics(
        peak_BM.where(present_BM, 0), (most_BM / divisor_BM).where(present_BM, 0.0), entropy_BM.exp().where(present_BM, 0.0)
    )
