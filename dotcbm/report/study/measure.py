"""The second half of a run of a study: test a trained model on the splits of its world, and audit it where the study asks for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.audit.run import AuditSettings, audit
from dotcbm.report.record_file import write_record
from dotcbm.report.study.plan import Record, Run, Study
from dotcbm.report.study.train import Training
from dotcbm.training.evaluation import evaluate

__all__ = ["measure"]

SHORTCUTS = ("shortcut/background", "data/background")
"""Findings that name a shortcut through the background."""

AUDITS = "audits"
"""Folder of the audits' records, below that of the runs'."""


def measure(study: Study, run: Run, *, model: ConceptModel, training: Training, data: ConceptDataModule, directory: Path) -> Record:
    """The record of a run; that of its audit is written on the way.

    Args:
        study, run: What is measured.
        model, training: See `dotcbm.report.study.train.read_trained`. The model is moved to a GPU where there is one.
        data: Of the run's world.
        directory: Of the study's records.
    """
    start = time.monotonic()
    world = study.worlds[run.world]
    data.seed = run.seed
    data.use_encoder(model.encoder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    figures = dict(training.figures)
    for split in data.evaluate_splits:
        found = evaluate(model, data.loader(split, places=world.places), model.concepts, places=world.places)
        figures |= {f"{split}/{name}": value for name, value in found.items()}
    if world.audit is not None:
        figures |= _audited(run, model, data, asked=world.audit, directory=directory)
    return Record(
        study=study.name,
        row=run.row.name,
        seed=run.seed,
        settings=training.settings,
        figures=figures,
        seconds=training.figures["train_seconds"] + time.monotonic() - start,
        device=training.device,
        versions=training.versions,
        world=run.world,
    )


def _audited(run: Run, model: ConceptModel, data: ConceptDataModule, *, asked: Mapping[str, Any], directory: Path) -> dict[str, float]:
    """The figures of an audit as "audit/<key>", and what it finds; its record is written beside.

    "audit/sweep/<map>/<threshold>" is the mean average precision of part detection at another threshold than 0.6;
    "audit/accused/<finding>" is 1 for each critical finding or warning; "audit/shortcut_first" whether the first of all findings names
    a shortcut, "audit/shortcut_accused" whether any does.
    """
    settings = {"seed": run.seed, "depth": "figures", **{name: value for name, value in asked.items() if name != "split"}}
    record = audit(model, data, split=asked["split"], settings=AuditSettings(**settings))
    path = directory / AUDITS / f"{run.stem}.json"
    path.parent.mkdir(exist_ok=True)
    write_record(record, path)
    accused = [finding.key for finding in record.findings if finding.severity in ("critical", "warning")]
    return {
        **{f"audit/{key}": value for key, value in record.flat().items()},
        **{f"audit/accused/{key}": 1.0 for key in accused},
        **{
            f"audit/sweep/{sweep.map}/{threshold:g}": precision
            for sweep in record.sweeps
            for threshold, precision in zip(sweep.thresholds, sweep.mean_average_precision)
            if precision is not None
        },
        "audit/shortcut_first": float(bool(accused) and record.findings[0].key in SHORTCUTS),
        "audit/shortcut_accused": float(any(key in SHORTCUTS for key in accused)),
    }
