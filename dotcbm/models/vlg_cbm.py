"""The concept bottleneck with grounded labels and a limit on how many concepts explain a class.

Srivastava, Yan and Weng, "VLG-CBM: Training Concept Bottleneck Models with Vision-Language Guidance", NeurIPS 2024. A linear
layer reads concept logits from pooled features and is trained by cross-entropy on the labels of a grounded detector; the logits
are normalised over the training pictures, and a sparse head reads them, with five non-zero weights a class in the paper's
comparison (`head_nec: 5` of the training task, with its GLM-SAGA path).

Departures: the labels are the data's own, or a teacher's (`dotcbm.data.teacher`), not those of Grounding DINO, and there is no
cropping to detected boxes; the features may be scaled, and the weights carry a penalty on their squares that is part of the
loss; the normalisation uses running moments; the encoder may stay frozen. The paper's optional hidden layers of the concept
layer are left out: without them a logit is a sum over patches, and its map is exact.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.models.linear_concepts import LinearConcepts, Moments
from dotcbm.models.pooling import Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["VLGCBM"]


class VLGCBM(Bottleneck):
    """Linear concepts on the mean of the patches, normalised, then a linear head that is meant to be sparse."""

    reads_mean: ClassVar[bool] = True

    def __init__(self, problem: Problem, *, scaling: Scaling = "full", dropout: float = 0.0, l2: float = 0.0) -> None:
        """Args:
        problem: What the data and the encoder fix.
        scaling: Of the pooled features; see `dotcbm.models.linear_concepts.LinearConcepts`. The paper's is "none".
        dropout: Share of the features dropped in training.
        l2: Strength of the penalty l2 / 2 times the mean over concepts of the squared norm of their weights.

        Raises:
            ValueError: A setting out of range.
        """
        super().__init__(problem, settings={"scaling": scaling, "dropout": dropout, "l2": l2})
        if l2 < 0:
            raise ValueError(f"l2 is {l2}; a penalty is not negative")
        self.l2 = l2
        self.concept = LinearConcepts(problem, scaling=scaling, dropout=dropout, bias=True)
        self.moments = Moments(problem.concepts.num_concepts)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        logit_BM = self.concept(features.patch_BND)
        self.moments.update(logit_BM.detach())
        weight_MD = self.concept.linear.weight
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=None if self.training else self.concept.maps(features.patch_BND) / features.patch_BND.shape[1],
            losses={"l2": self.l2 / 2 * weight_MD.square().sum(1).mean()} if self.training and self.l2 else {},
        )

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) normalised logits."""
        del context_BX
        return (concept_logit_BM - self.moments.mean_X) / self.moments.deviation_X
