"""Classes: accuracy, calibration, recall and precision of each class, and which concepts speak for it.

N pictures, K classes, M concepts, S bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.metrics.classes import balanced_accuracy, calibration_error
from dotcbm.report.audit.tools import Gathered, Section, rounded, share, statistic
from dotcbm.report.record import ClassRow, Confusion, Figure, Interval, Reliability

__all__ = ["class_figures", "class_rows", "confusion", "reliability"]

_BINS = 15  # Guo et al. 2017
_MISTAKEN, _SPEAKING = 3, 5


def class_figures(g: Gathered) -> Section:
    """Accuracy, balanced accuracy, calibration error, mean confidence of the mistakes."""
    section = Section()
    columns = g.columns
    label_N, probability_NK = columns.label_N, columns.class_NK
    settings = g.settings
    commonest = int(torch.bincount(g.train.label_N, minlength=probability_NK.shape[1]).argmax())
    guess = share((label_N == commonest).double())
    section.figures += [
        Figure(
            "classes/accuracy",
            "Accuracy",
            share(columns.correct_N),
            control=guess,
            control_label="always the commonest training class",
            note="Share of pictures whose most probable class is theirs; Wilson's interval.",
        ),
        Figure(
            "classes/balanced_accuracy",
            "Balanced accuracy",
            statistic(lambda rows: float(balanced_accuracy(probability_NK[rows], label_N[rows])), len(columns), settings=settings),
            control=Interval(rounded(1 / max(int(label_N.unique().numel()), 1)), n=int(label_N.unique().numel()), over="classes"),
            control_label="guessing among the classes of the split",
            note="Mean over the classes of the share of their pictures that are found.",
        ),
        Figure(
            "classes/calibration_error",
            "Expected calibration error",
            statistic(
                lambda rows: float(calibration_error(probability_NK[rows], label_N[rows], num_bins=_BINS)), len(columns), settings=settings
            ),
            better="lower",
            note=f"{_BINS} bins of equal width (Guo et al. 2017). The bootstrap overestimates it a little where the error is small.",
        ),
    ]
    confidence_N = probability_NK.max(1).values
    section.figures.append(
        Figure(
            "classes/overconfidence",
            "Confidence minus accuracy",
            statistic(lambda rows: float((confidence_N[rows] - columns.correct_N[rows]).mean()), len(columns), settings=settings),
            unit="points",
            better=None,
            note="Mean probability of the predicted class minus accuracy: above 0 the model is surer than it is right.",
        )
    )
    return section


def class_rows(g: Gathered) -> tuple[ClassRow, ...]:
    """One row a class; classes without a picture have figures of None."""
    columns, names = g.columns, g.model.concepts.class_names
    predicted_N, label_N = columns.predicted_N, columns.label_N
    rows: list[ClassRow] = []
    for k, name in enumerate(names):
        mine = (label_N == k).nonzero()[:, 0]
        taken_N = predicted_N[mine]
        wrong_K = torch.bincount(taken_N[taken_N != k], minlength=len(names))
        order = wrong_K.argsort(descending=True, stable=True)[:_MISTAKEN].tolist()
        speaks_for, speaks_against = _speaking(g, mine, k)
        rows.append(
            ClassRow(
                name=name,
                recall=share(columns.correct_N[mine]),
                precision=share(columns.correct_N[predicted_N == k]),
                mistaken_for=tuple((names[other], int(wrong_K[other])) for other in order if wrong_K[other] > 0),
                speaks_for=speaks_for,
                speaks_against=speaks_against,
            )
        )
    return tuple(rows)


def contribution_to(g: Gathered, rows: Tensor, class_index: int) -> Tensor:
    """(n, M) what each concept adds to the logit of one class, for some pictures."""
    columns = g.columns
    device = next(g.model.bottleneck.parameters()).device
    context = columns.context(rows)
    with torch.no_grad():
        given = columns.concept_logit_NM[rows].to(device), None if context is None else context.to(device)
        return g.model.bottleneck.contributions(*given)[:, class_index].cpu()


def _speaking(g: Gathered, rows: Tensor, class_index: int) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
    if not g.reads_concepts or not len(rows):
        return (), ()
    mean_M = contribution_to(g, rows, class_index).mean(0)
    names = g.model.concepts.names

    def chosen(sign: int) -> tuple[tuple[str, float], ...]:
        order = (sign * mean_M).argsort(descending=True, stable=True)[:_SPEAKING].tolist()
        return tuple((names[j], rounded(mean_M[j]) or 0.0) for j in order if sign * mean_M[j] > 0)

    return chosen(1), chosen(-1)


def confusion(g: Gathered) -> Confusion:
    """Counts of truth (rows) and prediction (columns)."""
    k = g.columns.class_logit_NK.shape[1]
    count_KK = torch.bincount(g.columns.label_N * k + g.columns.predicted_N, minlength=k * k).view(k, k)
    return Confusion(tuple(tuple(row) for row in count_KK.tolist()))


def reliability(g: Gathered) -> Reliability:
    """Confidence against accuracy in the bins of the calibration error."""
    confidence_N, correct_N = g.columns.class_NK.max(1).values, g.columns.correct_N
    inner = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]
    bin_N = torch.bucketize(confidence_N, inner, right=False)
    count_S = torch.bincount(bin_N, minlength=_BINS)
    sums = [torch.bincount(bin_N, weights=value, minlength=_BINS) for value in (confidence_N, correct_N)]
    means = [tuple(rounded(total / n) if n else None for total, n in zip(column, count_S.tolist())) for column in sums]
    return Reliability(tuple(count_S.tolist()), *means)
