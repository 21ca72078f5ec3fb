"""A rich record of an audit that nobody made: drawn creatures, a linear head with known weights, and every section filled.

Shape letters: N pictures, M concepts, K classes.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
from fakes.audit_figures import figures, findings, model_card
from PIL import Image
from torch import Tensor

from dotcbm.data.synthetic import Synthetic
from dotcbm.report.record import (
    FORMAT,
    Absence,
    AuditRecord,
    ClassRow,
    ConceptRow,
    Confusion,
    DetectionSweep,
    GroupRow,
    Interval,
    InterventionCurve,
    PartRow,
    PictureCard,
    PictureColumns,
    Reliability,
    ShownConcept,
    Suspect,
    Thumbnail,
)

__all__ = ["HOSTILE", "bare", "make_record"]

HOSTILE = (
    '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">',
    "\"'><svg onload='window.pwned=1'>",
    "a|b & `c` <b>bold</b> {{ 7*7 }} ]]> <!-- *x* [y](javascript:window.pwned=1)",
)
_GRID = (14, 14)


def make_record(
    *,
    num_pictures: int = 60,
    num_cards: int = 4,
    num_grid: int = 40,
    num_concepts: int | None = None,
    size: int = 160,
    hostile: bool = False,
) -> AuditRecord:
    """A record with every section.

    Args:
        num_pictures: N.
        num_cards: Of the section of pictures; half as many errors.
        num_grid: Thumbnails.
        num_concepts: M; more than the creatures have are made up, for tests of size.
        size: Side of the cards' pictures in pixels.
        hostile: Names full of characters that mean something to HTML, Markdown and scripts.
    """
    source = Synthetic(size=size, num_test=max(num_pictures, 8), num_classes=6, seed=3)
    data = source.load("test")
    names = list(source.concepts.names)
    names += [f"made-up concept {i}" for i in range(len(names), num_concepts or 0)]
    names = names[:num_concepts]
    classes = list(source.concepts.class_names)
    pictures = list(data.names[:num_pictures])
    if hostile:
        for held in (names, classes, pictures):
            held[: len(HOSTILE)] = HOSTILE
    rng = np.random.default_rng(7)
    m, k, real = len(names), len(classes), min(len(names), data.concept_NM.shape[1])
    truth_NM = (rng.random((num_pictures, m)) < 0.2).astype(int)
    truth_NM[:, :real] = data.concept_NM[:num_pictures, :real].numpy().astype(int)
    logit_NM = np.round(rng.normal(0, 1.7, (num_pictures, m)) + 4 * truth_NM - 2.4, 4)
    prob_NM = np.round(1 / (1 + np.exp(-logit_NM)), 5)
    label_N = data.label_N[:num_pictures].numpy()
    mean_KM = np.stack([truth_NM[label_N == c].mean(axis=0) if (label_N == c).any() else np.zeros(m) for c in range(k)])
    weight_KM = np.round(5 * (mean_KM - mean_KM.mean(axis=0)) * np.sqrt(27 / m) + rng.normal(0, 0.2, (k, m)), 4)
    class_NK = prob_NM @ weight_KM.T
    p_NK = np.exp(class_NK) / np.exp(class_NK).sum(axis=1, keepdims=True)
    predicted_N = p_NK.argmax(axis=1)
    confidence_N, true_N = p_NK.max(axis=1), p_NK[np.arange(num_pictures), label_N]
    parts = source.concepts.parts or ()

    def card(row: int, why: str) -> PictureCard:
        shown = list(dict.fromkeys([*np.argsort(-p_NK[row])[:4].tolist(), int(label_N[row])]))
        rest = [c for c in range(k) if c not in shown]
        contribution_M = prob_NM[row] * weight_KM[predicted_N[row]]
        strongest = np.argsort(-np.abs(contribution_M))[:12]
        masks = source.part_masks("test", row)
        return PictureCard(
            row=row,
            why=why,
            image=_jpeg(source.picture("test", row)),
            width=size,
            height=size,
            grid=_GRID,
            region=(0.0, 0.0, 1.0, 1.0),
            classes=tuple(shown),
            class_logits=tuple(float(class_NK[row, c]) for c in shown),
            rest=float(np.log(np.exp(class_NK[row, rest]).sum())) if rest else None,
            concepts=tuple(
                ShownConcept(
                    concept=int(j),
                    probability=float(prob_NM[row, j]),
                    truth=None if j % 11 == 10 else int(truth_NM[row, j]),
                    contribution=float(contribution_M[j]),
                    logit=float(logit_NM[row, j]),
                    heat=_heat(masks, parts[j] if j < len(parts) else (), source.concepts.part_names, rng),
                    slope_K=tuple(float(weight_KM[c, j]) for c in shown),
                )
                for j in strongest
            ),
        )

    wrong = [int(row) for row in np.argsort(-confidence_N) if predicted_N[row] != label_N[row]]
    sure = [int(row) for row in np.argsort(confidence_N)]
    order = np.argsort(confidence_N)[: min(num_grid, num_pictures)]
    count_KK = np.zeros((k, k), int)
    np.add.at(count_KK, (label_N, predicted_N), 1)
    accuracy = float((predicted_N == label_N).mean())
    n = num_pictures
    return AuditRecord(
        format=FORMAT,
        title="Audit of DOT-CBM on drawn creatures",
        class_names=tuple(classes),
        summary=(
            f"The model names {100 * accuracy:.1f} % of {n} pictures rightly. It reads two concepts from the place behind the creature; "
            "a background swap confirms one. Its maps point better than the prior alone."
        ),
        card=model_card(n, m, k),
        findings=findings(names, classes, n),
        figures=figures(accuracy, n, m),
        absent=(
            Absence("groups", "worst-group accuracy under re-weighting", "no second model was given; pass one with --against"),
            Absence("parts", "percentage of correct parts (APN)", "the data has no key points named as in CUB"),
        ),
        classes=tuple(_class_row(c, classes, names, count_KK, prob_NM, label_N, weight_KM) for c in range(k)),
        confusion=Confusion(tuple(tuple(int(v) for v in row) for row in count_KK)),
        reliability=_reliability(confidence_N, predicted_N == label_N),
        concepts=tuple(_concept_row(j, names, truth_NM, weight_KM, parts, rng) for j in range(m)),
        parts=(
            *(
                PartRow(name, "part", float(v), Interval(float(v) * 0.9, float(v) * 0.8, float(v), n, "boxes"), float(v) * 0.6)
                for name, v in zip(source.concepts.part_names, np.round(rng.uniform(0.1, 0.8, 20), 4))
            ),
            PartRow("wing", "group", None, Interval(0.41, 0.33, 0.49, n), 0.31),
        ),
        sweeps=tuple(_sweep(name, peak) for name, peak in (("plan", 0.42), ("evidence", 0.34), ("prior", 0.19), ("random", 0.03))),
        suspects=(
            Suspect(names[0], classes[0], 0.81, 2.31, 1.87, Interval(0.34, 0.27, 0.41, 40), Interval(0.02, -0.01, 0.05, 40), "confirmed"),
            Suspect(names[4], classes[1], 0.66, 1.12, 0.74, Interval(0.01, -0.02, 0.04, 38), Interval(0.01, -0.02, 0.03, 38), "refuted"),
            Suspect(names[2], classes[2], 0.58, 0.91, 0.53),
        ),
        interventions=(
            _curve("random", "test", _rise(accuracy - 0.1, 0.97, 9), n),
            _curve("uncertainty", "test", _rise(accuracy - 0.1, 0.97, 9, bend=2.2), n),
            _curve("random", "test_ood", (*_rise(accuracy - 0.25, 0.95, 8), 0.938), n),
        ),
        groups=(
            GroupRow("meadow", "group", Interval(0.91, 0.84, 0.95, 22), Interval(-0.04, -0.1, 0.02, 22)),
            GroupRow("beach", "group", Interval(0.62, 0.41, 0.79, 21), Interval(0.25, 0.08, 0.42, 21)),
            GroupRow("test_ood", "split", Interval(0.61, 0.53, 0.69, n), Interval(0.26, 0.17, 0.34, n)),
        ),
        errors=tuple(card(row, "wrong and sure" if i < 2 else "wrong") for i, row in enumerate(wrong[: max(num_cards // 2, 1)])),
        cards=tuple(card(row, "least sure" if i % 2 == 0 else "drawn at random") for i, row in enumerate(sure[:num_cards])),
        grid=tuple(Thumbnail(int(row), _jpeg(data.read_image(int(row)), side=88)) for row in order),
        pictures=PictureColumns(
            name=tuple(pictures),
            label=tuple(int(v) for v in label_N),
            predicted=tuple(int(v) for v in predicted_N),
            confidence=tuple(float(v) for v in confidence_N),
            true_probability=tuple(float(v) for v in true_N),
            group=tuple(int(v) % 8 for v in (data.group_N[:num_pictures] if data.group_N is not None else label_N)),
            concept_probability=tuple(tuple(float(v) for v in row) for row in prob_NM),
            concept_truth=tuple(tuple(int(v) for v in row) for row in truth_NM),
        ),
    )


def bare(record: AuditRecord) -> AuditRecord:
    """The same record without anything that parts, masks, groups and interventions give: those sections are absent."""
    sections = ("parts", "suspects", "interventions", "groups", "errors", "pictures", "grid")
    return replace(
        record,
        findings=(),
        parts=(),
        sweeps=(),
        suspects=(),
        interventions=(),
        groups=(),
        errors=(),
        cards=(),
        grid=(),
        absent=tuple(Absence(name, f"the section {name}", "the data has neither parts nor masks") for name in sections),
    )


def _jpeg(image_3HW: Tensor, *, side: int | None = None) -> str:
    picture = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
    picture = picture.resize((side, side)) if side else picture
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _heat(masks_PHW: Tensor, parts: tuple[str, ...], part_names: tuple[str, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """The concept's part on the grid, with some haze."""
    height, width = _GRID
    where = [part_names.index(part) for part in parts]
    mask = masks_PHW[where].any(dim=0).float().numpy() if where else masks_PHW.any(dim=0).float().numpy()
    rows = np.linspace(0, mask.shape[0], height + 1).astype(int)
    columns = np.linspace(0, mask.shape[1], width + 1).astype(int)
    cells = np.array([[mask[a:b, c:d].mean() for c, d in pairwise(columns)] for a, b in pairwise(rows)])
    cells = cells + rng.gamma(0.35, 0.12, cells.shape)
    return tuple(int(v) for v in np.round(255 * cells / cells.max()).ravel())


