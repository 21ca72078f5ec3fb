"""Figures of answers: this class and not that one, what lives in a box, what covering a place does, and similar pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from matplotlib import patheffects as effects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dotcbm.explain.comparison import plot_class_change, plot_concept_change
from dotcbm.explain.heatmaps import Box
from dotcbm.explain.style import (
    AGAINST,
    FOR,
    INK,
    LABELS,
    LINE,
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
    from dotcbm.explain.contrast import Contrast
    from dotcbm.explain.neighbours import Neighbours
    from dotcbm.explain.occlusion import OccludedConcept, Occlusion
    from dotcbm.explain.regions import BoxReport, MutedRegion

__all__ = ["plot_box", "plot_contrast", "plot_muted", "plot_neighbours", "plot_occlusion"]

_SIDE = 3.0  # inches of the picture
_TILE = 1.9  # inches of a smaller one
_HEAD = 0.75  # inches above an axes with a heading
_ROW = 0.4  # inches of a bar


def plot_contrast(contrast: Contrast, *, n: int = 5) -> Figure:
    """What speaks for the first class rather than the second, and the reverse; the bars add up to the difference of the logits.

    Args:
        contrast: Of one picture.
        n: At most so many concepts on each side.
    """
    why = contrast.explanation
    shown = [*contrast.for_first(n), *reversed(contrast.for_second(n))]
    names, values = [row.name for row in shown], [row.value for row in shown]
    colours = [FOR if value > 0 else AGAINST for value in values]
    others = len(why.concept_names) - len(shown)
    if others:
        names.append(f"{others} other concept{'s' if others > 1 else ''}")
        values.append(contrast.margin - contrast.bias - sum(values))
    names, values = [*names, "bias"], [*values, contrast.bias]
    colours += [REST] * (len(values) - len(colours))
    width, height = 3.2, _ROW * len(values)
    inches = LABELS + width
    title = wrapped(f"Why {why.target_class} and not {contrast.other_class}", inches=inches, size=TITLE, lines=3, bold=True)
    head = 0.55 + 0.25 * (1 + title.count("\n"))
    figure = new_figure(inches + 2 * MARGIN, head + height + 2 * MARGIN)
    ax = place(figure, left=MARGIN + LABELS, top=MARGIN + head, width=width, height=height)
    _bars(ax, names, values, colours, texts=[signed(value) for value in values])
    subtitle = f"blue for it, orange for the other; together {signed(contrast.margin)}"
    heading(ax, f"Why {why.target_class} and not {contrast.other_class}", subtitle, inches=inches, lines=3, shift=LABELS)
    return figure


def plot_box(report: BoxReport, *, n: int = 6) -> Figure:
    """The picture with the box, and how much of the maps of the concepts that are seen in it lies inside.

    Args:
        report: Of one picture.
        n: How many concepts.
    """
    why = report.explanation
    rows = report.concepts[:n]
    aspect = room_aspect(why.picture_3HW)
    body = max(_SIDE * aspect, 0.5 * len(rows))
    left = MARGIN + _SIDE + 0.4 + LABELS
    figure = new_figure(left + 3.0 + MARGIN, MARGIN + _HEAD + body + 0.35 + MARGIN)
    ax = place(figure, left=MARGIN, top=MARGIN + _HEAD, width=_SIDE, height=_SIDE * aspect)
    shown = draw_picture(ax, why.picture_3HW)
    _frame(ax, report.box, shown)
    heading(ax, "The box", f"{percent(report.area)} of what the model sees", inches=_SIDE)
    bars = place(figure, left=left, top=MARGIN + _HEAD, width=3.0, height=min(body, 0.55 * len(rows)))
    values = [0.0 if math.isnan(row.share) else row.share for row in rows]
    texts = [percent(row.share) + ("" if row.evidence is None else f"  ({signed(row.evidence)})") for row in rows]
    names = [f"{row.name} ({percent(row.probability)})" for row in rows]
    _bars(bars, names, values, [FOR if row.lift > 1 else REST for row in rows], texts=texts)
    bars.set_xlim(0, 1.5 * max([*values, report.area, 1e-3]))
    bars.axvline(report.area, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    for text in bars.texts:  # short bars end left of the line
        text.set_path_effects([effects.Stroke(linewidth=3, foreground="white"), effects.Normal()])
    heading(bars, "Concepts that live in it", "share of the map inside", inches=LABELS + 3.0, shift=LABELS)
    note = "dashed: the box's share of the area, which chance would give"
    if rows and rows[0].evidence is not None:
        note += "; in brackets: what the box adds to the concept's logit"
    total_width, total_height = figure.get_size_inches()
    text = wrapped(note, inches=total_width - 2 * MARGIN, size=SMALL, lines=2)
    figure.text(MARGIN / total_width, MARGIN / total_height, text, fontsize=SMALL, color=MUTED, va="center")
    return figure


def plot_muted(muted: MutedRegion, *, n: int = 4) -> Figure:
    """The picture with the box that was taken away, the concepts that changed most, and the classes before and after.

    Args:
        muted: Of one picture.
        n: How many classes.
    """
    after, before = muted.after, muted.before
    aspect = room_aspect(after.picture_3HW)
    num_changes = min(10, int((after.concept_M != before.concept_M).sum()))
    body = max(_SIDE * aspect, 0.5 * num_changes + 0.3, 0.6 * n)
    was, now = before.predicted_class, after.predicted_class
    title = was if was == now else f"{was} → {now}"
    lines = 1 + wrapped(title, inches=_SIDE, size=TITLE, lines=2, bold=True).count("\n")
    top = MARGIN + 0.5 + 0.25 * lines
    left_changes = MARGIN + _SIDE + 0.5 + LABELS
    left_classes = left_changes + 2.6 + 0.5 + LABELS
    figure = new_figure(left_classes + 2.4 + MARGIN, top + body + 0.35 + MARGIN)
    ax = place(figure, left=MARGIN, top=top, width=_SIDE, height=_SIDE * aspect)
    shown = draw_picture(ax, after.picture_3HW)
    _frame(ax, muted.box, shown, filled=True)
    heading(ax, title, "without the box", inches=_SIDE, lines=2)
    change = place(figure, left=left_changes, top=top, width=2.6, height=min(body - 0.25, 0.75 * max(num_changes, 1)))
    plot_concept_change(after, ax=change, title="Concepts without the box")
    plot_class_change(after, n=n, ax=place(figure, left=left_classes, top=top, width=2.4, height=min(body, 0.75 * n)))
    total_width, total_height = figure.get_size_inches()
    figure.text(MARGIN / total_width, MARGIN / total_height, muted.why, fontsize=SMALL, color=MUTED, va="center")
    return figure


def plot_occlusion(occlusion: Occlusion) -> Figure:
    """A row for each concept: its map, its place covered, a random place covered, and the probability after each."""
    why = occlusion.explanation
    aspect = room_aspect(why.picture_3HW)
    row_height = _TILE * aspect + 0.85
    left_dots = MARGIN + 3 * (_TILE + 0.2) + 0.75
    width = left_dots + 3.0 + MARGIN
    height = MARGIN + 0.5 + len(occlusion.concepts) * row_height + 0.3
    figure = new_figure(width, height)
    title = wrapped("Does the concept leave with its place?", inches=width - 2 * MARGIN, size=TITLE, lines=1, bold=True)
    figure.text(MARGIN / width, 1 - (MARGIN + 0.1) / height, title, fontsize=TITLE, fontweight="bold", color=INK, va="center")
    for i, row in enumerate(occlusion.concepts):
        top = MARGIN + 0.5 + i * row_height + 0.55
        tiles = [place(figure, left=MARGIN + c * (_TILE + 0.2), top=top, width=_TILE, height=_TILE * aspect) for c in range(3)]
        j = why.concept_names.index(row.name)
        draw_heat(tiles[0], why.picture_3HW, why.heatmaps_MHW[j], region=why.region)
        for tile, region_hw in ((tiles[1], row.region_hw), (tiles[2], row.random_Rhw[0])):
            _cover_cells(tile, why.picture_3HW, region_hw, region=why.region)
        heading(tiles[0], row.name, f"{percent(row.probability)} in the picture", inches=_TILE + 0.1, size=NAME + 1)
        heading(tiles[1], "", f"its place covered: {percent(row.covered)}", inches=_TILE + 0.1)
        heading(tiles[2], "", f"elsewhere: {percent(float(row.random_R[0]))}", inches=_TILE + 0.1)
        _drops(place(figure, left=left_dots, top=top, width=3.0, height=min(_TILE * aspect, 1.0)), row)
    note = f"covered with the picture's {'mean colour' if occlusion.fill == 'mean' else 'blur'}; the picture shows one of the random places"
    figure.text(MARGIN / width, 0.2 / height, note, fontsize=SMALL, color=MUTED, va="center")
    return figure


def plot_neighbours(neighbours: Neighbours) -> Figure:
    """The picture that was asked about, and those found with their classes and what they share; names where no picture is at hand."""
    why, found, table = neighbours.explanation, neighbours.found, neighbours.table
    aspects = [room_aspect(why.picture_3HW)]
    pictures: list[Tensor | None] = [why.picture_3HW]
    for row in found:
        pictures.append(None if table.read is None else table.read(row.row))
        aspects.append(1.0 if pictures[-1] is None else room_aspect(cast(Tensor, pictures[-1])))
    body = _TILE * max(aspects)
    width = 2 * MARGIN + len(pictures) * (_TILE + 0.25)
    top = MARGIN + 1.05
    height = top + body + 0.75 + MARGIN
    figure = new_figure(width, height)
    title = "Nearest by their concepts" if neighbours.concept is None else f"Surest of “{neighbours.concept}”"
    figure.text(
        MARGIN / width, 1 - (MARGIN + 0.1) / height, wrapped(title, inches=width - 2 * MARGIN, size=TITLE, lines=1, bold=True),
        fontsize=TITLE, fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    for i, picture in enumerate(pictures):
        ax = place(figure, left=MARGIN + i * (_TILE + 0.25), top=top, width=_TILE, height=_TILE * aspects[i])
        if picture is None:
            ax.set_axis_off()
            ax.text(0, 0.5, wrapped(found[i - 1].name, inches=_TILE, size=NAME, lines=4), fontsize=NAME, color=MUTED, va="center")
        else:
            draw_picture(ax, picture)
        if i == 0:
            heading(ax, f"asked about: {why.target_class}", _value_of_asked(neighbours), inches=_TILE, size=NAME + 1, lines=2)
            continue
        row = found[i - 1]
        value = f"distance {row.value:.3f}" if neighbours.concept is None else percent(row.value)
        heading(ax, row.class_name, value, inches=_TILE, size=NAME + 1, lines=2)
        if row.shared:
            text = wrapped("both: " + ", ".join(row.shared), inches=_TILE, size=SMALL, lines=3)
            figure.text((MARGIN + i * (_TILE + 0.25)) / width, 1 - (top + body + 0.1) / height, text, fontsize=SMALL, color=MUTED, va="top")
    return figure


def _value_of_asked(neighbours: Neighbours) -> str:
    why = neighbours.explanation
    return percent(float(why.class_K[why.target]) if neighbours.concept is None else why.concept(neighbours.concept).probability)


def _bars(ax: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str], *, texts: Sequence[str]) -> None:
    rows = range(len(values))
    ax.barh(rows, values, color=list(colours), height=0.62)
    ax.set_yticks(rows, [wrapped(name, inches=LABELS - 0.1, size=NAME) for name in names], fontsize=NAME, color=INK)
    ax.set_ylim(max(len(values), 1) - 0.5, -0.5)
    ax.set_xticks([])
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.axvline(0, color=INK, linewidth=0.9)
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.24 * ((high - low) or 1)  # for the texts at the ends of the bars
    ax.set_xlim(low - (room if low < 0 else 0.02 * room), high + room)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        ax.annotate(
            text, (value, row), xytext=(4 if value >= 0 else -4, 0), textcoords="offset points", va="center",
            ha="left" if value >= 0 else "right", fontsize=NAME, color=INK,
        )  # fmt: skip


def _frame(ax: Axes, box: Box, shown: tuple[int, int], *, filled: bool = False) -> None:
    height, width = shown
    x0, y0, x1, y1 = (value * side for value, side in zip(box, (width, height, width, height), strict=True))
    halo = [effects.Stroke(linewidth=4, foreground="white", alpha=0.8), effects.Normal()]
    if filled:
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, facecolor=LINE, edgecolor="none", alpha=0.85))
    ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=INK, linewidth=2, path_effects=halo))


def _cover_cells(ax: Axes, picture_3HW: Tensor, region_hw: Tensor, *, region: Box) -> None:
    """A picture whose covered cells are grey."""
    height, width = draw_picture(ax, picture_3HW)
    x0, y0, x1, y1 = region
    rows, columns = region_hw.shape
    for row, column in torch.nonzero(region_hw).tolist():
        left, top = x0 + (x1 - x0) * column / columns, y0 + (y1 - y0) * row / rows
        ax.add_patch(
            Rectangle(
                (left * width - 0.5, top * height - 0.5),
                (x1 - x0) / columns * width,
                (y1 - y0) / rows * height,
                facecolor=REST,
                linewidth=0,
            )
        )


def _drops(ax: Axes, row: OccludedConcept) -> None:
    """The probability as it is, with the own place covered, and with each random place covered."""
    values = row.random_R.tolist()
    ax.axvline(row.probability, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.plot(values, [1] * len(values), "o", color=REST, markersize=7, alpha=0.8)
    ax.plot(row.covered, 0, "o", color=AGAINST if row.drop > 0 else FOR, markersize=9)
    ax.set_yticks([0, 1], ["its place", "elsewhere"], fontsize=SMALL, color=INK)
    ax.tick_params(axis="y", length=0, pad=5)
    ax.set_ylim(1.6, -0.6)
    ax.set_xlim(-0.05, 1.05)
    ax.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=SMALL, color=MUTED)
    ax.tick_params(axis="x", length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color=LINE, linewidth=0.6)
    heading(ax, "", f"falls by {_points(row.drop)} points, elsewhere by {_points(row.random_drop)}", inches=3.0)


def _points(drop: float) -> str:
    """0.0264 -> "2.6"; no minus sign before zero."""
    return f"{round(100 * drop, 1) + 0.0:.1f}".replace("-", "−")
