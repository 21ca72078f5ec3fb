"""The record of an audit: everything that the report shows, and what is needed to compute it again.

An audit is collected into one `AuditRecord`, stored as JSON (`dotcbm.report.record_file`), and drawn from the record alone as
HTML or Markdown. The record holds no time and no path, so the same model, data, settings and seed give the same bytes.

Accuracies and shares are fractions in [0, 1]; maps are quantised to 0 ... 255. N pictures, M concepts, K classes, P parts.
NaN never occurs: what is not known is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dotcbm.report.record_experts import ExpertLayer
from dotcbm.report.record_interval import Interval

__all__ = [
    "FORMAT",
    "SWAP_FALL_CLASS",
    "Absence",
    "AuditRecord",
    "ClassRow",
    "ConceptRow",
    "Confusion",
    "DetectionSweep",
    "ExpertLayer",
    "Figure",
    "Finding",
    "GroupRow",
    "Interval",
    "InterventionCurve",
    "ModelCard",
    "PartRow",
    "PictureCard",
    "PictureColumns",
    "Reliability",
    "ShownConcept",
    "Suspect",
    "Thumbnail",
]

FORMAT = 5
"""See the migrations in `dotcbm.report.record_file` for what each format added."""

SWAP_FALL_CLASS = "suspects/swap_fall_class/"
"""Before the name of a class: the key of the figure that says how far the class falls on another class's backgrounds."""

Section = Literal[
    "verdict",
    "errors",
    "classes",
    "concepts",
    "parts",
    "suspects",
    "interventions",
    "groups",
    "controls",
    "experts",
    "pictures",
    "grid",
    "card",
]
Severity = Literal["critical", "warning", "note", "good"]
Verdict = Literal["confirmed", "refuted", "open"]
_UNKNOWN = Interval(None)
Unit = Literal["percent", "points", "number", "bits"]
"""percent: a share, shown times 100; points: a difference of shares, shown times 100; number: as it is."""


