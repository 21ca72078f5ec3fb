"""The runs of a study: train, measure, audit, and leave a record of each. A study that was stopped goes on with what is missing.

Several processes can share the runs of one study; each run leaves its record whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dotcbm.catalog import subclasses
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.base import Bottleneck
from dotcbm.report.audit.run import AuditSettings, audit
from dotcbm.report.record_file import write_record
from dotcbm.report.study.plan import Record, Run, Study, make_source, read_records, run_settings, runs_of, source_of
from dotcbm.training.task import ConceptTask

__all__ = ["run_study"]

SHORTCUTS = ("shortcut/background", "data/background")
"""Findings that name a shortcut through the background."""

AUDITS = "audits"
"""Folder of the audits' records, below that of the runs'."""


def run_study(
    study: Study,
    directory: Path,
    *,
    only: Sequence[str] = (),
    worlds: Sequence[str] = (),
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Make the runs that have no record in `directory` yet.

    Args:
        study: What to run.
        directory: Where the records lie, one JSON file a run; those of audits in its folder `audits`.
        only: Names of rows; all by default.
        worlds: Names of worlds; all by default.
        share: (i, n): every n-th of the missing runs, from the i-th, for n processes side by side.
        say: Told of each run.

    Returns:
        All records of the study that are there afterwards.

    Raises:
        ValueError: A row or world that does not exist, or a record of other settings than the study's.
    """
    for what, asked, known in (("rows", only, [row.name for row in study.rows]), ("worlds", worlds, list(study.worlds))):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise ValueError(f"the study {study.name} has no {what} {unknown}; it has {known}")
    directory.mkdir(parents=True, exist_ok=True)
    read_records(study, directory)
    chosen = [run for run in runs_of(study, only) if not worlds or run.world in worlds]
    missing = [run for run in chosen if not (directory / f"{run.stem}.json").exists()]
    made: dict[str, tuple[ImageEncoder | None, ConceptDataModule]] = {}  # by the source as it is described
    mine = missing[share[0] :: share[1]]
    for number, run in enumerate(mine):
        path = directory / f"{run.stem}.json"
        if path.exists():  # another process has made it meanwhile
            continue
        say(f"{study.name}: run {number + 1} of {len(mine)}: {run.row.name}, {run.world}, seed {run.seed}")
        world = study.worlds[run.world]
        source = source_of(world, seed=run.seed)
        key = f"{run.world} {json.dumps(source)}"
        if key not in made:
            made.clear()  # one world's features in memory at a time
            frozen = None if world.encoder.get("trainable") else ImageEncoder(**world.encoder)
            made[key] = frozen, ConceptDataModule(make_source(source), **world.data)
        encoder, data = made[key]
        record = _run(study, run, encoder=encoder, data=data, directory=directory)
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps(asdict(record), indent=1) + "\n")
        partial_path.replace(path)
    return read_records(study, directory)


def _run(study: Study, run: Run, *, encoder: ImageEncoder | None, data: ConceptDataModule, directory: Path) -> Record:
    import lightning.pytorch as pl

    from dotcbm import __version__

    start = time.monotonic()
    world, row = study.worlds[run.world], run.row
    data.seed = run.seed
    if encoder is None:
        torch.manual_seed(run.seed)
        encoder = ImageEncoder(**world.encoder)
    bottleneck = partial(subclasses(Bottleneck, package="dotcbm.models")[row.bottleneck], **row.settings)
    task = ConceptTask(encoder, bottleneck, **{**world.task, **row.task, "seed": run.seed})
    trainer = pl.Trainer(
        max_epochs=row.epochs_in(run.world, world),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data)
    trained = time.monotonic()
    figures = {name: float(value) for name, value in trainer.test(task, datamodule=data, verbose=False)[0].items()}
    figures["train_seconds"] = trained - start
    if task.head_fit is not None:
        figures["head_l2"] = task.head_fit.l2
        figures["val/accuracy"] = task.head_fit.val_accuracy
    if world.audit is not None:
        task.model.to(trainer.strategy.root_device)  # Lightning has moved it back
        figures |= _audited(run, task, data, asked=world.audit, directory=directory)
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "CPU"
    return Record(
        study=study.name,
        row=row.name,
        seed=run.seed,
        settings=run_settings(study, run),
        figures=figures,
        seconds=time.monotonic() - start,
        device=device,
        versions={"dotcbm": __version__, "torch": torch.__version__, "lightning": version("lightning")},
        world=run.world,
    )


def _audited(run: Run, task: ConceptTask, data: ConceptDataModule, *, asked: Mapping[str, Any], directory: Path) -> dict[str, float]:
    """The figures of an audit as "audit/<key>", and what it finds; its record is written beside.

    "audit/sweep/<map>/<threshold>" is the mean average precision of part detection at another threshold than 0.6;
    "audit/accused/<finding>" is 1 for each critical finding or warning; "audit/shortcut_first" whether the first of all findings names
    a shortcut, "audit/shortcut_accused" whether any does.
    """
    settings = {"seed": run.seed, "depth": "figures", **{name: value for name, value in asked.items() if name != "split"}}
    record = audit(task.model, data, split=asked["split"], settings=AuditSettings(**settings))
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
