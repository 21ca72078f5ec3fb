"""Figures that one would put in a talk. Every function returns a matplotlib Figure; none shows it or touches pyplot.

Functions that draw one axes take `ax` and return the figure that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dotcbm.explain.style import (
    AGAINST,
    FOR,
    INK,
    LINE,
    MUTED,
    REST,
    draw_heat,
    draw_picture,
    new_figure,
    percent,
    place,
    signed,
    wrapped,
)

if TYPE_CHECKING:
    from dotcbm.explain.explanation import ConceptEvidence, Explanation

__all__ = [
    "plot_class_change",
    "plot_comparison",
    "plot_concept_change",
    "plot_contributions",
    "plot_explanation",
    "plot_heatmap_grid",
    "plot_overlay",
]

_TITLE, _NAME, _SMALL = 13.0, 9.0, 7.5  # font sizes in points
_MARGIN, _GAP = 0.3, 0.28  # inches
_LABELS = 1.95  # inches left of bars for the names of concepts
_TWO_LINES = 0.34  # inches that two lines of a name take
_MOST_CHANGES = 10  # concepts drawn of an intervention
_VIEWS = {
    "concept": "share of the concept's mass (Q / γ)",
    "patch": "share of the patch's mass (Q / θ)",
    "evidence": "what a patch adds to the concept",
}


def plot_overlay(explanation: Explanation, concept: str, *, ax: Axes | None = None) -> Figure:
    """One concept's map over the picture, with box, peak, probability and contribution.

    Raises:
        ValueError: There is no such concept.
    """
    evidence = explanation.concept(concept)
    if ax is None:
        aspect = explanation.picture_3HW.shape[1] / explanation.picture_3HW.shape[2]
        figure = new_figure(3.6, 3.0 * aspect + 1.2)
        ax = place(figure, left=_MARGIN, top=0.85, width=3.0, height=3.0 * aspect)
    _overlay(ax, explanation, evidence, inches=3.0)
    return cast(Figure, ax.figure)


def plot_contributions(explanation: Explanation, *, n: int = 6, ax: Axes | None = None) -> Figure:
    """All that adds up to the class logit: the strongest concepts for and against, the others, and the bias.

    Args:
        explanation: Of one picture.
        n: At most so many concepts for the class, and half as many (rounded up, 3 at most) against it.
        ax: Where to draw.
    """
    shown = [*explanation.top_concepts(n), *reversed(explanation.against(_num_against(n)))]
    total = float(explanation.class_logit_K[explanation.target])
    bias = float(explanation.bias_K[explanation.target])
    names = [evidence.name for evidence in shown]
    values = [evidence.contribution for evidence in shown]
    colours = [FOR if value > 0 else AGAINST for value in values]
    others = len(explanation.concept_names) - len(shown)
    if others:
        names.append(f"{others} other concept{'s' if others > 1 else ''}")
        values.append(total - bias - sum(values))
        colours.append(REST)
    names, values, colours = [*names, "bias"], [*values, bias], [*colours, REST]
    if ax is None:
        height = 0.4 * len(values)
        figure = new_figure(_LABELS + 3.2 + 2 * _MARGIN, height + 0.7 + 2 * _MARGIN)
        ax = place(figure, left=_MARGIN + _LABELS, top=_MARGIN + 0.7, width=3.2, height=height)
    figure = cast(Figure, ax.figure)
    row_height = ax.get_position().height * figure.get_size_inches()[1] / len(values)
    lines = 2 if row_height > _TWO_LINES else 1
    labels = [wrapped(name, inches=_LABELS - 0.1, size=_NAME, lines=lines) for name in names]
    rows = range(len(values))
    ax.barh(rows, values, color=colours, height=0.62)
    ax.invert_yaxis()
    ax.set_yticks(rows, labels, fontsize=_NAME, color=INK)
    ax.set_xticks([])
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.axvline(0, color=INK, linewidth=0.9)
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.24 * ((high - low) or 1)  # for the numbers at the ends of the bars
    ax.set_xlim(low - (room if low < 0 else 0.02 * room), high + room)
    for row, value in zip(rows, values, strict=True):
        ax.annotate(
            signed(value),
            (value, row),
            xytext=(4 if value >= 0 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=_NAME,
            color=INK,
        )
    title = f"For and against {explanation.target_class}"
    _heading(ax, title, f"the bars add up to the class logit, {signed(total)}", inches=_LABELS + 2.9, shift=_LABELS)
    return figure


def plot_explanation(explanation: Explanation, *, n: int = 6) -> Figure:
    """The picture with its classes, the maps of the concepts that speak for the class, and all contributions.

    Args:
        explanation: Of one picture.
        n: How many maps, 1 to 8. If fewer concepts speak for the class, the most probable others fill up.

    Raises:
        ValueError: `n` outside 1 to 8.
    """
    if not 1 <= n <= 8:
        raise ValueError(f"n is {n}; a figure has room for 1 to 8 concepts")
    concepts = _shown(explanation, n)
    aspect = _aspect(explanation)
    title = wrapped(explanation.target_class, inches=3.0, size=_TITLE + 2, lines=2, bold=True)
    head = 0.42 + 0.27 * (1 + title.count("\n"))  # the heads of picture, maps and bars end on one line
    rows = 1 if len(concepts) <= 2 else 2
    columns = math.ceil(len(concepts) / rows)
    num_bars = len(explanation.top_concepts(n)) + len(explanation.against(_num_against(n))) + 2
    body = max(3.0 * aspect + 1.25, 0.27 * num_bars, 3.0)
    tile_head = 0.62
    tile_height = (body - (rows - 1) * (_GAP + tile_head)) / rows
    tile_width = min(tile_height / aspect, 2.6)
    left_tiles = _MARGIN + 3.0 + 0.4
    left_bars = left_tiles + columns * (tile_width + _GAP) + 0.2 + _LABELS
    top = _MARGIN + head
    width, height = left_bars + 2.9 + _MARGIN, top + body + 0.25 + _MARGIN
    figure = new_figure(width, height)

    ax = place(figure, left=_MARGIN, top=top, width=3.0, height=3.0 * aspect)
    draw_picture(ax, explanation.picture_3HW)
    target = explanation.target
    note = "predicted class" if target == explanation.predicted else f"asked for; predicted: {explanation.predicted_class}"
    subtitle = f"{percent(float(explanation.class_K[target]))}, {note}"
    _heading(ax, explanation.target_class, subtitle, inches=3.0, size=_TITLE + 2, lines=2)
    _class_bars(place(figure, left=_MARGIN, top=top + 3.0 * aspect + 0.22, width=3.0, height=1.0), explanation)
    for i, evidence in enumerate(concepts):
        row, column = divmod(i, columns)
        tile = place(
            figure,
            left=left_tiles + column * (tile_width + _GAP),
            top=top + row * (tile_height + tile_head + _GAP),
            width=tile_width,
            height=min(tile_height, tile_width * aspect),
        )
        _overlay(tile, explanation, evidence, inches=tile_width)
    plot_contributions(explanation, n=n, ax=place(figure, left=left_bars, top=top, width=2.9, height=body))
    legend = f"Heat: {_VIEWS[explanation.view]}, gated by the concept's probability.  □ at least 0.6 of the maximum  + peak"
    figure.text(left_tiles / width, _MARGIN / height, legend, fontsize=_SMALL, color=MUTED, va="center")
    return figure


def plot_comparison(explanation: Explanation, *, n: int = 4) -> Figure:
    """An intervention: the concepts that were changed, and the classes before and after.

    Args:
        explanation: The result of `Explanation.intervene`.
        n: How many classes.

    Raises:
        ValueError: The explanation comes from no intervention.
    """
    before = _before(explanation)
    aspect = _aspect(explanation)
    was, now = before.predicted, explanation.predicted
    title = before.predicted_class if was == now else f"{before.predicted_class} → {explanation.predicted_class}"
    lines = 1 + wrapped(title, inches=3.0, size=_TITLE + 2, lines=2, bold=True).count("\n")
    top = _MARGIN + 0.42 + 0.27 * lines
    num_changes = len(_changes(explanation)[:_MOST_CHANGES])
    body = max(3.0 * aspect, 0.5 * num_changes + 0.3, 0.5 * n)
    left_changes = _MARGIN + 3.0 + 0.5 + _LABELS
    left_classes = left_changes + 2.6 + 0.5 + _LABELS
    figure = new_figure(left_classes + 2.4 + _MARGIN, top + body + _MARGIN)
    ax = place(figure, left=_MARGIN, top=top, width=3.0, height=3.0 * aspect)
    draw_picture(ax, explanation.picture_3HW)
    old, new = percent(float(before.class_K[was])), percent(float(explanation.class_K[now]))
    _heading(ax, title, f"{old} before, {new} after", inches=3.0, size=_TITLE + 2, lines=2)
    height = min(body - 0.25, 0.75 * max(num_changes, 1))
    plot_concept_change(explanation, ax=place(figure, left=left_changes, top=top, width=2.6, height=height))
    plot_class_change(explanation, n=n, ax=place(figure, left=left_classes, top=top, width=2.4, height=min(body, 0.75 * n)))
    return figure


def plot_concept_change(explanation: Explanation, *, ax: Axes | None = None) -> Figure:
    """The concepts that an intervention changed most, ten at most: from the probability before to the one after."""
    before = _before(explanation)
    every = _changes(explanation)
    changed = every[:_MOST_CHANGES]
    if ax is None:
        height = 0.5 * max(len(changed), 1) + 0.2
        figure = new_figure(_LABELS + 2.6 + 2 * _MARGIN, height + 0.95 + 2 * _MARGIN)
        ax = place(figure, left=_MARGIN + _LABELS, top=_MARGIN + 0.7, width=2.6, height=height)
    for row, j in enumerate(changed):
        old, new = float(before.concept_M[j]), float(explanation.concept_M[j])
        ax.plot([old, new], [row, row], color=LINE, linewidth=3, zorder=1, solid_capstyle="round")
        ax.plot(old, row, "o", color=REST, markersize=8, zorder=2)
        ax.plot(new, row, "o", color=FOR if new > old else AGAINST, markersize=9, zorder=3)
        ax.annotate(
            f"{percent(old)} → {percent(new)}", ((old + new) / 2, row), xytext=(0, 7), textcoords="offset points", ha="center",
            fontsize=_NAME, color=INK,
        )  # fmt: skip
    ax.set_yticks(
        range(len(changed)),
        [wrapped(explanation.concept_names[j], inches=_LABELS - 0.1, size=_NAME) for j in changed],
        fontsize=_NAME,
        color=INK,
    )
    ax.set_ylim(max(len(changed), 1) - 0.4, -0.6)
    ax.set_xlim(-0.12, 1.12)
    ax.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=_SMALL, color=MUTED)
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color=LINE, linewidth=0.6)
    subtitle = "grey before, coloured after"
    if len(every) > len(changed):
        subtitle += f"; {len(changed)} of {len(every)} shown"
    _heading(ax, "Concepts changed by hand", subtitle if every else "none", inches=_LABELS + 2.6, shift=_LABELS)
    return cast(Figure, ax.figure)


def plot_class_change(explanation: Explanation, *, n: int = 4, ax: Axes | None = None) -> Figure:
    """The most probable classes of before and after an intervention, both probabilities as bars."""
    before = _before(explanation)
    old_K, new_K = before.class_K, explanation.class_K
    classes = old_K.maximum(new_K).argsort(descending=True, stable=True)[:n].tolist()
    if ax is None:
        figure = new_figure(_LABELS + 2.4 + 2 * _MARGIN, 0.6 * len(classes) + 0.7 + 2 * _MARGIN)
        ax = place(figure, left=_MARGIN + _LABELS, top=_MARGIN + 0.7, width=2.4, height=0.6 * len(classes))
    for row, k in enumerate(classes):
        for offset, value, colour in ((-0.19, float(old_K[k]), REST), (0.19, float(new_K[k]), FOR)):
            ax.barh(row + offset, value, height=0.34, color=colour)
            ax.annotate(
                percent(value), (value, row + offset), xytext=(4, 0), textcoords="offset points", va="center", fontsize=_NAME, color=INK
            )
    names = [wrapped(explanation.class_names[k], inches=_LABELS - 0.1, size=_NAME) for k in classes]
    ax.set_yticks(range(len(classes)), names, fontsize=_NAME, color=INK)
    ax.set_ylim(len(classes) - 0.4, -0.6)
    ax.set_xlim(0, 1.25)
    ax.set_xticks([])
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.axvline(0, color=INK, linewidth=0.9)
    _heading(ax, "Classes that follow", "grey before, blue after", inches=_LABELS + 2.4, shift=_LABELS)
    return cast(Figure, ax.figure)


def plot_heatmap_grid(
    pictures: Sequence[Tensor],
    maps_BMHW: Tensor,
    *,
    concept_names: Sequence[str],
    row_names: Sequence[str] | None = None,
    probability_BM: Tensor | None = None,
) -> Figure:
    """Rows are pictures, columns are concepts: for reports.

    Args:
        pictures: B pictures, (3, H, W) uint8 of any sizes.
        maps_BMHW: (B, M, grid_h, grid_w), not negative; each map is shown relative to its own maximum.
        concept_names: M names, above the columns.
        row_names: B names, above the pictures.
        probability_BM: (B, M) in [0, 1]: gates the maps and is printed above them.

    Raises:
        ValueError: The numbers of pictures, maps and names differ.
    """
    b, m = maps_BMHW.shape[:2]
    if len(pictures) != b or len(concept_names) != m or (row_names is not None and len(row_names) != b):
        raise ValueError(
            f"{len(pictures)} pictures, {len(concept_names)} concept names and {b if row_names is None else len(row_names)} row names "
            f"do not fit maps of shape {tuple(maps_BMHW.shape)}, which need {b}, {m} and {b}"
        )
    tile, line = 1.7, 0.24
    titles = [wrapped(name, inches=tile, size=_NAME, bold=True) for name in concept_names]
    head = 0.22 + 0.16 * max((title.count("\n") for title in titles), default=0)
    heights = [tile * min(1.5, max(0.5, picture.shape[1] / picture.shape[2])) for picture in pictures]
    height = 2 * _MARGIN + head + sum(heights) + b * (line + 0.1)
    width = 2 * _MARGIN + (m + 1) * tile + m * 0.12
    figure = new_figure(width, height)
    top = _MARGIN + head
    for i, picture in enumerate(pictures):
        top += line
        for column in range(m + 1):
            left = _MARGIN + column * (tile + 0.12)
            ax = place(figure, left=left, top=top, width=tile, height=heights[i])
            if column == 0:
                draw_picture(ax, picture)
                label = "" if row_names is None else wrapped(row_names[i], inches=tile, size=_SMALL, lines=1)
            else:
                probability = 1.0 if probability_BM is None else float(probability_BM[i, column - 1])
                draw_heat(ax, picture, maps_BMHW[i, column - 1], probability=probability)
                label = "" if probability_BM is None else percent(probability)
                if i == 0:
                    figure.text(
                        left / width, 1 - (_MARGIN + head - 0.04) / height, titles[column - 1], fontsize=_NAME, fontweight="bold",
                        color=INK, va="bottom",
                    )  # fmt: skip
            figure.text(left / width, 1 - (top - 0.05) / height, label, fontsize=_SMALL, color=MUTED, va="bottom")
        top += heights[i] + 0.1
    return figure


def _shown(explanation: Explanation, n: int) -> list[ConceptEvidence]:
    """The concepts that speak for the class, filled up with the most probable others."""
    concepts = list(explanation.top_concepts(n))
    known = {evidence.index for evidence in concepts}
    fill = [
        evidence for evidence in explanation.top_concepts(len(explanation.concept_names), by="probability") if evidence.index not in known
    ]
    return (concepts + fill)[:n]


def _aspect(explanation: Explanation) -> float:
    """Height over width of the room for the picture; pictures beyond keep their shape and leave some of it empty."""
    return min(1.6, max(0.55, explanation.picture_3HW.shape[1] / explanation.picture_3HW.shape[2]))


def _num_against(n: int) -> int:
    return min(3, math.ceil(n / 2))


def _changes(explanation: Explanation) -> list[int]:
    """The concepts that an intervention changed, most first."""
    change_M = (explanation.concept_M - _before(explanation).concept_M).abs()
    return [j for j in change_M.argsort(descending=True, stable=True).tolist() if change_M[j] > 0]


def _before(explanation: Explanation) -> Explanation:
    if explanation.before is None:
        raise ValueError("this explanation comes from no intervention; call explanation.intervene({concept: probability}) first")
    return explanation.before


def _overlay(ax: Axes, explanation: Explanation, evidence: ConceptEvidence, *, inches: float) -> None:
    draw_heat(
        ax,
        explanation.picture_3HW,
        explanation.heatmaps_MHW[evidence.index],
        probability=evidence.probability,
        region=explanation.region,
        box=evidence.box,
        peak=evidence.peak,
    )
    ax.annotate(
        wrapped(evidence.name, inches=inches, size=_NAME, bold=True), (0, 1), xycoords="axes fraction", xytext=(0, 17),
        textcoords="offset points", va="bottom", fontsize=_NAME, fontweight="bold", color=INK,
    )  # fmt: skip
    for text, colour, x, align in (
        (percent(evidence.probability), MUTED, 0, "left"),
        (signed(evidence.contribution), FOR if evidence.contribution >= 0 else AGAINST, 1, "right"),
    ):
        ax.annotate(
            text, (x, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", va="bottom", ha=align,
            fontsize=_NAME, color=colour,
        )  # fmt: skip


def _class_bars(ax: Axes, explanation: Explanation, *, n: int = 3) -> None:
    """The most probable classes, small."""
    classes = explanation.class_K.argsort(descending=True, stable=True)[:n].tolist()
    for row, k in enumerate(classes):
        value = float(explanation.class_K[k])
        ax.barh(row + 0.22, 1.0, height=0.16, color="#EDF0F3")
        ax.barh(row + 0.22, value, height=0.16, color=INK if k == explanation.target else REST)
        ax.text(0, row + 0.04, wrapped(explanation.class_names[k], inches=2.3, size=_NAME, lines=1), fontsize=_NAME, color=INK, va="bottom")
        ax.text(1, row + 0.04, percent(value), fontsize=_NAME, color=INK, va="bottom", ha="right")
    ax.set_ylim(n - 0.6, -0.4)
    ax.set_xlim(0, 1)
    ax.set_axis_off()


def _heading(ax: Axes, title: str, subtitle: str, *, inches: float, size: float = _TITLE, lines: int = 1, shift: float = 0.0) -> None:
    """Title and a muted line above an axes, `shift` inches left of its left edge."""
    for text, height, points, colour, weight in (
        (wrapped(title, inches=inches, size=size, lines=lines, bold=True), 21, size, INK, "bold"),
        (wrapped(subtitle, inches=inches, size=_NAME, lines=1), 5, _NAME, MUTED, "normal"),
    ):
        ax.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(-72 * shift, height), textcoords="offset points", va="bottom",
            fontsize=points, fontweight=weight, color=colour,
        )  # fmt: skip
