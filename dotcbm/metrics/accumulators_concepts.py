"""Interventions and leakage over batches and over ranks: torchmetrics classes whose states add up or concatenate.

This file needs torchmetrics (`pip install "dotcbm[train]"`); the functions that it calls do not.
B pictures, M concepts, S steps of an intervention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dotcbm.metrics.leakage import concept_task_leakage

__all__ = ["ConceptTaskLeakage", "InterventionAccuracy"]


class InterventionAccuracy(Metric):
    """`dotcbm.metrics.intervention.Curve.accuracy_S` from the hits of its pictures.

    Args:
        num_steps: S, the number of groups plus 1.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total_S: Tensor
    count: Tensor

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.add_state("total_S", default=torch.zeros(num_steps, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct_BS: Tensor) -> None:
        """Take `Curve.correct_NS` of a batch.

        Raises:
            ValueError: Another number of steps.
        """
        if correct_BS.shape[1:] != self.total_S.shape:
            raise ValueError(f"the hits of a batch have shape {tuple(correct_BS.shape)}; num_steps is {len(self.total_S)}")
        self.total_S += correct_BS.double().sum(0)
        self.count += len(correct_BS)

    def compute(self) -> Tensor:
        """(S,); NaN before the first picture."""
        return self.total_S / self.count


class ConceptTaskLeakage(Metric):
    """Mean of `dotcbm.metrics.leakage.concept_task_leakage` over the concepts where it is defined. Keeps every score.

    Args:
        k, seed: As of the function.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    score: list[Tensor]
    target: list[Tensor]
    label: list[Tensor]

    def __init__(self, *, k: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.k, self.seed = k, seed
        for name in ("score", "target", "label"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, concept_BM: Tensor, truth_BM: Tensor, label_B: Tensor) -> None:
        """Take a batch of predicted concepts, of their truth in {0, 1, NaN}, and of classes."""
        self.score.append(concept_BM.detach())
        self.target.append(truth_BM.detach())
        self.label.append(label_B.detach())

    def compute(self) -> Tensor:
        """A scalar; NaN where no concept is defined."""
        columns = (dim_zero_cat(self.score), dim_zero_cat(self.target), dim_zero_cat(self.label))
        return concept_task_leakage(*columns, k=self.k, seed=self.seed).nanmean()
