"""Concepts as directions in the features of a model that is already there.

Yuksekgonul, Wang and Zou, "Post-hoc Concept Bottleneck Models", ICLR 2023. A linear support vector machine separates the pictures with
and without a concept; its normal is the concept activation vector (CAV, Kim et al., ICML 2018). The class head reads the
signed distances to those planes:

    minimise over w_j, b_j   mean_i max(0, 1 - y_ij (w_j . x_i + b_j)) + l2 / 2 |w_j|^2,   y in {-1, 1}
    head reads               (w_j . x + b_j) / |w_j|

Departures: all machines are trained at once by gradient descent in this library's loop, on all labelled pictures (the paper solves
each with libsvm on a balanced sample; `concept_weighting: balanced` weighs in place of sampling); x is the scaled mean of the patches;
the head is solved with an L2 penalty, or sparsely with `head_nec` (the paper: an elastic net by stochastic gradients). The
concept's logit is the machine's decision value: its sign is the machine's answer, but the sigmoid of it is no calibrated
probability. The class loss never moves the vectors, in no regime: that is what "post hoc" says.

Not here: the hybrid with a residual (PCBM-h). It fits a second classifier on the features to what the first, already frozen, gets
wrong. Two stages solve one head once; solved together, as one head on distances and features, the features would take what belongs
to the concepts, which is another model. And its class logit is no longer the sum of what concepts add, which `contributions` and
every explanation built on it promise.

B pictures, N patches of a picture, M concepts, K classes, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotcbm.models.pooling import PooledBottleneck, Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["PostHocCBM", "hinge_loss"]


def hinge_loss(value_BM: Tensor, truth_BM: Tensor, *, pos_weight_M: Tensor | None = None) -> Tensor:
    """The mean over known labels of max(0, 1 - y value).

    Args:
        value_BM: (B, M) decision values.
        truth_BM: (B, M) in [0, 1], NaN where unknown; above 0.5 y is 1, else -1.
        pos_weight_M: (M,) weight of each concept's positives.

    Returns:
        A scalar; 0 (with a zero gradient) where no label is known.
    """
    known_BM, there_BM = ~truth_BM.isnan(), truth_BM > 0.5
    each_BM = (1 - torch.where(there_BM, value_BM, -value_BM)).relu()
    if pos_weight_M is not None:
        each_BM = torch.where(there_BM, pos_weight_M * each_BM, each_BM)
    return torch.where(known_BM, each_BM, 0.0).sum() / known_BM.sum().clamp(min=1)


class PostHocCBM(PooledBottleneck):
    """Concept activation vectors on the mean of the patches; linear classes on the distances to their planes."""

    def __init__(self, problem: Problem, *, scaling: Scaling = "full", l2: float = 0.01, dropout: float = 0.0) -> None:
        """Args:
        problem: What the data and the encoder fix.
        scaling: Of the pooled features, see `PooledBottleneck`.
        l2: Strength of the machines' margin term. With n pictures and the task's concept_weight w it is w / (n C) for a machine's C;
            0.01 is near the paper's C of 0.1 with 1,000 pictures.
        dropout: Share of the features dropped in training.

        Raises:
            ValueError: A scaling that does not exist, or a negative l2.
        """
        settings = {"scaling": scaling, "l2": l2, "dropout": dropout}
        super().__init__(problem, settings=settings, scaling=scaling, dropout=dropout, l2=l2)
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = self.patches(features)
        logit_BM = self.concept(self.pooled(patch_BND))
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM.detach()),
            grid=features.grid,
            evidence_BNM=self.evidence(patch_BND, self.concept.weight),
            losses=self.penalty(self.concept.weight),
        )

    def losses(
        self, output: ConceptOutput, *, concepts_BM: Tensor, label_B: Tensor, pos_weight_M: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The hinge loss as "concept", and the margin term "l2"."""
        del label_B
        return {"concept": hinge_loss(output.concept_logit_BM, concepts_BM, pos_weight_M=pos_weight_M), **output.losses}

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) signed distances to the concepts' planes, in units of the scaled features."""
        del context_BX
        norm_M = self.concept.weight.detach().norm(dim=1)
        return concept_logit_BM / norm_M.clamp(min=torch.finfo(norm_M.dtype).tiny)
