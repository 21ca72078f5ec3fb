"""The same numbers over batches and over ranks: torchmetrics classes whose states add up or concatenate.

Before the first picture they are NaN, and an empty batch changes nothing. Where states concatenate, every rank must have seen a batch,
as `dotcbm.data.batches.EpochSampler` sees to: torchmetrics leaves a rank without one out of the gathering, which the others wait for.

This file needs torchmetrics (`pip install "dotcbm[train]"`); the functions that it calls do not.
B pictures, N patches, M concepts, K classes, G sub-populations, S confidence bins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dotcbm.metrics.classes import calibration_bins, predicted_correctly
from dotcbm.metrics.concepts import concept_auroc, concept_average_precision, concept_f1, count_errors, macro_average
from dotcbm.metrics.localization import scored_pairs

__all__ = [
    "BalancedAccuracy",
    "CalibrationError",
    "ClassAccuracy",
    "ConceptAUROC",
    "ConceptAveragePrecision",
    "ConceptError",
    "ConceptF1",
    "GroupAccuracy",
    "PointingAccuracy",
    "PositiveMean",
    "WorstGroupAccuracy",
]


class _ConceptScores(Metric, ABC):
    """Keeps every score, since ranks need them all: 4 bytes * pictures * concepts * 2."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("score", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, score_BM: Tensor, target_BM: Tensor) -> None:
        """Take a batch of scores and of targets in {0, 1, NaN}."""
        self.score.append(score_BM.detach())
        self.target.append(target_BM.detach())

    def compute(self) -> Tensor:
        """The mean over the concepts that vary."""
        return macro_average(self.per_concept()) if len(self.score) else torch.tensor(torch.nan)

    def per_concept(self) -> Tensor:
        """(M,) the figure of each concept on this rank's pictures, NaN where it does not vary."""
        return self._formula(dim_zero_cat(self.score), dim_zero_cat(self.target))

    @abstractmethod
    def _formula(self, score_NM: Tensor, target_NM: Tensor) -> Tensor: ...


class ConceptAUROC(_ConceptScores):
    """`dotcbm.metrics.concepts.macro_auroc`."""

    def _formula(self, score_NM: Tensor, target_NM: Tensor) -> Tensor:
        return concept_auroc(score_NM, target_NM)


class ConceptAveragePrecision(_ConceptScores):
    """`dotcbm.metrics.concepts.macro_average_precision`."""

    def _formula(self, score_NM: Tensor, target_NM: Tensor) -> Tensor:
        return concept_average_precision(score_NM, target_NM)


class ConceptF1(_ConceptScores):
    """`dotcbm.metrics.concepts.macro_f1` of probabilities at 0.5."""

    def _formula(self, score_NM: Tensor, target_NM: Tensor) -> Tensor:
        return concept_f1(score_NM, target_NM)


