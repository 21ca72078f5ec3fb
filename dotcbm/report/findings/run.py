"""What an auditor should know, by fixed rules from the figures of a record. Each rule states its threshold, and its control.

A rule looks at an end of an interval, not at its middle: what the pictures cannot decide is no finding. A check that was clearly passed
is a finding too ("good"), so that the list is no mere charge sheet.

K classes, M concepts.
"""

from __future__ import annotations

from collections.abc import Callable

from dotcbm.report.findings.concepts import CONCEPT_RULES
from dotcbm.report.findings.experts import EXPERT_RULES
from dotcbm.report.findings.rule import LEAST, find, listed, points
from dotcbm.report.findings.shortcut import SHORTCUT_RULES
from dotcbm.report.record import AuditRecord, Finding, Interval, Section

__all__ = ["RULES", "find_all", "summary"]

_GAP, _GROUP_MARGIN, _CLASS_MARGIN, _SURE, _CALIBRATED = 0.05, 0.10, 0.20, 0.05, 0.05
_LEAST_OF_CLASS = 10  # pictures: a class with fewer is not called weak
_FIRST = ("shortcut/background", "data/background")  # among findings of one severity
_SEVERITIES = ("critical", "warning", "note", "good")


def find_all(record: AuditRecord) -> tuple[Finding, ...]:
    """The findings of a record, the gravest first; among equals the one farthest from its threshold, and a proven shortcut before all."""
    found = [finding for rule in RULES for finding in rule(record)]

    def order(finding: Finding) -> tuple[int, int, float, str]:
        distance = abs((finding.measured.value or 0.0) - finding.threshold)
        first = _FIRST.index(finding.key) if finding.key in _FIRST else len(_FIRST)
        return _SEVERITIES.index(finding.severity), first, -distance, finding.key

    return tuple(sorted(found, key=order))


def summary(record: AuditRecord) -> str:
    """Two or three sentences on a record whose findings are known."""
    accuracy = find(record, "classes/accuracy")
    control = None if accuracy is None else accuracy.control
    said = []
    if accuracy is not None and accuracy.value.value is not None:
        against = "" if control is None or control.value is None else f", where {accuracy.control_label} gets {control.value:.1%}"
        limit = dict(record.card.audit).get("limit", "None")
        drawn = f" drawn from the split {record.card.split}" if limit != "None" else ""
        n = f"{accuracy.value.n} pictures" if accuracy.value.n != 1 else "1 picture"
        said.append(f"{record.card.bottleneck} classifies {accuracy.value.value:.1%} of {n}{drawn} rightly{against}.")
    if record.card.split == "train":
        said.append("These are the pictures that it was trained on: no figure here says how it does on others.")
    bad = [finding for finding in record.findings if finding.severity in ("critical", "warning")]
    good = sum(finding.severity == "good" for finding in record.findings)
    if bad:
        said.append(f"{f'Gravest of {len(bad)} findings' if len(bad) > 1 else 'The finding'} against it: {bad[0].title}")
    else:
        said.append("No rule of the audit raised a warning.")
    said.append(f"{good} {'check was' if good == 1 else 'checks were'} passed, {len(record.absent)} could not be made.")
    return " ".join(said)


def _no_skill(record: AuditRecord) -> list[Finding]:
    """Is the model better than an answer that looks at no picture?"""
    found: list[Finding] = []
    questions: tuple[tuple[str, str, Section, str, bool], ...] = (
        ("classes/accuracy", "classes/no_skill", "classes", "The classes are found no more often than by saying", True),
        ("concepts/error", "concepts/no_skill", "concepts", "The concepts are wrong no less often than by", False),
    )
    for key, name, section, said, higher in questions:
        figure = find(record, key)
        if figure is None or figure.control is None or figure.control.value is None or figure.value.n < LEAST:
            continue
        low, high, blind = figure.value.low, figure.value.high, figure.control.value
        if low is None or high is None or (low > blind if higher else high < blind):
            continue
        sure = high <= blind if higher else low >= blind
        title = f"{said} {figure.control_label}."
        found.append(
            Finding(
                name,
                "warning" if sure else "note",
                title if sure else f"The pictures cannot rule it out: {title[0].lower()}{title[1:]}",
                "The control looks at no picture. A model that is not better than it has learned nothing that this split shows.",
                figure.value,
                "percent",
                blind,
                f"{'upper' if higher == sure else 'lower'} end of the interval {'not above' if higher else 'not below'} the control",
                figure.control,
                figure.control_label,
                "confirmed" if sure else "open",
                section,
            )
        )
    return found


