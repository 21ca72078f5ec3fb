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
    LABELS,
    MARGIN,
    MUTED,
    NAME,
    REST,
    SMALL,
    TITLE,
    draw_heat,
    draw_picture,
    heading,
    new_figure,
    percent,
    place,
    room_aspect,
    signed,
    wrapped,
)

if TYPE_CHECKING:
    from dotcbm.explain.explanation import ConceptEvidence, Explanation

__all__ = [
    "plot_contributions",
    "plot_explanation",
    "plot_heatmap_grid",
    "plot_overlay",
]

_GAP = 0.28  # inches between maps
_TWO_LINES = 0.34  # inches that two lines of a name take
_VIEWS = {
    "concept": "share of the concept's mass (Q / γ)",
    "patch": "share of the patch's mass (Q / θ)",
    "evidence": "what a patch adds to the concept",
    "gradcam": "Grad-CAM of the concept",
    "integrated_gradients": "integrated gradients of the concept",
    "lrp": "layer-wise relevance of the concept",
}


def plot_overlay(explanation: Explanation, concept: str, *, ax: Axes | None = None) -> Figure:
    """One concept's map over the picture, with probability, contribution and, if it is seen (50 % or more), box and peak.

    Raises:
        ValueError: There is no such concept.
    """
    evidence = explanation.concept(concept)
    if ax is None:
        aspect = explanation.picture_3HW.shape[1] / explanation.picture_3HW.shape[2]
        figure = new_figure(3.6, 3.0 * aspect + 1.2)
        ax = place(figure, left=MARGIN, top=0.85, width=3.0, height=3.0 * aspect)
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
        figure = new_figure(LABELS + 3.2 + 2 * MARGIN, height + 0.7 + 2 * MARGIN)
        ax = place(figure, left=MARGIN + LABELS, top=MARGIN + 0.7, width=3.2, height=height)
    figure = cast(Figure, ax.figure)
    row_height = ax.get_position().height * figure.get_size_inches()[1] / len(values)
    lines = 2 if row_height > _TWO_LINES else 1
    labels = [wrapped(name, inches=LABELS - 0.1, size=NAME, lines=lines) for name in names]
    rows = range(len(values))
    ax.barh(rows, values, color=colours, height=0.62)
    ax.invert_yaxis()
    ax.set_yticks(rows, labels, fontsize=NAME, color=INK)
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
            fontsize=NAME,
            color=INK,
        )
    title = f"For and against {explanation.target_class}"
    heading(ax, title, f"the bars add up to the class logit, {signed(total)}", inches=LABELS + 2.9, shift=LABELS)
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
    aspect = room_aspect(explanation.picture_3HW)
    title = wrapped(explanation.target_class, inches=3.0, size=TITLE + 2, lines=2, bold=True)
    head = 0.42 + 0.27 * (1 + title.count("\n"))  # the heads of picture, maps and bars end on one line
    rows = 1 if len(concepts) <= 2 else 2
    columns = math.ceil(len(concepts) / rows)
    num_bars = len(explanation.top_concepts(n)) + len(explanation.against(_num_against(n))) + 2
    body = max(3.0 * aspect + 1.25, 0.27 * num_bars, 3.0)
    tile_head = 0.62
    tile_height = (body - (rows - 1) * (_GAP + tile_head)) / rows
    tile_width = min(tile_height / aspect, 2.6)
    left_tiles = MARGIN + 3.0 + 0.4
    left_bars = left_tiles + columns * (tile_width + _GAP) + 0.2 + LABELS
    top = MARGIN + head
    width, height = left_bars + 2.9 + MARGIN, top + body + 0.25 + MARGIN
    figure = new_figure(width, height)

    ax = place(figure, left=MARGIN, top=top, width=3.0, height=3.0 * aspect)
    draw_picture(ax, explanation.picture_3HW)
    target = explanation.target
    note = "predicted class" if target == explanation.predicted else f"asked for; predicted: {explanation.predicted_class}"
    subtitle = f"{percent(float(explanation.class_K[target]))}, {note}"
    heading(ax, explanation.target_class, subtitle, inches=3.0, size=TITLE + 2, lines=2)
    _class_bars(place(figure, left=MARGIN, top=top + 3.0 * aspect + 0.22, width=3.0, height=1.0), explanation)
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
    bars = place(figure, left=left_bars, top=top, width=2.9, height=min(body, 0.45 * num_bars))
    plot_contributions(explanation, n=n, ax=bars)
    legend = f"Heat: {_VIEWS[explanation.view]}, gated by the concept's probability.  □ at least 0.6 of the maximum  + peak"
    figure.text(left_tiles / width, MARGIN / height, legend, fontsize=SMALL, color=MUTED, va="center")
    return figure


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
    titles = [wrapped(name, inches=tile, size=NAME, bold=True) for name in concept_names]
    head = 0.22 + 0.16 * max((title.count("\n") for title in titles), default=0)
    heights = [tile * min(1.5, max(0.5, picture.shape[1] / picture.shape[2])) for picture in pictures]
    height = 2 * MARGIN + head + sum(heights) + b * (line + 0.1)
    width = 2 * MARGIN + (m + 1) * tile + m * 0.12
    figure = new_figure(width, height)
    top = MARGIN + head
    for i, picture in enumerate(pictures):
        top += line
        for column in range(m + 1):
            left = MARGIN + column * (tile + 0.12)
            ax = place(figure, left=left, top=top, width=tile, height=heights[i])
            if column == 0:
                draw_picture(ax, picture)
                label = "" if row_names is None else wrapped(row_names[i], inches=tile, size=SMALL, lines=1)
            else:
                probability = 1.0 if probability_BM is None else float(probability_BM[i, column - 1])
                draw_heat(ax, picture, maps_BMHW[i, column - 1], probability=probability)
                label = "" if probability_BM is None else percent(probability)
                if i == 0:
                    figure.text(
                        left / width, 1 - (MARGIN + head - 0.04) / height, titles[column - 1], fontsize=NAME, fontweight="bold",
                        color=INK, va="bottom",
                    )  # fmt: skip
            figure.text(left / width, 1 - (top - 0.05) / height, label, fontsize=SMALL, color=MUTED, va="bottom")
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


