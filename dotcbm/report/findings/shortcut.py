"""Rules on shortcuts: does the model read the background, and does the data invite it to?

The deciding experiment is the swap (`dotcbm.report.audit.shortcut`): other-class background against own-class background, the same seams
and paint in both. Without masks, groups and other splits can raise a suspicion that nothing here confirms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dotcbm.report.findings.rule import LEAST, find, listed, points
from dotcbm.report.record import SWAP_FALL_CLASS, AuditRecord, Figure, Finding, Interval

__all__ = ["SHORTCUT_FALL", "SHORTCUT_ODDS", "SHORTCUT_RULES"]

SHORTCUT_FALL = 0.02
"""Points of accuracy that another class's background may cost: the lower end of the 99 % interval must not exceed it."""

SHORTCUT_ODDS = 0.25
"""What it may take off the log-odds of the true class, likewise: a factor of 1.3 in the odds."""

_PASSED = 0.05  # a fall that is surely below this is a passed check
_USUAL = 0.05
_DATA, _STRONG_DATA = 0.10, 0.30  # above the largest class's share: worth a note; a planted shortcut
_LEAST_CLASS_FALL = 0.05  # for a class to be named in a title
_MOST_NAMED = 3
_NAMED = " The classes and concepts named each fall surely on these pictures, but many are tried: other draws may name others."


def _background(record: AuditRecord) -> list[Finding]:
    fall, odds = find(record, "suspects/swap_fall"), find(record, "suspects/swap_log_odds")
    if fall is None or odds is None or fall.value.n < LEAST:
        return []
    detail = _experiment(record, fall, odds)
    classes, concepts = _leaning(record)
    if fall.value.low is not None and fall.value.low > SHORTCUT_FALL:
        return [
            Finding(
                "shortcut/background",
                "critical",
                f"The model reads the background: on another class's background its accuracy falls by {points(fall.value.value)} points"
                f"{_through(classes, concepts)}.",
                detail + (_NAMED if classes or concepts else ""),
                fall.value,
                "points",
                SHORTCUT_FALL,
                f"lower end of the 99 % interval above {100 * SHORTCUT_FALL:g} points",
                fall.control,
                fall.control_label,
                "confirmed",
                "suspects",
                concepts,
                classes,
            )
        ]
    if odds.value.low is not None and odds.value.low > SHORTCUT_ODDS:
        return [
            Finding(
                "shortcut/background",
                "warning",
                f"The model leans on the background: another class's takes {odds.value.value:.2f} off the log-odds of the true class"
                f"{_through(classes, concepts)}.",
                f"{detail} It rarely decides here; it may where the object is hard to see.",
                odds.value,
                "number",
                SHORTCUT_ODDS,
                f"lower end of the 99 % interval above {SHORTCUT_ODDS:g}, a factor of {math.exp(SHORTCUT_ODDS):.2f} in the odds",
                odds.control,
                odds.control_label,
                "confirmed",
                "suspects",
                concepts,
                classes,
            )
        ]
    if fall.value.high is not None and fall.value.high < _PASSED:
        return [
            Finding(
                "shortcut/background",
                "good",
                "Another class's background costs hardly any accuracy.",
                detail,
                fall.value,
                "points",
                _PASSED,
                f"upper end of the 99 % interval below {100 * _PASSED:g} points, and no fall of the log-odds above {SHORTCUT_ODDS:g}",
                fall.control,
                fall.control_label,
                "confirmed",
                "suspects",
            )
        ]
    return [
        Finding(
            "shortcut/open",
            "note",
            f"The background swap cannot tell whether the model reads the background ({points(fall.value.value)} points).",
            f"{detail} Swap more pictures to decide it.",
            fall.value,
            "points",
            SHORTCUT_FALL,
            f"neither the lower end of the 99 % interval above {100 * SHORTCUT_FALL:g} points nor its upper end below {100 * _PASSED:g}",
            fall.control,
            fall.control_label,
            "open",
            "suspects",
        )
    ]


