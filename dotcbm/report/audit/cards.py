"""Pictures of an audit: cards with maps and contributions, errors first, and the grid of thumbnails.

N pictures, B of the cards, M concepts, K classes, L patches.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from dotcbm.data.batches import Rows, mix_seed
from dotcbm.explain.heatmaps import visible_region
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.audit.tools import Gathered, rounded
from dotcbm.report.collect.maps import explaining_map
from dotcbm.report.collect.run import evaluating, run
from dotcbm.report.collect.settings import AuditSettings
from dotcbm.report.record import Absence, PictureCard, PictureColumns, ShownConcept, Thumbnail

__all__ = ["cards", "chosen_pictures", "head_on", "jpeg", "picture_columns", "seen_region", "thumbnails", "withheld"]

HeadOn = Literal["probability", "logit", "other", "none"]

_DRAWN = 0xCA2D  # separates the random cards from the other uses of the seed
_SURE = 0.8  # probability of the predicted class above which an error is called sure
_SHOWN_CONCEPTS, _SHOWN_CLASSES = 12, 5
_SIDE, _QUALITY = 320, 80  # of a card's picture: about 20 KB each
_THUMBNAIL, _THUMBNAIL_QUALITY = 56, 70
_HEAT = 255


def jpeg(picture_3HW: Tensor, *, side: int, quality: int) -> tuple[str, tuple[int, int]]:
    """A picture as JPEG in base64, its longer side at most `side` pixels, and its (width, height). The same bytes every time."""
    image = Image.fromarray(picture_3HW.permute(1, 2, 0).numpy())
    scale = min(1.0, side / max(image.size))
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality, optimize=True, progressive=False, subsampling=2)
    return base64.b64encode(written.getvalue()).decode("ascii"), image.size


def chosen_pictures(g: Gathered) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(picture, why) of the errors, most confident first, and of the other cards; no picture twice."""
    settings, columns = g.settings, g.columns
    confidence_N = columns.class_NK.max(1).values
    wrong = (columns.correct_N == 0).nonzero()[:, 0]
    wrong = wrong[confidence_N[wrong].argsort(descending=True, stable=True)].tolist()
    errors = [(n, "wrong and sure" if confidence_N[n] > _SURE else "wrong") for n in wrong[: settings.num_errors]]
    taken = {n for n, _ in errors}
    unsure = [n for n in confidence_N.argsort(stable=True).tolist() if n not in taken][: settings.num_unsure]
    taken |= set(unsure)
    drawn = torch.Generator().manual_seed(mix_seed(settings.seed, _DRAWN))
    random = [n for n in torch.randperm(len(columns), generator=drawn).tolist() if n not in taken][: settings.num_drawn]
    return errors, [*((n, "least sure") for n in unsure), *((n, "drawn at random") for n in random)]


def head_on(model: ConceptModel, concept_logit_BM: Tensor, context_BX: Tensor | None) -> HeadOn:
    """What the class logits are linear in, concept by concept: "probability", "logit", "other"; "none" for a black box.

    Found by trying it: with all other concepts as they are, the middle of two values must give the middle of two answers.
    """
    if not model.bottleneck.reads_concepts:
        return "none"
    probability = torch.tensor([0.5, 0.7, 0.9])  # not around 0.5, about which the two would look alike
    tried: tuple[tuple[HeadOn, Tensor], ...] = (("probability", torch.logit(probability)), ("logit", torch.tensor([-1.5, 0.0, 1.5])))
    for name, values in tried:
        answers = [_set_all(model, concept_logit_BM, context_BX, float(value)) for value in values]
        spread = float((answers[2] - answers[0]).abs().max())
        if spread > 0 and float((answers[0] + answers[2] - 2 * answers[1]).abs().max()) <= 1e-3 * spread:
            return name
    return "other"


def _set_all(model: ConceptModel, logit_BM: Tensor, context_BX: Tensor | None, value: float) -> Tensor:
    """(M, B, K) class logits with one concept after the other set to a logit."""
    answers: list[Tensor] = []
    for j in range(logit_BM.shape[1]):
        changed_BM = logit_BM.clone()
        changed_BM[:, j] = value
        answers.append(model.bottleneck.classify(changed_BM, context_BX).double())
    return torch.stack(answers)


