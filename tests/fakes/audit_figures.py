"""Findings, figures and the model card of the record that `fakes.audit_record` makes up."""

from __future__ import annotations

from dotcbm.report.record import Figure, Finding, Interval, ModelCard

__all__ = ["figures", "findings", "model_card"]


def findings(names: list[str], classes: list[str], n: int) -> tuple[Finding, ...]:
    return (
        Finding(
            "shortcut/background",
            "critical",
            f"{names[0]} is read from the background, and {classes[0]} leans on it",
            "81.0 % of the concept's map lies outside the creature. When the background is exchanged for another class's the probability "
            "falls, and it does not when it is exchanged for one of the same class.",
            Interval(0.34, 0.27, 0.41, 40),
            "points",
            0.05,
            "lower end of the interval above 5 points",
            Interval(0.02, -0.01, 0.05, 40),
            "swap within the class",
            "confirmed",
            "suspects",
            (names[0],),
            (classes[0],),
        ),
        Finding(
            "robustness/ood",
            "critical",
            "Accuracy falls on places that training did not tie to the class",
            "The same creatures on other places.",
            Interval(0.26, 0.17, 0.34, n),
            "points",
            0.02,
            "lower end of the interval above 2 points",
            Interval(0.004, -0.02, 0.03, n),
            "same pictures, places drawn evenly",
            "confirmed",
            "groups",
        ),
        Finding(
            "leakage/ctl",
            "warning",
            "Concept probabilities say more of the class than the concepts do",
            "Mean CTL over concepts, in shares of the class's entropy; k nearest neighbours, k = 3.",
            Interval(0.061, 0.048, 0.075, 27, "concepts"),
            "number",
            0.03,
            "lower end of the interval above 0.03",
            Interval(0.055, 0.04, 0.07, 27, "concepts"),
            "random concepts",
            "open",
            "concepts",
        ),
        Finding(
            "suspects/grass",
            "warning",
            f"{names[4]} was suspected to be read from the background",
            "Its map lies outside the creature, and yet the probability does not move when the background is exchanged.",
            Interval(0.01, -0.02, 0.04, 38),
            "points",
            0.05,
            "lower end of the interval above 5 points",
            Interval(0.01, -0.02, 0.03, 38),
            "swap within the class",
            "refuted",
            "suspects",
            (names[4],),
        ),
        Finding(
            "concepts/never",
            "note",
            "One concept never appears in the split",
            "Nothing can be said of it.",
            Interval(1.0, None, None, 27, "concepts"),
            "number",
            0.0,
            "more than none",
            section="concepts",
        ),
        Finding(
            "interventions/monotone",
            "good",
            "Each corrected group of concepts raises the accuracy, or keeps it",
            "Largest fall over all later steps, 5 random orders.",
            Interval(0.0, -0.004, 0.004, n),
            "points",
            0.01,
            "upper end of the interval below 1 point",
            Interval(0.04, 0.02, 0.06, n),
            "groups corrected to random values",
            "confirmed",
            "interventions",
        ),
    )


def figures(accuracy: float, n: int, m: int) -> tuple[Figure, ...]:
    return (
        Figure(
            "classes/accuracy",
            "class accuracy",
            Interval(accuracy, accuracy - 0.06, min(accuracy + 0.05, 1), n),
            control=Interval(1 / 6, n=n),
            control_label="always the most frequent class",
        ),
        Figure("classes/calibration_error", "expected calibration error", Interval(0.043, 0.03, 0.061, n), better="lower", note="10 bins."),
        Figure(
            "concepts/auroc",
            "concept AUROC, mean",
            Interval(0.912, 0.894, 0.928, m, "concepts"),
            control=Interval(0.5),
            control_label="chance",
        ),
        Figure(
            "concepts/error",
            "concept error at 0.5",
            Interval(0.071, 0.066, 0.077, n * m, "pairs of picture and concept"),
            better="lower",
            control=Interval(0.204, n=n * m, over="pairs of picture and concept"),
            control_label="all negative",
        ),
        Figure(
            "parts/pointing_plan",
            "pointing of the plan",
            Interval(0.584, 0.56, 0.61, 730, "pairs of picture and concept"),
            control=Interval(0.488, 0.46, 0.51, 730, "pairs of picture and concept"),
            control_label="prior alone",
            note="Peak of the map inside the mask of the concept's part.",
        ),
        Figure(
            "parts/map_plan",
            "part detection mAP",
            Interval(0.421, 0.38, 0.46, 412, "boxes"),
            control=Interval(0.19, 0.16, 0.22, 412, "boxes"),
            control_label="prior alone",
            note="Threshold 0.6 of the maximum, IoU 0.5.",
        ),
        Figure("interventions/area_random", "area under the curve, random order", Interval(0.87, 0.84, 0.9, n)),
        Figure(
            "groups/gap_ood",
            "accuracy lost out of distribution",
            Interval(0.26, 0.17, 0.34, n),
            unit="points",
            better="lower",
            control=Interval(0.004, -0.02, 0.03, n),
            control_label="places drawn evenly",
        ),
        Figure("controls/random_concepts", "accuracy with random concepts", Interval(0.66, 0.6, 0.72, n), better=None),
        Figure(
            "controls/occlusion",
            "fall when the region is covered",
            Interval(0.23, 0.2, 0.26, 500, "pairs of picture and concept"),
            unit="points",
            control=Interval(0.013, 0.006, 0.02, 500, "pairs of picture and concept"),
            control_label="random region of the same size",
        ),
        Figure("concepts/plan_residual", "plan residual", Interval(0.000031, n=n), unit="number", better="lower"),
        Figure("concepts/entropy", "entropy of the class", Interval(2.58, n=n), unit="bits", better=None),
    )


def model_card(n: int, m: int, k: int) -> ModelCard:
    return ModelCard(
        bottleneck="DotCbm",
        settings=(("temperature", "0.1"), ("prior", '"patch"')),
        encoder="dinov2_vits14",
        encoder_fingerprint="9f0c6a5d31e2",
        weights_sha256="5b1f0e4c7a93d2286d1a",
        head_on="probability",
        data="Synthetic(num_classes=6, shortcut=0.0)",
        data_fingerprint="c0ffee1234",
        split="test",
        num_pictures=n,
        num_concepts=m,
        num_classes=k,
        data_licence="Apache-2.0 (drawn)",
        audit=(("seed", "0"), ("depth", "full")),
        training=(("epochs", "45"), ("seed", "0")),
        versions=(("dotcbm", "0.1.0"), ("torch", "2.15")),
        edits=("2026-11-20, A. Auditor: removed “sandy ground”, a shortcut; head re-fitted",),
    )
