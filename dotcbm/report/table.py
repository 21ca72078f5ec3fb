"""Records of a study as a Markdown table: mean and spread over the seeds, one line a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from dotcbm.report.study import Record, Study

__all__ = ["Column", "markdown", "summary"]

Column = tuple[str, str]
"""A figure's name without its split, and the heading of its column."""


def summary(values: Sequence[float], *, percent: bool = True) -> str:
    """ "mean ± deviation" over the seeds (the sample's standard deviation), or a dash without a value.

    >>> summary([0.71, 0.73])
    '72.0 ± 1.4'
    >>> summary([math.nan])
    '—'
    """
    known = [100 * value if percent else value for value in values if not math.isnan(value)]
    if not known:
        return "—"
    return f"{mean(known):.1f} ± {stdev(known):.1f}" if len(known) > 1 else f"{known[0]:.1f}"


def markdown(study: Study, records: Sequence[Record], *, columns: Sequence[Column], splits: Sequence[str]) -> str:
    """One table; a cell holds the figure of each split, separated by a slash.

    Args:
        study: Gives the order of the rows.
        records: Of the study; rows without a record are left out.
        columns: What to show. A name may list alternatives with "|": the first that a record has is taken.
        splits: Whose figures.
    """
    lines = [
        "| method | n | " + " | ".join(heading for _, heading in columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for row in study.rows:
        runs = [record for record in records if record.row == row.name]
        if not runs:
            continue
        cells = []
        for names, _ in columns:
            shown = [summary([_figure(record, split, names) for record in runs]) for split in splits]
            cells.append(" / ".join(shown) if set(shown) != {"—"} else "—")
        lines.append(f"| {row.name.replace('|', ':')} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(record: Record, split: str, names: str) -> float:
    # The mean of concept logits that are all alike is no figure: a black box has no concepts.
    if names == "concept_auroc" and record.settings["bottleneck"] == "LinearProbe":
        return math.nan
    for name in names.split("|"):
        if f"{split}/{name}" in record.figures:
            return record.figures[f"{split}/{name}"]
    return math.nan
