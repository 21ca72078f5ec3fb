"""The rows of a comparison: concepts and classes one by one, findings, and the pictures that models disagree on.

n pictures, M concepts, K classes, D draws, R rows (concepts or classes), I models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dotcbm.report.compare.figures import Draws
from dotcbm.report.compare.pairing import Overlay
from dotcbm.report.compare.record import ComparedFinding, ComparedRow, Disagreement, Turned
from dotcbm.report.compare.statistics import adjusted, delong, interval, mcnemar
from dotcbm.report.record import AuditRecord, Interval

__all__ = ["class_rows", "concept_rows", "disagreements", "findings", "turned"]

_ORDER = ("critical", "warning", "note", "good")
_Measure = Literal["auroc", "error", "recall"]


def _row_differences(
    value_R: Tensor, value_DR: Tensor, base_R: Tensor, base_DR: Tensor, *, level: float, n_R: Tensor
) -> list[Interval | None]:
    found: list[Interval | None] = []
    for r in range(len(value_R)):
        difference = float(value_R[r] - base_R[r])
        found.append(None if math.isnan(difference) else interval(difference, value_DR[:, r] - base_DR[:, r], n=int(n_R[r]), level=level))
    return found


def concept_rows(laid: Overlay, plain: Sequence[Draws], drawn: Sequence[Draws], reference: int, *, level: float) -> tuple[ComparedRow, ...]:
    """AUROC (DeLong's test) and error (McNemar's) of each concept."""
    truth_nM = laid.truth_nM
    known_M = (~truth_nM.isnan()).sum(0)
    base = laid.answers[reference].concept_nM

    def auroc_p(i: int, j: int) -> float | None:
        return delong(laid.answers[i].concept_nM[:, j], base[:, j], truth_nM[:, j])

    def error_p(i: int, j: int) -> float | None:
        known_n = ~truth_nM[:, j].isnan()
        if not bool(known_n.any()):
            return None
        right = [(p[known_n, j] > 0.5) == (truth_nM[known_n, j] == 1) for p in (laid.answers[i].concept_nM, base)]
        return mcnemar(right[0], right[1])

    rows: list[ComparedRow] = []
    tests: tuple[tuple[_Measure, Callable[[int, int], float | None]], ...] = (("auroc", auroc_p), ("error", error_p))
    for measure, test in tests:
        name = f"{measure}_DM"
        value_I = [getattr(d, name)[0] for d in plain]
        draws_I = [getattr(d, name) for d in drawn]
        p_I = [[None if i == reference else test(i, j) for j in range(truth_nM.shape[1])] for i in range(len(drawn))]
        rows += _rows(laid.concept_names, measure, value_I, draws_I, p_I, reference, known_M, level=level)
    return tuple(rows)


def class_rows(laid: Overlay, plain: Sequence[Draws], drawn: Sequence[Draws], reference: int, *, level: float) -> tuple[ComparedRow, ...]:
    """Recall (McNemar's test) of each class."""
    num_classes = len(laid.class_names)
    count_K = torch.bincount(laid.label_n, minlength=num_classes)
    mine = [laid.label_n == k for k in range(num_classes)]
    correct_I = [d.correct_n for d in drawn]
    p_I: list[list[float | None]] = [
        [None if i == reference or not count_K[k] else mcnemar(c[mine[k]], correct_I[reference][mine[k]]) for k in range(num_classes)]
        for i, c in enumerate(correct_I)
    ]
    value_I, draws_I = [d.recall_DK()[0] for d in plain], [d.recall_DK() for d in drawn]
    return tuple(_rows(laid.class_names, "recall", value_I, draws_I, p_I, reference, count_K, level=level))


def _rows(
    names: Sequence[str],
    measure: _Measure,
    value_I: Sequence[Tensor],
    draws_I: Sequence[Tensor],
    p_I: Sequence[Sequence[float | None]],
    reference: int,
    n_R: Tensor,
    *,
    level: float,
) -> list[ComparedRow]:
    differences = [
        [None] * len(names)
        if i == reference
        else _row_differences(value_I[i], draws_I[i], value_I[reference], draws_I[reference], level=level, n_R=n_R)
        for i in range(len(value_I))
    ]
    q_I = [adjusted(p) for p in p_I]
    return [
        ComparedRow(
            name=name,
            measure=measure,
            values=tuple(None if value[r].isnan() else float(value[r]) for value in value_I),
            differences=tuple(row[r] for row in differences),
            p=tuple(p[r] for p in p_I),
            q=tuple(q[r] for q in q_I),
            n=int(n_R[r]),
        )
        for r, name in enumerate(names)
    ]


def findings(records: Sequence[AuditRecord]) -> tuple[ComparedFinding, ...]:
    """Findings of one kind in one row, whichever concepts and classes they name; the most severe first."""
    by_model = [{f.key: f for f in reversed(record.findings)} for record in records]
    rows = []
    for key in dict.fromkeys(f.key for record in records for f in record.findings):
        found = [findings.get(key) for findings in by_model]
        rows.append(
            ComparedFinding(
                key=key,
                titles=tuple(None if f is None else f.title for f in found),
                severities=tuple(None if f is None else f.severity for f in found),
                verdicts=tuple(None if f is None else f.verdict for f in found),
                measured=tuple(None if f is None else f.measured for f in found),
                unit=next(f.unit for f in found if f is not None),
            )
        )
    return tuple(sorted(rows, key=lambda row: min(_ORDER.index(s) for s in row.severities if s is not None)))


def turned(laid: Overlay, names: Sequence[str], reference: int) -> tuple[Turned, ...]:
    """How many pictures turned right and wrong, for each model but the reference."""
    base_n = laid.answers[reference].predicted_n
    right_n = base_n == laid.label_n
    rows = []
    for i, answers in enumerate(laid.answers):
        if i != reference:
            mine_n = answers.predicted_n == laid.label_n
            otherwise = int((~mine_n & ~right_n & (answers.predicted_n != base_n)).sum())
            gained, lost = int((mine_n & ~right_n).sum()), int((right_n & ~mine_n).sum())
            rows.append(Turned(names[i], gained, lost, otherwise, mcnemar(mine_n, right_n)))
    return tuple(rows)


def disagreements(laid: Overlay, reference: int) -> tuple[Disagreement, ...]:
    """Pictures that not all models give the reference's class; the largest spread of the true class's probability first."""
    predicted_nI = torch.stack([answers.predicted_n for answers in laid.answers], 1)
    true_nI = torch.stack([answers.true_n for answers in laid.answers], 1)
    rows = (predicted_nI != predicted_nI[:, reference : reference + 1]).any(1).nonzero()[:, 0]
    spread = (true_nI.max(1).values - true_nI.min(1).values)[rows]
    return tuple(
        Disagreement(
            name=laid.names[row],
            label=laid.class_names[int(laid.label_n[row])],
            predicted=tuple(laid.class_names[k] for k in predicted_nI[row].tolist()),
            true_probability=tuple(true_nI[row].tolist()),
        )
        for row in rows[spread.argsort(descending=True, stable=True)].tolist()
    )
