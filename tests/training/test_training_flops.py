"""Operations of a training step, for Lightning's ThroughputMonitor, against a count by hand."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger

from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.cbm import CBM
from dotcbm.moe.matryoshka import BudgetDraws
from dotcbm.training.experts import ExpertTraining
from dotcbm.training.flops import count_flops


def by_hand(active: list[int], *, num_concepts: int, num_classes: int) -> tuple[float, float]:
    """Forward, and both passes, of vit_moe/test with four experts: 4 blocks of width 64, two of them with experts, 16 patches and a
    class token. The first layer needs no gradient of its input."""
    tokens, width, hidden, experts = 17, 64, 128, 4
    embed = 2 * 16 * (3 * 16 * 16) * width
    attention = 2 * tokens * width * (3 * width) + 2 * tokens * width * width + 2 * 2 * tokens * tokens * width
    dense = 2 * 2 * tokens * width * hidden
    sparse = sum(2 * tokens * width * experts + 2 * 2 * tokens * k * width * 64 for k in active)
    rest = 4 * attention + 2 * dense + sparse + 2 * width * num_concepts + 2 * num_concepts * num_classes
    return embed + rest, 2 * embed + 3 * rest


def moe_task(run, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ImageEncoder("vit_moe/test", pretrained=False, trainable=True, moe={"num_experts": 4, "k": 2})
    return run.task(encoder=encoder, bottleneck=CBM, regime="joint", lr=1e-3, **settings)


class Told(pl.Callback):
    def __init__(self) -> None:
        self.flops: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.flops.append(pl_module.flops_per_batch / len(batch))


def test_counted_as_by_hand_with_the_active_experts_of_each_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.throughput_monitor.get_available_flops", lambda *_: 1e12
    )  # of no processor is it known
    draws, told = BudgetDraws(k_max=4), Told()
    monitor = ThroughputMonitor(len, window_size=2)
    task = moe_task(run, experts=ExpertTraining(draws=draws))
    trainer = run.trainer(monitor, told, epochs=2, log_every_n_steps=1)
    trainer.logger = CSVLogger(tmp_path, name="log", version="")
    trainer.fit(task, datamodule=run.data())
    for step, flops in enumerate(told.flops):
        expected = by_hand([draws.k(0, step), draws.k(1, step)], num_concepts=5, num_classes=4)[1]
        assert flops == pytest.approx(expected, rel=0.01)
    assert len({round(flops) for flops in told.flops}) > 1
    assert "train/device/mfu" in (tmp_path / "log" / "metrics.csv").read_text()


def test_counting_changes_nothing(run):
    task = moe_task(run)
    run.trainer(epochs=1).fit(task, datamodule=run.data(val_fraction=0))
    batch = next(iter(task.data.plain_loader("train")))
    task.model.train()
    task.model.zero_grad()
    before, state = {name: value.clone() for name, value in task.model.state_dict().items()}, torch.get_rng_state()
    counted = count_flops(task.model, batch)
    forward, both = by_hand([2, 2], num_concepts=5, num_classes=4)
    assert counted.forward == pytest.approx(forward, rel=0.01)
    assert counted.both == pytest.approx(both, rel=0.01)
    assert counted.at([4, 1], backward=False) == pytest.approx(by_hand([4, 1], num_concepts=5, num_classes=4)[0], rel=0.01)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert task.model.training
    assert all(layer.backend == "auto" for layer in task.model.modules() if hasattr(layer, "backend"))


def test_a_run_that_is_watched_ends_as_one_that_is_not(run):
    ends = []
    for callbacks in ([], [ThroughputMonitor(len, window_size=2)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task = moe_task(run, experts=ExpertTraining())
            run.trainer(*callbacks, epochs=1, directory=f"run{len(callbacks)}").fit(task, datamodule=run.data())
        ends.append(task.learned_state())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
