"""The runs of a study of experts: those that have no record yet, each from fresh weights or from another row's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch

import dotcbm
from dotcbm.encoders.vit_moe_growth import Growth
from dotcbm.models.concept_model import ConceptModel
from dotcbm.moe.layer import moe_layers
from dotcbm.moe.router import Gate, Normalize
from dotcbm.report.study.experts_plan import ExpertRow, ExpertRun, ExpertStudy, read_expert_records, run_settings, runs_of
from dotcbm.report.study.experts_train import (
    Pictures,
    evaluate_at,
    flops_per_picture,
    make_model,
    nested_by_budget,
    read_pictures,
    save_weights,
    train_model,
)
from dotcbm.report.study.plan import Record, make_source
from dotcbm.structures import ConceptSet
from dotcbm.training.growth import grow_model

__all__ = ["growth_errors", "run_expert_study"]


def run_expert_study(
    study: ExpertStudy, directory: Path, *, only: Sequence[str] = (), share: tuple[int, int] = (0, 1), say: Callable[[str], None] = print
) -> list[Record]:
    """Make the runs that have no record in `directory` yet.

    Args:
        study: What to run.
        directory: Of the records; models lie in its folder `models`, pictures beside it.
        only: Names of rows; all by default. A row that another one starts from must have been run.
        share: (i, n): every n-th seed of the missing runs, from the i-th, for n processes side by side.
        say: Told of each run.

    Returns:
        All records that are there afterwards.

    Raises:
        ValueError: A row that does not exist, or a record of other settings.
    """
    if unknown := sorted(set(only) - {row.name for row in study.rows}):
        raise ValueError(f"the study {study.name} has no rows {unknown}; it has {[row.name for row in study.rows]}")
    directory.mkdir(parents=True, exist_ok=True)
    read_expert_records(study, directory)
    mine = study.seeds[share[0] :: share[1]]
    runs = [run for run in runs_of(study) if run.seed in mine and (not only or run.row.name in only)]
    missing = [run for run in runs if not (directory / f"{run.stem}.json").exists()]
    if not missing:
        return read_expert_records(study, directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = make_source(study.source)
    model = make_model(study.encoder, {}, source.concepts, seed=0).to(device)
    unit = 3 * study.loop.steps * study.loop.batch_size * flops_per_picture(model, [layer.k for layer in moe_layers(model).values()])
    splits = [
        read_pictures(source, study.source, split, preprocessing=model.preprocessing, cache=directory.parent, device=device)
        for split in ("train", study.evaluate)
    ]
    start = time.monotonic()
    for number, run in enumerate(missing):
        left = (time.monotonic() - start) / number * (len(missing) - number) / 60 if number else 0.0
        say(
            f"{study.name}: run {number + 1} of {len(missing)}: {run.row.name}, seed {run.seed}"
            + (f"; {left:.0f} min left" if number else "")
        )
        record = _run(study, run, source.concepts, splits[0], splits[1], unit=unit, directory=directory)
        aside = (path := directory / f"{run.stem}.json").with_suffix(".partial")
        aside.write_text(json.dumps(asdict(record), indent=1) + "\n")
        aside.replace(path)
    return read_expert_records(study, directory)


def growth_errors(study: ExpertStudy, concepts: ConceptSet, *, seed: int) -> dict[str, float]:
    """How far a model's patches move, at most, as it grows by zeroed depth or by width at alpha = 0, for every gate.

    Weights are random and large, so that routers choose by clear margins: rounding must not be what decides.
    """
    found: dict[str, float] = {}
    for gate, normalize in product(get_args(Gate), get_args(Normalize)):
        small = make_model(study.encoder, {"gate": gate, "normalize": normalize}, concepts, seed=seed)
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
        picture = torch.randn(8, 3, *small.preprocessing.size, generator=drawn)
        for name, growth in (("depth", Growth(depth="zero")), ("width", Growth(width=2, alpha=0.0))):
            large, _ = grow_model(small.eval(), growth)
            with torch.no_grad():
                moved = (large.encoder(picture).patch_BND - small.encoder(picture).patch_BND).abs().max()
            found[f"exact/{name}/{gate}/{normalize}"] = float(moved)
    return found


def _run(
    study: ExpertStudy, run: ExpertRun, concepts: ConceptSet, train: Pictures, test: Pictures, *, unit: float, directory: Path
) -> Record:
    start, row = time.monotonic(), run.row
    models = directory / "models"
    device = train.label_B.device
    figures: dict[str, float] = {}
    model = _start(study, row, concepts, seed=run.seed, models=models).to(device)
    at_rest = [layer.k for layer in moe_layers(model).values()]
    if row.of is not None:
        figures["start/accuracy"] = evaluate_at(model, test, at_rest)["accuracy"]
    if row.part == "base":
        figures |= growth_errors(study, concepts, seed=run.seed)
    loop = replace(study.loop, **row.loop)
    if row.flops is not None:
        loop = replace(loop, steps=max(1, round(row.flops * unit / (3 * loop.batch_size * flops_per_picture(model, at_rest)))))
    save_at = {step: models / f"{run.stem}-step{step}.pt" for step in row.save_at}
    figures |= train_model(model, train, loop=loop, experts=row.training(study, seed=run.seed), seed=run.seed, save_at=save_at)
    save_weights(model, models / f"{run.stem}.pt")
    figures |= evaluate_at(model, test, at_rest)
    figures["flops"] = flops_per_picture(model, at_rest)
    for budget in row.budgets:
        figures |= {f"{name}@{budget}": value for name, value in evaluate_at(model, test, budget).items() if "/" not in name}
        figures[f"flops@{budget}"] = flops_per_picture(model, budget)
    if row.budgets:
        figures |= {f"nested@{budget}": value for budget, value in nested_by_budget(model, test, row.budgets).items()}
    figures["parameters"] = float(sum(parameter.numel() for parameter in model.parameters()))
    return Record(
        study=study.name,
        row=row.name,
        seed=run.seed,
        settings=run_settings(study, run),
        figures=figures,
        seconds=time.monotonic() - start,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        versions={"dotcbm": dotcbm.__version__, "torch": torch.__version__},
    )


def _start(study: ExpertStudy, row: ExpertRow, concepts: ConceptSet, *, seed: int, models: Path) -> ConceptModel:
    """Where a row begins: fresh, or where another one was, grown if it says so."""
    if row.of is None:
        return make_model(study.encoder, row.moe, concepts, seed=seed)
    before = study.row(row.of)
    model = _start(study, before, concepts, seed=seed, models=models)  # for its architecture
    path = models / f"{before.slug}-seed{seed}{'' if row.at is None else f'-step{row.at}'}.pt"
    if not path.exists():
        raise ValueError(f"{path} is not there; run the row {before.name!r} first")
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    if row.grow is None:
        return model
    grown, _ = grow_model(model, Growth(**{"seed": seed, **row.grow}))
    return grown.requires_grad_(True)
