"""The figures of a study of experts: means as large marks or lines, seeds as small marks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from dotcbm.explain.style import INK, LINE, MUTED, NAME, SMALL, TITLE, new_figure, place, wrapped
from dotcbm.report.study.experts_claims import by_seed, rows_of
from dotcbm.report.study.experts_plan import ExpertRow, ExpertStudy
from dotcbm.report.study.plan import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_experts"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#66727F")  # Okabe and Ito 2008
_LINE, _HEAD, _FOOT, _LABELS = 0.3, 0.8, 0.65, 2.4  # inches


def plot_experts(study: ExpertStudy, records: Sequence[Record]) -> Figure:
    """The figure of the study's claim.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError(f"the study {study.name} has no record yet; run it first")
    return {"balance": _balance, "budgets": _budgets, "growth": _growth}[study.claim](study, records)


def _balance(study: ExpertStudy, records: Sequence[Record]) -> Figure:
    """A panel for each figure, a line for each row."""
    rows = rows_of(study, records, "plain", "remedy", "")
    panels = (
        ("experts/0/switch_loss", "Switch loss, layer 0", 1.0, 1.05),
        ("experts/0/max_vio", "MaxVio, layer 0 ←", 1.0, None),
        ("experts/0/min_vio", "MinVio, layer 0 →", 1.0, None),
        ("accuracy", "accuracy, % →", 100.0, None),
    )
    return _dots(study, records, rows, panels)


def _dots(
    study: ExpertStudy, records: Sequence[Record], rows: Sequence[ExpertRow], panels: Sequence[tuple[str, str, float, float | None]]
) -> Figure:
    width, height = _LABELS + 1.9 * len(panels) + 0.2, _HEAD + _LINE * len(rows) + _FOOT
    figure = _figure(study, records, width, height)
    for number, (name, heading, scale, mark) in enumerate(panels):
        ax = place(figure, left=_LABELS + 1.9 * number, top=_HEAD, width=1.65, height=_LINE * len(rows))
        found = {row.name: [scale * value for value in by_seed(records, row.name, name).values()] for row in rows}
        if _far_apart([mean(values) for values in found.values() if values]):
            ax.set_xscale("log")
        for line, row in enumerate(rows):
            values = found[row.name]
            ax.axhline(line, color=LINE, linewidth=0.6, zorder=0)
            _marks(ax, values, [float(line)] * len(values), colour=_COLOURS[0])
        if mark is not None:
            ax.axvline(mark, color=MUTED, linewidth=0.8, linestyle=":")
        ax.margins(x=0.15)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), _names(rows) if number == 0 else [""] * len(rows), fontsize=NAME, color=INK)
        ax.set_title(heading, fontsize=NAME, color=INK, loc="left")
        _plain(ax)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    return figure


def _budgets(study: ExpertStudy, records: Sequence[Record]) -> Figure:
    """Accuracy over FLOPs: left the specialists at all budgets, right their own budgets beside the models of all budgets."""
    figure = _figure(study, records, 9.6, 4.6)
    left = place(figure, left=0.8, top=_HEAD + 0.1, width=3.9, height=2.7)
    right = place(figure, left=5.4, top=_HEAD + 0.1, width=3.9, height=2.7)
    ours, fixed = rows_of(study, records, "matryoshka"), rows_of(study, records, "specialist")
    for number, row in enumerate([*ours, *fixed]):
        colour, style = _COLOURS[number % len(_COLOURS)], "-" if row in ours else "--"
        _curve(left, study, records, row, row.budgets, colour=colour, style=style)
        if row in ours:
            _curve(right, study, records, row, row.budgets, colour=colour, style=style)
    own = []
    for row in fixed:
        k = row.moe.get("k", study.encoder["moe"]["k"])
        accuracies = by_seed(records, row.name, f"accuracy@{k}")
        flops = [value / 1e6 for value in by_seed(records, row.name, f"flops@{k}").values()]
        right.plot(flops, [100 * v for v in accuracies.values()], "s", color=INK, markersize=2.5, alpha=0.5)
        own.append((mean(flops), 100 * mean(accuracies.values())))
    if own:
        right.plot(*zip(*sorted(own)), "s--", color=INK, markersize=6, label="specialists, each at its k")
    for ax, heading in ((left, "every model at every k"), (right, "one model against specialists")):
        ax.set_title(heading, fontsize=NAME, color=INK, loc="left")
        ax.set_xlabel("MFLOP a picture", fontsize=SMALL, color=MUTED)
        ax.set_ylabel("accuracy, %", fontsize=SMALL, color=MUTED)
        ax.legend(fontsize=SMALL, frameon=False, loc="best")
        _plain(ax)
    return figure


