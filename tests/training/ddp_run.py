"""The run that test_ddp.py makes in one process and in two."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from fakes.source import TinySource

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import Problem
from dotcbm.training.checkpoints import Checkpoints
from dotcbm.training.task import ConceptTask


def bottleneck(problem: Problem) -> PublishedDotCBM:
    return PublishedDotCBM(problem, dim=16, dropout=0.0, iterations=5)


def train(folder: Path, *, devices: int, accelerator: str, probe: bool = False) -> None:
    """Train and test with 16 pictures a step, and save weights and figures."""
    torch.manual_seed(0)
    encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
    # All labels are known and 32 pictures divide evenly: a mean over two halves is the mean over all.
    data = ConceptDataModule(
        TinySource(counts=(("train", 40), ("test", 15)), names=("red", "green", "left", "right")),
        batch_size=16 // devices,
        val_fraction=0.2,
        cache_dir=str(folder / "cache"),
        views=["plain", "flip"],
    )
    task = ConceptTask(encoder, LinearProbe if probe else bottleneck, lr=1e-3, head_l2="auto")
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Checkpoints(str(folder))],
    )
    trainer.fit(task, datamodule=data)
    loss = {name: float(value) for name, value in trainer.callback_metrics.items()}
    figures = trainer.test(task, datamodule=data, verbose=False)[0]
    if trainer.is_global_zero:
        torch.save({"weights": task.learned_state(), "figures": figures, "loss": loss}, folder / "result.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), devices=int(sys.argv[2]), accelerator=sys.argv[3], probe="probe" in sys.argv)
