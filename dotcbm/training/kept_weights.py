"""Which weights a run ends with: the best on the validation split, or their running mean."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor

from dotcbm.training.sharded import copy_whole, whole

__all__ = ["KeptWeights"]


class _Finishing(Protocol):
    def learned_state(self) -> dict[str, Tensor]: ...

    def finish(self) -> None: ...


class KeptWeights(Callback):
    """Keeps the weights of the epoch with the best validation figure and puts them back when training ends.

    With `ema_decay` the weights that are validated and kept are an exponential moving mean over the optimizer's steps
    (as in `torch.optim.swa_utils`, here with a state that resumes bit by bit), while training goes on with its own.

    Attributes:
        best_epoch: The epoch whose weights are kept; None before the first validation.
        best: Its figure.
    """

    def __init__(self, monitor: str, *, mode: Literal["max", "min"] = "max", ema_decay: float | None = None) -> None:
        """Args:
        monitor: Logged figure; without a validation split the last weights are kept.
        mode: Whether larger or smaller is better. Among equals the first epoch wins.
        ema_decay: Share of the mean that stays at each step, in (0, 1); None for no mean.
        """
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; it is a share in (0, 1), or None")
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.ema_decay = ema_decay
        self.best_epoch: int | None = None
        self.best = -math.inf * self.sign
        self._best_state: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._steps = 0
        self._ended = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the mean, unless it was resumed."""
        if self.ema_decay is not None and not self._mean:
            self._mean = _copy(_task(pl_module).learned_state())
        elif self.ema_decay is not None:
            mean, self._mean = self._mean, _copy(_task(pl_module).learned_state())
            for name, value in self._mean.items():
                copy_whole(value, mean[name])
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the mean, if the optimizer made a step."""
        del outputs, batch, batch_idx
        if self.ema_decay is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        for name, value in _task(pl_module).learned_state().items():
            if value.is_floating_point():
                self._mean[name].lerp_(value.detach(), 1 - self.ema_decay)
            else:
                self._mean[name].copy_(value)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the mean."""
        if self._mean and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._own = _copy(_task(pl_module).learned_state())
            _put(_task(pl_module), self._mean)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if they are the best so far, and go on with those of training."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        figure = trainer.callback_metrics.get(self.monitor)
        if figure is not None and not math.isnan(float(figure)) and self.sign * (float(figure) - self.best) > 0:
            self.best, self.best_epoch = float(figure), trainer.current_epoch
            self._best_state = {name: whole(value).detach().clone().cpu() for name, value in _task(pl_module).learned_state().items()}
        if self._own:
            _put(_task(pl_module), self._own)
            self._own = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the kept weights in place and let the task finish (fit its head)."""
        del trainer
        self._ended = True
        kept = self._best_state or self._mean
        if kept:
            _put(_task(pl_module), kept)
        _task(pl_module).finish()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's hook."""
        del trainer, pl_module, stage
        self._ended = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was stopped after its last epoch and resumed trains no more, but still has to end."""
        if not self._ended:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        mean = {name: whole(value) for name, value in self._mean.items()}
        return {"best": self.best, "best_epoch": self.best_epoch, "best_state": self._best_state, "mean": mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]
        self._best_state, self._mean = state_dict["best_state"], state_dict["mean"]


def _task(pl_module: pl.LightningModule) -> _Finishing:
    return cast(_Finishing, pl_module)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def _put(task: _Finishing, state: dict[str, Tensor]) -> None:
    for name, value in task.learned_state().items():
        copy_whole(value, state[name])
