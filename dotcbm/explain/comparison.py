"""Figures of an intervention: the concepts that were changed by hand, and the classes that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    from dotcbm.explain.explanation import Explanation

__all__ = ["plot_class_change", "plot_comparison", "plot_concept_change", "plot_weight_change"]

_MOST_CHANGES = 10  # concepts drawn of an intervention


def plot_comparison(explanation: Explanation, *, n: int = 4) -> Figure:
    """An intervention: the concepts, or the weights, that were changed, and the classes before and after.

    Args:
        explanation: The result of `Explanation.intervene` or `reweigh`.
        n: How many classes.

    Raises:
        ValueError: The explanation comes from no intervention.
    """
    before = _before(explanation)
    aspect = room_aspect(explanation.picture_3HW)
    was, now = before.predicted, explanation.predicted
    title = before.predicted_class if was == now else f"{before.predicted_class} → {explanation.predicted_class}"
    lines = 1 + wrapped(title, inches=3.0, size=TITLE + 2, lines=2, bold=True).count("\n")
    top = MARGIN + 0.42 + 0.27 * lines
    by_weight = not _changes(explanation) and bool(_weight_changes(explanation))
    num_changes = len((_weight_changes if by_weight else _changes)(explanation)[:_MOST_CHANGES])
    body = max(3.0 * aspect, 0.5 * num_changes + 0.3, 0.5 * n)
    left_changes = MARGIN + 3.0 + 0.5 + LABELS
    left_classes = left_changes + 2.6 + 0.5 + LABELS
    figure = new_figure(left_classes + 2.4 + MARGIN, top + body + MARGIN)
    ax = place(figure, left=MARGIN, top=top, width=3.0, height=3.0 * aspect)
    draw_picture(ax, explanation.picture_3HW)
    old, new = percent(float(before.class_K[was])), percent(float(explanation.class_K[now]))
    heading(ax, title, f"{old} before, {new} after", inches=3.0, size=TITLE + 2, lines=2)
    height = min(body - 0.25, 0.75 * max(num_changes, 1))
    draw_change = plot_weight_change if by_weight else plot_concept_change
    draw_change(explanation, ax=place(figure, left=left_changes, top=top, width=2.6, height=height))
    plot_class_change(explanation, n=n, ax=place(figure, left=left_classes, top=top, width=2.4, height=min(body, 0.75 * n)))
    return figure


def plot_concept_change(explanation: Explanation, *, ax: Axes | None = None, title: str = "Concepts changed by hand") -> Figure:
    """The concepts that an intervention changed most, ten at most: from the probability before to the one after."""
    before = _before(explanation)
    every = _changes(explanation)
    changed = every[:_MOST_CHANGES]
    if ax is None:
        height = 0.5 * max(len(changed), 1) + 0.2
        figure = new_figure(LABELS + 2.6 + 2 * MARGIN, height + 0.95 + 2 * MARGIN)
        ax = place(figure, left=MARGIN + LABELS, top=MARGIN + 0.7, width=2.6, height=height)
    for row, j in enumerate(changed):
        old, new = float(before.concept_M[j]), float(explanation.concept_M[j])
        ax.plot([old, new], [row, row], color=LINE, linewidth=3, zorder=1, solid_capstyle="round")
        ax.plot(old, row, "o", color=REST, markersize=8, zorder=2)
        ax.plot(new, row, "o", color=FOR if new > old else AGAINST, markersize=9, zorder=3)
        middle = min(0.9, max(0.1, (old + new) / 2))  # keeps the text off the names on the left
        ax.annotate(
            f"{percent(old)} → {percent(new)}", (middle, row), xytext=(0, 7), textcoords="offset points", ha="center",
            fontsize=NAME, color=INK,
        )  # fmt: skip
    ax.set_yticks(
        range(len(changed)),
        [wrapped(explanation.concept_names[j], inches=LABELS - 0.1, size=NAME) for j in changed],
        fontsize=NAME,
        color=INK,
    )
    ax.set_ylim(max(len(changed), 1) - 0.4, -0.6)
    ax.set_xlim(-0.12, 1.12)
    ax.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=SMALL, color=MUTED)
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color=LINE, linewidth=0.6)
    subtitle = "grey before, coloured after"
    if len(every) > len(changed):
        subtitle += f"; {len(changed)} of {len(every)} shown"
    heading(ax, title, subtitle if every else "none", inches=LABELS + 2.6, shift=LABELS)
    return cast(Figure, ax.figure)


def plot_weight_change(explanation: Explanation, *, ax: Axes | None = None) -> Figure:
    """The contributions to the explained class that other weights changed most, ten at most: before and after, as bars."""
    before = _before(explanation)
    every = _weight_changes(explanation)
    changed = every[:_MOST_CHANGES]
    if ax is None:
        height = 0.6 * max(len(changed), 1) + 0.2
        figure = new_figure(LABELS + 2.6 + 2 * MARGIN, height + 0.95 + 2 * MARGIN)
        ax = place(figure, left=MARGIN + LABELS, top=MARGIN + 0.7, width=2.6, height=height)
    values = [(float(before.contribution_M[j]), float(explanation.contribution_M[j])) for j in changed]
    for row, (old, new) in enumerate(values):
        for offset, value, colour in ((-0.19, old, REST), (0.19, new, FOR if new > old else AGAINST)):
            ax.barh(row + offset, value, height=0.34, color=colour)
            ax.annotate(
                signed(value), (value, row + offset), xytext=(4 if value >= 0 else -4, 0), textcoords="offset points", va="center",
                ha="left" if value >= 0 else "right", fontsize=NAME, color=INK,
            )  # fmt: skip
    ax.set_yticks(
        range(len(changed)),
        [wrapped(explanation.concept_names[j], inches=LABELS - 0.1, size=NAME) for j in changed],
        fontsize=NAME,
        color=INK,
    )
    low, high = min([0.0, *(v for pair in values for v in pair)]), max([0.0, *(v for pair in values for v in pair)])
    room = 0.3 * ((high - low) or 1)  # for the numbers at the ends of the bars
    ax.set_xlim(low - (room if low < 0 else 0.02 * room), high + room)
    ax.set_ylim(max(len(changed), 1) - 0.4, -0.6)
    ax.set_xticks([])
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.axvline(0, color=INK, linewidth=0.9)
    subtitle = f"what they add to {explanation.target_class}; grey before"
    if len(every) > len(changed):
        subtitle += f"; {len(changed)} of {len(every)} shown"
    heading(ax, "Weights changed by hand", subtitle, inches=LABELS + 2.6, shift=LABELS)
    return cast(Figure, ax.figure)


def plot_class_change(explanation: Explanation, *, n: int = 4, ax: Axes | None = None) -> Figure:
    """The most probable classes of before and after an intervention, both probabilities as bars."""
    before = _before(explanation)
    old_K, new_K = before.class_K, explanation.class_K
    classes = old_K.maximum(new_K).argsort(descending=True, stable=True)[:n].tolist()
    if ax is None:
        figure = new_figure(LABELS + 2.4 + 2 * MARGIN, 0.6 * len(classes) + 0.7 + 2 * MARGIN)
        ax = place(figure, left=MARGIN + LABELS, top=MARGIN + 0.7, width=2.4, height=0.6 * len(classes))
    for row, k in enumerate(classes):
        for offset, value, colour in ((-0.19, float(old_K[k]), REST), (0.19, float(new_K[k]), FOR)):
            ax.barh(row + offset, value, height=0.34, color=colour)
            ax.annotate(
                percent(value), (value, row + offset), xytext=(4, 0), textcoords="offset points", va="center", fontsize=NAME, color=INK
            )
    names = [wrapped(explanation.class_names[k], inches=LABELS - 0.1, size=NAME) for k in classes]
    ax.set_yticks(range(len(classes)), names, fontsize=NAME, color=INK)
    ax.set_ylim(len(classes) - 0.4, -0.6)
    ax.set_xlim(0, 1.25)
    ax.set_xticks([])
    ax.tick_params(length=0, pad=5)
    ax.spines[:].set_visible(False)
    ax.axvline(0, color=INK, linewidth=0.9)
    heading(ax, "Classes that follow", "grey before, blue after", inches=LABELS + 2.4, shift=LABELS)
    return cast(Figure, ax.figure)


def _changes(explanation: Explanation) -> list[int]:
    """The concepts that an intervention changed, most first."""
    change_M = (explanation.concept_M - _before(explanation).concept_M).abs()
    return [j for j in change_M.argsort(descending=True, stable=True).tolist() if change_M[j] > 0]


def _weight_changes(explanation: Explanation) -> list[int]:
    """The concepts whose weights were changed, those first whose contribution to the explained class changed most."""
    before, factor_KM = _before(explanation), explanation.factor_KM
    if factor_KM is None:
        return []
    old_KM = factor_KM.new_ones(factor_KM.shape) if before.factor_KM is None else before.factor_KM
    changed_M = (factor_KM != old_KM).any(0)
    change_M = (explanation.contribution_M - before.contribution_M).abs()
    return [j for j in change_M.argsort(descending=True, stable=True).tolist() if changed_M[j]]


def _before(explanation: Explanation) -> Explanation:
    if explanation.before is None:
        raise ValueError("this explanation comes from no intervention; call explanation.intervene({concept: probability}) first")
    return explanation.before