def _experiment(record: AuditRecord, fall: Figure, odds: Figure) -> str:
    said = [
        f"{fall.value.n} objects were put on the background of another picture of their own class and of another class. "
        f"Beyond what the exchange itself does, the other class's background costs {points(fall.value.value)} points "
        f"(99 % interval {points(fall.value.low)} to {points(fall.value.high)}) and takes {odds.value.value:.2f} off the log-odds of the "
        "true class."
    ]
    donor = find(record, "suspects/swap_to_donor")
    if donor is not None and donor.control is not None and donor.control.value is not None:
        said.append(
            f"The object is taken for the class that lent the background in {points(donor.value.value)} %, "
            f"and for that class on a background of its own in {points(donor.control.value)} %."
        )
    for row in record.groups:
        if row.kind == "split" and row.gap is not None and row.gap.value is not None:
            said.append(f"On {row.name} the accuracy is {points(row.gap.value)} points lower.")
    return " ".join(said)


def _leaning(record: AuditRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes that lose most, and the concepts that the swap showed to be carried by the background."""
    classes = [
        figure.key.removeprefix(SWAP_FALL_CLASS)
        for figure in record.figures
        if figure.key.startswith(SWAP_FALL_CLASS) and (figure.value.value or 0.0) >= _LEAST_CLASS_FALL and (figure.value.low or 0.0) > 0
    ]
    confirmed = [suspect for suspect in record.suspects if suspect.verdict == "confirmed"]

    def carried(index: int) -> float:
        suspect = confirmed[index]
        drop, control = suspect.swap_drop or Interval(None), suspect.control_drop or Interval(None)
        return suspect.weight * ((drop.value or 0.0) - (control.value or 0.0))

    order = sorted(range(len(confirmed)), key=lambda i: (-carried(i), i))
    concepts = dict.fromkeys(confirmed[i].concept for i in order)
    return tuple(classes[:_MOST_NAMED]), tuple(concepts)[:_MOST_NAMED]


def _through(classes: tuple[str, ...], concepts: tuple[str, ...]) -> str:
    most = f", most for {listed(classes)}" if classes else ""
    through = f", through {listed(concepts)}" if concepts else ""
    return most + through


def _usual(record: AuditRecord) -> list[Finding]:
    """Without masks: pictures in the group that a class was trained in most against its others."""
    figure = find(record, "groups/usual_gap")
    if figure is None or figure.value.low is None or figure.value.low <= _USUAL:
        return []
    proven = find(record, "suspects/swap_fall") is not None
    return [
        Finding(
            "shortcut/groups",
            "warning" if proven else "critical",
            f"Outside the group that a class was trained in most, the accuracy is {points(figure.value.value)} points lower.",
            "Groups divide the classes by something else, most often the place. "
            + figure.note
            + ("" if proven else " Without masks no experiment can say that it is the background."),
            figure.value,
            "points",
            _USUAL,
            f"lower end of the interval above {100 * _USUAL:g} points",
            Interval(0.0),
            "no difference",
            "open",
            "groups",
        )
    ]


def _data(record: AuditRecord) -> list[Finding]:
    """A fact of the data: the background's colours tell the class."""
    figure = find(record, "suspects/background_colours")
    if figure is None or figure.control is None or figure.control.value is None or figure.value.low is None:
        return []
    threshold = figure.control.value + _DATA
    if figure.value.low <= threshold:
        return []
    strong = figure.value.low > figure.control.value + _STRONG_DATA
    return [
        Finding(
            "data/background",
            "warning" if strong else "note",
            f"The data invites a shortcut: the background's colours alone tell {figure.value.value:.0%} of the classes.",
            figure.note + " Accuracy on this split proves less than it seems; whether this model uses it, the background swap says.",
            figure.value,
            "percent",
            round(threshold, 6),
            f"lower end of the interval more than {100 * _DATA:g} points above the largest class's share",
            figure.control,
            figure.control_label,
            "confirmed",
            "suspects",
        )
    ]


SHORTCUT_RULES: tuple[Callable[[AuditRecord], list[Finding]], ...] = (_background, _usual, _data)
"""All rules of this file."""
