"""The runs that test_expert_training_ranks.py makes in one process, and in two: with DDP, and sharing the encoder."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from fakes.source import TinySource
from lightning.pytorch.strategies import ModelParallelStrategy

from dotcbm.cli import main
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.moe.experts import Experts
from dotcbm.moe.layer import moe_layers
from dotcbm.moe.matryoshka import BudgetDraws
from dotcbm.structures import Problem
from dotcbm.training.checkpoints import Checkpoints
from dotcbm.training.experts import ExpertTraining
from dotcbm.training.sharded import is_sharded
from dotcbm.training.task import ConceptTask

RUNS = {
    "global": ExpertTraining(balance="global", balance_weight=0.5, z_weight=1e-3, draws=BudgetDraws(k_max=4)),
    "top1": ExpertTraining(balance="top1", balance_weight=0.5, top1_switch=2.0),
    "bias": ExpertTraining(balance="bias", bias_step=0.05),
}


def bottleneck(problem: Problem) -> PublishedDotCBM:
    """One without batch statistics, which are those of one process."""
    return PublishedDotCBM(problem, dim=16, dropout=0.0, iterations=20)


def train(
    folder: Path,
    experts: ExpertTraining,
    *,
    devices: int,
    accelerator: str,
    epochs: int = 2,
    resume: bool = False,
    expert_parallel: bool = True,
    **trainer: Any,
) -> ConceptTask:
    """Train with 16 pictures a step in two micro-batches; `last.ckpt`, `model.ckpt` and the figures (figures.pt) are in the folder."""
    torch.manual_seed(0)
    moe = {"num_experts": 4, "k": 2, "arguments": {"embed_dim": 32}}
    encoder = ImageEncoder("vit_moe/test", pretrained=False, trainable=True, moe=moe)
    # All labels are known and 32 pictures divide evenly: a mean over two halves is the mean over all.
    data = ConceptDataModule(
        TinySource(counts=(("train", 40), ("test", 15)), names=("red", "green", "left", "right")),
        batch_size=8 // devices,
        val_fraction=0.2,
        views=["plain", "flip"],
    )
    task = ConceptTask(encoder, bottleneck, lr=1e-3, regime="joint", experts=experts, expert_parallel=expert_parallel, ema_decay=0.5)
    trainer_ = pl.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": accelerator,
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "accumulate_grad_batches": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": [Checkpoints(str(folder))],
            **trainer,
        }
    )
    trainer_.fit(task, datamodule=data, ckpt_path=str(folder / "last.ckpt") if resume else None)
    if trainer_.is_global_zero:
        torch.save({name: float(value) for name, value in trainer_.callback_metrics.items()}, folder / "figures.pt")
    return task


STRATEGY = """
trainer:
  devices: 2
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}
"""


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    home, train = Path(sys.argv[1]), partial(train, accelerator=sys.argv[2])
    for name, experts in RUNS.items():
        train(home / "ddp" / name, experts, devices=2)
    shared = home / "shared"
    train(shared / "through", RUNS["global"], devices=2, strategy=sharded())
    train(shared / "stopped", RUNS["global"], devices=2, strategy=sharded(), epochs=1)
    train(shared / "stopped", RUNS["global"], devices=2, strategy=sharded(), resume=True)
    assert is_sharded(train(shared / "bias", RUNS["bias"], devices=2, strategy=sharded()).model)
    weights = train(shared / "weights", RUNS["global"], devices=2, strategy=sharded(), expert_parallel=False).encoder
    assert is_sharded(weights)
    assert all(type(layer.experts) is Experts for layer in moe_layers(weights).values())
    (home / "strategy.yaml").write_text(STRATEGY, encoding="utf-8")
    moe = Path(__file__).parents[1] / "conf" / "moe.yaml"
    command = ["fit", "--config", str(moe), "--config", str(home / "strategy.yaml"), "--trainer.accelerator", sys.argv[2]]
    uneven = ["--model.expert_parallel", "false", "--model.encoder.moe.num_experts", "3"]
    sys.exit(main([*command, "--run_dir", str(home / "cli")]) or main([*command, *uneven, "--run_dir", str(home / "uneven")]))