@dataclass(frozen=True)
class Figure:
    """A named figure with its control.

    Attributes:
        key: Stable name, as in `<section>/<name>`: "concepts/auroc", "parts/pointing_0.1_plan".
        label: For people.
        value: Measured.
        unit: How to show it.
        better: Which way is good; None where neither is.
        control: The same figure for what knows nothing (or None), and `control_label` what that is.
        note: One sentence on how it is measured, with its thresholds.
    """

    key: str
    label: str
    value: Interval
    unit: Unit = "percent"
    better: Literal["higher", "lower"] | None = "higher"
    control: Interval | None = None
    control_label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that an auditor should know, with the evidence.

    Attributes:
        key: Stable: "shortcut/background", "localization/prior", "interventions/monotone", "leakage/ctl".
        severity: "critical" before "warning", "note" and "good"; the order of the report.
        title: One sentence.
        detail: How it was measured and what it means, in two or three sentences.
        measured: The deciding figure, n and interval.
        unit: Of `measured`, `control` and `threshold`.
        threshold: The bound that the figure was held against.
        rule: The whole rule in words: "lower end of the interval above 2 points".
        control: The figure of the control.
        control_label: What the control is.
        verdict: Whether the control confirms the finding, refutes it, or cannot tell.
        section: Where the evidence is shown.
        concepts, classes: Names it speaks of.
    """

    key: str
    severity: Severity
    title: str
    detail: str
    measured: Interval
    unit: Unit
    threshold: float
    rule: str
    control: Interval | None = None
    control_label: str = ""
    verdict: Verdict = "open"
    section: Section = "verdict"
    concepts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absence:
    """A section, or a part of it, that could not be measured: which, why, and what would be needed."""

    section: Section
    what: str
    reason: str


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Attributes:
        name: Of the class.
        recall: Share of its pictures that are predicted as it.
        precision: Share of the pictures predicted as it that are.
        mistaken_for: The classes it is most often taken for, with counts; at most three.
        speaks_for, speaks_against: Concepts with the largest mean contribution to its logit on its own pictures, with that mean;
            at most five each. Empty for models whose classes are not read from concepts.
    """

    name: str
    recall: Interval
    precision: Interval
    mistaken_for: tuple[tuple[str, int], ...] = ()
    speaks_for: tuple[tuple[str, float], ...] = ()
    speaks_against: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Confusion:
    """(K, K) counts, rows truth, columns prediction."""

    count_KK: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy: pictures, mean confidence and accuracy of each bin; None in empty bins."""

    count_S: tuple[int, ...]
    confidence_S: tuple[float | None, ...]
    accuracy_S: tuple[float | None, ...]


@dataclass(frozen=True)
class ConceptRow:
    """One concept. All figures are None where they are not defined.

    Attributes:
        name, group, parts: Of the vocabulary.
        shown: Whether it is among those drawn (at most 32); all are in the table.
        num_positive, num_known: Pictures that show it, and pictures for which it is known.
        prevalence, train_prevalence: Share of positives in the split and in training.
        auroc, average_precision, error: In the split; `error` at probability 0.5.
        all_negative_error: The control of `error`.
        leakage: CTL, in shares of the class's entropy.
        pointing, pointing_prior: Peak on the part (in its mask, or within 0.1 diagonals of a key point), and that of the best map that
            knows no concept.
        part_mass: Share of the map inside the part's mask.
        background_share: Share of the map outside the object, where the concept is there; `background_area` is the control, the
            share of the picture outside the object, and `num_mapped` counts the pictures.
        occlusion_drop, random_drop: Mean fall of the probability when its region, or a random one of the same size, is covered,
            in `num_covered` pictures.
        weight_span: Largest minus smallest weight of the head over the classes.
    """

    name: str
    group: str | None = None
    parts: tuple[str, ...] = ()
    shown: bool = False
    num_positive: int = 0
    num_known: int = 0
    prevalence: float | None = None
    train_prevalence: float | None = None
    auroc: Interval = _UNKNOWN
    average_precision: float | None = None
    error: float | None = None
    all_negative_error: float | None = None
    leakage: float | None = None
    pointing: Interval = _UNKNOWN
    pointing_prior: float | None = None
    part_mass: float | None = None
    background_share: float | None = None
    background_area: float | None = None
    num_mapped: int | None = 0
    occlusion_drop: float | None = None
    random_drop: float | None = None
    num_covered: int | None = 0
    weight_span: float | None = None


@dataclass(frozen=True)
class PartRow:
    """One part, or one group of parts of the APN protocol: detection at threshold 0.6 and IoU 0.5.

    Attributes:
        name: Of the part.
        kind: "part" (average precision of boxes) or "group" (percentage of correct parts).
        average_precision: Ranked by concept probability; None for groups.
        correct: Share of boxes with IoU of at least 0.5 (part), or PCP (group).
        prior: The same as `correct` for the best map that knows no concept.
    """

    name: str
    kind: Literal["part", "group"]
    average_precision: float | None
    correct: Interval
    prior: float | None = None


@dataclass(frozen=True)
class DetectionSweep:
    """Part detection against the threshold that cuts a map into a box; `paper` is the paper's threshold, 0.6.

    Attributes:
        map: Which map: "plan", "evidence", "prior", "random", "attribution".
        thresholds: Shares of the map's maximum.
        mean_average_precision, share_correct: At IoU 0.5, mean over parts, and over all boxes.
        num_boxes: Pairs of picture and concept with a true box, which both are measured on; None where unknown.
    """

    map: str
    thresholds: tuple[float, ...]
    mean_average_precision: tuple[float | None, ...]
    share_correct: tuple[float | None, ...]
    paper: float = 0.6
    num_boxes: int | None = None


@dataclass(frozen=True)
class Suspect:
    """A concept that a class leans on and that is read from the background.

    Attributes:
        concept, class_name: The pair.
        background_share: Of the concept's map, on the pictures of the class that have it.
        weight: What the concept adds to the class's logit, mean over those pictures.
        suspicion: background_share times weight, what the list is sorted by.
        swap_drop: Fall of the concept's probability when the background is exchanged for another class's, and `control_drop` for
            one of the same class; None where no picture could be swapped.
        verdict: Whether the swap confirms that the background carries the concept.
    """

    concept: str
    class_name: str
    background_share: float
    weight: float
    suspicion: float
    swap_drop: Interval | None = None
    control_drop: Interval | None = None
    verdict: Verdict = "open"


@dataclass(frozen=True)
class InterventionCurve:
    """Accuracy when groups of concepts are set to their true values, one group after the other.

    Attributes:
        policy: "random", "uncertainty", "coop", "greedy".
        split: Whose pictures.
        accuracy: For 0, 1, ... groups corrected; the first is the model's own.
        area: Mean of `accuracy` over the number of groups.
        steps_down: The largest fall from one step to a later one, in accuracy; 0 if monotone.
        spread: Standard deviation over the orders drawn, for policies that draw; else None.
        num_pictures: Pictures corrected; None where unknown.
    """

    policy: str
    split: str
    accuracy: tuple[float, ...]
    area: float
    steps_down: float
    spread: tuple[float, ...] | None = None
    num_pictures: int | None = None


@dataclass(frozen=True)
class GroupRow:
    """One sub-population: a group of the data, or a split ("test_ood")."""

    name: str
    kind: Literal["group", "split"]
    accuracy: Interval
    gap: Interval | None = None
    """Accuracy of all pictures minus this group's; for a split, of the same pictures in the audited split minus here."""