def cards(g: Gathered, chosen: Sequence[tuple[int, str]], *, read_on: str) -> tuple[PictureCard, ...]:
    """The cards of some pictures, in that order.

    Args:
        g: All that was gathered.
        chosen: Numbers of pictures and why they are shown.
        read_on: What `head_on` found.
    """
    if not chosen:
        return ()
    model, dataset = g.model, g.data.dataset(g.columns.split)
    cache = g.data.cache(g.columns.split)
    annotations = "foreground" if g.data.foreground_in_training else "labels"
    rows = Rows(dataset, preprocessing=model.preprocessing, caches=None if cache is None else [cache], annotations=annotations)
    device = next(model.bottleneck.parameters()).device
    made: list[PictureCard] = []
    with evaluating(model):
        for n, why in chosen:
            row = int(g.columns.row_N[n])
            output, features = run(model, rows[[(row, 0)]].to(device))
            picture = dataset.sample(row, masks=False).image
            assert picture is not None
            image, (width, height) = jpeg(picture, side=_SIDE, quality=_QUALITY)
            if not g.settings.pictures:
                image = ""
            class_logit_K = output.class_logit_BK[0].double()
            classes = class_logit_K.argsort(descending=True, stable=True)[:_SHOWN_CLASSES].tolist()
            label = int(g.columns.label_N[n])
            if label not in classes:
                classes[-1] = label
            others = [k for k in range(len(class_logit_K)) if k not in classes]
            maps_of = partial(explaining_map, model, features, output)
            concepts = _shown_concepts(g, n, classes, maps_of=maps_of, read_on=read_on)
            made.append(
                PictureCard(
                    row=n,
                    why=why,
                    image=image,
                    width=width,
                    height=height,
                    grid=output.grid,
                    region=seen_region(model, picture),
                    classes=tuple(classes),
                    class_logits=tuple(rounded(class_logit_K[k]) or 0.0 for k in classes),
                    rest=rounded(class_logit_K[others].logsumexp(0)) if others else None,
                    concepts=concepts,
                )
            )
    return tuple(made)


