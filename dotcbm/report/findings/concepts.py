"""Rules on concepts: are they recognised, are they where the maps say, does the class follow from them, do they say more than they mean?"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from dotcbm.report.findings.rule import LEAST, counted, find, listed, points
from dotcbm.report.record import AuditRecord, ConceptRow, Finding, Interval, Section, Severity, Unit, Verdict

__all__ = ["CONCEPT_RULES"]

_POINTS_AT, _FAITHFUL = 0.05, 0.02  # gains that are surely above these are passed checks
_LEAK, _TIGHT = 0.05, 0.02
_STEP_DOWN, _IGNORED, _ROOM = 0.01, 0.2, 0.05
_RANDOM = 0.05
_GOOD: Severity = "good"
_NOTE: Severity = "note"
_NEAR_CHANCE = 0.6  # an AUROC that surely stays below tells hardly more than guessing
_LEAST_OF_KIND = 10  # pictures with and without a concept: with fewer, the bootstrap's interval is too narrow to accuse
_RESIDUAL = 0.01  # share of the mass that may be misplaced


def _gain(
    record: AuditRecord, key: str, name: str, *, bad: tuple[str, Severity], good: str, detail: str, passed: float, section: Section
) -> list[Finding]:
    """A difference to a control that should be above 0: bad if it is not surely so, good if it is surely above `passed`."""
    figure = find(record, key)
    if figure is None or figure.value.low is None or figure.value.high is None or figure.value.n < LEAST:
        return []
    if figure.value.low > passed:
        title, severity, threshold, rule = good, _GOOD, passed, f"lower end of the interval above {100 * passed:g} points"
        verdict: Verdict = "confirmed"
    elif figure.value.low <= 0:
        title, severity, threshold, rule = *bad, 0.0, "lower end of the interval not above 0"
        verdict = "confirmed" if figure.value.high < passed else "open"
    else:
        title, severity, threshold = f"{good.removesuffix('.')}, but by {points(figure.value.value)} points only.", _NOTE, passed
        rule, verdict = f"lower end of the interval above 0 and not above {100 * passed:g} points", "confirmed"
    return [
        Finding(
            name,
            severity,
            title,
            f"{detail} {figure.note}".strip(),
            figure.value,
            "points",
            threshold,
            rule,
            Interval(0.0),
            "no difference to the control",
            verdict,
            section,
        )
    ]


def _localisation(record: AuditRecord) -> list[Finding]:
    return _gain(
        record,
        "parts/pointing_gain",
        "localization/prior",
        bad=("The maps point at the parts no better than a map that knows no concept.", "warning"),
        good="The maps find the parts of their concepts better than a map that knows no concept.",
        detail="A map that only follows what is salient looks convincing and says nothing of a concept.",
        passed=_POINTS_AT,
        section="parts",
    )


def _faithfulness(record: AuditRecord) -> list[Finding]:
    return _gain(
        record,
        "concepts/occlusion_excess",
        "concepts/occlusion",
        bad=("Covering the region that a map highlights changes its concept no more than covering a random region.", "warning"),
        good="Concepts fall when the region that their map highlights is covered, and not for a random region.",
        detail="Fall of a present concept when its hottest region is covered, minus the fall for a random region of the same size.",
        passed=_FAITHFUL,
        section="concepts",
    )


def _random_concepts(record: AuditRecord) -> list[Finding]:
    return _gain(
        record,
        "controls/nec5_gain",
        "controls/random_concepts",
        bad=("With five concepts a class, random projections classify as well as the concepts.", "warning"),
        good="With five concepts a class, the concepts classify better than random projections.",
        detail="Heads cut to five weights a class, on the concepts and on as many random projections of the features.",
        passed=_RANDOM,
        section="controls",
    )


def _detection(record: AuditRecord) -> list[Finding]:
    """The boxes of the model's own map against those of the control."""
    found = [f for f in record.figures if f.key.startswith("parts/detection_correct_") and f.control is not None]
    if not found or found[0].value.n < LEAST:
        return []
    figure, control = found[0], found[0].control
    if figure.value.high is None or control is None or control.value is None or figure.value.high >= control.value:
        return []
    return [
        Finding(
            "localization/detection",
            "warning",
            f"Boxes around the maps find parts less often than boxes around {figure.control_label}.",
            figure.note + " The sweep shows other thresholds.",
            figure.value,
            "percent",
            control.value,
            "upper end of the interval below the control's figure",
            control,
            figure.control_label,
            "confirmed",
            "parts",
        )
    ]


