"""A small encoder and quick runs for the tests of training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fakes.source import TinySource

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import Problem
from dotcbm.training.checkpoints import Checkpoints
from dotcbm.training.task import ConceptTask


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_encoder(seed: int = 0) -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)


@pytest.fixture(scope="session")
def encoder() -> ImageEncoder:
    return make_encoder()


def small_dot(problem: Problem) -> PublishedDotCBM:
    return PublishedDotCBM(problem, dim=16, iterations=5)


class Run:
    """One run in one folder: task, data and trainer."""

    def __init__(self, folder: Path, encoder: ImageEncoder) -> None:
        self.folder = folder
        self.encoder = encoder

    def task(self, **settings: Any) -> ConceptTask:
        encoder = settings.pop("encoder", self.encoder)
        make: Callable[[Problem], Any] = settings.pop("bottleneck", small_dot)
        return ConceptTask(encoder, make, **{"lr": 1e-2, "lr_halve_every": 2, "head_l2": 1e-2, **settings})

    def data(self, source: TinySource | None = None, **settings: Any) -> ConceptDataModule:
        settings = {"batch_size": 8, "cache_dir": str(self.folder / "cache"), "views": ["plain", "flip"], **settings}
        return ConceptDataModule(source or TinySource(), **settings)

    def trainer(
        self, *callbacks: pl.Callback, epochs: int = 4, directory: str = "run", accelerator: str = "cpu", **settings: Any
    ) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder / directory,
            callbacks=[*callbacks, Checkpoints(str(self.folder / directory))],
            **settings,
        )


@pytest.fixture
def run(tmp_path: Path, encoder: ImageEncoder) -> Run:
    return Run(tmp_path, encoder)
