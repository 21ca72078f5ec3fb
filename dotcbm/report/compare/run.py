"""Several audits side by side, with the differences to one of them and how sure those are.

Audits of the same pictures are paired: all models are measured on the same bootstrap draws of the pictures, so that what is hard in a
picture for every model cancels. Concepts and classes are tested one by one, with the false discovery rate controlled over all of them.

n pictures, M concepts, K classes, D draws.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from dotcbm.report.compare.figures import MEASURES, Draws, Measure, measure_of
from dotcbm.report.compare.pairing import overlay
from dotcbm.report.compare.record import FORMAT, ComparedFigure, Comparison
from dotcbm.report.compare.rows import class_rows, concept_rows, disagreements, findings, turned
from dotcbm.report.compare.statistics import draw_counts, interval, unpaired_difference
from dotcbm.report.record import AuditRecord, Figure, Interval

__all__ = ["compare"]

_AGREES = 1e-3  # how far a figure computed again may be from the record's, which rounds probabilities: a tenth of a point


def compare(
    records: Sequence[AuditRecord],
    names: Sequence[str],
    *,
    against: str | None = None,
    unpaired: bool = False,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    false_discovery_rate: float = 0.05,
) -> Comparison:
    """Compare audits.

    Args:
        records: Two or more.
        names: What to call each, all different.
        against: The name of the reference; the first by default.
        unpaired: Compare audits of other pictures or splits too; intervals of differences then come from the two intervals alone.
        num_draws: Of the bootstrap over pictures.
        level: Of the intervals.
        seed: Of the draws.
        false_discovery_rate: Expected share of chance finds among the concepts (or classes) that are called different.

    Raises:
        ValueError: Fewer than two records, names that repeat or are not known, or records of other data (see `overlay`).
    """
    if len(records) < 2 or len(records) != len(names):
        raise ValueError(f"{len(records)} records and {len(names)} names were given; compare two audits or more, each with a name")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the name {doubled[0]!r} stands for several audits; give each its own (NAME=PATH)")
    if against is not None and against not in names:
        near = difflib.get_close_matches(against, names, n=1)
        raise ValueError(f"there is no audit {against!r} to compare against; " + (f"did you mean {near[0]}?" if near else f"{list(names)}"))
    if num_draws < 2 or not 0 < level < 1 or not 0 < false_discovery_rate < 1:
        raise ValueError(
            f"num_draws is {num_draws}, level {level} and false_discovery_rate {false_discovery_rate}; give 2 draws or more, and shares "
            "between 0 and 1"
        )
    reference = 0 if against is None else list(names).index(against)
    laid = None if unpaired else overlay(records, names, against=reference)
    notes: list[str] = []
    figures: tuple[ComparedFigure, ...]
    concepts = classes = ()
    if laid is None:
        notes.append(
            "Not paired, as asked: the intervals of differences are as of different pictures, and single pictures are not compared."
        )
        figures = _figures(records, reference, paired={}, offered=())
    else:
        if laid.missing:
            notes.append(f"{len(laid.missing)} concepts are not known to all models and are left out: {_some(laid.missing)}.")
        count_nD = draw_counts(len(laid.names), num_draws=num_draws, seed=seed)
        once_n1 = torch.ones(len(laid.names), 1)
        drawn = [Draws.of(laid, answers, count_nD) for answers in laid.answers]
        plain = [Draws.of(laid, answers, once_n1) for answers in laid.answers]
        paired, offered = _paired(records, plain, drawn, reference, level=level, notes=notes)
        figures = _figures(records, reference, paired=paired, offered=offered)
        concepts = concept_rows(laid, plain, drawn, reference, level=level)
        classes = class_rows(laid, plain, drawn, reference, level=level)
    return Comparison(
        format=FORMAT,
        names=tuple(names),
        titles=tuple(record.title for record in records),
        against=reference,
        data=tuple(record.card.data for record in records),
        split=tuple(record.card.split for record in records),
        num_pictures=tuple(len(record.pictures.name) for record in records),
        paired=laid is not None,
        num_draws=num_draws,
        level=level,
        seed=seed,
        false_discovery_rate=false_discovery_rate,
        figures=figures,
        concepts=concepts,
        classes=classes,
        findings=findings(records),
        turned=() if laid is None else turned(laid, names, reference),
        disagreements=() if laid is None else disagreements(laid, reference),
        notes=tuple(notes),
    )


def _some(names: Sequence[str], few: int = 5) -> str:
    return ", ".join(names[:few]) + (f" and {len(names) - few} more" if len(names) > few else "")


def _find(record: AuditRecord, key: str) -> Figure | None:
    return next((figure for figure in record.figures if figure.key == key), None)


def _paired(
    records: Sequence[AuditRecord],
    plain: Sequence[Draws],
    drawn: Sequence[Draws],
    reference: int,
    *,
    level: float,
    notes: list[str],
) -> tuple[dict[str, tuple[Interval | None, ...]], tuple[ComparedFigure, ...]]:
    """Paired differences by key of the records' figures, and figures that no record has."""
    values = {m.key: [None if (v := m.draws(d)) is None else float(v[0]) for d in plain] for m in MEASURES}
    draws = {m.key: [m.draws(d) for d in drawn] for m in MEASURES}
    n = len(plain[0].overlay.names)

    def differences(m: Measure) -> tuple[Interval | None, ...]:
        base_value, base_D = values[m.key][reference], draws[m.key][reference]
        found: list[Interval | None] = []
        for i, (value, value_D) in enumerate(zip(values[m.key], draws[m.key], strict=True)):
            if i == reference or value is None or value_D is None or base_value is None or base_D is None:
                found.append(None)
                continue
            found.append(interval(value - base_value, value_D - base_D, n=n, level=level))
        return tuple(found)

    paired: dict[str, tuple[Interval | None, ...]] = {}
    used: set[str] = set()
    for key in dict.fromkeys(figure.key for record in records for figure in record.figures):
        told = [None if (figure := _find(record, key)) is None else figure.value.value for record in records]
        for m in measure_of(key):
            if all(t is None or ((v := values[m.key][i]) is not None and abs(v - t) <= _AGREES) for i, t in enumerate(told)):
                known = [t is not None for t in told]
                paired[key] = tuple(d if known[i] and known[reference] else None for i, d in enumerate(differences(m)))
                used.add(m.key)
                break
    offered = []
    for m in MEASURES:
        if m.offered and m.key not in used and m.key not in paired and any(v is not None for v in values[m.key]):
            if any(_find(record, m.key) is not None for record in records):
                notes.append(f"{m.label}: what the records say of each picture does not give the figure that they state; it is not paired.")
                continue
            shown = tuple(
                Interval(None) if v is None or v_D is None else interval(v, v_D, n=n, level=level)
                for v, v_D in zip(values[m.key], draws[m.key], strict=True)
            )
            better = "higher" if m.better == "higher" else "lower" if m.better == "lower" else None
            offered.append(ComparedFigure(m.key, m.label, m.unit, better, shown, differences(m), "paired", "Computed from the pictures."))
    return paired, tuple(offered)


def _figures(
    records: Sequence[AuditRecord],
    reference: int,
    *,
    paired: dict[str, tuple[Interval | None, ...]],
    offered: tuple[ComparedFigure, ...],
) -> tuple[ComparedFigure, ...]:
    rows: list[ComparedFigure] = []
    for key in dict.fromkeys(figure.key for record in records for figure in record.figures):
        found = [_find(record, key) for record in records]
        about = next(figure for figure in found if figure is not None)
        values = tuple(Interval(None) if figure is None else figure.value for figure in found)
        if key in paired:
            rows.append(ComparedFigure(key, about.label, about.unit, about.better, values, paired[key], "paired", about.note))
            continue
        differences: tuple[Interval | None, ...] = tuple(
            None if i == reference or (d := unpaired_difference(value, values[reference])).value is None else d
            for i, value in enumerate(values)
        )
        how = "unpaired" if any(d is not None and d.low is not None for d in differences) else "side by side"
        rows.append(ComparedFigure(key, about.label, about.unit, about.better, values, differences, how, about.note))
    return (*rows, *offered)
