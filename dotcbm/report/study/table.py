"""Records of a study as Markdown tables: mean and spread over the seeds, one line a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from dotcbm.catalog import subclasses
from dotcbm.models.base import Bottleneck
from dotcbm.report.study.plan import MAIN, Claim, Record, Row, Study

__all__ = ["DEFAULT_COLUMNS", "cell_values", "default_claim", "markdown", "shown_rows", "split_labels", "summary"]

Column = tuple[str, str]
"""A figure as in `Claim.columns`, and the heading of its column."""

_OF_CONCEPTS = ("concept_", "concepts/", "interventions/", "controls/nec5", "controls/anec")

DEFAULT_COLUMNS: tuple[Column, ...] = (
    ("accuracy", "class accuracy"),
    ("concept_auroc", "concept AUROC"),
    ("pointing_0.05_plan|pointing_0.05_evidence", "pointing, r = 0.05"),
    ("pointing_0.1_plan|pointing_0.1_evidence", "pointing, r = 0.1"),
    ("pointing_0.1_evidence", "of the evidence"),
    ("pointing_0.1_prior", "control: prior alone"),
    ("pointing_mask_plan|pointing_mask_evidence", "peak inside the part"),
    ("foreground_mass_plan|foreground_mass_evidence", "mass on the object"),
)
"""For studies that make no claims; without splits, which the caller puts before them."""


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


def default_claim(records: Sequence[Record]) -> Claim:
    """The table of a study without claims: `DEFAULT_COLUMNS` for all splits that the records of its own world have."""
    splits = sorted({name.split("/")[0] for record in records for name in record.figures if name.startswith("test")})
    columns = tuple((f"{','.join(splits)}/{names}", heading) for names, heading in DEFAULT_COLUMNS)
    return Claim("all", " / ".join(splits), columns)


def cell_values(study: Study, records: Sequence[Record], *, row: str, figure: str) -> list[list[float]]:
    """The values behind one cell: for each split that `figure` names those of all seeds, NaN where a record lacks it."""
    world, colon, rest = figure.partition(":")
    if not colon:
        world, rest = MAIN, figure
    runs = [record for record in records if record.row == row and record.world == world]
    return [[_figure(record, *named) for record in runs] for named in _split_names(rest)]


def shown_rows(study: Study, records: Sequence[Record], claim: Claim) -> list[tuple[Row, int]]:
    """The rows of a claim that have records, and the number of trials that each was chosen from."""
    present = {record.row for record in records}
    rows = [row for row in study.rows if row.name in present and (not claim.rows or row.method in claim.rows)]
    if not claim.best:
        return [(row, 1) for row in rows]

    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    seeds = {row.name: {record.seed for record in records if record.row == row.name} for row in rows}
    # A seed can be a split of the data, harder than another: trials are compared on those that all of the method have.
    common = {method: set.intersection(*(seeds[row.name] for row in trials)) for method, trials in by_method.items()}

    def score(row: Row) -> float:
        runs = [record for record in records if record.seed in (common[row.method] or seeds[row.name])]
        each = [v for figure in claim.best for values in cell_values(study, runs, row=row.name, figure=figure) for v in values]
        known = [value for value in each if not math.isnan(value)]
        return mean(known) if known else -math.inf

    def preference(row: Row) -> tuple[float, ...]:
        settings = {**row.settings, **row.task}
        return (*(float(settings.get(name, 0)) for name in claim.prefer), score(row))

    shown: list[tuple[Row, int]] = []
    for trials in by_method.values():
        best = max(score(row) for row in trials)
        shown.append((max((row for row in trials if score(row) >= best - claim.within - 1e-9), key=preference), len(trials)))
    return shown


def split_labels(figure: str) -> list[str]:
    """What the values of a cell are told apart by: their splits, or their names where the splits are the same."""
    named = _split_names(figure.partition(":")[2] or figure)
    splits = [split for split, _ in named]
    return splits if len(set(splits)) == len(splits) else [name.rpartition("/")[2] for _, name in named]


def _split_names(figure: str) -> list[tuple[str, str]]:
    """Split and name of each figure of a cell: "a,b/x" is a/x and b/x, "a/x,b/y" is a/x and b/y."""
    parts = figure.split(",")
    if all("/" in part for part in parts):
        pairs = [part.partition("/") for part in parts]
        return [(split, name) for split, _, name in pairs]
    splits, _, name = figure.partition("/")
    return [(split, name) for split in splits.split(",")]


def markdown(study: Study, records: Sequence[Record], claim: Claim) -> str:
    """One table; a cell holds the mean and deviation of each split, separated by a slash, and n where it has fewer seeds than its row.

    Args:
        study: Gives the order of the rows.
        records: Of the study; rows without a record are left out.
        claim: What to show.
    """
    head, rule = ("| method | trials | n | ", "| --- | --- | --- |") if claim.best else ("| method | n | ", "| --- | --- |")
    lines = [head + " | ".join(heading for _, heading in claim.columns) + " |", rule + " --- |" * len(claim.columns)]
    for row, num_trials in shown_rows(study, records, claim):
        num_seeds = len({record.seed for record in records if record.row == row.name})
        cells = []
        for figure, _ in claim.columns:
            values = cell_values(study, records, row=row.name, figure=figure)
            shown = [summary(of_split) for of_split in values]
            num = max((len(of_split) for of_split in values), default=0)
            fewer = f" (n = {num})" if 0 < num < num_seeds else ""
            cells.append(" / ".join(shown) + fewer if set(shown) != {"—"} else "—")
        counts = f"{num_trials} | {num_seeds}" if claim.best else f"{num_seeds}"
        lines.append(f"| {row.name.replace('|', ':')} | {counts} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(record: Record, split: str, names: str) -> float:
    # The mean of concept logits that are all alike is no figure: a black box has no concepts.
    if names.startswith(_OF_CONCEPTS) and not _bottleneck(record).reads_concepts:
        return math.nan
    for name in names.split("|"):
        if f"{split}/{name}" in record.figures:
            return record.figures[f"{split}/{name}"]
    return math.nan


def _bottleneck(record: Record) -> type[Bottleneck]:
    return subclasses(Bottleneck, package="dotcbm.models")[record.settings["bottleneck"]]
