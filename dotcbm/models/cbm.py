"""The vanilla concept bottleneck on pooled features, with its class activation map.

Koh et al., "Concept Bottleneck Models", ICML 2020. A linear layer reads the concepts from the mean of the patch features.
Because the mean is linear, the concept's logit is the sum over patches of w_j . f_i / N, so its class activation map
(Zhou et al., CVPR 2016) is an exact account of the logit and serves as the heatmap.

Departures: the pooled features are standardised (batch statistics in training, running ones afterwards, so that the logit
stays linear in the patches); the class head reads the concepts' probabilities or their logits, a setting; the encoder may be
frozen (the paper trains Inception-v3 with the bottleneck); the paper's three ways to train (independent, sequential, joint) are
settings of the training task, not of the model.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["CBM"]


class CBM(Bottleneck):
    """Linear concepts on the mean of the patches, then linear classes on the concept probabilities."""

    def __init__(
        self, problem: Problem, *, dropout: float = 0.0, standardise: bool = True, head_on: Literal["probability", "logit"] = "probability"
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        dropout: Share of the features dropped in training.
        standardise: Give every pooled feature mean 0 and deviation 1 over the training pictures.
        head_on: What the class head reads. Logits carry more than the concepts' presence: better accuracy, more leakage.
        """
        super().__init__(problem, settings={"dropout": dropout, "standardise": standardise, "head_on": head_on})
        self.head_on: Literal["probability", "logit"] = head_on
        self.norm = nn.BatchNorm1d(problem.patch_width, affine=False) if standardise else None
        self.dropout = nn.Dropout(dropout)
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = features.patch_BND.to(self.concept.weight.dtype)
        logit_BM = self.concept(self.dropout(self._standardised(patch_BND.mean(1))))
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.head(self._read_by_head(logit_BM)),
            grid=features.grid,
            evidence_BNM=None if self.training else self._standardised(patch_BND) @ self.concept.weight.T / patch_BND.shape[1],
        )

    def head_input(self, features: PatchFeatures, output: ConceptOutput) -> Tensor:
        """(B, M) probabilities or logits."""
        del features
        return self._read_by_head(output.concept_logit_BM)

    def _read_by_head(self, logit_BM: Tensor) -> Tensor:
        return logit_BM if self.head_on == "logit" else logit_BM.sigmoid()

    def _standardised(self, feature: Tensor) -> Tensor:
        if self.norm is None:
            return feature
        return self.norm(feature.flatten(0, -2)).view_as(feature)