def _num_against(n: int) -> int:
    return min(3, math.ceil(n / 2))


def _overlay(ax: Axes, explanation: Explanation, evidence: ConceptEvidence, *, inches: float) -> None:
    seen = evidence.probability >= 0.5  # a concept that is not there has no place to frame
    draw_heat(
        ax,
        explanation.picture_3HW,
        explanation.heatmaps_MHW[evidence.index],
        probability=evidence.probability,
        region=explanation.region,
        box=evidence.box if seen else None,
        peak=evidence.peak if seen else None,
    )
    ax.annotate(
        wrapped(evidence.name, inches=inches, size=NAME, bold=True), (0, 1), xycoords="axes fraction", xytext=(0, 17),
        textcoords="offset points", va="bottom", fontsize=NAME, fontweight="bold", color=INK,
    )  # fmt: skip
    for text, colour, x, align in (
        (percent(evidence.probability), MUTED, 0, "left"),
        (signed(evidence.contribution), FOR if evidence.contribution >= 0 else AGAINST, 1, "right"),
    ):
        ax.annotate(
            text, (x, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", va="bottom", ha=align,
            fontsize=NAME, color=colour,
        )  # fmt: skip


def _class_bars(ax: Axes, explanation: Explanation, *, n: int = 3) -> None:
    """The most probable classes, small."""
    classes = explanation.class_K.argsort(descending=True, stable=True)[:n].tolist()
    for row, k in enumerate(classes):
        value = float(explanation.class_K[k])
        ax.barh(row + 0.22, 1.0, height=0.16, color="#EDF0F3")
        ax.barh(row + 0.22, value, height=0.16, color=INK if k == explanation.target else REST)
        ax.text(0, row + 0.04, wrapped(explanation.class_names[k], inches=2.3, size=NAME, lines=1), fontsize=NAME, color=INK, va="bottom")
        ax.text(1, row + 0.04, percent(value), fontsize=NAME, color=INK, va="bottom", ha="right")
    ax.set_ylim(n - 0.6, -0.4)
    ax.set_xlim(0, 1)
    ax.set_axis_off()
