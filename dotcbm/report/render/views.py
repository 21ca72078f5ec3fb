"""What a page of an audit shows, taken from the record: sections, figures by section, headline, confusions, cards.

Both HTML and Markdown are drawn from these. K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dotcbm.report.record import Absence, AuditRecord, Figure, PictureCard, Severity
from dotcbm.report.render.heat import heat_png, outline

__all__ = [
    "SECTIONS",
    "SEVERITIES",
    "SHOWING",
    "CardView",
    "Headline",
    "Heat",
    "SectionView",
    "card_view",
    "confused_pairs",
    "headline",
    "key_figures",
    "map_trust",
    "matrix_png",
    "sections",
]

SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note", "good")

SECTIONS: dict[str, tuple[str, str]] = {
    "verdict": ("Verdict", "Findings in order of severity. Each stands beside its control; the rule that decided it is written out."),
    "errors": ("Errors first", "Pictures that the model gets wrong, the surest first, with what it read and where."),
    "classes": ("Classes and confusion", "Recall and precision of each class, what it is taken for, and whether confidence is honest."),
    "concepts": ("Concepts", "How well each concept is predicted, how much it leaks of the class, and whether it is read from its part."),
    "parts": (
        "Part detection",
        "Maps cut into boxes and held against the true parts. The result depends on the cut, so all cuts are shown.",
    ),
    "suspects": (
        "Spurious-correlation suspects",
        "Concepts that a class leans on and whose map lies outside the object. Exchanging the background confirms or refutes.",
    ),
    "interventions": (
        "Interventions",
        "Groups of concepts are set to their true values, one after the other. A model that uses its concepts must not get worse.",
    ),
    "groups": ("Groups", "Accuracy of sub-populations and of shifted splits, and how far each is from the whole."),
    "controls": ("Controls", "What knows nothing must score nothing: random concepts, random regions, maps that know no concept."),
    "experts": (
        "Experts",
        "Which expert of the encoder each patch goes to, what that has to do with what is in the patch, and how evenly experts are used.",
    ),
    "pictures": ("Pictures", "Single pictures with each concept's map, what it adds to the class, and sliders that change it."),
    "grid": ("Picture grid", "Many pictures, sorted by what the model says of them."),
    "card": ("Model card", "What was audited, on what data, with which settings, versions and hashes."),
}
"""Title and the sentence under it, in the order of the report."""

SHOWING = ("errors", "pictures", "grid")
"""Sections that show and do not measure: what is absent there was not shown."""

_CUT = 0.6  # of the maximum: where the paper cuts a map into a box
_KEY_FIGURES: dict[str, tuple[str, ...]] = {
    "classes": ("accuracy",),
    "concepts": ("auroc",),
    "parts": ("pointing_mask", "pointing_0.1"),  # 0.1 diagonals: the radius of the concepts' table
    "interventions": ("area",),
    "groups": ("worst_group", "accuracy", "gap"),
}
"""By section, how the names begin of the figures that a reader in a hurry asks for, the first choice first."""


@dataclass(frozen=True)
class SectionView:
    """One section: its number in the report, id, title, the sentence under it, figures, and what is absent."""

    number: int
    key: str
    title: str
    lead: str
    figures: tuple[Figure, ...]
    absent: tuple[Absence, ...]


@dataclass(frozen=True)
class Headline:
    """The verdict in ten seconds.

    Attributes:
        level: The gravest severity that stands; "good" if none of the grave ones does.
        text: One sentence.
        tally: For each severity that occurs: (severity, number, how many of them confirmed, refuted, open).
    """

    level: Severity
    text: str
    tally: tuple[tuple[Severity, int, tuple[int, int, int]], ...]


@dataclass(frozen=True)
class Heat:
    """A concept's map: a PNG in base64, and the SVG path about the cells above the paper's threshold."""

    png: str
    outline: str


@dataclass(frozen=True)
class CardView:
    """A picture card with what the page needs beside it: its id, names, and each concept's map as a PNG."""

    id: str
    card: PictureCard
    name: str
    label: str
    predicted: str
    right: bool
    confidence: float
    heats: tuple[Heat | None, ...]
    reach: float
    """The largest contribution in size, for bars on one scale."""


