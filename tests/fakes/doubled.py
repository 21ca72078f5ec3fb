"""A bottleneck of a shape that none of ours has: two inputs of the head for each concept, and no maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["Doubled"]


class Doubled(Bottleneck):
    """No maps, and a head that reads two numbers of each concept: probability times a number of the picture, and its square."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, settings={})
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.head = nn.Linear(2 * problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        pooled = features.patch_BND.mean(1)
        logit_BM, context_BX = self.concept(pooled), pooled.exp()
        return ConceptOutput(logit_BM, self.classify(logit_BM, context_BX), features.grid, context_BX=context_BX)

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        assert context_BX is not None
        p = concept_logit_BM.sigmoid()
        return torch.stack([p * context_BX[:, :1], p**2], -1).flatten(1)

    def contributions(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        return (self.head.weight * self.head_input(concept_logit_BM, context_BX)[:, None]).unflatten(2, (-1, 2)).sum(3)
