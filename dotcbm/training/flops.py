"""Floating point operations of a training step, experts included: what Lightning's ThroughputMonitor divides by time and peak for MFU.

Counted once, on a batch of the training, by PyTorch's counter: matrix products and convolutions, a multiplication and an addition as
two operations. Experts are counted by the products that each token needs, however they are computed, and brought from the number of
active experts at which they were counted to that of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dotcbm.models.concept_model import ConceptModel
from dotcbm.moe.experts import Backend
from dotcbm.moe.flops import experts_flops
from dotcbm.moe.layer import MoELayer
from dotcbm.structures import ConceptBatch
from dotcbm.training.experts import ExpertWork

__all__ = ["FlopsPerBatch", "PictureFlops", "count_flops"]


class _Task(Protocol):
    model: ConceptModel
    experts: ExpertWork
    flops_per_batch: float


@dataclass(frozen=True)
class PictureFlops:
    """Of one picture.

    Attributes:
        forward, both: Of a forward pass, and of a forward and a backward pass, at `active` experts.
        active: Of each layer of experts, first to last.
        expert: Forward, of one active expert more in each layer.
    """

    forward: float
    both: float
    active: tuple[int, ...]
    expert: tuple[float, ...]

    def at(self, active: Sequence[int], *, backward: bool) -> float:
        """With these numbers of active experts."""
        more = sum(cost * (k - before) for cost, k, before in zip(self.expert, active, self.active, strict=True))
        return self.both + 3 * more if backward else self.forward + more


def count_flops(model: ConceptModel, batch: ConceptBatch) -> PictureFlops:
    """Count on a batch. Weights, gradients, statistics, mode and random numbers are left as they are.

    Args:
        model: On the device of the batch. Every process must call it, where weights are distributed.
        batch: Of at least one picture, or of features from a cache.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [trained[0].device] if trained and trained[0].is_cuda else []
    with _plainly(model, layers), torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            output = model.forward_batch(batch)
        loss = output.concept_logit_BM.float().sum() + output.class_logit_BK.float().sum()
        with FlopCounterMode(display=False) as backward:
            if trained and loss.requires_grad:
                torch.autograd.grad(loss, trained, allow_unused=True)
        tokens = [0 if layer.routing is None else len(layer.routing.index_TK) for layer in layers]
    num = len(batch)
    cost = [
        experts_flops(count, width=layer.router.weight.shape[1], hidden=layer.experts.up_EDH.shape[2], k=1) / num
        for layer, count in zip(layers, tokens, strict=True)
    ]
    once = forward.get_total_flops()
    return PictureFlops(once / num, (once + backward.get_total_flops()) / num, tuple(layer.k for layer in layers), tuple(cost))


class FlopsPerBatch(Callback):
    """Keeps `flops_per_batch` of a task up to date: forward and backward in training, forward in validation."""

    def __init__(self) -> None:
        super().__init__()
        self._counted: PictureFlops | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Of the active experts of the step."""
        del batch_idx
        self._tell(cast(_Task, pl_module), batch, step=trainer.global_step)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Of as many active experts as the encoder has."""
        del trainer, batch_idx, dataloader_idx
        self._tell(cast(_Task, pl_module), batch, step=None)

    def _tell(self, task: _Task, batch: ConceptBatch, *, step: int | None) -> None:
        if self._counted is None:
            self._counted = count_flops(task.model, batch)
        active = self._counted.active if step is None else task.experts.active(step) or self._counted.active
        task.flops_per_batch = len(batch) * self._counted.at(active, backward=step is not None)


@contextmanager
def _plainly(model: nn.Module, layers: Sequence[MoELayer]) -> Iterator[None]:
    """In eval mode, with experts one after the other and attention in products, all of which the counter sees."""
    was_training = model.training
    backends: list[Backend] = [layer.backend for layer in layers]
    model.eval()
    for layer in layers:
        layer.backend = "loop"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.train(was_training)
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend
