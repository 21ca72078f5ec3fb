"""A claim of a study as one figure: a panel for each column, a line for each method, a dot for each seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from matplotlib.figure import Figure

from dotcbm.explain.style import INK, LINE, MUTED, NAME, SMALL, TITLE, new_figure, place, wrapped
from dotcbm.report.study.plan import Claim, Record, Study
from dotcbm.report.study.table import cell_values, shown_rows, split_labels

__all__ = ["plot_claim"]

_SPLIT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito 2008
_SPLIT_MARKS = ("o", "D", "s", "^")
_CONTROL = "its control"
_LABELS, _PANEL, _GAP, _LINE, _HEAD = 3.0, 1.75, 0.25, 0.27, 1.05  # inches
_SPAN = 2.0  # an axis shows this much at least, in percent: less is no difference worth a look


def plot_claim(study: Study, records: Sequence[Record], claim: Claim) -> Figure:
    """Draw what `dotcbm.report.study.table.markdown` writes: means as large marks, seeds as small ones, splits told apart by shape.

    A column headed "its control" has no panel of its own: its mean is an upright stroke in that of the column before it.

    Raises:
        ValueError: No row of the claim has a record.
    """
    shown = [row for row, _ in shown_rows(study, records, claim)]
    # Of a claim that shows one trial of each method the table says which; the margin has no room for its settings.
    rows, names = [row.name for row in shown], [row.method if claim.best else row.name for row in shown]
    if not rows:
        raise ValueError(f"the claim {claim.name!r} of the study {study.name} has no record yet; run the study first")
    panels = _panels(claim)
    width = _LABELS + len(panels) * (_PANEL + _GAP) + 0.2
    height = _HEAD + len(rows) * _LINE + 0.85
    figure = new_figure(width, height)
    figure.text(
        0.15 / width, 1 - 0.15 / height, wrapped(claim.question, inches=width - 0.3, size=TITLE, bold=True), va="top", fontsize=TITLE,
        fontweight="bold", color=INK,
    )  # fmt: skip
    for number, (column, control) in enumerate(panels):
        figure_name, heading = claim.columns[column]
        ax = place(figure, left=_LABELS + number * (_PANEL + _GAP), top=_HEAD, width=_PANEL, height=len(rows) * _LINE)
        for line, row in enumerate(rows):
            ax.axhline(line, color=LINE, linewidth=0.6, zorder=0)
            for place_of_split, values in enumerate(cell_values(study, records, row=row, figure=figure_name)):
                known = _known(values)
                if not known:
                    continue
                colour, mark = _SPLIT_COLOURS[place_of_split % 4], _SPLIT_MARKS[place_of_split % 4]
                ax.plot(known, [line] * len(known), mark, color=colour, markersize=2.5, alpha=0.5, zorder=2)
                ax.plot(mean(known), line, mark, color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.6, zorder=3)
            blind = [] if control is None else _known(cell_values(study, records, row=row, figure=claim.columns[control][0])[0])
            if blind:
                ax.plot(mean(blind), line, "|", color=INK, markersize=9, markeredgewidth=1.4, zorder=4)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.margins(x=0.1)
        low, high = ax.get_xlim()
        missing = max(0.0, _SPAN - (high - low)) / 2
        ax.set_xlim(low - missing, high + missing)
        ax.tick_params(axis="x", labelsize=SMALL, colors=MUTED, length=2)
        ax.set_yticks(range(len(rows)), names if number == 0 else [""] * len(rows), fontsize=NAME, color=INK)
        ax.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_color(LINE)
        better = claim.better[column] if claim.better else "higher"
        arrow = {"higher": " →", "lower": " ←", "none": ""}[better]
        ax.set_title(wrapped(heading + arrow, inches=_PANEL, size=NAME, lines=2), fontsize=NAME, color=INK, loc="left")
    most = max(len(split_labels(figure_name)) for figure_name, _ in claim.columns)
    for number in range(most if most > 1 else 0):
        said = f"{'●◆■▲'[number % 4]} {('first', 'second', 'third', 'fourth')[number % 4]} of a heading's figures"
        figure.text((_LABELS + number * 2.1) / width, 0.25 / height, said, fontsize=SMALL + 1, color=_SPLIT_COLOURS[number % 4])
    seeds = len({record.seed for record in records})
    controlled = "; upright strokes: the control" if any(control is not None for _, control in panels) else ""
    said = f"%, {seeds} seeds: small marks" if seeds > 1 else "%, one seed"
    figure.text(0.15 / width, 0.25 / height, said + controlled, fontsize=SMALL + 1, color=MUTED)
    return figure


def _panels(claim: Claim) -> list[tuple[int, int | None]]:
    """The columns that have a panel, each with the column headed "its control" that follows it, if any."""
    panels: list[tuple[int, int | None]] = []
    for number, (_, heading) in enumerate(claim.columns):
        if heading == _CONTROL and panels:
            panels[-1] = (panels[-1][0], number)
        else:
            panels.append((number, None))
    return panels


def _known(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values if not math.isnan(value)]