def _worst_group(record: AuditRecord) -> list[Finding]:
    figure = find(record, "groups/worst_group_accuracy")
    if figure is None or figure.control is None or figure.value.high is None or figure.control.value is None:
        return []
    threshold = figure.control.value - _GROUP_MARGIN
    if figure.value.high >= threshold:
        return []
    name = figure.label.partition("(")[2].removesuffix(")")
    return [
        Finding(
            "groups/worst",
            "warning",
            f"{name} is recognised far less often than the other pictures.",
            "Accuracy on the worst sub-population of the data. It is the worst of several: look at its interval and at its size.",
            figure.value,
            "percent",
            round(threshold, 6),
            f"upper end of the interval more than {_GROUP_MARGIN:.0%} below the accuracy on all other pictures",
            figure.control,
            figure.control_label,
            "confirmed",
            "groups",
        )
    ]


def _weak_classes(record: AuditRecord) -> list[Finding]:
    accuracy = find(record, "classes/accuracy")
    if accuracy is None or accuracy.value.value is None:
        return []
    threshold = accuracy.value.value - _CLASS_MARGIN
    weak = [r for r in record.classes if r.recall.n >= _LEAST_OF_CLASS and r.recall.high is not None and r.recall.high < threshold]
    if not weak:
        return []
    weak.sort(key=lambda row: row.recall.value or 0.0)
    names = tuple(row.name for row in weak)
    mistaken = f" {names[0]} is most often taken for {weak[0].mistaken_for[0][0]}." if weak[0].mistaken_for else ""
    return [
        Finding(
            "classes/weak",
            "warning",
            f"{len(names)} of {len(record.classes)} classes are found far less often than the average: {listed(names)}.",
            f"Share of each class's pictures that is found; the figure is the worst class's.{mistaken}",
            weak[0].recall,
            "percent",
            round(threshold, 6),
            f"upper end of the interval more than {_CLASS_MARGIN:.0%} below the accuracy, {_LEAST_OF_CLASS} pictures at least",
            accuracy.value,
            "accuracy on all pictures",
            "confirmed",
            "classes",
            classes=names,
        )
    ]


def _calibration(record: AuditRecord) -> list[Finding]:
    figure, error = find(record, "classes/overconfidence"), find(record, "classes/calibration_error")
    found: list[Finding] = []
    if figure is not None and figure.value.n >= LEAST and figure.value.low is not None and figure.value.low > _SURE:
        found.append(
            Finding(
                "classes/overconfident",
                "warning",
                f"The model is surer than it is right, by {points(figure.value.value)} points.",
                "Mean probability of the predicted class minus accuracy. Its probabilities should not be read as chances of being right.",
                figure.value,
                "points",
                _SURE,
                f"lower end of the interval above {100 * _SURE:g} points",
                verdict="confirmed",
                section="classes",
            )
        )
    if error is not None and error.value.n >= LEAST and error.value.high is not None and error.value.high < _CALIBRATED:
        found.append(
            Finding(
                "classes/calibrated",
                "good",
                "The model's confidence can be read as a chance of being right.",
                "Expected calibration error over 15 bins.",
                error.value,
                "percent",
                _CALIBRATED,
                f"upper end of the interval below {_CALIBRATED:.0%}",
                verdict="confirmed",
                section="classes",
            )
        )
    return found


def _splits(record: AuditRecord) -> list[Finding]:
    found: list[Finding] = []
    for row in record.groups:
        if row.kind != "split" or row.gap is None or row.gap.n < LEAST or row.gap.low is None or row.gap.low <= _GAP:
            continue
        figure = find(record, f"groups/gap_{row.name}")
        control = None if figure is None else figure.control
        chance = None if control is None else control.high
        found.append(
            Finding(
                f"groups/split/{row.name}",
                "warning",
                f"On {row.name} the accuracy is {100 * (row.gap.value or 0):.0f} points lower.",
                f"Accuracy on {record.card.split} minus {row.name}, of the same objects where names match. The control says whether chance "
                "could do it, not what in the pictures does.",
                row.gap,
                "points",
                _GAP,
                f"lower end of the interval above {100 * _GAP:g} points",
                control or Interval(0.0),
                figure.control_label if figure is not None and control is not None else "no difference",
                "open" if chance is None else "confirmed" if row.gap.low > chance else "refuted",
                "groups",
            )
        )
    return found


RULES: tuple[Callable[[AuditRecord], list[Finding]], ...] = (
    *SHORTCUT_RULES,
    *CONCEPT_RULES,
    _no_skill,
    _worst_group,
    _weak_classes,
    _calibration,
    _splits,
    *EXPERT_RULES,
)
"""All rules, in no order: the findings are sorted."""
