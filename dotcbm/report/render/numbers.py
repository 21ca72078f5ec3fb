"""How the figures of an audit are written: with unit, interval and what was counted, and with a true minus sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dotcbm.report.record import Interval, Unit

__all__ = ["NO_CONTROL", "UNIT_SIGN", "cases", "interval_text", "logit", "number", "signed", "span", "with_unit"]

UNIT_SIGN: dict[Unit, str] = {"percent": " %", "points": " points", "number": "", "bits": " bits"}
NO_CONTROL = "no control: the figure itself decides"
"""What is said of findings that have none, such as counts of labels."""

_MINUS = "−"
_THIN = "\u202f"  # between thousands: the line must not break there


def number(value: float | None, unit: Unit = "number") -> str:
    """The number alone: shares times 100, three significant digits otherwise; a dash for what is not defined.

    >>> number(-0.0312, "points"), number(0.48812, "percent"), number(0.000031), number(None)
    ('−3.1', '48.8', '0.000031', '—')
    """
    if value is None:
        return "—"
    if unit in ("percent", "points"):
        text = f"{100 * value:.1f}"
    elif unit == "bits":
        text = f"{value:.2f}"
    elif float(value).is_integer():
        text = f"{value:,.0f}".replace(",", _THIN)
    else:
        digits = max(2 - math.floor(math.log10(abs(value))), 0)
        text = f"{value:.{digits}f}".rstrip("0") if digits else f"{value:,.0f}".replace(",", _THIN)
        text = text.rstrip(".")
    if text.strip("-0.") == "":
        text = text.lstrip("-")
    return text.replace("-", _MINUS)


def signed(value: float | None, unit: Unit = "number") -> str:
    """As `number`, with a plus sign before what is added.

    >>> signed(0.25, "points"), signed(-1.5), signed(0.0, "points")
    ('+25.0', '−1.5', '0.0')
    """
    text = number(value, unit)
    return text if value is None or value <= 0 or text.strip("0.") == "" else f"+{text}"


def logit(value: float) -> str:
    """A contribution to a logit, signed, with two decimals: those of one list are compared.

    >>> logit(1.4), logit(-0.001)
    ('+1.40', '0.00')
    """
    text = f"{value:+.2f}"
    return "0.00" if text.strip("+-0.") == "" else text.replace("-", _MINUS)


def with_unit(value: float | None, unit: Unit) -> str:
    """The number with its unit.

    >>> with_unit(0.05, "points"), with_unit(None, "percent")
    ('5.0 points', 'not defined')
    """
    return "not defined" if value is None else number(value, unit) + UNIT_SIGN[unit]


def span(interval: Interval, unit: Unit) -> str:
    """The ends of the interval; empty where there is none. Its coverage is said where it is not 95 %.

    >>> span(Interval(0.5, 0.4, 0.61, 80), "percent")
    '40.0 to 61.0'
    """
    if interval.low is None or interval.high is None:
        return ""
    said = "" if interval.level == 0.95 else f" ({round(100 * interval.level)} % interval)"
    return f"{number(interval.low, unit)} to {number(interval.high, unit)}{said}"


def cases(interval: Interval) -> str:
    """What was counted: "n = 730 pairs of picture and concept"; empty where nothing was."""
    return f"n = {number(interval.n)} {interval.over}" if interval.n else ""


def interval_text(interval: Interval | None, unit: Unit) -> str:
    """Everything in one line.

    >>> interval_text(Interval(0.5, 0.4, 0.61, 80), "percent")
    '50.0 % (95 % interval 40.0 to 61.0; n = 80 pictures)'
    """
    if interval is None:
        return "not measured"
    ends = span(replace(interval, level=0.95), unit)
    coverage = f"{round(100 * interval.level)} % interval"
    said: Sequence[str] = [text for text in (f"{coverage} {ends}" if ends else "", cases(interval)) if text]
    return with_unit(interval.value, unit) + (f" ({'; '.join(said)})" if said else "")
