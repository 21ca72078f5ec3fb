"""Means over an epoch, against Lightning's own."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from dotcbm.models.cbm import CBM
from dotcbm.training.running_means import RunningMeans


@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(0, 50), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_each_name_has_the_weighted_mean_of_where_it_was(batches):
    means = RunningMeans()
    for value, count, both in batches:
        scalar = torch.tensor(value, requires_grad=True)
        means.add({"a": scalar, "b": 2 * scalar} if both else {"a": scalar}, count)
    found = means.take()
    for name, factor, rows in (("a", 1, batches), ("b", 2, [row for row in batches if row[2]])):
        weight = sum(count for _, count, _ in rows)
        assert (name in found) == bool(rows)
        if rows:
            mean, count = found[name]
            assert count == weight
            assert not mean.requires_grad
            expected = factor * sum(value * count for value, count, _ in rows) / max(weight, 1)
            assert float(mean) == pytest.approx(expected, rel=1e-4, abs=2e-3)
    assert means.take() == {}


class Both(pl.LightningModule):
    """Logs each batch's value, and the same through `RunningMeans` at the last batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.means = RunningMeans()

    def training_step(self, batch):
        value = (self.weight * batch[0]).mean()
        self.log("theirs", value, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        self.means.add({"ours": value}, len(batch[0]))
        return value

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_last_batch:
            for name, (mean, count) in self.means.take().items():
                self.log(name, mean, on_step=False, on_epoch=True, batch_size=count)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_has_the_same_mean_of_batches_of_different_sizes(tmp_path):
    module = Both()
    data = DataLoader(TensorDataset(torch.randn(23, generator=torch.Generator().manual_seed(0))), batch_size=5)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["ours"]) == pytest.approx(float(trainer.callback_metrics["theirs"]), rel=1e-5)


@pytest.mark.parametrize("steps", [-1, 4])  # of three in an epoch
def test_a_run_logs_its_losses_also_if_it_ends_within_an_epoch(run, steps):
    task = run.task(bottleneck=CBM)
    trainer = run.trainer(epochs=2, max_steps=steps)
    trainer.fit(task, datamodule=run.data(batch_size=12))
    assert trainer.global_step == (6 if steps == -1 else steps)
    assert {"train/loss", "train/concept_loss", "val/concept_loss", "lr"} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(0.8 * float(trainer.callback_metrics["train/concept_loss"]))
