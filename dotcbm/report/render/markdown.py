"""An audit's record as Markdown for pull requests: the sections of the page, compact, without pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from dotcbm.report.record import AuditRecord, ConceptRow, Figure, Finding, Interval, Unit
from dotcbm.report.record_experts import ExpertLayer
from dotcbm.report.render.numbers import NO_CONTROL, cases, interval_text, number, signed, span, with_unit
from dotcbm.report.render.views import SHOWING, confused_pairs, headline, sections

__all__ = ["markdown"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$@!])")
_MOST_SERVED = 5  # names beside an expert
_VERDICTS = {"confirmed": "confirmed by its control", "refuted": "refuted by its control", "open": "open"}


def markdown(record: AuditRecord) -> str:
    """The text; names are escaped such that Markdown and HTML leave them as they are."""
    card = record.card
    verdict = headline(record)
    lines = [
        f"# {_plain(record.title)}",
        "",
        f"**{verdict.text}**",
        "",
        _plain(record.summary),
        "",
        f"{_plain(card.bottleneck)} on {_plain(card.encoder)}; {number(card.num_pictures)} pictures of split {_plain(card.split)}, "
        f"{number(card.num_concepts)} concepts, {number(card.num_classes)} classes.",
    ]
    for section in sections(record):
        body = [
            *(
                f"- Not {'shown' if row.section in SHOWING else 'measured'}: {_plain(row.what)}, because {_plain(row.reason)}."
                for row in section.absent
            ),
            *_figures(section.figures),
            *_BODIES.get(section.key, lambda record: [])(record),
        ]
        if body:
            lines += ["", f"## {section.number}. {section.title}", "", *body]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _plain(text: str) -> str:
    """The text as it is: everything that Markdown or HTML would read is escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table with its blank line, nothing without rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return ["", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *body, ""] if body else []


def _short(interval: Interval | None, unit: Unit = "percent") -> str:
    """ "58.4 [56.0 to 61.0], n = 730"."""
    if interval is None or interval.value is None:
        return "—"
    ends = span(interval, unit)
    return number(interval.value, unit) + (f" [{ends}]" if ends else "") + (f", n = {number(interval.n)}" if interval.n else "")


def _figures(rows: Sequence[Figure]) -> list[str]:
    return _table(
        ("figure", "measured [95 % interval]", "n", "control"),
        (
            (
                _plain(row.label),
                with_unit(row.value.value, row.unit) + (f" [{span(row.value, row.unit)}]" if span(row.value, row.unit) else ""),
                cases(row.value).removeprefix("n = ") or "—",
                f"{with_unit(row.control.value, row.unit)} ({_plain(row.control_label)})" if row.control else "none",
            )
            for row in rows
        ),
    )


def _findings(record: AuditRecord) -> list[str]:
    def row(finding: Finding) -> tuple[str, ...]:
        control = f"{interval_text(finding.control, finding.unit)}: {_plain(finding.control_label)}" if finding.control else "none"
        rule = f"{with_unit(finding.threshold, finding.unit)}: {_plain(finding.rule)}"
        return (
            finding.severity,
            _plain(finding.title),
            interval_text(finding.measured, finding.unit),
            control,
            rule,
            _VERDICTS[finding.verdict] if finding.control else NO_CONTROL,
        )

    return _table(("severity", "finding", "measured", "control", "threshold and rule", "verdict"), map(row, record.findings))


def _errors(record: AuditRecord) -> list[str]:
    columns = record.pictures
    return _table(
        ("picture", "truth", "taken for", "confidence, %", "why shown"),
        (
            (
                _plain(columns.name[card.row]),
                _plain(record.class_names[columns.label[card.row]]),
                _plain(record.class_names[columns.predicted[card.row]]),
                number(columns.confidence[card.row], "percent"),
                _plain(card.why),
            )
            for card in record.errors
        ),
    )


def _classes(record: AuditRecord) -> list[str]:
    def named(rows: Sequence[tuple[str, float]]) -> str:
        return ", ".join(f"{_plain(name)} {signed(value)}" for name, value in rows[:3]) or "—"

    rows = _table(
        ("class", "recall, %", "precision, %", "mistaken for", "speaks for it", "speaks against"),
        (
            (
                _plain(row.name),
                _short(row.recall),
                _short(row.precision),
                ", ".join(f"{_plain(name)} × {count}" for name, count in row.mistaken_for) or "none",
                named(row.speaks_for),
                named(row.speaks_against),
            )
            for row in record.classes
        ),
    )
    confused = _table(
        ("truth", "taken for", "pictures", "share, %"),
        (
            (_plain(truth), _plain(taken), str(count), number(share, "percent"))
            for truth, taken, count, share in confused_pairs(record, num=10)
        ),
    )
    return rows + (["Most frequent confusions:", *confused] if confused else [])


