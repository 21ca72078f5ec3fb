"""The vanilla concept bottleneck on pooled features, with its class activation map.

Koh et al., "Concept Bottleneck Models", ICML 2020. A linear layer reads the concepts from the mean of the patch features.
Because the mean is linear, the concept's logit is the sum over patches of w_j . f_i / N, so its class activation map
(Zhou et al., CVPR 2016) is an exact account of the logit and serves as the heatmap.

Departures: the pooled features are standardised, wholly or half (batch statistics in training, running ones afterwards, so that
the logit stays linear in the patches), and the concept weights can carry a penalty on their squares; the class head reads the
concepts' probabilities or their logits, a setting; the encoder may be frozen (the paper trains Inception-v3 with the
bottleneck); the paper's three ways to train (independent, sequential, joint) are settings of the training task, not of the
model.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dotcbm.models.pooling import PooledBottleneck, Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["CBM"]


class CBM(PooledBottleneck):
    """Linear concepts on the mean of the patches, then linear classes on the concepts."""

    def __init__(
        self,
        problem: Problem,
        *,
        dropout: float = 0.0,
        scaling: Scaling = "full",
        l2: float = 0.0,
        head_on: Literal["probability", "logit"] = "probability",
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        dropout: Share of the features dropped in training.
        scaling: Of the pooled features, see `PooledBottleneck`.
        l2: Of the concept weights, see `PooledBottleneck`.
        head_on: What the class head reads. Logits carry more than the concepts' presence: better accuracy, more leakage.

        Raises:
            ValueError: A scaling that does not exist, or a negative l2.
        """
        settings = {"dropout": dropout, "scaling": scaling, "l2": l2, "head_on": head_on}
        super().__init__(problem, settings=settings, scaling=scaling, dropout=dropout, l2=l2)
        self.head_on: Literal["probability", "logit"] = head_on
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.start_at_frequency(self.concept.bias)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = self.patches(features)
        logit_BM = self.concept(self.pooled(patch_BND))
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=self.evidence(patch_BND, self.concept.weight),
            losses=self.penalty(self.concept.weight),
        )

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) probabilities or logits."""
        del context_BX
        return concept_logit_BM if self.head_on == "logit" else concept_logit_BM.sigmoid()
