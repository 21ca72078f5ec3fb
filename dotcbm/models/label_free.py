"""The label-free concept bottleneck.

Oikarinen, Das, Nguyen and Weng, "Label-Free Concept Bottleneck Models", ICLR 2023. A linear layer without a bias reads
activations from the pooled features; it is trained so that over the pictures each activation is similar to what a teacher (an
image-text model) says of its concept, by the cosine of cubed, centred columns. The class head reads standardised
activations and is sparse.

Departures: the similarity is taken over batches, not over all training pictures at once, and optimised by the task's AdamW;
the teacher may be the data's own labels (`dotcbm.data.teacher` makes scores of an image-text model into labels); no concept is
dropped for a weak teacher or a weak similarity, so that all bottlenecks are compared on the same concepts; activations are
standardised by running moments; the features may be scaled. The paper's activations have no zero, so "concept present" means
nothing in it: a slope and an offset for each concept, fitted to the labels beside the training, turn them into
probabilities without changing activations or head. The sparse head is the task's (`head_nec`).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.models.linear_concepts import Calibration, LinearConcepts, cubed_cosine
from dotcbm.models.pooling import Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["LabelFreeCBM"]


class LabelFreeCBM(Bottleneck):
    """Linear activations on the mean of the patches, similar to a teacher's in the cubed cosine; then a linear head."""

    reads_mean: ClassVar[bool] = True

    def __init__(self, problem: Problem, *, scaling: Scaling = "full", dropout: float = 0.0) -> None:
        """Args:
        problem: What the data and the encoder fix.
        scaling: Of the pooled features; see `dotcbm.models.linear_concepts.LinearConcepts`. The paper's is "none".
        dropout: Share of the features dropped in training.

        Raises:
            ValueError: A setting out of range.
        """
        super().__init__(problem, settings={"scaling": scaling, "dropout": dropout})
        self.concept = LinearConcepts(problem, scaling=scaling, dropout=dropout, bias=False)
        self.calibration = Calibration(problem)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        logit_BM = self.calibration(self.concept(features.patch_BND))
        evidence_BNM = None
        if not self.training:
            evidence_BNM = self.concept.maps(features.patch_BND) * (self.calibration.slope_M / features.patch_BND.shape[1])
        return ConceptOutput(
            concept_logit_BM=logit_BM, class_logit_BK=self.classify(logit_BM), grid=features.grid, evidence_BNM=evidence_BNM
        )

    def losses(
        self, output: ConceptOutput, *, concepts_BM: Tensor, label_B: Tensor, pos_weight_M: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "concept": 1 - the mean over concepts of the cubed cosine; "calibration": see `Calibration`, to which the weights go."""
        del label_B
        # The similarity knows neither scale nor offset, so the logits serve as well as the activations.
        return {
            "concept": 1 - cubed_cosine(output.concept_logit_BM, concepts_BM).mean(),
            "calibration": self.calibration.loss(output.concept_logit_BM, concepts_BM, pos_weight_M=pos_weight_M),
        }

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) standardised activations."""
        del context_BX
        return self.calibration.standardised(concept_logit_BM)
