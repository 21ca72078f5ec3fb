"""Concepts removed from a model's classes or re-weighted, the rest of the head fitted anew, and what that changed.

    removed   no class reads the concept any more: its inputs are taken out of the class head, and the head is fitted to the training
              pictures without them. The concept is still predicted and shown.
    scaled    the classes' weights on the concept are the model's own times a factor, and are held while the rest is fitted anew around
              them. (To scale an input before the fit would change nothing: the fit would scale its weight back.)

Taking a concept out without a fit is what most tools do; it can hurt (Waterbirds' worst group 25.8 -> 13.9 % in CBDebug, arXiv
2509.21385), and is measured here beside the edit, as a warning. So is the head fitted anew with all concepts: what that differs from the
model is owed to the fit, not to the edit. `reweight` weighs the training pictures (see `dotcbm.report.edit.weights`).

What cannot be undone by an edit of the head: other concepts may carry what the removed one said, and a context that the head reads
beside the concepts (a residual) still does.

n training pictures, M concepts, K classes, F inputs of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from torch import Tensor

import dotcbm
from dotcbm.data.batches import Annotations, View
from dotcbm.data.concepts import compare_concepts
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.edits import Edit
from dotcbm.report.audit.model import without_paths
from dotcbm.report.edit.figures import ChangeRow, Scored, change_rows
from dotcbm.report.edit.head import RefitHead, concept_inputs, refit_head
from dotcbm.report.edit.log import HeadSettings, method_of, notes_of
from dotcbm.report.edit.names import asked, known_group_names
from dotcbm.report.edit.weights import Reweighting
from dotcbm.report.edit.weights import reweight as weights_of
from dotcbm.training.head_fit import check_reads_truth, true_head_input

__all__ = ["BEFORE", "CONTROL", "REFIT", "REWEIGHTED", "ZEROED", "Edited", "HeadSettings", "Version", "edit_model"]

BEFORE = "before"
CONTROL = "refit, unedited"
ZEROED = "silently zeroed"
REFIT = "refit"
REWEIGHTED = "refit, re-weighted"
"""Names of the versions that are measured, in this order; the last one is the edited model."""


@dataclass(frozen=True)
class Version:
    """One head that was tried: its name, weights (K, F) and (K,) biases."""

    name: str
    weight_KF: Tensor
    bias_K: Tensor


@dataclass(frozen=True)
class Edited:
    """An edit and what it changed.

    Attributes:
        model: The edited model; its `edits` end with this edit. It shares the encoder with the one it was made from, which is unchanged.
        before: That one.
        edit: The entry of the log.
        versions: The heads that were measured, the model's own first, the one of `model` last.
        rows: What each scores, split by split.
        reweighting: Of the training pictures; None without.
        notes: What the reader must know.
    """

    model: ConceptModel
    before: ConceptModel
    edit: Edit
    versions: tuple[Version, ...]
    rows: tuple[ChangeRow, ...]
    reweighting: Reweighting | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    """What the head reads of a split: (n, F) inputs, (n,) labels, (n, M) concept probabilities."""

    input_nF: Tensor
    label_n: Tensor
    concept_nM: Tensor


def edit_model(
    model: ConceptModel,
    data: ConceptDataModule,
    *,
    remove: Sequence[str] = (),
    scale: Mapping[str, float] | None = None,
    reweight: bool = False,
    by: str,
    reason: str,
    head: HeadSettings | None = None,
    splits: Sequence[str] | None = None,
    limit: float = 10.0,
    num_draws: int = 1000,
    seed: int = 0,
    when: datetime | None = None,
) -> Edited:
    """Edit a model; see the head of this file.

    Args:
        model: Left as it is.
        data: Its training data, and the splits to measure on.
        remove: Names of concepts that no class shall read.
        scale: Factors by concept, positive; 1 holds a concept's weights as they are.
        reweight: Weigh training pictures so that the class does not depend on the removed concepts.
        by: Who decides this; goes into the log.
        reason: Why; goes into the log.
        head: How the head is fitted; give what the run was trained with (the defaults of `HeadSettings` otherwise).
        splits: To measure on; the data's test splits by default.
        limit: Of the weights of pictures (`dotcbm.report.edit.weights.reweight`).
        num_draws: Of the bootstrap.
        seed: Of its draws.
        when: For the log; now by default.

    Raises:
        ValueError: Nothing to do, nobody who does it or no reason; concepts that are not known (the nearest is named), were removed
            before, or are to be removed and scaled; a factor that is not positive; data of other concepts; or a bottleneck whose head
            cannot be edited (`concept_inputs`).
    """
    head = head or HeadSettings()
    removed, scaled = asked(model, remove, dict(scale or {}), by=by, reason=reason, reweight=reweight)
    compare_concepts(model.concepts, data.concepts, what="the data", of="the model")
    data.use_encoder(model.encoder)
    names, bottleneck = model.concepts.names, model.bottleneck
    annotations: Annotations = "foreground" if data.foreground_in_training else "labels"
    blocks = _blocks(model, data, annotations)
    gone = sorted({j for name in (*model.removed_concepts, *removed) for j in blocks[names.index(name)]})
    before = sorted({j for name in model.removed_concepts for j in blocks[names.index(name)]})
    earlier = [name for edit in model.edits for name, _ in edit.scaled]
    held_names = [name for name in dict.fromkeys([*earlier, *scaled]) if name not in (*model.removed_concepts, *removed)]
    held = sorted({j for name in held_names for j in blocks[names.index(name)]})
    weight_KF, bias_K = bottleneck.head.weight.detach().cpu().double(), bottleneck.head.bias.detach().cpu().double()
    start_KF = weight_KF.clone()
    for name, factor in scaled.items():
        start_KF[:, blocks[names.index(name)]] *= factor

    views: tuple[View, ...] = data.views if head.views == "all" and head.fit_on == "predicted" else ("plain",)
    seen = [_read(model, data, "train", annotations, view) for view in views]
    if head.fit_on == "truth":
        check_reads_truth(bottleneck)
        inputs, labels = true_head_input(bottleneck, data.dataset("train"))
    else:
        inputs, labels = torch.cat([s.input_nF for s in seen]), torch.cat([s.label_n for s in seen])
    val = _read(model, data, "val", annotations) if data.has_validation else None
    val_pair = None if val is None else (val.input_nF, val.label_n)
    class_n = data.class_weights()[labels] if head.balanced else torch.ones(len(labels))
    strength = None if head.l2 == "auto" else head.l2

    def fit(*, start: Tensor, out: Sequence[int], keep: Sequence[int], l2: float | None, weight_n: Tensor) -> RefitHead:
        return refit_head(inputs, labels, weight_KF=start, bias_K=bias_K, removed=out, held=keep, l2=l2, val=val_pair, weight_n=weight_n)

    zeroed_KF = start_KF.clone()
    zeroed_KF[:, gone] = 0.0
    former = sorted({j for name in earlier if name not in model.removed_concepts for j in blocks[names.index(name)]})
    control = fit(start=weight_KF, out=before, keep=former, l2=strength, weight_n=class_n)
    chosen = fit(start=start_KF, out=gone, keep=held, l2=strength, weight_n=class_n)
    versions = [
        Version(BEFORE, weight_KF, bias_K),
        Version(CONTROL, control.weight_KF, control.bias_K),
        Version(ZEROED, zeroed_KF, bias_K),
        Version(REFIT, chosen.weight_KF, chosen.bias_K),
    ]
    reweighting = None
    if reweight:
        undesired = [names.index(name) for name in (*model.removed_concepts, *removed)]
        reweighting = weights_of(labels, torch.cat([s.concept_nM for s in seen])[:, undesired] > 0.5, limit=limit)
        chosen = fit(start=chosen.weight_KF, out=gone, keep=held, l2=chosen.l2, weight_n=class_n * reweighting.weight_n)
        versions.append(Version(REWEIGHTED, chosen.weight_KF, chosen.bias_K))

    rows: list[ChangeRow] = []
    for split in splits or data.evaluate_splits:
        scored = _scored(_read(model, data, split, annotations), data, split, versions)
        group_names = known_group_names(data.source)
        rows += change_rows(scored, class_names=model.concepts.class_names, group_names=group_names, num_draws=num_draws, seed=seed)
    edit = Edit(
        by=by.strip(),
        reason=reason.strip(),
        when=(when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        removed=tuple(removed),
        removed_inputs=tuple(sorted(set(gone) - set(before))),
        scaled=tuple(scaled.items()),
        reweighted=reweight,
        method=method_of(head, chosen, len(labels), reweighting),
        data=f"{without_paths(repr(data.source))}, split train",
        figures=tuple(
            (f"{row.split}/{row.name}, {version.name}", value.value)
            for row in rows
            if row.kind in ("all", "balanced", "worst group")
            for version, value in zip(versions, row.values, strict=True)
            if value.value is not None
        ),
        version=dotcbm.__version__,
    )
    notes = notes_of(model, removed, control, reweighting)
    return Edited(_with_head(model, versions[-1], edit), model, edit, tuple(versions), tuple(rows), reweighting, notes)


@torch.no_grad()
def _blocks(model: ConceptModel, data: ConceptDataModule, annotations: Annotations) -> list[list[int]]:
    """The inputs of each concept."""
    device = next(model.bottleneck.parameters()).device
    batch = next(iter(data.plain_loader("train", annotations=annotations))).to(device)
    was_training = model.training
    model.eval()
    try:
        return [inputs.tolist() for inputs in concept_inputs(model.bottleneck, model.forward_batch(batch))]
    finally:
        model.train(was_training)


@torch.no_grad()
def _read(model: ConceptModel, data: ConceptDataModule, split: str, annotations: Annotations, view: View = "plain") -> _Read:
    device = next(model.bottleneck.parameters()).device
    was_training = model.training
    model.eval()
    inputs, concepts, labels = [], [], []
    try:
        for batch in data.plain_loader(split, annotations=annotations, view=view):
            output = model.forward_batch(batch.to(device))
            inputs.append(model.bottleneck.head_input(output.concept_logit_BM, output.context_BX).float().cpu())
            concepts.append(output.concept_BM.float().cpu())
            labels.append(batch.label_B)
    finally:
        model.train(was_training)
    return _Read(torch.cat(inputs), torch.cat(labels), torch.cat(concepts))


def _scored(read: _Read, data: ConceptDataModule, split: str, versions: Sequence[Version]) -> Scored:
    input_nF = read.input_nF.double()
    predicted = {version.name: F.linear(input_nF, version.weight_KF, version.bias_K).argmax(1) for version in versions}
    return Scored(split, read.label_n, data.dataset(split).group_N, predicted)


def _with_head(model: ConceptModel, version: Version, edit: Edit) -> ConceptModel:
    bottleneck = copy.deepcopy(model.bottleneck)
    with torch.no_grad():
        bottleneck.head.weight.copy_(version.weight_KF)
        bottleneck.head.bias.copy_(version.bias_K)
    edited = ConceptModel(model.encoder, bottleneck)
    edited.train(model.training)
    edited.edits = (*model.edits, edit)
    return edited