def _rise(low: float, high: float, steps: int, *, bend: float = 1.2) -> tuple[float, ...]:
    return tuple(float(high - (high - low) * (1 - i / (steps - 1)) ** bend) for i in range(steps))


def _curve(policy: str, split: str, accuracy: tuple[float, ...], n: int) -> InterventionCurve:
    fall = max(max(a - b, 0.0) for i, a in enumerate(accuracy) for b in accuracy[i:])
    spread = tuple(0.02 * (8 - i) / 8 for i in range(9)) if policy == "random" else None
    return InterventionCurve(policy, split, accuracy, sum(accuracy) / len(accuracy), fall, spread, n)


def _sweep(name: str, peak: float) -> DetectionSweep:
    thresholds = tuple(round(0.1 * i, 1) for i in range(1, 10))
    values = [peak * float(np.exp(-((t - 0.5) ** 2) / 0.08)) for t in thresholds]
    undefined = [None if name == "random" and t > 0.8 else v for v, t in zip(values, thresholds)]
    return DetectionSweep(name, thresholds, tuple(undefined), tuple(v * 0.8 for v in values), 0.6, 412)


def _reliability(confidence_N: np.ndarray, hit_N: np.ndarray) -> Reliability:
    bins = [(confidence_N > i / 10) & (confidence_N <= (i + 1) / 10) for i in range(10)]
    return Reliability(
        tuple(int(b.sum()) for b in bins),
        tuple(float(confidence_N[b].mean()) if b.any() else None for b in bins),
        tuple(float(hit_N[b].mean()) if b.any() else None for b in bins),
    )