def _curve(
    ax: Axes, study: ExpertStudy, records: Sequence[Record], row: ExpertRow, budgets: Sequence[int], *, colour: str, style: str
) -> None:
    points = []
    for k in budgets:
        accuracies = [100 * value for value in by_seed(records, row.name, f"accuracy@{k}").values()]
        flops = [value / 1e6 for value in by_seed(records, row.name, f"flops@{k}").values()]
        ax.plot(flops, accuracies, "o", color=colour, markersize=2.5, alpha=0.5)
        points.append((mean(flops), mean(accuracies)))
    ax.plot(*zip(*points), style, marker="o", markersize=5, color=colour, linewidth=1.5, label=row.name)


def _growth(study: ExpertStudy, records: Sequence[Record]) -> Figure:
    """Left the arms at equal extra FLOPs, right the accuracy over what the base had cost."""
    arms = rows_of(study, records, "grown", "scratch", "whole", "continued", "base")
    height = max(3.6, _HEAD + _LINE * len(arms) + _FOOT + 0.2)
    figure = _figure(study, records, 9.6, height)
    left = place(figure, left=_LABELS + 0.3, top=_HEAD + 0.1, width=2.6, height=_LINE * len(arms))
    for line, row in enumerate(arms):
        left.axhline(line, color=LINE, linewidth=0.6, zorder=0)
        values = [100 * value for value in by_seed(records, row.name, "accuracy").values()]
        colour = {"grown": _COLOURS[0], "scratch": _COLOURS[1], "whole": _COLOURS[1], "continued": _COLOURS[2]}.get(row.part, _COLOURS[6])
        _marks(left, values, [float(line)] * len(values), colour=colour)
    left.set_ylim(len(arms) - 0.5, -0.5)
    left.set_yticks(range(len(arms)), _names(arms), fontsize=NAME, color=INK)
    left.margins(x=0.1)
    left.set_xlabel("accuracy, %", fontsize=SMALL, color=MUTED)
    left.set_title("after the same extra FLOPs", fontsize=NAME, color=INK, loc="left")
    _plain(left)
    right = place(figure, left=6.3, top=_HEAD + 0.1, width=3.0, height=height - _HEAD - _FOOT - 0.1)
    for row, steps in sunk_costs(study, records):
        values = [100 * value for value in by_seed(records, row.name, "accuracy").values()]
        _marks(right, [float(steps)] * len(values), values, colour=_COLOURS[0])
    points = [(steps, 100 * mean(by_seed(records, row.name, "accuracy").values())) for row, steps in sunk_costs(study, records)]
    if points:
        right.plot(*zip(*points), "-", color=_COLOURS[0], linewidth=1.2, zorder=1)
    right.set_xlabel("steps of the base before it grew", fontsize=SMALL, color=MUTED)
    right.set_ylabel("accuracy, %", fontsize=SMALL, color=MUTED)
    right.set_title("sunk cost, same extra FLOPs", fontsize=NAME, color=INK, loc="left")
    _plain(right)
    return figure


def sunk_costs(study: ExpertStudy, records: Sequence[Record]) -> list[tuple[ExpertRow, int]]:
    """The rows of the sunk-cost curve and the base's steps: the first that starts from nothing, those that grow in the same way."""
    judged = next(iter(rows_of(study, records, "grown")), None)
    if judged is None or judged.of is None:
        return []
    whole = study.row(judged.of).loop.get("steps", study.loop.steps)
    scratch = [(row, 0) for row in rows_of(study, records, "scratch")[:1]]
    return sorted(
        [*scratch, *((row, row.at or whole) for row in rows_of(study, records, "sunk")), (judged, judged.at or whole)], key=lambda x: x[1]
    )


def _names(rows: Sequence[ExpertRow]) -> list[str]:
    """What stands in the left margin."""
    return [wrapped(row.name, inches=_LABELS - 0.2, size=NAME, lines=2) for row in rows]


def _figure(study: ExpertStudy, records: Sequence[Record], width: float, height: float) -> Figure:
    figure = new_figure(width, height)
    title = wrapped(study.question, inches=width - 0.3, size=TITLE, bold=True)
    figure.text(0.15 / width, 1 - 0.15 / height, title, va="top", fontsize=TITLE, fontweight="bold", color=INK)
    seeds = len({record.seed for record in records})
    figure.text(0.15 / width, 0.12 / height, f"large marks: mean of {seeds} seeds (small marks)", fontsize=SMALL, color=MUTED)
    return figure


def _far_apart(values: Sequence[float]) -> bool:
    """Whether one row, such as a collapsed one, would press the others into a point."""
    return bool(values) and min(values) > 0 and max(values) > 20 * median(values)


def _marks(ax: Axes, x: Sequence[float], y: Sequence[float], *, colour: str) -> None:
    if not x:
        return
    ax.plot(x, y, "o", color=colour, markersize=2.5, alpha=0.5, zorder=2)
    ax.plot(mean(x), mean(y), "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.6, zorder=3)


def _plain(ax: Axes) -> None:
    ax.tick_params(labelsize=SMALL, colors=MUTED, length=2)
    for label in ax.get_yticklabels():
        if label.get_text() and not label.get_text().replace(".", "").replace("−", "").isdigit():
            label.set(fontsize=NAME, color=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LINE)