class ConceptError(Metric):
    """Mean over concepts of `dotcbm.metrics.concepts.concept_error`.

    Args:
        num_concepts: M.
        threshold: A concept is said to be there above it.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    wrong_M: Tensor
    known_M: Tensor

    def __init__(self, num_concepts: int, *, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("wrong_M", default=torch.zeros(num_concepts, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("known_M", default=torch.zeros(num_concepts, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probability_BM: Tensor, target_BM: Tensor) -> None:
        """Take a batch of probabilities and of targets in {0, 1, NaN}."""
        wrong_M, known_M = count_errors(probability_BM, target_BM, threshold=self.threshold)
        self.wrong_M += wrong_M
        self.known_M += known_M

    def compute(self) -> Tensor:
        """The mean over the concepts with a known label."""
        return (self.wrong_M / torch.where(self.known_M > 0, self.known_M, torch.nan)).nanmean()


class GroupAccuracy(Metric):
    """`dotcbm.metrics.classes.group_accuracy`: (G,) accuracy within each sub-population, NaN where it has no picture.

    Args:
        num_groups: G.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    hit_G: Tensor
    count_G: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.add_state("hit_G", default=torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count_G", default=torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, score_BK: Tensor, label_B: Tensor, group_B: Tensor) -> None:
        """Take a batch of class scores, labels, and numbers of sub-populations.

        Raises:
            ValueError: A group out of range, or scores and labels that do not fit.
        """
        if len(group_B) and (group_B.min() < 0 or group_B.max() >= self.num_groups):
            raise ValueError(
                f"group numbers run from {int(group_B.min())} to {int(group_B.max())}; num_groups={self.num_groups} needs "
                f"[0, {self.num_groups})"
            )
        if not len(label_B):
            return
        correct_B = predicted_correctly(score_BK, label_B)
        self.hit_G += torch.bincount(group_B[correct_B], minlength=self.num_groups)
        self.count_G += torch.bincount(group_B, minlength=self.num_groups)

    def compute(self) -> Tensor:
        """(G,)."""
        return self._per_group()

    def _per_group(self) -> Tensor:
        return self.hit_G / torch.where(self.count_G > 0, self.count_G, torch.nan)


class WorstGroupAccuracy(GroupAccuracy):
    """`dotcbm.metrics.classes.worst_group_accuracy`: the lowest accuracy among the sub-populations seen."""

    def compute(self) -> Tensor:
        """A scalar; NaN before the first picture."""
        per_group_G = self._per_group()
        seen_G = per_group_G[~per_group_G.isnan()]
        return seen_G.min() if len(seen_G) else per_group_G.new_tensor(torch.nan)


class _ClassCounts(Metric, ABC):
    """Hits and pictures by class: what plain and balanced accuracy are made of."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    hit_K: Tensor
    count_K: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("hit_K", default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count_K", default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, score_BK: Tensor, label_B: Tensor) -> None:
        """Take a batch of class scores and labels."""
        if not len(label_B):
            return
        correct_B = predicted_correctly(score_BK, label_B)
        self.hit_K += torch.bincount(label_B[correct_B], minlength=self.num_classes)
        self.count_K += torch.bincount(label_B, minlength=self.num_classes)


class ClassAccuracy(_ClassCounts):
    """`dotcbm.metrics.classes.accuracy`."""

    def compute(self) -> Tensor:
        """A scalar; NaN before the first picture."""
        return self.hit_K.sum() / self.count_K.sum()


class BalancedAccuracy(_ClassCounts):
    """`dotcbm.metrics.classes.balanced_accuracy`: the mean recall of the classes that have pictures."""

    def compute(self) -> Tensor:
        """A scalar; NaN before the first picture."""
        return (self.hit_K / torch.where(self.count_K > 0, self.count_K, torch.nan)).nanmean()


class CalibrationError(Metric):
    """`dotcbm.metrics.classes.calibration_error`.

    Args:
        num_bins: S, bins of equal width over [0, 1].
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    gap_S: Tensor
    count: Tensor

    def __init__(self, *, num_bins: int = 15) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.add_state("gap_S", default=torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probability_BK: Tensor, label_B: Tensor) -> None:
        """Take a batch of class probabilities and labels."""
        if not len(label_B):
            return
        self.gap_S += calibration_bins(probability_BK, label_B, num_bins=self.num_bins)
        self.count += len(label_B)

    def compute(self) -> Tensor:
        """A scalar in [0, 1]; NaN before the first picture."""
        return self.gap_S.abs().sum() / self.count


class PositiveMean(Metric):
    """`dotcbm.metrics.localization.positive_mean`: for distances, hits in masks, relevance mass and rank.

    `num_pairs` after an epoch is the n to report.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    num_pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_pairs", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, value_BM: Tensor, target_BM: Tensor) -> None:
        """Take (B, M) values, NaN where undefined, and concept targets in {0, 1, NaN}; only ones count."""
        scored_BM = scored_pairs(value_BM, target_BM)
        self.total += value_BM[scored_BM].double().sum()
        self.num_pairs += scored_BM.sum()

    def compute(self) -> Tensor:
        """A scalar; NaN if no pair counts."""
        return self.total / self.num_pairs


class PointingAccuracy(PositiveMean):
    """`dotcbm.metrics.localization.pointing_accuracy` of distances.

    Args:
        r: Radius as a share of the picture's diagonal.
    """

    higher_is_better = True

    def __init__(self, *, r: float = 0.1) -> None:
        super().__init__()
        self.r = r

    def update(self, value_BM: Tensor, target_BM: Tensor) -> None:
        """Take (B, M) distances from `pointing_distance`, and concept targets in {0, 1, NaN}."""
        super().update(torch.where(value_BM.isnan(), torch.nan, (value_BM <= self.r).double()), target_BM)
