"""Metrics of places and of robustness over batches and over ranks: torchmetrics classes, as in `dotcbm.metrics.accumulators`.

This file needs torchmetrics (`pip install "dotcbm[train]"`); the functions that it calls do not. Shares of right boxes, background
shares, relevance mass and rank are means over pairs: take `dotcbm.metrics.accumulators.PositiveMean` for them.

B pictures, M concepts, S groups of parts, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dotcbm.metrics.detection import THRESHOLDS, Detections, PartGroups, PartScores, detect, part_detection
from dotcbm.metrics.localization import scored_pairs
from dotcbm.metrics.robustness import background_share

__all__ = ["AccuracyGap", "BackgroundShare", "CorrectParts", "DetectionSweep", "OcclusionDrop", "PartDetection"]


class PartDetection(Metric):
    """Mean over groups of parts of the average precision of `dotcbm.metrics.detection.part_detection`.

    Keeps every detection, since ranks need them all: 17 bytes * pictures * groups.

    Args:
        groups: Of the vocabulary.
        iou: A box is right at this IoU and above.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score: list[Tensor]
    iou: list[Tensor]
    visible: list[Tensor]

    def __init__(self, groups: PartGroups, *, iou: float = 0.5) -> None:
        super().__init__()
        self.groups = groups
        self.right_at = iou
        for name in ("score", "iou", "visible"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, detections: Detections) -> None:
        """Take the detections of a batch (`dotcbm.metrics.detection.detect`)."""
        self.score.append(detections.score_BS.double())
        self.iou.append(detections.iou_BS.double())
        self.visible.append(detections.visible_BS)

    def compute(self) -> Tensor:
        """A scalar; NaN if no part is ever visible."""
        return torch.tensor(self._scores().mean_average_precision, dtype=torch.float64)

    def per_part(self) -> PartScores:
        """The figures of each group, on this rank's pictures."""
        return self._scores()

    def _scores(self) -> PartScores:
        if not len(self.score):
            nothing = torch.zeros(0, len(self.groups))
            return part_detection(Detections(nothing, nothing, nothing > 0), self.groups, iou=self.right_at)
        detections = Detections(dim_zero_cat(self.score), dim_zero_cat(self.iou), dim_zero_cat(self.visible))
        return part_detection(detections, self.groups, iou=self.right_at)


class DetectionSweep(Metric):
    """(T, 2) `dotcbm.metrics.detection.sweep`: mean average precision and share of right boxes at each threshold.

    Args:
        groups: Of the vocabulary.
        thresholds: T shares of the maximum.
        iou: A box is right at this IoU and above.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score: list[Tensor]
    iou: list[Tensor]
    visible: list[Tensor]

    def __init__(self, groups: PartGroups, *, thresholds: Sequence[float] = THRESHOLDS, iou: float = 0.5) -> None:
        super().__init__()
        self.groups = groups
        self.thresholds = tuple(thresholds)
        self.right_at = iou
        for name in ("score", "iou", "visible"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, map_BNM: Tensor, probability_BM: Tensor, *, grid: tuple[int, int], part_box_BP4: Tensor) -> None:
        """Take the maps of a batch; arguments as in `dotcbm.metrics.detection.detect`."""
        found = [
            detect(map_BNM, probability_BM, grid=grid, part_box_BP4=part_box_BP4, groups=self.groups, threshold=threshold)
            for threshold in self.thresholds
        ]
        self.score.append(torch.stack([each.score_BS.double() for each in found], 1))
        self.iou.append(torch.stack([each.iou_BS for each in found], 1))
        self.visible.append(torch.stack([each.visible_BS for each in found], 1))

    def compute(self) -> Tensor:
        """(T, 2); NaN if no part is ever visible."""
        if not len(self.score):
            return torch.full((len(self.thresholds), 2), torch.nan, dtype=torch.float64)
        score_BTS, iou_BTS, visible_BTS = (dim_zero_cat(state) for state in (self.score, self.iou, self.visible))
        rows = [
            part_detection(Detections(score_BTS[:, t], iou_BTS[:, t], visible_BTS[:, t]), self.groups, iou=self.right_at)
            for t in range(len(self.thresholds))
        ]
        return torch.tensor([[row.mean_average_precision, row.share_correct] for row in rows], dtype=torch.float64)


class CorrectParts(Metric):
    """`dotcbm.metrics.detection.pcp` as a share: the mean over groups of parts of the mean over their pictures.

    Args:
        num_groups: S.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total_S: Tensor
    count_S: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("total_S", default=torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count_S", default=torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct_BS: Tensor) -> None:
        """Take (B, S) from `dotcbm.metrics.detection.correct_parts`, NaN where a part is not visible."""
        self.total_S += correct_BS.double().nansum(0)
        self.count_S += (~correct_BS.isnan()).sum(0)

    def compute(self) -> Tensor:
        """A scalar; NaN if no part is ever visible."""
        return (self.total_S / torch.where(self.count_S > 0, self.count_S, torch.nan)).nanmean()


class BackgroundShare(Metric):
    """Mean of `dotcbm.metrics.robustness.background_share` over the pairs of picture and concept with target 1.

    Args:
        grid: (grid_h, grid_w) of the maps.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    num_pairs: Tensor

    def __init__(self, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_pairs", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, map_BNM: Tensor, target_BM: Tensor, foreground_BHW: Tensor) -> None:
        """Take maps, targets in {0, 1, NaN}, and masks of the object."""
        share_BM = background_share(map_BNM, grid=self.grid, foreground_BHW=foreground_BHW)
        scored_BM = scored_pairs(share_BM, target_BM)
        self.total += share_BM[scored_BM].sum()
        self.num_pairs += scored_BM.sum()

    def compute(self) -> Tensor:
        """A scalar in [0, 1]; NaN if no pair counts."""
        return self.total / self.num_pairs


class AccuracyGap(Metric):
    """Accuracy in distribution minus out of it, from pictures of both in any order."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    hit_2: Tensor
    count_2: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hit_2", default=torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count_2", default=torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct_B: Tensor, outside_B: Tensor) -> None:
        """Take (B,) bool: class predicted correctly, and picture out of distribution."""
        self.hit_2 += torch.bincount(outside_B[correct_B.bool()].long(), minlength=2)
        self.count_2 += torch.bincount(outside_B.long(), minlength=2)

    def compute(self) -> Tensor:
        """A scalar in [-1, 1]; NaN before there is a picture of both."""
        share_2 = self.hit_2 / torch.where(self.count_2 > 0, self.count_2, torch.nan)
        return share_2[0] - share_2[1]


class OcclusionDrop(Metric):
    """Mean of `dotcbm.metrics.faithfulness.occlusion_drop` of the concept's own region minus that of the random one."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    num_pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_pairs", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, drop_X: Tensor, random_drop_X: Tensor) -> None:
        """Take the drops of the same pairs; those for which either is NaN are left out."""
        difference_X = drop_X.double() - random_drop_X.double()
        self.total += difference_X.nansum()
        self.num_pairs += (~difference_X.isnan()).sum()

    def compute(self) -> Tensor:
        """A scalar in [-2, 2]; NaN if no pair counts."""
        return self.total / self.num_pairs
