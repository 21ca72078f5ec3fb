"""Differences with their intervals, drawn as dots on lines about zero: one SVG, without script, coloured by the page's style sheet.

Models are told apart by colour, shape and lane; an interval that keeps clear of zero has a filled marker, one that holds it a hollow one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dotcbm.report.record import Interval
from dotcbm.report.render.numbers import interval_text, number

__all__ = ["PlotRow", "beyond_chance", "difference_plot", "key_mark"]

_LABEL, _CHART, _LANE, _PAD = 290.0, 430.0, 13.0, 9.0
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class PlotRow:
    """One line: what differs, and a difference (a share) for each series; None where there is none."""

    label: str
    differences: tuple[Interval | None, ...]


def beyond_chance(difference: Interval | None) -> bool:
    """Whether the interval keeps clear of zero."""
    return difference is not None and difference.low is not None and difference.high is not None and difference.low * difference.high > 0


def difference_plot(rows: Sequence[PlotRow], names: Sequence[str], *, label: str) -> str:
    """The SVG, in points; empty without a row that has a difference.

    Args:
        rows: From top to bottom.
        names: Of the series.
        label: What the drawing shows, for readers who cannot see it.
    """
    ends = [v for row in rows for d in row.differences if d is not None for v in (d.value, d.low, d.high) if v is not None]
    if not ends:
        return ""
    reach = max(max(map(abs, ends)), 0.001) * 1.08
    step = next((tick for tick in _TICKS if reach / tick <= 4), 0.5)
    height_of = [max(sum(d is not None for d in row.differences), 1) * _LANE + 2 * _PAD for row in rows]
    bottom = sum(height_of)

    def x(value: float) -> float:
        return round(_LABEL + _CHART * (value + reach) / (2 * reach), 1)

    parts = []
    for i in range(-math.floor(reach / step), math.floor(reach / step) + 1):
        at, kind = x(i * step), "zero heavy" if i == 0 else "gridline"
        parts.append(f'<path class="{kind}" d="M{at} 0V{bottom:g}"/>')
        sign = "+" if i > 0 else ""
        parts.append(f'<text x="{at}" y="{bottom + 13:g}" text-anchor="middle">{sign}{number(i * step, "points")}</text>')
    parts.append(
        f'<text class="axis-label" x="{_LABEL + _CHART / 2:g}" y="{bottom + 28:g}" text-anchor="middle">difference in points</text>'
    )
    top = 0.0
    for row, height in zip(rows, height_of, strict=True):
        middle = top + height / 2
        parts.append(f'<path class="gridline" d="M0 {top:g}H{_LABEL + _CHART:g}"/>')
        parts.append(
            f'<text class="axis-label" x="{_LABEL - 12:g}" y="{middle + 3.5:g}" text-anchor="end">{escape(_short(row.label))}</text>'
        )
        lane = top + _PAD + _LANE / 2
        for i, (difference, name) in enumerate(zip(row.differences, names, strict=True)):
            if difference is None or difference.value is None:
                continue
            said = escape(f"{row.label}, {name}: {interval_text(difference, 'points')}")
            whisker = ""
            if difference.low is not None and difference.high is not None:
                whisker = f'<path class="series solid" d="M{x(difference.low)} {lane:g}H{x(difference.high)}"/>'
            shape = _shape(i, x(difference.value), lane, filled=beyond_chance(difference))
            parts.append(f'<g class="s{i % 6}"><title>{said}</title>{whisker}{shape}</g>')
            lane += _LANE
        top += height
    return (
        f'<svg class="differences" viewBox="0 0 {_LABEL + _CHART + 14:g} {bottom + 34:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def key_mark(index: int) -> str:
    """The mark of a series, for a legend."""
    shape = _shape(index, 14, 7, filled=True)
    return (
        f'<svg class="swatch s{index % 6}" viewBox="0 0 28 14" aria-hidden="true" focusable="false">'
        f'<path class="series solid" d="M1 7H27"/>{shape}</svg>'
    )


def _shape(index: int, x: float, y: float, *, filled: bool) -> str:
    paths = (
        f"M{x - 3.6:g} {y:g}a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
        f"M{x - 3.2:g} {y - 3.2:g}h6.4v6.4h-6.4z",
        f"M{x:g} {y - 4.2:g}l4 7h-8z",
        f"M{x:g} {y - 4.6:g}l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
        f"M{x - 4:g} {y - 2.8:g}h8l-4 7z",
        f"M{x - 4.4:g} {y - 2.2:g}h8.8v4.4h-8.8z",
    )
    return f'<path class="dot {"full" if filled else "hollow"}" d="{paths[index % len(paths)]}"/>'


def _short(text: str, most: int = 42) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
