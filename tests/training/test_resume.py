"""Runs that stop, and go on: bit by bit, from whole files, with a word on how."""

from __future__ import annotations

import errno
import logging
import signal
import sys

import lightning.pytorch as pl
import pytest
import torch

from dotcbm.models.cbm import CBM
from dotcbm.training.checkpoints import CheckpointWriteError, resume_command
from dotcbm.training.guard import NonFiniteError


class StopAt(pl.Callback):
    """Raises in the middle of an epoch."""

    def __init__(self, epoch: int, *, error: BaseException) -> None:
        self.epoch, self.error = epoch, error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise self.error


@pytest.fixture(autouse=True)
def _keep_sigint():
    """Lightning ignores SIGINT for good after a Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "settings",
    [{"regime": "two_stage"}, {"regime": "joint"}, {"regime": "joint", "ema_decay": 0.8}],
    ids=["two_stage", "joint", "ema"],
)
@pytest.mark.parametrize("stop", [0, 2])
def test_a_resumed_run_ends_with_the_same_bits(run, settings, stop):
    through = run.task(**settings)
    trainer = run.trainer(directory="through")
    trainer.fit(through, datamodule=run.data())

    with pytest.raises(SystemExit):
        run.trainer(StopAt(stop, error=KeyboardInterrupt())).fit(run.task(**settings), datamodule=run.data())
    torch.manual_seed(12345)  # whatever happened in between
    resumed = run.task(**settings)
    again = run.trainer()
    again.fit(resumed, datamodule=run.data(), ckpt_path=str(run.folder / "run" / "last.ckpt"))

    assert again.global_step == trainer.global_step
    assert_same(through.learned_state(), resumed.learned_state())
    states = [torch.load(run.folder / name / "last.ckpt", weights_only=True) for name in ("through", "run")]
    assert_same(states[0]["state_dict"], states[1]["state_dict"])
    for a, b in zip(*(state["optimizer_states"][0]["state"].values() for state in states), strict=True):
        assert_same(a, b)


def test_more_epochs_after_the_end(run):
    through = run.task()
    run.trainer(directory="through", epochs=4).fit(through, datamodule=run.data())
    run.trainer(epochs=2).fit(run.task(), datamodule=run.data())
    longer = run.task()
    run.trainer(epochs=4).fit(longer, datamodule=run.data(), ckpt_path=str(run.folder / "run" / "last.ckpt"))
    assert_same(through.learned_state(), longer.learned_state())


def test_a_run_stopped_before_its_head_was_fitted_is_finished_when_resumed(run):
    class StopBeforeHead(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.checkpoint_callback.on_train_epoch_end(trainer, pl_module)
                raise KeyboardInterrupt

    through = run.task()
    run.trainer(directory="through").fit(through, datamodule=run.data())
    with pytest.raises(SystemExit):
        run.trainer(StopBeforeHead()).fit(run.task(), datamodule=run.data())
    assert not (run.folder / "run" / "model.ckpt").exists()
    resumed = run.task()
    run.trainer().fit(resumed, datamodule=run.data(), ckpt_path=str(run.folder / "run" / "last.ckpt"))
    assert_same(through.learned_state(), resumed.learned_state())
    saved = torch.load(run.folder / "run" / "model.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, through.learned_state())


def test_dropout_and_order_matter(run):
    """The test above could not fail if nothing was drawn."""
    weights = []
    for seed in (0, 1):
        task = run.task(seed=0)
        run.trainer(directory=f"seed{seed}", epochs=1).fit(task, datamodule=run.data(seed=seed, val_fraction=0))
        weights.append(task.learned_state()["model.bottleneck.concept.free_MD"])
    assert not torch.equal(*weights)
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in task.model.bottleneck.modules())


def test_ctrl_c_in_the_first_epoch_leaves_a_checkpoint_and_says_how_to_go_on(run, caplog, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dotcbm", "fit", "--config", "my birds.yaml", "--ckpt_path=old.ckpt"])
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        run.trainer(StopAt(0, error=KeyboardInterrupt())).fit(run.task(), datamodule=run.data())
    assert stopped.value.code == 1
    path = run.folder / "run" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 0
    assert f"dotcbm fit --config 'my birds.yaml' --ckpt_path {path}" in caplog.text


def test_the_command_to_go_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dotcbm", "fit", "--ckpt_path", "old.ckpt", "--config", "c.yaml"])
    assert resume_command("new.ckpt") == "dotcbm fit --config c.yaml --ckpt_path new.ckpt"
    monkeypatch.setattr(sys, "argv", ["notebook"])
    assert resume_command("new.ckpt") == "trainer.fit(task, data, ckpt_path='new.ckpt')"


def test_a_full_disk_leaves_the_checkpoint_before_it_intact(run, monkeypatch):
    folder = run.folder / "run"

    class FillDisk(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.before = (folder / "last.ckpt").read_bytes()

                def save(checkpoint, filepath, storage_options=None):
                    with open(filepath, "wb") as opened:  # noqa: PTH123
                        opened.write(b"half")
                    raise OSError(errno.ENOSPC, "No space left on device")

                monkeypatch.setattr(trainer.strategy, "save_checkpoint", save)

    fill = FillDisk()
    with pytest.raises(CheckpointWriteError, match=r"last\.ckpt: .*No space left on device.*is intact.*[Ff]ree some room") as raised:
        run.trainer(fill).fit(run.task(), datamodule=run.data())
    assert raised.value.errno == errno.ENOSPC
    assert (folder / "last.ckpt").read_bytes() == fill.before
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    monkeypatch.undo()
    resumed = run.task()
    run.trainer().fit(resumed, datamodule=run.data(), ckpt_path=str(folder / "last.ckpt"))
    through = run.task()
    run.trainer(directory="through").fit(through, datamodule=run.data())
    assert_same(through.learned_state(), resumed.learned_state())


class Poison(CBM):
    """Gives NaN from the sixth training batch on."""

    count = 0

    def forward(self, features):
        output = super().forward(features)
        if self.training:
            self.count += 1
        return output if self.count < 6 else type(output)(output.concept_logit_BM * torch.nan, output.class_logit_BK, output.grid)


def test_a_nan_loss_stops_the_run_and_says_where(run):
    with pytest.raises(NonFiniteError) as raised:
        run.trainer().fit(run.task(bottleneck=Poison), datamodule=run.data())
    message = str(raised.value)
    # 40 pictures less 8 for validation make 4 batches of 8: the sixth is the second of epoch 1, after 5 steps.
    assert "not finite in epoch 1, step 5: concept = nan" in message
    assert "train/0" in message
    assert str(run.folder / "run" / "last.ckpt") in message
    good = torch.load(run.folder / "run" / "last.ckpt", weights_only=True)
    assert good["global_step"] == 4
    assert all(value.isfinite().all() for value in good["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(run):
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 4:
                with torch.no_grad():
                    pl_module.model.bottleneck.concept.weight.fill_(torch.inf)

    with pytest.raises(NonFiniteError, match=r"weight model\.bottleneck\.concept\.weight is not finite after epoch 1.*last\.ckpt"):
        run.trainer(Spoil()).fit(run.task(bottleneck=CBM), datamodule=run.data(val_fraction=0))
    good = torch.load(run.folder / "run" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in good["state_dict"].values())
