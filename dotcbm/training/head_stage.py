"""Stage 2 of training: what the head reads is collected from the data, and the head solved for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dotcbm.data.batches import Condense
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.models.concept_model import ConceptModel
from dotcbm.training.head_fit import HeadFit, collect_head_input, fit_head, true_head_input
from dotcbm.training.sparse_head import fit_sparse_head

__all__ = ["solve_head"]


def solve_head(
    model: ConceptModel,
    data: ConceptDataModule,
    *,
    on_truth: bool,
    views: Literal["plain", "all"],
    l2: float | None,
    nec: int | None,
    condense: Condense | None,
    class_weight_K: Tensor | None,
) -> HeadFit:
    """The best head on the concepts as the model is; the model is not changed.

    Args:
        model: Its concepts are trained.
        data: With the encoder in use.
        on_truth: Fit to the true concepts of the training pictures.
        views: Of the training pictures.
        l2: Strength; None for the best on the validation split. Not read with `nec`.
        nec: Effective concepts a class of a sparse head; None for a dense one.
        condense: What the bottleneck makes of features before they are cached.
        class_weight_K: (K,) weights of the classes; None for 1.
    """
    annotations: Literal["foreground", "labels"] = "foreground" if data.foreground_in_training else "labels"
    if on_truth:
        collected = [true_head_input(model.bottleneck, data.dataset("train"))]
    else:
        chosen = data.views if views == "all" else ("plain",)
        loaders = (data.plain_loader("train", annotations=annotations, view=view, condense=condense) for view in chosen)
        collected = [collect_head_input(model, loader) for loader in loaders]
    val = None
    if data.has_validation:
        val = collect_head_input(model, data.plain_loader("val", annotations=annotations, condense=condense))
    inputs, labels = torch.cat([inputs for inputs, _ in collected]), torch.cat([labels for _, labels in collected])
    num_classes = model.concepts.num_classes
    if nec is not None:
        return fit_sparse_head(inputs, labels, num_classes=num_classes, nec=nec, val=val, class_weight_K=class_weight_K)
    return fit_head(inputs, labels, num_classes=num_classes, l2=l2, val=val, class_weight_K=class_weight_K)