@dataclass(frozen=True)
class ShownConcept:
    """One concept of a picture card.

    Attributes:
        concept: Index in `AuditRecord.concepts`.
        probability: Predicted.
        truth: 1, 0, or None where unknown.
        contribution: To the logit of the predicted class.
        logit: Predicted.
        heat: The map, grid_h * grid_w values 0 ... 255 row by row; empty where the model has none.
        slope_K: Change of each shown class's logit (`PictureCard.classes`) per unit of the concept's probability, or of its logit with
            `ModelCard.head_on` "logit"; empty where an intervention has no effect.
    """

    concept: int
    probability: float
    truth: int | None
    contribution: float
    logit: float
    heat: tuple[int, ...] = ()
    slope_K: tuple[float, ...] = ()


@dataclass(frozen=True)
class PictureCard:
    """One picture with its explanation.

    Attributes:
        row: In `AuditRecord.pictures`.
        why: Why it is shown: "wrong and sure", "wrong", "least sure", "drawn at random".
        image: JPEG, base64; empty where photos are left out.
        width, height: Of the JPEG in pixels, also where it is left out.
        grid: (grid_h, grid_w) of the maps.
        region: x0, y0, x1, y1 of the part of the picture that the maps cover, as fractions.
        classes: Indices of the classes shown, most probable first, the true one among them.
        class_logits: Of those classes.
        rest: log-sum-exp of the logits of all other classes, None if there is none: the slider needs it for probabilities.
        concepts: Strongest contributions first.
    """

    row: int
    why: str
    image: str
    width: int
    height: int
    grid: tuple[int, int]
    region: tuple[float, float, float, float]
    classes: tuple[int, ...]
    class_logits: tuple[float, ...]
    rest: float | None
    concepts: tuple[ShownConcept, ...]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of the grid: `row` in `AuditRecord.pictures`, and a JPEG in base64."""

    row: int
    image: str


@dataclass(frozen=True)
class PictureColumns:
    """What the model said of each picture, column by column: enough to compute the tables again.

    Attributes:
        name: N names.
        label, predicted: Class indices.
        confidence: Probability of the predicted class.
        true_probability: Of the true class.
        group: Sub-population, empty without any.
        concept_probability, concept_truth: (N, M); truth is 1, 0 or None.
        pointing_hits, pointing_pairs: (N,) pairs of picture and concept whose peak hits, and that count; empty without parts.
        prior_hits: (N,) the same as `pointing_hits` for the best map that knows no concept.
    """

    name: tuple[str, ...]
    label: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: tuple[float, ...]
    true_probability: tuple[float, ...]
    group: tuple[int, ...] = ()
    concept_probability: tuple[tuple[float, ...], ...] = ()
    concept_truth: tuple[tuple[int | None, ...], ...] = ()
    pointing_hits: tuple[int, ...] = ()
    pointing_pairs: tuple[int, ...] = ()
    prior_hits: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelCard:
    """What was audited, on what, with what.

    Attributes:
        bottleneck: Class name; `settings` its arguments, as JSON text for each.
        encoder: Name; `encoder_fingerprint` its hash.
        weights_sha256: Of the bottleneck's weights.
        head_on: What the head reads of a concept: its "probability" or its "logit"; "other" where sliders cannot follow it, "none" for a
            black box.
        data: The source, as it prints, without paths; `data_fingerprint` a hash of the pictures' names and `split` whose they are.
        num_pictures, num_concepts, num_classes: N, M, K.
        data_licence, encoder_licence: As far as known.
        audit: Settings of the audit, seed among them.
        training: What the run says of its training; empty where unknown.
        versions: Package -> version.
        edits: What `dotcbm edit` changed in the model: one line each with who, when and why.
    """

    bottleneck: str
    settings: tuple[tuple[str, str], ...]
    encoder: str
    encoder_fingerprint: str
    weights_sha256: str
    head_on: Literal["probability", "logit", "other", "none"]
    data: str
    data_fingerprint: str
    split: str
    num_pictures: int
    num_concepts: int
    num_classes: int
    data_licence: str | None = None
    encoder_licence: str | None = None
    audit: tuple[tuple[str, str], ...] = ()
    training: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    edits: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditRecord:
    """One audit; see the head of this file.

    Attributes:
        format: Of this record; `dotcbm.report.record_file` migrates older ones.
        title: What the report is headed with.
        class_names: K names.
        summary: Two or three sentences that a reader in a hurry needs.
        findings: Ordered by severity, then by how far the figure is from its threshold.
        figures: All figures, of all sections, by key.
        absent: What could not be measured and why.
        experts: Of the encoder's expert layers; empty where it has none.
        The others are the rows of the sections of the same names.
    """

    format: int
    title: str
    class_names: tuple[str, ...]
    summary: str
    card: ModelCard
    findings: tuple[Finding, ...]
    figures: tuple[Figure, ...]
    absent: tuple[Absence, ...]
    classes: tuple[ClassRow, ...]
    confusion: Confusion
    reliability: Reliability
    concepts: tuple[ConceptRow, ...]
    parts: tuple[PartRow, ...]
    sweeps: tuple[DetectionSweep, ...]
    suspects: tuple[Suspect, ...]
    interventions: tuple[InterventionCurve, ...]
    groups: tuple[GroupRow, ...]
    errors: tuple[PictureCard, ...]
    cards: tuple[PictureCard, ...]
    grid: tuple[Thumbnail, ...]
    pictures: PictureColumns
    experts: tuple[ExpertLayer, ...] = ()

    def figure(self, key: str) -> Figure:
        """The figure of that key.

        Raises:
            ValueError: The record has no such figure.
        """
        found = next((figure for figure in self.figures if figure.key == key), None)
        if found is None:
            raise ValueError(f"the record has no figure {key!r}; it has {[figure.key for figure in self.figures]}")
        return found

    def flat(self) -> dict[str, float]:
        """Value by key of the figures that are defined, and of their controls as "<key>/control": for tables over many records."""
        values = {figure.key: figure.value.value for figure in self.figures}
        values |= {f"{figure.key}/control": figure.control.value for figure in self.figures if figure.control is not None}
        return {key: value for key, value in values.items() if value is not None}
