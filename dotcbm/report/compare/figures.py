"""Figures that can be computed again from what a record says of each picture, in every bootstrap draw.

Only a figure that is recomputed can be paired: its key says what it measures, and the value computed here must be the record's, or it
is not trusted and stays unpaired.

n pictures, M concepts, K classes, D draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dotcbm.report.compare.pairing import Answers, Overlay
from dotcbm.report.compare.statistics import auroc_draws, group_draws, mean_draws
from dotcbm.report.record import Unit

__all__ = ["MEASURES", "Draws", "Measure", "measure_of"]

_BINS = 15  # of the calibration error: Guo et al. 2017, as `dotcbm.metrics.classes`


@dataclass
class Draws:
    """What is computed once for a model and all its figures.

    Attributes:
        overlay, answers: Of the pictures and of the model.
        count_nD: The shared draws; a single column of ones gives the figure itself.
        auroc_DM, error_DM: (D, M) float64, NaN where not defined.
    """

    overlay: Overlay
    answers: Answers
    count_nD: Tensor
    auroc_DM: Tensor
    error_DM: Tensor

    @classmethod
    def of(cls, overlay: Overlay, answers: Answers, count_nD: Tensor) -> Draws:
        """Compute the concepts' figures."""
        truth_nM, probability_nM = overlay.truth_nM, answers.concept_nM
        num_draws, num_concepts = count_nD.shape[1], truth_nM.shape[1]
        auroc = [auroc_draws(probability_nM[:, j], truth_nM[:, j], count_nD) for j in range(num_concepts)]
        known_nM = ~truth_nM.isnan()
        wrong_nM = ((probability_nM > 0.5) != (truth_nM == 1)) & known_nM
        count_Dn = count_nD.T.double()
        known_DM = count_Dn @ known_nM.double()
        return cls(
            overlay=overlay,
            answers=answers,
            count_nD=count_nD,
            auroc_DM=torch.stack(auroc, 1) if auroc else torch.zeros(num_draws, 0, dtype=torch.float64),
            error_DM=(count_Dn @ wrong_nM.double()) / torch.where(known_DM > 0, known_DM, torch.nan),
        )

    @property
    def correct_n(self) -> Tensor:
        """(n,) bool."""
        return self.answers.predicted_n == self.overlay.label_n

    def recall_DK(self) -> Tensor:
        """(D, K) share of each class's pictures that are predicted as it."""
        return group_draws(self.correct_n, self.count_nD, group_n=self.overlay.label_n, num_groups=len(self.overlay.class_names))


@dataclass(frozen=True)
class Measure:
    """A figure that can be paired.

    Attributes:
        pattern: Of the keys of records that measure it.
        key, label, unit, better: For records that lack it.
        draws: (D,) its value in each draw; None where the record does not allow it.
        offered: Whether to show it even if no record has it.
    """

    pattern: str
    key: str
    label: str
    unit: Unit
    better: str | None
    draws: Callable[[Draws], Tensor | None]
    offered: bool = True


def _calibration(d: Draws) -> Tensor:
    inner = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]
    gap_n = d.correct_n.double() - d.answers.confidence_n
    bin_n = torch.bucketize(d.answers.confidence_n, inner, right=False)
    sums_DS = d.count_nD.T.double() @ (torch.nn.functional.one_hot(bin_n, _BINS).double() * gap_n[:, None])
    return sums_DS.abs().sum(1) / d.count_nD.double().sum(0)


def _worst_group(d: Draws) -> Tensor | None:
    group_n = d.overlay.group_n
    if group_n is None:
        return None
    share_DG = group_draws(d.correct_n, d.count_nD, group_n=group_n, num_groups=int(group_n.max()) + 1)
    return share_DG.nan_to_num(torch.inf).min(1).values


def _ratio(pair_n2: Tensor | None, d: Draws) -> Tensor | None:
    if pair_n2 is None or not float(pair_n2[:, 1].sum()) > 0:
        return None
    return mean_draws(pair_n2[:, 0], d.count_nD, weight_n=pair_n2[:, 1])


def _macro(value_DM: Tensor) -> Tensor | None:
    return value_DM.nanmean(1) if value_DM.shape[1] and not bool(value_DM.isnan().all()) else None


MEASURES: tuple[Measure, ...] = (
    Measure(r"(.*/)?(class_)?accuracy", "classes/accuracy", "Accuracy", "percent", "higher", lambda d: mean_draws(d.correct_n, d.count_nD)),
    Measure(
        r"(.*/)?balanced_accuracy",
        "classes/balanced_accuracy",
        "Balanced accuracy",
        "percent",
        "higher",
        lambda d: d.recall_DK().nanmean(1),
    ),
    Measure(
        r"(.*/)?(expected_)?calibration_error",
        "classes/calibration_error",
        "Expected calibration error",
        "percent",
        "lower",
        _calibration,
    ),
    Measure(
        r"(.*/)?overconfidence",
        "classes/overconfidence",
        "Confidence minus accuracy",
        "points",
        None,
        lambda d: mean_draws(d.answers.confidence_n - d.correct_n.double(), d.count_nD),
        offered=False,
    ),
    Measure(
        r"(.*/)?worst_group(_accuracy)?", "groups/worst_group_accuracy", "Accuracy of the worst group", "percent", "higher", _worst_group
    ),
    Measure(r"(.*/)?(concept_|macro_)?auroc", "concepts/auroc", "Concept AUROC", "percent", "higher", lambda d: _macro(d.auroc_DM)),
    Measure(r"(.*/)?(concept_)?error", "concepts/error", "Concept error", "percent", "lower", lambda d: _macro(d.error_DM)),
    Measure(
        r"(.*/)?pointing\S*",
        "parts/pointing",
        "Pointing: peak on the concept's part",
        "percent",
        "higher",
        lambda d: _ratio(d.answers.pointing_n2, d),
    ),
    Measure(
        r"(.*/)?(pointing|prior)\S*",
        "parts/pointing_prior",
        "Pointing of the best map without concepts",
        "percent",
        None,
        lambda d: _ratio(d.answers.prior_n2, d),
        offered=False,
    ),
)


def measure_of(key: str) -> tuple[Measure, ...]:
    """The measures that a record's key may name."""
    return tuple(measure for measure in MEASURES if re.fullmatch(measure.pattern, key))
