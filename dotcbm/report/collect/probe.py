"""Experiments of an audit: show the model changed pictures and see what it says.

    swap        the object of a picture on the background of another picture: of its own class (which has the same artefacts and must
                change nothing) and of another class
    occlusion   the hottest region of the map of a concept that is there is covered, or a random region of the same size

S pictures of an experiment, M concepts, K classes. Pictures are numbered by their place in the audited `Columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dotcbm.data.backgrounds_paint import PAINT, swap_background
from dotcbm.data.batches import Annotations, Rows, mix_seed
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptDataset
from dotcbm.data.transforms import collate, prepare_sample
from dotcbm.metrics.faithfulness import cover, random_region, region_of
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.collect.maps import explaining_map
from dotcbm.report.collect.run import Columns, evaluating, run
from dotcbm.report.collect.settings import AuditSettings
from dotcbm.report.collect.store import Store
from dotcbm.structures import ConceptBatch, ConceptOutput

__all__ = ["Occlusion", "Swap", "occlude", "plan_occlusion", "plan_swap", "swap"]

_SWAP, _OCCLUDE = 0x5A9, 0x0CC  # separate streams of the seed
_AT_ONCE = 4  # pictures through the encoder: larger batches leave a processor's cache (see `dotcbm.data.features`)
_PIECE = 16  # pictures between two savings
_LEAST = 0.02  # share of the picture that must be background to be worth an exchange: with less, nothing is seen of the donor's


@dataclass(frozen=True)
class Swap:
    """Pictures on other backgrounds, and what the model says of them.

    Attributes:
        picture_S: (S,) the picture whose object is shown.
        same_S, other_S: (S,) the picture whose background is lent: of the object's own class, and of another class.
        same_logit_SK, other_logit_SK: (S, K) class logits.
        same_concept_SM, other_concept_SM: (S, M) concept probabilities.
    """

    picture_S: Tensor
    same_S: Tensor
    other_S: Tensor
    same_logit_SK: Tensor
    other_logit_SK: Tensor
    same_concept_SM: Tensor
    other_concept_SM: Tensor


@dataclass(frozen=True)
class Occlusion:
    """Covered pictures, each for one concept that is there.

    Attributes:
        picture_S, concept_S: (S,) which concept of which picture.
        before_S: (S,) the concept's probability.
        region_S, random_S: (S,) with its hottest region covered, and with a random region of the same size covered.
    """

    picture_S: Tensor
    concept_S: Tensor
    before_S: Tensor
    region_S: Tensor
    random_S: Tensor


def plan_swap(columns: Columns, *, settings: AuditSettings) -> Tensor:
    """(S, 3) picture, donor of its own class, donor of another class: drawn among the pictures with a usable mask.

    Pictures whose class has no second picture with a mask are left out, and none is left if all are of one class.
    """
    area_N = columns.places.get("area")
    if area_N is None:
        return torch.zeros(0, 3, dtype=torch.long)
    masked = ((area_N > _LEAST) & (area_N < 1)).nonzero()[:, 0]
    label_N = columns.label_N
    drawn = torch.Generator().manual_seed(mix_seed(settings.seed, _SWAP))
    order = masked[torch.randperm(len(masked), generator=drawn)]
    by_class = {k: masked[label_N[masked] == k] for k in label_N[masked].unique().tolist()}
    classes = list(by_class)
    triples: list[list[int]] = []
    for n in order.tolist():
        own = int(label_N[n])
        # Drawn for every picture, used or not, so that one picture more or less changes no other's donors.
        uniform = torch.rand(3, generator=drawn).tolist()
        mates = by_class[own][by_class[own] != n]
        others = [k for k in classes if k != own]
        if len(triples) == settings.num_swapped or not len(mates) or not others:
            continue
        # The class first: every other class is as likely, however many pictures it has.
        strangers = by_class[others[int(uniform[1] * len(others))]]
        triples.append([n, int(mates[int(uniform[0] * len(mates))]), int(strangers[int(uniform[2] * len(strangers))])])
    return torch.tensor(triples, dtype=torch.long).view(-1, 3)


def swapped_pictures(dataset: ConceptDataset, columns: Columns, plan_S3: Tensor) -> ConceptDataset:
    """2 S pictures of a plan: each object on the background of its own class, and then of another one."""
    dataset = replace(dataset, read_part_masks=None)  # of no use here, and slow to read
    row_N, triples = columns.row_N, plan_S3.tolist()
    pairs = [(int(row_N[n]), int(row_N[donor])) for n, same, other in triples for donor in (same, other)]
    shown = dataset.subset([row for row, _ in pairs])
    return replace(
        shown,
        names=tuple(f"{dataset.names[row]} on {dataset.names[donor]}" for row, donor in pairs),
        read_image=partial(_swapped, dataset, pairs),
        read_size=partial(_size_of, dataset, pairs),
        read_foreground=partial(_foreground_of, dataset, pairs),
        source_key=f"{dataset.source_key} swapped {PAINT}",
        rows=None,
    )


def _swapped(dataset: ConceptDataset, pairs: Sequence[tuple[int, int]], index: int) -> Tensor:
    shown, lent = (dataset.sample(row) for row in pairs[index])
    assert shown.image is not None
    assert shown.foreground_HW is not None
    assert lent.image is not None
    return swap_background(shown.image, shown.foreground_HW, lent.image, lent.foreground_HW)


def _foreground_of(dataset: ConceptDataset, pairs: Sequence[tuple[int, int]], index: int) -> Tensor | None:
    return dataset.sample(pairs[index][0], image=False).foreground_HW


def _size_of(dataset: ConceptDataset, pairs: Sequence[tuple[int, int]], index: int) -> tuple[int, int]:
    return dataset.sample(pairs[index][0], image=False, masks=False).size


def swap(
    model: ConceptModel,
    data: ConceptDataModule,
    columns: Columns,
    plan_S3: Tensor,
    *,
    store: Store,
    encoded: Callable[[int], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Swap:
    """Make the swaps of `plan_swap` and show them to the model.

    What a frozen encoder sees in them is cached like the features of a split: other models on the same pictures find it there.

    Args:
        model, data, columns, store: Of the audit.
        plan_S3: See `plan_swap`.
        encoded: Told how many pictures the encoder has seen, where its features are cached.
        advance: Told how many swaps were shown to the model.
    """
    dataset = swapped_pictures(data.dataset(columns.split), columns, plan_S3)
    caches = [data.cache_pictures(dataset, progress=False, advance=encoded)] if data.caches_features else None
    annotations: Annotations = "foreground" if data.foreground_in_training else "labels"
    rows = Rows(dataset, preprocessing=model.preprocessing, caches=caches, annotations=annotations)

    def piece(start: int) -> dict[str, Tensor]:
        shown = [(row, 0) for row in range(2 * start, min(2 * (start + _PIECE), len(dataset)))]
        outputs = [_output(model, rows[shown[i : i + _AT_ONCE]]) for i in range(0, len(shown), _AT_ONCE)]
        class_logit = torch.cat([output.class_logit_BK for output in outputs])
        concept = torch.cat([output.concept_BM for output in outputs])
        return {
            "same_logit": class_logit[0::2],
            "other_logit": class_logit[1::2],
            "same_concept": concept[0::2],
            "other_concept": concept[1::2],
        }

    found = _pieces("swap", len(plan_S3), piece, store=store, model=model, advance=advance)
    return Swap(
        picture_S=plan_S3[:, 0],
        same_S=plan_S3[:, 1],
        other_S=plan_S3[:, 2],
        same_logit_SK=found["same_logit"],
        other_logit_SK=found["other_logit"],
        same_concept_SM=found["same_concept"],
        other_concept_SM=found["other_concept"],
    )


def plan_occlusion(columns: Columns, *, settings: AuditSettings) -> Tensor:
    """(S, 2) picture and concept: drawn pictures, and of each a concept that is there by its label and by the model."""
    there_NM = (columns.truth_NM == 1) & (columns.concept_NM > 0.5)
    drawn = torch.Generator().manual_seed(mix_seed(settings.seed, _OCCLUDE))
    pairs: list[list[int]] = []
    for n in torch.randperm(len(columns), generator=drawn).tolist():
        uniform = float(torch.rand(1, generator=drawn))
        concepts = there_NM[n].nonzero()[:, 0]
        if len(pairs) < settings.num_occluded and len(concepts):
            pairs.append([n, int(concepts[int(uniform * len(concepts))])])
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def occlude(
    model: ConceptModel,
    data: ConceptDataModule,
    columns: Columns,
    plan_S2: Tensor,
    *,
    settings: AuditSettings,
    store: Store,
    advance: Callable[[int], None] | None = None,
) -> Occlusion | None:
    """Cover what `plan_occlusion` says and show it to the model; None for a model without maps."""
    dataset = replace(data.dataset(columns.split), read_part_masks=None)
    device = next(model.bottleneck.parameters()).device

    def piece(start: int) -> dict[str, Tensor]:
        before, region, noise = [], [], []
        for n, concept in plan_S2[start : start + _PIECE].tolist():
            row = int(columns.row_N[n])
            sample = prepare_sample(dataset.sample(row), preprocessing=model.preprocessing)
            plain, features = run(model, collate([sample]).to(device))
            found = explaining_map(model, features, plain, concepts=[concept])
            assert found is not None
            assert sample.image is not None
            map_HW = found[1][0, :, 0].unflatten(0, plain.grid)
            hot_HW = region_of(map_HW)
            cold_HW = random_region(hot_HW, seed=mix_seed(settings.seed, _OCCLUDE, row, concept))
            covered = _output(model, collate([replace(sample, image=cover(sample.image, mask_HW)) for mask_HW in (hot_HW, cold_HW)]))
            before.append(plain.concept_BM[0, concept])
            region.append(covered.concept_BM[0, concept])
            noise.append(covered.concept_BM[1, concept])
        return {"before": torch.stack(before), "region": torch.stack(region), "random": torch.stack(noise)}

    if not columns.has_maps:
        return None
    found = _pieces("occlusion", len(plan_S2), piece, store=store, model=model, advance=advance)
    return Occlusion(plan_S2[:, 0], plan_S2[:, 1], found["before"], found["region"], found["random"])


def _pieces(
    what: str,
    num: int,
    piece: Callable[[int], dict[str, Tensor]],
    *,
    store: Store,
    model: ConceptModel,
    advance: Callable[[int], None] | None,
) -> dict[str, Tensor]:
    parts: list[dict[str, Tensor]] = []
    with evaluating(model):
        for start in range(0, num, _PIECE):
            parts.append(store.keep(f"{what}-{start:06d}", lambda start=start: piece(start)))
            if advance is not None:
                advance(min(_PIECE, num - start))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _output(model: ConceptModel, batch: ConceptBatch) -> ConceptOutput:
    return run(model, batch.to(next(model.bottleneck.parameters()).device))[0]
