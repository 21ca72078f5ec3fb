"""What a comparison of several audits says, model by model: the record behind `compare.json`, and what the pages are drawn from.

Every tuple "by model" has one entry for each of `Comparison.names`, in that order. NaN never occurs: what is not known is None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dotcbm.report.record import Interval, Severity, Unit, Verdict

__all__ = ["FORMAT", "ComparedFigure", "ComparedFinding", "ComparedRow", "Comparison", "Disagreement", "Turned", "comparison_to_dict"]

FORMAT = 1

How = Literal["paired", "unpaired", "side by side"]
"""paired: bootstrap over the same pictures; unpaired: from the two intervals alone (`unpaired_difference`); side by side: no interval."""


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of all models.

    Attributes:
        key, label, unit, better: As in `dotcbm.report.record.Figure`.
        values: By model, as its audit measured it; value None where the audit has no such figure.
        differences: By model, to the reference; None for the reference itself and where either is not defined.
        how: Where the differences' intervals come from.
        note: What is measured.
    """

    key: str
    label: str
    unit: Unit
    better: Literal["higher", "lower"] | None
    values: tuple[Interval, ...]
    differences: tuple[Interval | None, ...]
    how: How
    note: str = ""


@dataclass(frozen=True)
class ComparedRow:
    """One concept or class under one measure.

    Attributes:
        name: Of the concept or class.
        measure: "auroc" and "error" of concepts, "recall" of classes.
        values: By model.
        differences: By model, to the reference, with paired bootstrap intervals.
        p: By model; DeLong's test (auroc), McNemar's exact test (error, recall); None where it cannot be made.
        q: By model; Benjamini and Hochberg's q-value over all concepts (or classes) of that model and measure.
        n: Pictures that count.
    """

    name: str
    measure: Literal["auroc", "error", "recall"]
    values: tuple[float | None, ...]
    differences: tuple[Interval | None, ...]
    p: tuple[float | None, ...]
    q: tuple[float | None, ...]
    n: int


@dataclass(frozen=True)
class ComparedFinding:
    """One kind of finding.

    Attributes:
        key: Of the finding.
        titles, severities, verdicts, measured: By model; None for a model without it.
        unit: Of `measured`.
    """

    key: str
    titles: tuple[str | None, ...]
    severities: tuple[Severity | None, ...]
    verdicts: tuple[Verdict | None, ...]
    measured: tuple[Interval | None, ...]
    unit: Unit


@dataclass(frozen=True)
class Turned:
    """Pictures that one model has right and the reference wrong, and the other way.

    Attributes:
        name: Of the model.
        gained, lost: Right here and wrong there; wrong here and right there.
        otherwise: Wrong in both, as different classes.
        p: McNemar's exact test of gained = lost.
    """

    name: str
    gained: int
    lost: int
    otherwise: int
    p: float


@dataclass(frozen=True)
class Disagreement:
    """A picture that not all models give the same class: its name and class, and by model the class given and the true one's
    probability."""

    name: str
    label: str
    predicted: tuple[str, ...]
    true_probability: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Several audits side by side.

    Attributes:
        format: Of this record.
        names: Of the models.
        titles: Of their records.
        against: Index of the reference.
        data, split: What was audited; by model where it differs.
        num_pictures: By model.
        paired: Whether all were audited on the same pictures.
        num_draws, level, seed: Of the bootstrap.
        false_discovery_rate: At which a concept or class counts as different.
        figures, concepts, classes, findings, turned, disagreements: The sections. Without pairing the rows of concepts and classes
            have no differences, and there are no `turned` and `disagreements`.
        notes: What the reader must know of what could not be compared.
    """

    format: int
    names: tuple[str, ...]
    titles: tuple[str, ...]
    against: int
    data: tuple[str, ...]
    split: tuple[str, ...]
    num_pictures: tuple[int, ...]
    paired: bool
    num_draws: int
    level: float
    seed: int
    false_discovery_rate: float
    figures: tuple[ComparedFigure, ...]
    concepts: tuple[ComparedRow, ...]
    classes: tuple[ComparedRow, ...]
    findings: tuple[ComparedFinding, ...]
    turned: tuple[Turned, ...]
    disagreements: tuple[Disagreement, ...]
    notes: tuple[str, ...]

    def different(self, rows: tuple[ComparedRow, ...], model: int, measure: str) -> tuple[ComparedRow, ...]:
        """The rows of one measure in which a model differs from the reference beyond chance, the largest difference first."""
        found = [row for row in rows if row.measure == measure and (q := row.q[model]) is not None and q <= self.false_discovery_rate]
        return tuple(sorted(found, key=lambda row: -abs(_value(row.differences[model]))))

    def tested(self, rows: tuple[ComparedRow, ...], model: int, measure: str) -> int:
        """How many rows of one measure could be tested."""
        return sum(row.measure == measure and row.q[model] is not None for row in rows)


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """JSON values."""
    return asdict(comparison)


def _value(difference: Interval | None) -> float:
    return 0.0 if difference is None or difference.value is None else difference.value