def seen_region(model: ConceptModel, picture_3HW: Tensor) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of the part of a picture that the model sees, as fractions."""
    x0, y0, x1, y1 = visible_region(model.preprocessing, (int(picture_3HW.shape[1]), int(picture_3HW.shape[2])))
    return round(x0, 5), round(y0, 5), round(x1, 5), round(y1, 5)


def _shown_concepts(
    g: Gathered, n: int, classes: list[int], *, maps_of: Callable[..., tuple[str, Tensor] | None], read_on: str
) -> tuple[ShownConcept, ...]:
    """The concepts that contribute most to the predicted class, for or against; `maps_of` gives the maps of those."""
    if not g.reads_concepts:
        return ()
    columns, bottleneck = g.columns, g.model.bottleneck
    device = next(bottleneck.parameters()).device
    rows = torch.tensor([n])
    context = columns.context(rows)
    context = None if context is None else context.to(device)
    logit_1M = columns.concept_logit_NM[rows].to(device)
    contribution_M = bottleneck.contributions(logit_1M, context)[0, classes[0]].cpu()
    order = contribution_M.abs().argsort(descending=True, stable=True)[:_SHOWN_CONCEPTS].tolist()
    found = maps_of(concepts=order)
    shown: list[ShownConcept] = []
    for place, j in enumerate(order):
        truth = float(columns.truth_NM[n, j])
        logit = float(columns.concept_logit_NM[n, j])
        shown.append(
            ShownConcept(
                concept=j,
                probability=rounded(torch.tensor(logit).sigmoid()) or 0.0,
                truth=None if truth != truth else int(truth),
                contribution=rounded(contribution_M[j]) or 0.0,
                logit=rounded(logit) or 0.0,
                heat=() if found is None else _heat(found[1][0, :, place]),
                slope_K=_slopes(g.model, logit_1M, context, j, classes, read_on=read_on),
            )
        )
    return tuple(shown)


def _heat(map_L: Tensor) -> tuple[int, ...]:
    positive_L = map_L.double().clamp(min=0)
    highest = float(positive_L.max())
    if highest <= 0:
        return (0,) * len(positive_L)
    return tuple((positive_L / highest * _HEAT).round().int().tolist())


def _slopes(
    model: ConceptModel, logit_1M: Tensor, context: Tensor | None, concept: int, classes: list[int], *, read_on: str
) -> tuple[float, ...]:
    """Change of the class logits for a whole probability, or for one unit of the logit; empty where neither is linear."""
    if read_on not in ("probability", "logit"):
        return ()
    low, high = (float(torch.logit(torch.tensor(0.2))), float(torch.logit(torch.tensor(0.8)))) if read_on == "probability" else (-1.5, 1.5)
    step = 0.6 if read_on == "probability" else high - low
    changed_2M = logit_1M.repeat(2, 1)
    changed_2M[0, concept], changed_2M[1, concept] = low, high
    context_2X = None if context is None else context.repeat(2, *([1] * (context.ndim - 1)))
    answer_2K = model.bottleneck.classify(changed_2M, context_2X).double().cpu()
    slope_K = (answer_2K[1] - answer_2K[0]) / step
    return tuple(rounded(slope_K[k]) or 0.0 for k in classes)


def thumbnails(g: Gathered) -> tuple[Thumbnail, ...]:
    """Small pictures of the grid: evenly spaced pictures of the split; none without photos."""
    num = min(g.settings.num_thumbnails, len(g.columns)) if g.settings.pictures else 0
    if num == 0:
        return ()
    dataset = g.data.dataset(g.columns.split)
    chosen = sorted({round(i * (len(g.columns) - 1) / max(num - 1, 1)) for i in range(num)})
    made: list[Thumbnail] = []
    for n in chosen:
        picture = dataset.sample(int(g.columns.row_N[n]), masks=False).image
        assert picture is not None
        made.append(Thumbnail(n, jpeg(picture, side=_THUMBNAIL, quality=_THUMBNAIL_QUALITY)[0]))
    return tuple(made)


def withheld(settings: AuditSettings) -> tuple[Absence, ...]:
    """What an audit without photos does not show, and why."""
    if settings.pictures:
        return ()
    reason = "photos are left out: this audit was made without them, as for data whose licence forbids showing them"
    return (
        Absence("errors", "the photos", f"{reason}; maps, contributions and sliders are there"),
        Absence("pictures", "the photos", f"{reason}; maps, contributions and sliders are there"),
        Absence("grid", "the grid", reason),
    )


def picture_columns(g: Gathered, hit_NM: Tensor | None, prior_NM: Tensor | None) -> PictureColumns:
    """What the model said of each picture.

    Args:
        g: All that was gathered.
        hit_NM, prior_NM: (N, M) 1 where a peak is on the part, of the model's map and of the control; NaN where not measured.
    """
    columns = g.columns
    probability_NK = columns.class_NK
    confidence_N, true_N = probability_NK.max(1).values, probability_NK.gather(1, columns.label_N[:, None])[:, 0]

    def hits(value_NM: Tensor | None) -> tuple[int, ...]:
        return () if value_NM is None else tuple(((value_NM == 1) & (columns.truth_NM == 1)).sum(1).tolist())

    counted = () if hit_NM is None else tuple((~hit_NM.isnan() & (columns.truth_NM == 1)).sum(1).tolist())
    return PictureColumns(
        name=columns.names,
        label=tuple(columns.label_N.tolist()),
        predicted=tuple(columns.predicted_N.tolist()),
        confidence=tuple(rounded(value) or 0.0 for value in confidence_N.tolist()),
        true_probability=tuple(rounded(value) or 0.0 for value in true_N.tolist()),
        group=() if columns.group_N is None else tuple(columns.group_N.tolist()),
        concept_probability=tuple(tuple(rounded(value) or 0.0 for value in row) for row in columns.concept_NM.tolist()),
        concept_truth=tuple(tuple(None if value != value else int(value) for value in row) for row in columns.truth_NM.tolist()),
        pointing_hits=hits(hit_NM),
        pointing_pairs=counted,
        prior_hits=hits(prior_NM) if hit_NM is not None else (),
    )
