"""Classes as mixtures of concepts.

Yang et al., "Language in a Bottle: Language Model Guided Concept Bottlenecks for Interpretable Image Classification" (LaBo), CVPR
2023. A class-concept matrix, normalised over the concepts by a softmax, mixes concept scores to class logits:

    class_logit_k = scale * sum_j softmax_j(A_kj / temperature) score_j

No weight is negative, and each class spreads the same total over its concepts. A starts as the class-concept matrix and is learned
by the class loss, which never moves the scores: in LaBo they are similarities of a frozen image-text model.

Departures: scores are those of a linear concept bottleneck on the scaled mean of the patches, learned from labels or a teacher in the
same run, because data with concept labels need no image-text model (detached, so that each part learns from its own loss); the
vocabulary is the data's, so LaBo's selection of concepts has no place; A starts as the share of a class's pictures that show a
concept, in LaBo as 1 for the concepts that a language model wrote for the class; `temperature` is not in LaBo (1 is LaBo's), it sets
how far A moves at the bottleneck's learning rate; `scale` is LaBo's 100, for similarities that differ by hundredths.

The head's `.weight` is the scaled, normalised matrix, computed from `head.parametrizations.weight.original` (A): writing into it
in place changes nothing. It has no bias; `.bias` is a buffer of zeros, for those who read a head.

B pictures, N patches of a picture, M concepts, K classes, D features.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dotcbm.models.pooling import PooledBottleneck, Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["LaBo"]


class _Mixture(nn.Module):
    """A -> scale * softmax(A / temperature), row by row."""

    def __init__(self, *, scale: float, temperature: float) -> None:
        super().__init__()
        self.scale = scale
        self.temperature = temperature

    def forward(self, association_KM: Tensor) -> Tensor:
        return self.scale * (association_KM / self.temperature).softmax(1)


class LaBo(PooledBottleneck):
    """Linear concepts on the mean of the patches; classes as mixtures of them, with weights from a softmax."""

    head_by_gradient: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        *,
        scale: float = 100.0,
        temperature: float = 1.0,
        scaling: Scaling = "full",
        dropout: float = 0.0,
        l2: float = 0.0,
        head_on: Literal["probability", "logit"] = "probability",
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        scale: Total weight of a class.
        temperature: Of the softmax.
        scaling: Of the pooled features, see `PooledBottleneck`.
        dropout: Share of the features dropped in training.
        l2: Of the concept weights, see `PooledBottleneck`.
        head_on: What the class head reads, see `CBM`. Logits speak against a class too, as LaBo's scores do not.

        Raises:
            ValueError: A setting out of range.
        """
        settings = {
            "scale": scale,
            "temperature": temperature,
            "scaling": scaling,
            "dropout": dropout,
            "l2": l2,
            "head_on": head_on,
        }
        super().__init__(problem, settings=settings, scaling=scaling, dropout=dropout, l2=l2)
        if not (scale > 0 and temperature > 0):
            raise ValueError(f"scale is {scale} and temperature {temperature}; both must be positive")
        if head_on not in ("probability", "logit"):
            raise ValueError(f"head_on is {head_on!r}; choose 'probability' or 'logit'")
        concepts = problem.concepts
        self.head_on: Literal["probability", "logit"] = head_on
        self.concept = nn.Linear(problem.patch_width, concepts.num_concepts)
        self.start_at_frequency(self.concept.bias)
        self.head = nn.Linear(concepts.num_concepts, concepts.num_classes, bias=False)
        del self.head._parameters["bias"]
        self.head.register_buffer("bias", torch.zeros(concepts.num_classes))
        known_KM = concepts.class_concept_KM
        mean = known_KM.nanmean().nan_to_num(0.0)  # where nobody knows, a class is given the vocabulary's mean
        with torch.no_grad():
            self.head.weight.copy_(torch.where(known_KM.isnan(), mean, known_KM))
        parametrize.register_parametrization(self.head, "weight", _Mixture(scale=scale, temperature=temperature))

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

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) probabilities or logits."""
        del context_BX
        return concept_logit_BM if self.head_on == "logit" else concept_logit_BM.sigmoid()
