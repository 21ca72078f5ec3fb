"""Audit a model on a split: run it, experiment with it, measure, and write down what follows (`dotcbm.report.record`).

    collect     one pass over the split, the training split and the other test splits (`collect`), in pieces that can be resumed
    probe       pictures with exchanged backgrounds and covered regions (`collect_probe`)
    measure     the sections (`audit_*`), from what was collected alone
    find        the findings (`findings`), from the record alone

The same model, data, settings and seed give the same record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dotcbm
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.audit.cards import cards, chosen_pictures, picture_columns, thumbnails, withheld
from dotcbm.report.audit.classes import class_figures, class_rows, confusion, reliability
from dotcbm.report.audit.concepts import concept_figures, concept_rows, leakage_figures, occlusion_figures
from dotcbm.report.audit.controls import control_figures
from dotcbm.report.audit.experts import expert_figures, expert_layers, with_pictures
from dotcbm.report.audit.groups import group_figures, group_rows
from dotcbm.report.audit.interventions import interventions
from dotcbm.report.audit.model import model_card
from dotcbm.report.audit.places import detection_sweeps, part_rows, place_figures, residual_figures
from dotcbm.report.audit.shortcut import shortcut
from dotcbm.report.audit.tools import Gathered, Section
from dotcbm.report.collect.experts import collect_experts, has_experts
from dotcbm.report.collect.probe import occlude, plan_occlusion, plan_swap, swap
from dotcbm.report.collect.run import Columns, audited_rows, collect, pictures_digest
from dotcbm.report.collect.settings import AuditSettings, Depth
from dotcbm.report.collect.store import Store, digest, weights_digest
from dotcbm.report.findings.run import find_all, summary
from dotcbm.report.record import FORMAT, AuditRecord, ModelCard

__all__ = ["AuditSettings", "Depth", "audit"]


def audit(
    model: ConceptModel,
    data: ConceptDataModule,
    *,
    split: str = "test",
    settings: AuditSettings | None = None,
    resume_dir: Path | None = None,
    title: str | None = None,
    data_licence: str | None = None,
    encoder_licence: str | None = None,
    training: Sequence[tuple[str, str]] = (),
    console: Console | None = None,
) -> AuditRecord:
    """The record of an audit.

    Args:
        model: In any mode, on any device; its mode is restored.
        data: Its features are cached where it has a cache folder. Its other test splits (`evaluate_splits`) are measured too.
        split: What is audited.
        settings: How much, and the seed; `AuditSettings()` by default.
        resume_dir: Folder for what is measured on the way; a stopped audit goes on from there. It is emptied at the end.
        title: Of the report.
        data_licence, encoder_licence: For the model card, as far as known.
        training: What is known of the training, name and value, for the model card.
        console: Shows the progress; None shows none.

    Raises:
        ValueError: The data has no such split, or model and data have other concepts or classes.
    """
    settings = settings or AuditSettings()
    _check(model, data, split)
    data.use_encoder(model.encoder)
    others = tuple(name for name in data.evaluate_splits if name not in (split, "train", "val"))
    key = _key(model, data, (split, "train", *others), settings)
    store = Store(resume_dir, key=key)
    with _progress(console) as stage:
        gathered = _gather(model, data, split, others, settings, store, stage)
    card = model_card(gathered, data_licence=data_licence, encoder_licence=encoder_licence, training=training)
    record = _record(gathered, card, title=title or f"{type(model.bottleneck).__name__} on {split}")
    if settings.depth == "full":
        errors, rest = chosen_pictures(gathered)
        made = partial(cards, gathered, read_on=card.head_on)
        record = replace(record, errors=made(errors), cards=made(rest), grid=thumbnails(gathered))
        record = replace(record, experts=with_pictures(gathered, record.experts))
    record = replace(record, findings=find_all(record))
    record = replace(record, summary=summary(record))
    if settings.depth == "full":
        record = replace(record, absent=(*record.absent, *withheld(settings)))  # after the summary, which counts what was not measured
    store.clear()
    return record


Stage = Callable[[str, int], Callable[[int], None]]
"""Name and length of a stage -> what to tell how many were done."""


def _gather(
    model: ConceptModel, data: ConceptDataModule, split: str, others: tuple[str, ...], settings: AuditSettings, store: Store, stage: Stage
) -> Gathered:
    def split_columns(name: str, *, places: bool) -> Columns:
        dataset = data.dataset(name)
        num = len(dataset) if name in ("train", "val") else len(audited_rows(len(dataset), settings=settings))
        return collect(model, data, split=name, settings=settings, store=store, places=places, advance=stage(name, num))

    columns = split_columns(split, places=True)
    train = split_columns("train", places=False)
    rest = tuple(split_columns(name, places=False) for name in others)
    swapped, covered = plan_swap(columns, settings=settings), plan_occlusion(columns, settings=settings)
    return Gathered(
        model=model,
        data=data,
        settings=settings,
        columns=columns,
        train=train,
        others=rest,
        swap=swap(
            model,
            data,
            columns,
            swapped,
            store=store,
            encoded=stage("swapped pictures", 2 * len(swapped)) if data.caches_features else None,
            advance=stage("swap", len(swapped)),
        )
        if len(swapped)
        else None,
        occlusion=occlude(model, data, columns, covered, settings=settings, store=store, advance=stage("occlusion", len(covered)))
        if len(covered)
        else None,
        routed=collect_experts(model, data, columns, settings=settings, store=store, advance=stage("experts", len(columns)))
        if has_experts(model)
        else None,
    )


def _record(g: Gathered, card: ModelCard, *, title: str) -> AuditRecord:
    """Everything but cards and findings."""
    section = Section()
    section.extend(class_figures(g))
    concepts, auroc = concept_figures(g)
    leaking, leakage = leakage_figures(g)
    corrected, leaning, experts = interventions(g), shortcut(g), expert_layers(g)
    for part in (
        concepts,
        leaking,
        occlusion_figures(g),
        place_figures(g),
        residual_figures(g),
        leaning.section,
        corrected.section,
        group_figures(g),
        control_figures(g),
        expert_figures(g, experts),
    ):
        section.extend(part)
    return AuditRecord(
        format=FORMAT,
        title=title,
        class_names=g.model.concepts.class_names,
        summary="",
        card=card,
        findings=(),
        figures=tuple(section.figures),
        absent=tuple(section.absent),
        classes=class_rows(g),
        confusion=confusion(g),
        reliability=reliability(g),
        concepts=concept_rows(g, auroc, leakage),
        parts=part_rows(g) if g.columns.has_maps else (),
        sweeps=detection_sweeps(g),
        suspects=leaning.suspects,
        interventions=corrected.curves,
        groups=group_rows(g),
        errors=(),
        cards=(),
        grid=(),
        pictures=picture_columns(g, g.pointing(g.map_name), g.pointing(g.control_name)),
        experts=experts,
    )


def _check(model: ConceptModel, data: ConceptDataModule, split: str) -> None:
    known = tuple(dict.fromkeys((*data.source.splits, *(("val",) if data.has_validation else ()))))
    if split not in known:
        raise ValueError(f"{type(data.source).__name__} has no split {split!r}; it has {list(known)}")
    ours, theirs = model.concepts, data.concepts
    for what, expected, seen in (("concepts", ours.names, theirs.names), ("classes", ours.class_names, theirs.class_names)):
        if expected != seen:
            differing = next((f"{a!r} and {b!r}" for a, b in zip(expected, seen) if a != b), f"{len(expected)} and {len(seen)} of them")
            raise ValueError(f"model and data have other {what} ({differing}); audit the model on the data that it was trained for")


def _key(model: ConceptModel, data: ConceptDataModule, splits: Sequence[str], settings: AuditSettings) -> str:
    """Of all that the pieces depend on."""
    parts = [dotcbm.__version__, weights_digest(model.bottleneck), model.encoder.fingerprint(), repr(settings), str(FORMAT)]
    for split in dict.fromkeys(splits):
        dataset = data.dataset(split)
        parts += [dataset.source_key, pictures_digest(data, split, audited_rows(len(dataset), settings=AuditSettings()))]
    return digest(parts)


@contextmanager
def _progress(console: Console | None) -> Iterator[Stage]:
    if console is None:
        yield lambda name, total: lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        def stage(name: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=total)
            return lambda done: bars.advance(task, done)

        yield stage