def _concepts(record: AuditRecord) -> list[str]:
    def row(concept: ConceptRow) -> tuple[str, ...]:
        return (
            _plain(concept.name),
            f"{concept.num_positive} / {concept.num_known}",
            _short(concept.auroc),
            f"{number(concept.error, 'percent')} ({number(concept.all_negative_error, 'percent')})",
            number(concept.leakage, "percent"),
            f"{_short(concept.pointing)} ({number(concept.pointing_prior, 'percent')})",
            f"{number(concept.background_share, 'percent')} ({number(concept.background_area, 'percent')}), {_count(concept.num_mapped)}",
            f"{number(concept.occlusion_drop, 'points')} ({number(concept.random_drop, 'points')}), {_count(concept.num_covered)}",
        )

    heads = (
        "concept",
        "positive / known",
        "AUROC, %",
        "error, % (all negative)",
        "leakage, %",
        "pointing, % (best blind map)",
        "on background, % (area), n",
        "fall when covered, points (random), n",
    )
    rows = _table(heads, map(row, record.concepts))
    return ["", "<details><summary>All concepts; controls in brackets</summary>", *rows, "</details>", ""] if rows else []


def _parts(record: AuditRecord) -> list[str]:
    parts = _table(
        ("part", "measure", "average precision, %", "correct, % (best map without concepts)"),
        (
            (
                _plain(row.name),
                row.kind,
                number(row.average_precision, "percent"),
                f"{_short(row.correct)} ({number(row.prior, 'percent')})",
            )
            for row in record.parts
        ),
    )
    if not record.sweeps:
        return parts
    thresholds = record.sweeps[0].thresholds
    sweep = _table(
        ("mAP, %, at threshold", *(f"{threshold:g}" for threshold in thresholds), "boxes"),
        (
            (_plain(row.map), *(number(v, "percent") for v in row.mean_average_precision), number(row.num_boxes))
            for row in record.sweeps
            if row.thresholds == thresholds
        ),
    )
    return parts + sweep


def _suspects(record: AuditRecord) -> list[str]:
    return _table(
        ("concept", "class", "on background, %", "adds to logit", "fall, other background, points", "same class's, points", "verdict"),
        (
            (
                _plain(row.concept),
                _plain(row.class_name),
                number(row.background_share, "percent"),
                signed(row.weight),
                _short(row.swap_drop, "points"),
                _short(row.control_drop, "points"),
                _VERDICTS[row.verdict],
            )
            for row in record.suspects
        ),
    )


def _count(n: int | None) -> str:
    return "unknown" if n is None else number(n)


def _interventions(record: AuditRecord) -> list[str]:
    return _table(
        ("policy", "split", "n", "none corrected, %", "all corrected, %", "area, %", "largest fall, points"),
        (
            (
                row.policy,
                _plain(row.split),
                _count(row.num_pictures),
                number(row.accuracy[0], "percent"),
                number(row.accuracy[-1], "percent"),
                number(row.area, "percent"),
                number(row.steps_down, "points"),
            )
            for row in record.interventions
        ),
    )


def _groups(record: AuditRecord) -> list[str]:
    return _table(
        ("name", "kind", "accuracy, %", "below the whole by, points"),
        ((_plain(row.name), row.kind, _short(row.accuracy), _short(row.gap, "points")) for row in record.groups),
    )


def _experts(record: AuditRecord) -> list[str]:
    def served(layer: ExpertLayer, expert: int) -> str:
        links = [(table.names[link.row], link.lift) for table in layer.tables for link in table.links if link.expert == expert]
        links.sort(key=lambda link: -(link[1].value or 0.0))
        more = f" and {len(links) - _MOST_SERVED} more" if len(links) > _MOST_SERVED else ""
        return ", ".join(f"{_plain(name)} × {_short(lift, 'number')}" for name, lift in links[:_MOST_SERVED]) + more or "nothing"

    lines: list[str] = []
    for layer in record.experts:
        rows = _table(
            ("expert", "load, %", "on background, % (same places, other pictures)", "serves above chance, lift"),
            (
                (
                    str(e),
                    _short(row.load),
                    f"{_short(row.background)} ({number(row.background_expected, 'percent')})",
                    served(layer, e),
                )
                for e, row in enumerate(layer.experts)
            ),
        )
        lines += ["", f"### {_plain(layer.name).capitalize()}: {layer.active} of {len(layer.experts)} experts for each patch", *rows]
    return lines


def _card(record: AuditRecord) -> list[str]:
    card = record.card
    facts = (
        ("weights, SHA-256", card.weights_sha256),
        ("encoder fingerprint", card.encoder_fingerprint),
        ("head reads", card.head_on),
        ("data", card.data),
        ("data fingerprint", card.data_fingerprint),
        ("data licence", card.data_licence or "unknown"),
        ("encoder licence", card.encoder_licence or "unknown"),
        *((f"setting {key}", value) for key, value in card.settings),
        *((f"audit {key}", value) for key, value in card.audit),
        *((f"training {key}", value) for key, value in card.training),
        *((f"version of {key}", value) for key, value in card.versions),
        *(("edit", line) for line in card.edits),
    )
    return _table(("", ""), ((_plain(key), _plain(value)) for key, value in facts))


_BODIES: dict[str, Callable[[AuditRecord], list[str]]] = {
    "verdict": _findings,
    "errors": _errors,
    "classes": _classes,
    "concepts": _concepts,
    "parts": _parts,
    "suspects": _suspects,
    "interventions": _interventions,
    "groups": _groups,
    "experts": _experts,
    "card": _card,
}
