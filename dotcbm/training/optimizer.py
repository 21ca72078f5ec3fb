"""What is trained by gradients, and at which rate."""

from __future__ import annotations

import torch

from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.dot_cbm import DotCBM

__all__ = ["learns_places", "make_optimizer"]


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
