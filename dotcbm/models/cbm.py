"""The vanilla concept bottleneck on pooled features, with its class activation map.

Koh et al., "Concept Bottleneck Models", ICML 2020. A linear layer reads the concepts from the mean of the patch features.
Because the mean is linear, the concept's logit is the sum over patches of w_j . f_i / N, so its class activation map
(Zhou et al., CVPR 2016) is an exact account of the logit and serves as the heatmap.

Departures: the encoder may be frozen (the paper trains Inception-v3 with the bottleneck); the paper's three ways to train
(independent, sequential, joint) are settings of the training task, not of the model.
"""

from __future__ import annotations

from torch import nn

from dotcbm.models.base import Bottleneck
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["CBM"]


class CBM(Bottleneck):
    """Linear concepts on the mean of the patches, then linear classes on the concept probabilities."""

    def __init__(self, problem: Problem, *, dropout: float = 0.0) -> None:
        """Args:
        problem: What the data and the encoder fix.
        dropout: Share of the features dropped in training.
        """
        super().__init__(problem, settings={"dropout": dropout})
        self.dropout = nn.Dropout(dropout)
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = features.patch_BND.to(self.concept.weight.dtype)
        logit_BM = self.concept(self.dropout(patch_BND.mean(1)))
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.head(logit_BM.sigmoid()),
            grid=features.grid,
            evidence_BNM=None if self.training else patch_BND @ self.concept.weight.T / patch_BND.shape[1],
        )