def _class_row(
    c: int,
    classes: list[str],
    names: list[str],
    count_KK: np.ndarray,
    prob_NM: np.ndarray,
    label_N: np.ndarray,
    weight_KM: np.ndarray,
) -> ClassRow:
    hit, of, said = int(count_KK[c, c]), int(count_KK[c].sum()), int(count_KK[:, c].sum())
    taken = [(classes[j], int(count_KK[c, j])) for j in np.argsort(-count_KK[c], kind="stable") if j != c and count_KK[c, j]]
    mean_M = (prob_NM[label_N == c].mean(axis=0) if (label_N == c).any() else prob_NM.mean(axis=0)) * weight_KM[c]
    order = np.argsort(-mean_M)
    return ClassRow(
        classes[c],
        _share(hit, of),
        _share(hit, said),
        tuple(taken[:3]),
        tuple((names[j], float(mean_M[j])) for j in order[:4]),
        tuple((names[j], float(mean_M[j])) for j in order[::-1][:4]),
    )


def _share(hit: int, of: int) -> Interval:
    if not of:
        return Interval(None, n=0)
    value, half = hit / of, 0.9 / of**0.5
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), of)


def _concept_row(
    j: int, names: list[str], truth_NM: np.ndarray, weight_KM: np.ndarray, parts: tuple[tuple[str, ...], ...], rng: np.random.Generator
) -> ConceptRow:
    positive, known = int(truth_NM[:, j].sum()), len(truth_NM)
    a, b, c, d = (float(v) for v in np.round(rng.uniform(0, 1, 4), 4))
    seen = bool(positive)
    return ConceptRow(
        name=names[j],
        group="made up" if j >= len(parts) else names[j].split()[-1],
        parts=parts[j] if j < len(parts) else (),
        shown=j < 18,
        num_positive=positive,
        num_known=known,
        prevalence=positive / known,
        train_prevalence=0.2 + 0.1 * a,
        auroc=Interval(0.7 + 0.28 * a, 0.62 + 0.28 * a, min(0.78 + 0.28 * a, 1.0), known) if seen else Interval(None),
        average_precision=0.4 + 0.5 * b if seen else None,
        error=0.05 + 0.1 * c,
        all_negative_error=positive / known,
        leakage=0.12 * d,
        pointing=Interval(0.3 + 0.6 * b, 0.2 + 0.6 * b, min(0.4 + 0.6 * b, 1.0), positive) if seen else Interval(None),
        pointing_prior=0.3 + 0.2 * c,
        part_mass=0.2 + 0.5 * b,
        background_share=0.1 + 0.6 * d,
        background_area=0.63,
        occlusion_drop=0.05 + 0.4 * b,
        random_drop=0.02 * c,
        weight_span=float(np.ptp(weight_KM[:, j])),
    )
