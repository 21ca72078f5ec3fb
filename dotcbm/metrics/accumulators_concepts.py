"""Interventions and leakage over batches and over ranks: torchmetrics classes whose states add up or concatenate.

This file needs torchmetrics (`pip install "dotcbm[train]"`); the functions that it calls do not.
B pictures, M concepts, S steps of an intervention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dotcbm.metrics.leakage import concept_task_leakage, interconcept_leakage, niche_impurity, oracle_impurity

__all__ = ["ConceptTaskLeakage", "InterConceptLeakage", "InterventionAccuracy", "NicheImpurity", "OracleImpurity"]


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
        if not len(self.score):
            return torch.tensor(torch.nan, dtype=torch.float64)
        columns = (dim_zero_cat(self.score), dim_zero_cat(self.target), dim_zero_cat(self.label))
        return concept_task_leakage(*columns, k=self.k, seed=self.seed).nanmean()


class _PairedLeakage(Metric, ABC):
    """Keeps every score. What is drawn from the pictures (the held-out ones) follows their order: that of the ranks, then of batches."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    score: list[Tensor]
    target: list[Tensor]

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        for name in ("score", "target"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, concept_BM: Tensor, truth_BM: Tensor) -> None:
        """Take a batch of predicted concepts, and of their truth in {0, 1, NaN}."""
        self.score.append(concept_BM.detach())
        self.target.append(truth_BM.detach())

    def compute(self) -> Tensor:
        """A scalar, float64; NaN where the score is not defined."""
        if not len(self.score):
            return torch.tensor(torch.nan, dtype=torch.float64)
        return self._formula(dim_zero_cat(self.score), dim_zero_cat(self.target))

    @abstractmethod
    def _formula(self, concept_NM: Tensor, truth_NM: Tensor) -> Tensor: ...


class InterConceptLeakage(_PairedLeakage):
    """Mean of `dotcbm.metrics.leakage.interconcept_leakage` over the pairs of concepts.

    Args:
        num_pairs, k, seed: As of the function.
    """

    def __init__(self, *, num_pairs: int | None = 1000, k: int = 3, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.num_pairs, self.k = num_pairs, k

    def _formula(self, concept_NM: Tensor, truth_NM: Tensor) -> Tensor:
        return interconcept_leakage(concept_NM, truth_NM, num_pairs=self.num_pairs, k=self.k, seed=self.seed).nanmean()


class OracleImpurity(_PairedLeakage):
    """`dotcbm.metrics.leakage.oracle_impurity` (OIS)."""

    def _formula(self, concept_NM: Tensor, truth_NM: Tensor) -> Tensor:
        return torch.tensor(oracle_impurity(concept_NM, truth_NM, seed=self.seed), dtype=torch.float64)


class NicheImpurity(_PairedLeakage):
    """`dotcbm.metrics.leakage.niche_impurity` (NIS)."""

    def _formula(self, concept_NM: Tensor, truth_NM: Tensor) -> Tensor:
        return torch.tensor(niche_impurity(concept_NM, truth_NM, seed=self.seed), dtype=torch.float64)