def sections(record: AuditRecord) -> tuple[SectionView, ...]:
    """All in order, without that of experts where there are none; a figure goes to the section that its key begins with, to the model card
    if there is none."""
    shown = {key: text for key, text in SECTIONS.items() if key != "experts" or record.experts}
    homes: dict[str, list[Figure]] = {key: [] for key in shown}
    for figure in record.figures:
        prefix = figure.key.split("/")[0]
        homes[prefix if prefix in shown else "card"].append(figure)
    return tuple(
        SectionView(number, key, title, lead, tuple(homes[key]), tuple(row for row in record.absent if row.section == key))
        for number, (key, (title, lead)) in enumerate(shown.items(), start=1)
    )


def key_figures(record: AuditRecord) -> tuple[Figure, ...]:
    """At most four figures for the head of the report, one of a section; any of a section's if those asked for are missing."""
    chosen = []
    for section, names in _KEY_FIGURES.items():
        known = [figure for figure in record.figures if figure.value.value is not None and figure.key.startswith(f"{section}/")]
        asked = [figure for name in names for figure in known if figure.key.startswith(f"{section}/{name}")]
        chosen += (asked or known)[:1]
    return tuple(chosen[:4])


def map_trust(record: AuditRecord) -> Figure | None:
    """The figure that says how far the maps of the cards can be believed, with its control; None where nothing measures it."""
    for name in _KEY_FIGURES["parts"]:
        for figure in record.figures:
            if figure.key.startswith(f"parts/{name}") and figure.value.value is not None and figure.control is not None:
                return figure
    return None


def headline(record: AuditRecord) -> Headline:
    """What stands: findings that no control has refuted."""
    findings = record.findings
    tally = []
    for severity in SEVERITIES:
        rows = [finding for finding in findings if finding.severity == severity]
        if rows:
            verdicts = [finding.verdict for finding in rows]
            tally.append((severity, len(rows), (verdicts.count("confirmed"), verdicts.count("refuted"), verdicts.count("open"))))
    standing = {severity: num - refuted for severity, num, (_, refuted, _) in tally}
    if not findings:
        return Headline("note", "No finding was recorded. That is no proof of absence: see what was not measured.", ())
    critical, warning = standing.get("critical", 0), standing.get("warning", 0)
    if critical:
        confirmed = next(counts[0] for severity, _, counts in tally if severity == "critical")
        proof = "confirmed by its control" if critical == 1 else "each confirmed by its control"
        if confirmed != critical:
            proof = f"{confirmed} of them confirmed by a control" if critical > 1 else "not yet confirmed by a control"
        return Headline("critical", f"{critical} critical finding{'s stand' if critical > 1 else ' stands'}, {proof}.", tuple(tally))
    if warning:
        return Headline("warning", f"No critical finding stands. {warning} warning{'s do' if warning > 1 else ' does'}.", tuple(tally))
    if not standing.get("good"):
        missed = f": {len(record.absent)} could not be made" if record.absent else ""
        return Headline("note", f"No warning stands, and no check was passed{missed}. Nothing was decided.", tuple(tally))
    return Headline("good", "No critical finding and no warning stands.", tuple(tally))


def confused_pairs(record: AuditRecord, *, num: int = 20) -> tuple[tuple[str, str, int, float], ...]:
    """The most frequent confusions: (truth, prediction, pictures, share of the truth's pictures)."""
    pairs = [
        (record.class_names[i], record.class_names[j], count, count / sum(row))
        for i, row in enumerate(record.confusion.count_KK)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return tuple(sorted(pairs, key=lambda pair: (-pair[2], -pair[3]))[:num])


def matrix_png(record: AuditRecord) -> str:
    """The confusion matrix as shares of each row, one pixel a cell."""
    cells = [round(255 * count / max(sum(row), 1)) for row in record.confusion.count_KK for count in row]
    return heat_png(cells, width=len(record.confusion.count_KK), opaque=True)


def card_view(record: AuditRecord, card: PictureCard, *, id: str) -> CardView:
    """The card with names and maps."""
    columns = record.pictures
    label, predicted = columns.label[card.row], columns.predicted[card.row]
    return CardView(
        id=id,
        card=card,
        name=columns.name[card.row],
        label=record.class_names[label],
        predicted=record.class_names[predicted],
        right=label == predicted,
        confidence=columns.confidence[card.row],
        heats=tuple(
            Heat(heat_png(shown.heat, width=card.grid[1]), outline(shown.heat, width=card.grid[1], share=_CUT)) if shown.heat else None
            for shown in card.concepts
        ),
        reach=max((abs(shown.contribution) for shown in card.concepts), default=0.0) or 1.0,
    )
