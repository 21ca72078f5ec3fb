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

import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["CBM"]

Scaling = Literal["none", "half", "full"]


class CBM(Bottleneck):
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
        scaling: "full" gives every pooled feature mean 0 and deviation 1 over the training pictures; "half" divides by the
            root of the deviation only, so that with an `l2` features that hardly vary are trusted less.
        l2: Strength of the penalty l2 / 2 times the mean over concepts of the squared norm of their weights. Unlike the
            optimizer's decoupled weight decay it is part of the loss.
        head_on: What the class head reads. Logits carry more than the concepts' presence: better accuracy, more leakage.

        Raises:
            ValueError: A scaling that does not exist, or a negative l2.
        """
        super().__init__(problem, settings={"dropout": dropout, "scaling": scaling, "l2": l2, "head_on": head_on})
        if scaling not in ("none", "half", "full"):
            raise ValueError(f"scaling is {scaling!r}; choose 'none', 'half' or 'full'")
        if l2 < 0:
            raise ValueError(f"l2 is {l2}; a penalty is not negative")
        self.head_on: Literal["probability", "logit"] = head_on
        self.scaling: Scaling = scaling
        self.l2 = l2
        self.norm = None if scaling == "none" else nn.BatchNorm1d(problem.patch_width, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = features.patch_BND.to(self.concept.weight.dtype)
        logit_BM = self.concept(self.dropout(self._scaled(patch_BND.mean(1))))
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=None if self.training else self._scaled(patch_BND) @ self.concept.weight.T / patch_BND.shape[1],
            losses={"l2": self.l2 / 2 * self.concept.weight.square().sum(1).mean()} if self.training and self.l2 else {},
        )

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) probabilities or logits."""
        del context_BX
        return concept_logit_BM if self.head_on == "logit" else concept_logit_BM.sigmoid()

    def _scaled(self, feature: Tensor) -> Tensor:
        if self.norm is None:
            return feature
        flat = feature.flatten(0, -2)
        if self.training and flat.shape[0] == 1:  # the last batch of an epoch: one picture has no deviation
            scaled = F.batch_norm(flat, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        else:
            scaled = self.norm(flat)
        if self.scaling == "half":
            assert self.norm.running_var is not None
            deviation_D = (self.norm.running_var + self.norm.eps).sqrt()
            scaled = scaled * (deviation_D / deviation_D.mean()).sqrt()
        return scaled.view_as(feature)
