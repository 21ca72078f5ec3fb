"""The charts of an audit as SVG text: drawn here, so that the page needs no script to show them.

Colours are classes of the page's style sheet (`.s0` ... `.s5`, Okabe and Ito's set), and each series also has its own
marker and dash, so that no chart is read by colour alone. Every text is escaped. Charts are drawn for a width of 360
units, the narrowest page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from dotcbm.report.record import Interval, Reliability, Unit
from dotcbm.report.render.numbers import interval_text, number, with_unit

__all__ = ["Series", "domain_of", "dot_range", "icon", "line_chart", "reliability_chart", "swatch"]

_SMALL = 0.1  # shares up to which an axis from 0 to 100 % shows no difference
_ICONS = {
    "critical": '<path class="fill" d="M5 1h6l4 4v6l-4 4H5l-4-4V5z"/><path class="cut" d="M8 4v5M8 11v1.4"/>',
    "warning": '<path class="fill" d="M8 1l7.3 13.5H.7z"/><path class="cut" d="M8 6v4M8 11.6v1.4"/>',
    "note": '<circle class="fill" cx="8" cy="8" r="7"/><path class="cut" d="M8 7v5M8 3.8v1.4"/>',
    "good": '<rect class="fill" x="1" y="1" width="14" height="14" rx="3"/><path class="cut" d="M4 8.4l2.8 2.8L12 5.4"/>',
    "confirmed": '<circle class="fill" cx="8" cy="8" r="6"/>',
    "refuted": '<circle class="line" cx="8" cy="8" r="6"/><path class="line" d="M3.8 12.2l8.4-8.4"/>',
    "open": '<circle class="line" cx="8" cy="8" r="6"/><path class="fill" d="M8 2a6 6 0 0 1 0 12z"/>',
    "right": '<path class="line" d="M2.5 8.6l3.6 3.6L13.5 4"/>',
    "wrong": '<path class="line" d="M3 3l10 10M13 3L3 13"/>',
}
_MARKERS = (
    '<circle cx="{x}" cy="{y}" r="3"/>',
    '<rect x="{x0}" y="{y0}" width="5.6" height="5.6"/>',
    '<path d="M{x} {y}m0 -3.8l3.6 6.4h-7.2z"/>',
    '<path d="M{x} {y}m0 -4l4 4l-4 4l-4 -4z"/>',
    '<path class="open" d="M{x} {y}m-3 -3l6 6m0 -6l-6 6"/>',
    '<path class="open" d="M{x} {y}m-3.6 0h7.2m-3.6 -3.6v7.2"/>',
)


@dataclass(frozen=True)
class Series:
    """One line: its name, a value for each x (None leaves a gap), and half the height of a band about it."""

    name: str
    values: Sequence[float | None]
    spread: Sequence[float] | None = None


def icon(name: str) -> str:
    """A shape for a severity, a verdict, right or wrong; the word must stand beside it."""
    return f'<svg class="icon i-{name}" viewBox="0 0 16 16" aria-hidden="true" focusable="false">{_ICONS[name]}</svg>'


def swatch(index: int) -> str:
    """Line and marker of series `index`, for a legend."""
    marker = _marker(index, 14, 7)
    return (
        f'<svg class="swatch s{index % 6}" viewBox="0 0 28 14" aria-hidden="true" focusable="false">'
        f'<path class="series" d="M1 7H27"/><g class="marker">{marker}</g></svg>'
    )


def dot_range(
    measured: Interval,
    unit: Unit = "percent",
    *,
    control: Interval | None = None,
    threshold: float | None = None,
    domain: tuple[float, float] | None = None,
    tall: bool = False,
) -> str:
    """A dot with its interval, the control as a hollow diamond with its own, and the threshold as a dashed line.

    Args:
        measured: Drawn in the upper lane if there is a control.
        unit: Of all.
        control: Of the control.
        threshold: None for none.
        domain: Values at the left and right end; chosen from what is shown if None, zero always in it. Shares stand on 0 to 100 %,
            but for small ones on an axis with numbers.
        tall: With numbers at the ends of the axis.
    """
    if measured.value is None:
        return ""
    low, high = domain or domain_of([measured, control, None if threshold is None else Interval(threshold)])
    if domain is None and unit == "percent" and low >= 0 and high <= 1 and not (tall and high <= _SMALL):
        low, high = 0.0, 1.0
    width, left, right = (240.0, 8.0, 8.0) if tall else (120.0, 5.0, 5.0)
    two = control is not None and control.value is not None
    lanes = (9.0, 23.0) if two else (12.0, 12.0)
    height = (32.0 if two else 24.0) + (14.0 if tall else 0.0)
    base = 32.0 if two else 24.0

    def x(value: float) -> float:
        return round(left + (width - left - right) * (min(max(value, low), high) - low) / (high - low), 2)

    drawn = [f'<path class="axis" d="M{left} {base - 0.5}H{width - right}"/>']
    if low < 0 < high:
        drawn.append(f'<path class="zero" d="M{x(0)} 1V{base}"/>')
    if threshold is not None:
        drawn.append(f'<path class="threshold" d="M{x(threshold)} 0V{base}"/>')
    if two and control is not None and control.value is not None:
        drawn.append(_whisker(control, x, lanes[1], "control"))
        drawn.append(f'<path class="control" d="M{x(control.value)} {lanes[1]}m0 -5l5 5l-5 5l-5 -5z"/>')
    drawn.append(_whisker(measured, x, lanes[0], "measured"))
    drawn.append(f'<circle class="measured" cx="{x(measured.value)}" cy="{lanes[0]}" r="4.5"/>')
    if tall:
        drawn.append(f'<text x="{left - 4}" y="{base + 11}">{number(low, unit)}</text>')
        drawn.append(f'<text x="{width - right + 4}" y="{base + 11}" text-anchor="end">{number(high, unit)}</text>')
    said = f"measured {interval_text(measured, unit)}"
    said += f"; control {interval_text(control, unit)}" if control else ""
    said += f"; threshold {with_unit(threshold, unit)}" if threshold is not None else ""
    kind = "range tall" if tall else "range"
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(said, quote=True)}">{"".join(drawn)}</svg>'
    )


def domain_of(intervals: Sequence[Interval | None]) -> tuple[float, float]:
    """Round ends that hold zero and everything of the intervals.

    >>> domain_of([Interval(0.34, 0.27, 0.41), Interval(-0.02), None])
    (-0.1, 0.5)
    """
    known = [end for row in intervals if row for end in (row.value, row.low, row.high) if end is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    if high == low:
        return 0.0, 1.0
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0) if (high - low) / (power * part) <= 6)
    return float(f"{math.floor(low / step + 1e-9) * step:.6g}"), float(f"{math.ceil(high / step - 1e-9) * step:.6g}")


def line_chart(
    lines: Sequence[Series],
    *,
    x_values: Sequence[float],
    x_label: str,
    y_label: str,
    label: str,
    mark_x: float | None = None,
    mark_label: str = "",
    from_zero: bool = True,
) -> str:
    """Shares against x, in percent.

    Args:
        lines: Six at most.
        x_values: Rising; one for each value of a line.
        x_label, y_label: Of the axes.
        label: What the chart shows, for those who cannot see it.
        mark_x: Where a dashed line stands.
        mark_label: What it means.
        from_zero: Whether the vertical axis begins at 0; else just below the lowest value.
    """
    known = [value for line in lines for value in line.values if value is not None]
    top = min(max([*known, 0.05]) * 1.08, 1.0) if max(known, default=1.0) <= 1 else max(known)
    floor = 0.0 if from_zero else max(math.floor(20 * (min(known, default=0.0) - 0.02)) / 20, 0.0)
    ticks = _ticks(floor, max(top, floor + 0.05))
    low, high = ticks[0], ticks[-1]
    left, right, upper, lower = 40.0, 350.0, 12.0, 186.0
    x0, x1 = min(x_values), max(x_values)

    def x(value: float) -> float:
        return round(left + (right - left) * ((value - x0) / (x1 - x0) if x1 > x0 else 0.5), 2)

    def y(value: float) -> float:
        return round(lower - (lower - upper) * (min(max(value, low), high) - low) / (high - low), 2)

    drawn = []
    for tick in ticks:
        drawn.append(f'<path class="gridline" d="M{left} {y(tick)}H{right}"/>')
        drawn.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{100 * tick:.0f}</text>')
    step = max(1, math.ceil(len(x_values) / 9))
    for value in x_values[::step]:
        drawn.append(f'<text x="{x(value)}" y="{lower + 16}" text-anchor="middle">{value:g}</text>')
    if mark_x is not None and x0 <= mark_x <= x1:
        drawn.append(f'<path class="threshold" d="M{x(mark_x)} {upper - 8}V{lower}"/>')
        anchor, shift = ("end", -5) if mark_x > (x0 + x1) / 2 else ("start", 5)
        drawn.append(f'<text x="{x(mark_x) + shift}" y="{upper - 1}" text-anchor="{anchor}">{escape(mark_label)}</text>')
    for index, line in enumerate(lines):
        points = [(x(at), y(value)) for at, value in zip(x_values, line.values) if value is not None]
        if line.spread is not None:
            drawn.append(_band(index, line, x_values, x, y))
        path = "M" + "L".join(f"{px} {py}" for px, py in points) if points else ""
        markers = "".join(_marker(index, px, py) for px, py in points)
        drawn.append(f'<g class="s{index % 6}"><path class="series" d="{path}"/><g class="marker">{markers}</g></g>')
    drawn.append(f'<text class="axis-label" x="{(left + right) / 2}" y="{lower + 34}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (upper + lower) / 2
    drawn.append(f'<text class="axis-label" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return f'<svg class="chart" viewBox="0 0 360 226" role="img" aria-label="{escape(label, quote=True)}">{"".join(drawn)}</svg>'


def reliability_chart(reliability: Reliability) -> str:
    """Accuracy against confidence; the larger the dot, the more pictures. On the diagonal confidence is honest."""
    total = max(sum(reliability.count_S), 1)
    left, right, upper, lower = 40.0, 240.0, 16.0, 216.0
    drawn = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = lower - (lower - upper) * tick
        drawn.append(f'<path class="gridline" d="M{left} {at}H{right}"/>')
        drawn.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor="end">{100 * tick:.0f}</text>')
        drawn.append(f'<text x="{left + (right - left) * tick}" y="{lower + 16}" text-anchor="middle">{100 * tick:.0f}</text>')
    drawn.append(f'<path class="threshold" d="M{left} {lower}L{right} {upper}"/>')
    said = []
    for count, confidence, accuracy in zip(reliability.count_S, reliability.confidence_S, reliability.accuracy_S):
        if not count or confidence is None or accuracy is None:
            continue
        px, py = left + (right - left) * confidence, lower - (lower - upper) * accuracy
        honest = lower - (lower - upper) * confidence
        drawn.append(f'<path class="whisker measured" d="M{px:.2f} {honest:.2f}V{py:.2f}"/>')
        drawn.append(f'<circle class="measured soft" cx="{px:.2f}" cy="{py:.2f}" r="{3 + 11 * math.sqrt(count / total):.2f}"/>')
        said.append(f"confidence {number(confidence, 'percent')} %, accuracy {number(accuracy, 'percent')} %, {count} pictures")
    drawn.append(f'<text class="axis-label" x="{(left + right) / 2}" y="{lower + 34}" text-anchor="middle">confidence, %</text>')
    drawn.append('<text class="axis-label" transform="translate(11 116) rotate(-90)" text-anchor="middle">accuracy, %</text>')
    label = escape("Reliability: " + "; ".join(said), quote=True)
    return f'<svg class="chart square" viewBox="0 0 260 256" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _whisker(interval: Interval, x: Callable[[float], float], lane: float, kind: str) -> str:
    if interval.low is None or interval.high is None:
        return ""
    a, b = x(interval.low), x(interval.high)
    return f'<path class="whisker {kind}" d="M{a} {lane}H{b}M{a} {lane - 3}v6M{b} {lane - 3}v6"/>'


def _band(index: int, line: Series, x_values: Sequence[float], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    rows = [(x(at), v, s) for at, v, s in zip(x_values, line.values, line.spread or ()) if v is not None]
    if not rows:
        return ""
    upper = "L".join(f"{px} {y(v + s)}" for px, v, s in rows)
    lower = "L".join(f"{px} {y(v - s)}" for px, v, s in reversed(rows))
    return f'<path class="band s{index % 6}" d="M{upper}L{lower}z"/>'


def _marker(index: int, x: float, y: float) -> str:
    return _MARKERS[index % 6].format(x=x, y=y, x0=round(x - 2.8, 2), y0=round(y - 2.8, 2))


def _ticks(low: float, high: float) -> list[float]:
    """Four to six round shares from at most `low` to at least `high`."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, math.inf) if (high - low) / s <= 5)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 4) for i in range(first, max(last, first + 1) + 1)]
