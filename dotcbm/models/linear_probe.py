"""The black box: a linear classifier on the encoder's global token (Alain and Bengio 2016), without concepts.

The token is CLS for most transformers; for encoders without one it is the mean of the patches, which all other baselines read.

It is the yardstick of class accuracy. Its concept logits are all zero (probability one half): it knows no concept.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["LinearProbe"]


class LinearProbe(Bottleneck):
    """Linear classes on the encoder's global token."""

    reads_concepts: ClassVar[bool] = False
    reads_mean: ClassVar[bool] = True

    def __init__(self, problem: Problem) -> None:
        """Args:
        problem: What the data and the encoder fix.
        """
        super().__init__(problem, settings={})
        self.head = nn.Linear(problem.global_width, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        pooled = features.global_BD.to(self.head.weight.dtype)
        return ConceptOutput(
            concept_logit_BM=pooled.new_zeros(pooled.shape[0], self.problem.concepts.num_concepts),
            class_logit_BK=self.head(pooled),
            grid=features.grid,
            context_BX=pooled,
        )

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, D_g) the global token, whatever the concepts."""
        del concept_logit_BM
        assert context_BX is not None
        return context_BX
