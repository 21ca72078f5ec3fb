"""The first half of a run of a study: train a model and keep it, so that it can be measured again without being trained again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dotcbm.catalog import subclasses
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import from_pretrained, save_pretrained
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.study.plan import Run, Study, check_settings, run_settings
from dotcbm.training.task import ConceptTask

__all__ = ["Training", "is_trained", "read_trained", "train"]

MODELS = "models"
"""Folder of the models, below that of the records: a saved model and a `Training` for each run."""


@dataclass(frozen=True)
class Training:
    """What a training left beside its model.

    Attributes:
        settings: See `run_settings`.
        figures: "train_seconds", and of a fitted head "head_l2" and "val/accuracy".
        device: What it ran on.
        versions: Of the packages.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    device: str
    versions: Mapping[str, str]


def is_trained(directory: Path, run: Run) -> bool:
    """Whether the model of a run is there. Its `Training` is written last."""
    return _sidecar(directory, run).exists()


def train(study: Study, run: Run, *, encoder: ImageEncoder | None, data: ConceptDataModule, directory: Path) -> None:
    """Train the model of a run, and keep it with its `Training`.

    Args:
        study, run: What to train.
        encoder: The world's frozen encoder; None for one that is made here and trained too.
        data: Of the run's world.
        directory: Of the study's records.
    """
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
    figures = {"train_seconds": time.monotonic() - start}
    if task.head_fit is not None:
        figures |= {"head_l2": task.head_fit.l2, "val/accuracy": task.head_fit.val_accuracy}
    save_pretrained(task.model, directory / MODELS / run.stem, include_encoder=not encoder.has_source)
    training = Training(
        settings=run_settings(study, run),
        figures=figures,
        device=torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "CPU",
        versions={"dotcbm": __version__, "torch": torch.__version__, "lightning": version("lightning")},
    )
    path = _sidecar(directory, run)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(asdict(training), indent=1) + "\n")
    aside.replace(path)


def read_trained(study: Study, run: Run, *, encoder: ImageEncoder | None, directory: Path) -> tuple[ConceptModel, Training]:
    """The model of a run, in eval mode on the CPU, and its `Training`.

    Args:
        study, run: What was trained.
        encoder: The world's frozen encoder, which its models share; None, or another one, for a model that holds its own.
        directory: Of the study's records.

    Raises:
        ValueError: The model is damaged, or was trained with other settings than the study gives its row now.
    """
    path = _sidecar(directory, run)
    try:
        training = Training(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: says nothing of a training ({error}); delete it, and the study trains the model again") from error
    check_settings(training.settings, study=study, run=run, path=path)
    model = from_pretrained(directory / MODELS / run.stem)
    if encoder is not None and encoder.fingerprint() == model.encoder.fingerprint():
        model = ConceptModel(encoder, model.bottleneck).eval()
    return model, training


def _sidecar(directory: Path, run: Run) -> Path:
    return directory / MODELS / f"{run.stem}.json"
