"""What is trained by gradients, and at which rate."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.dot_cbm import SEARCH_TRAVEL, DotCBM

__all__ = ["learns_places", "make_optimizer", "query_rate", "rate_factor"]


def learns_places(model: ConceptModel) -> bool:
    """Whether the bottleneck has queries for places."""
    return isinstance(model.bottleneck, DotCBM) and model.bottleneck.learns


def make_optimizer(
    model: ConceptModel, *, lr: float, query_lr: float, encoder_lr: float | None, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (the paper's) with up to three groups, in this order: the bottleneck, its queries for places, the encoder.

    Args:
        model: Its trainable weights are taken.
        lr: Of the bottleneck.
        query_lr: Of queries; without effect where there are none.
        encoder_lr: Of a trainable encoder; None for `lr`.
        weight_decay: Of all groups.
    """
    queries = [model.bottleneck.query_ME] if isinstance(model.bottleneck, DotCBM) and model.bottleneck.learns else []
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    apart = {id(p) for p in queries + encoder}
    rest = [p for p in model.bottleneck.parameters() if p.requires_grad and id(p) not in apart]
    rates = ((rest, lr), (queries, query_lr), (encoder, encoder_lr or lr))
    groups = [{"params": parameters, "lr": rate, "initial_lr": rate} for parameters, rate in rates if parameters]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def rate_factor(epoch: int, *, halve_every: int) -> float:
    """Of all learning rates in an epoch; 1 in all of them if `halve_every` is 0."""
    return 0.5 ** (epoch // halve_every) if halve_every else 1.0


def query_rate(trainer: pl.Trainer, *, lr: float, halve_every: int) -> float:
    """The rate of queries for places: AdamW moves a number by about its rate in a step, in all steps together by `SEARCH_TRAVEL`.

    At one rate for all data sets, few pictures would not find their places and many would overfit to theirs. A training without an
    end has the rate `lr` of the weights.
    """
    num_steps = trainer.estimated_stepping_batches
    if num_steps == float("inf"):
        return lr
    trainer.fit_loop.setup_data()  # Lightning counts the batches there, not yet where max_steps alone ends the training
    per_epoch = max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    return SEARCH_TRAVEL / max(1.0, sum(rate_factor(step // per_epoch, halve_every=halve_every) for step in range(int(num_steps))))