def _chance(record: AuditRecord) -> list[Finding]:
    spans = [row.weight_span for row in record.concepts if row.weight_span is not None]
    if not spans:
        return []
    middle = median(spans)
    measured = [row for row in record.concepts if row.auroc.value is not None and (row.weight_span or 0.0) >= middle > 0]
    at_chance = [row for row in measured if row.auroc.low is None or row.auroc.low <= 0.5]
    if not at_chance:
        return []

    def is_decided(row: ConceptRow) -> bool:
        enough = row.num_known >= LEAST and min(row.num_positive, row.num_known - row.num_positive) >= _LEAST_OF_KIND
        return enough and row.auroc.low is not None and row.auroc.high is not None and row.auroc.high < _NEAR_CHANCE

    decided = [row for row in at_chance if is_decided(row)]
    told = sorted(decided or at_chance, key=lambda row: (-(row.weight_span or 0.0), row.name))
    names = tuple(row.name for row in told)
    if decided:
        title = f"{counted(names, 'carries', 'carry')} weight though recognised no better than by guessing: {listed(names)}."
        rule = (
            f"interval of the AUROC reaches down to 50 % and ends below {_NEAR_CHANCE:.0%}, {_LEAST_OF_KIND} pictures with and without the "
            "concept"
        )
    else:  # an interval that reaches everywhere, or too few pictures for one, is no proof against a concept
        title = f"{counted(names, 'carries', 'carry')} weight, and too few pictures show whether the model recognises it: {listed(names)}."
        rule = f"interval of the AUROC reaches down to 50 % and up to {_NEAR_CHANCE:.0%} or more, or rests on too few pictures"
    return [
        Finding(
            "concepts/chance",
            "warning" if decided else "note",
            title,
            "Their head weights span at least as much as the median concept's. The figure is the AUROC of the heaviest of them.",
            told[0].auroc,
            "percent",
            0.5,
            f"{rule}; weights of at least the median span",
            Interval(0.5),
            "guessing",
            "confirmed" if decided else "open",
            "concepts",
            concepts=names,
        )
    ]


def _never(record: AuditRecord) -> list[Finding]:
    absent = tuple(row.name for row in record.concepts if row.num_known and not row.num_positive)
    unknown = tuple(row.name for row in record.concepts if not row.num_known)
    found: list[Finding] = []
    for names, key, what in ((absent, "concepts/never_present", "never present"), (unknown, "concepts/unknown", "nowhere labelled")):
        if names:
            found.append(
                Finding(
                    key,
                    "note",
                    f"{counted(names, 'is', 'are')} {what} in the split: {listed(names)}.",
                    "Nothing can be said of how well they are recognised; the figures leave them out.",
                    Interval(float(len(names)), n=len(record.concepts), over="concepts"),
                    "number",
                    0.0,
                    "any such concept",
                    verdict="confirmed",
                    section="concepts",
                    concepts=names,
                )
            )
    return found


def _duplicates(record: AuditRecord) -> list[Finding]:
    columns: dict[tuple[int | None, ...], list[str]] = {}
    for row, column in zip(record.concepts, zip(*record.pictures.concept_truth, strict=True)):
        if 0 in column and 1 in column:
            columns.setdefault(column, []).append(row.name)
    doubled = tuple(name for names in columns.values() if len(names) > 1 for name in names)
    if not doubled:
        return []
    pairs = next(names for names in columns.values() if len(names) > 1)
    return [
        Finding(
            "concepts/duplicates",
            "note",
            f"{len(doubled)} concepts have the same labels as another one in every picture, {pairs[0]} and {pairs[1]} for instance.",
            "No figure of this split can tell them apart, and a model may read one from the other's place.",
            Interval(float(len(doubled)), n=len(record.concepts), over="concepts"),
            "number",
            0.0,
            "equal labels in all pictures of the split",
            verdict="confirmed",
            section="concepts",
            concepts=doubled,
        )
    ]


def _leakage(record: AuditRecord) -> list[Finding]:
    figure, ctl = find(record, "concepts/leakage_excess"), find(record, "concepts/leakage_ctl")
    if figure is None or ctl is None or figure.value.low is None or figure.value.high is None:
        return []
    control = (ctl.control.value if ctl.control else None) or 0.0
    detail = (
        f"Mean over concepts of what a prediction says of the class beyond what its truth does, in shares of the class's entropy, "
        f"minus the same after shuffling within the truth ({ctl.value.value:.3f} against {control:.3f})."
    )
    common: tuple[Interval, Unit] = (figure.value, "number")
    if figure.value.low > _LEAK:
        title = "The concepts tell the head more of the class than their meaning does: they leak."
        rule = f"lower end of the interval above {_LEAK:g}"
        return [
            Finding("leakage/ctl", "warning", title, detail, *common, _LEAK, rule, ctl.control, ctl.control_label, "confirmed", "concepts")
        ]
    if figure.value.high < _TIGHT:
        title = "The concepts tell hardly more of the class than they mean."
        rule = f"upper end of the interval below {_TIGHT:g}"
        return [
            Finding("leakage/ctl", "good", title, detail, *common, _TIGHT, rule, ctl.control, ctl.control_label, "confirmed", "concepts")
        ]
    return []


def _interventions(record: AuditRecord) -> list[Finding]:
    fall, gain, accuracy = find(record, "interventions/fall"), find(record, "interventions/gain"), find(record, "classes/accuracy")
    if record.card.head_on == "none":
        return [
            Finding(
                "interventions/black_box",
                "note",
                "The model claims no concepts: nothing of its decisions can be explained or corrected by them.",
                f"The classes of {record.card.bottleneck} are not read from concepts.",
                Interval(0.0, n=record.card.num_concepts, over="concepts"),
                "number",
                0.0,
                "classes are not read from concepts",
                verdict="confirmed",
                section="interventions",
            )
        ]
    if fall is None or gain is None or accuracy is None or gain.value.n < LEAST:
        return []
    if fall.value.low is not None and fall.value.low > _STEP_DOWN:
        return [
            Finding(
                "interventions/monotone",
                "warning",
                f"Correcting concepts makes the model worse, by up to {points(fall.value.value)} points.",
                f"{fall.note} Random order of the groups.",
                fall.value,
                "points",
                _STEP_DOWN,
                f"lower end of the interval above {100 * _STEP_DOWN:g} point",
                Interval(0.0),
                "no fall",
                "confirmed",
                "interventions",
            )
        ]
    room = 1 - (accuracy.value.value or 0.0)
    if room > _ROOM and gain.value.high is not None and gain.value.high < _IGNORED * room:
        return [
            Finding(
                "interventions/ignored",
                "warning",
                "Correcting all concepts hardly helps: the model does not use them as it claims.",
                f"Of the {points(room)} points that it lacks, all concepts set right bring {points(gain.value.value)}.",
                gain.value,
                "points",
                round(_IGNORED * room, 6),
                f"upper end of the interval below {_IGNORED:.0%} of what the model lacks",
                Interval(0.0),
                "no gain",
                "confirmed",
                "interventions",
            )
        ]
    if gain.value.low is not None and gain.value.low > 0:
        return [
            Finding(
                "interventions/monotone",
                "good",
                f"Correcting concepts helps, by {points(gain.value.value)} points with all set right, and never costs more than a point.",
                gain.note,
                gain.value,
                "points",
                0.0,
                f"lower end of the gain's interval above 0, and of the largest fall's not above {100 * _STEP_DOWN:g} point",
                Interval(0.0),
                "no gain",
                "confirmed",
                "interventions",
            )
        ]
    return []


def _residual(record: AuditRecord) -> list[Finding]:
    figure = find(record, "parts/transport_residual_max")
    if figure is None or (figure.value.value or 0.0) <= _RESIDUAL:
        return []
    return [
        Finding(
            "parts/residual",
            "warning",
            f"The transport plans are not solved: up to {100 * (figure.value.value or 0.0):.1f} % of the mass is misplaced.",
            figure.note + " More iterations or a larger eps help.",
            figure.value,
            "number",
            _RESIDUAL,
            f"largest residual above {_RESIDUAL:g}",
            verdict="confirmed",
            section="parts",
        )
    ]


CONCEPT_RULES: tuple[Callable[[AuditRecord], list[Finding]], ...] = (
    _localisation,
    _faithfulness,
    _random_concepts,
    _detection,
    _chance,
    _never,
    _duplicates,
    _leakage,
    _interventions,
    _residual,
)
"""All rules of this file."""
