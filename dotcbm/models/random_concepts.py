"""The control: concepts that mean nothing.

Each concept is a random direction of the pooled features, frozen. What the class head reaches on them is what accuracy alone proves
of a bottleneck of this size: VLG-CBM (Srivastava et al., NeurIPS 2024) reports 68.9 % on CUB with five weights a class. Their
names are those of the data's concepts, so every figure about concepts shows what chance gives.

    logit_j = r_j . z,   r_j ~ N(0, 1 / D) in each component,   z the scaled mean of the patches

Departures: VLG-CBM's random concepts lie in CLIP's space; ours in that of whichever encoder. The directions come from the run's seed and
are saved with the model.

Scaling needs statistics of the training pictures: the mean over all batches that were seen in training mode, as in regime "joint". In two
stages there is nothing to train before the head; unless something shows the bottleneck the training pictures first, the
features are taken as they are (mean 0, variance 1), as with `scaling="none"`.

B pictures, N patches of a picture, M concepts, K classes, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dotcbm.models.pooling import PooledBottleneck, Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["RandomConcepts"]


class RandomConcepts(PooledBottleneck):
    """Random frozen directions of the mean of the patches; linear classes on them."""

    direction_MD: Tensor

    def __init__(self, problem: Problem, *, scaling: Scaling = "full", head_on: Literal["probability", "logit"] = "probability") -> None:
        """Args:
        problem: What the data and the encoder fix.
        scaling: Of the pooled features, see `PooledBottleneck`.
        head_on: What the class head reads, see `CBM`.

        Raises:
            ValueError: A setting that does not exist.
        """
        super().__init__(problem, settings={"scaling": scaling, "head_on": head_on}, scaling=scaling, dropout=0.0, l2=0.0)
        if head_on not in ("probability", "logit"):
            raise ValueError(f"head_on is {head_on!r}; choose 'probability' or 'logit'")
        num_concepts = problem.concepts.num_concepts
        self.head_on: Literal["probability", "logit"] = head_on
        if self.norm is not None:
            self.norm.momentum = None  # a plain mean over batches: one pass over the training pictures is enough
        self.register_buffer("direction_MD", torch.randn(num_concepts, problem.patch_width) / problem.patch_width**0.5)
        self.head = nn.Linear(num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = self.patches(features)
        logit_BM = self.pooled(patch_BND) @ self.direction_MD.T
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=self.evidence(patch_BND, self.direction_MD),
        )

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) probabilities or logits."""
        del context_BX
        return concept_logit_BM if self.head_on == "logit" else concept_logit_BM.sigmoid()
