"""Concept embeddings: a vector for each concept in place of a number.

Espinosa Zarlenga et al., "Concept Embedding Models: Beyond the Accuracy-Explainability Trade-Off", NeurIPS 2022. Each concept
has two embeddings of the picture, one for its presence and one for its absence, and one scorer shared by all concepts reads its
probability from both. The class head reads the mixtures, end to end:

    [c+_j ; c-_j] = act(W_j h + b_j)     p_j = sigmoid(s . [c+_j ; c-_j] + t)     c_j = p_j c+_j + (1 - p_j) c-_j

RandInt: in training each p_j that the mixture uses is replaced by the label with probability `intervention`, so that the model
learns to answer corrections.

What to know of it: the embeddings carry more than the concept's presence, so an intervention chooses between two vectors that both
depend on the picture, and the class is not a function of the concept probabilities alone.

Departures: h is the scaled mean of the patches of an encoder that may be frozen (the paper trains a ResNet with the bottleneck);
interventions are drawn for each picture and concept, as the paper says (its code draws one set of concepts a batch);
unknown labels never replace a probability. With `activation="identity"` (an option of the authors' code too) the concept logits are
linear in the patches and have an exact account over them; with the paper's leaky ReLU they have none, and `evidence_BNM` is None.

The regime is "joint" in the paper. "two_stage" works: the embeddings are then shaped by the concepts alone, RandInt does
nothing, and the head is solved on the mixtures.

B pictures, N patches of a picture, M concepts, K classes, D features, C width of an embedding.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.pooling import PooledBottleneck, Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["CEM", "EmbeddingActivation"]

EmbeddingActivation = Literal["leaky_relu", "identity"]


class CEM(PooledBottleneck):
    """Two embeddings a concept, mixed by its probability; linear classes on all mixtures."""

    trains_on_truth: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        *,
        width: int = 16,
        intervention: float = 0.25,
        activation: EmbeddingActivation = "leaky_relu",
        scaling: Scaling = "full",
        dropout: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        width: C, of each embedding; this and the next two default to the paper's.
        intervention: Probability of RandInt, for each picture and concept.
        activation: Of the embeddings.
        scaling: Of the pooled features, see `PooledBottleneck`.
        dropout: Share of the features dropped in training.
        l2: Strength of the penalty l2 / 2 times the mean over concepts of the squared norm of the weights s W_j from features to
            their logit.

        Raises:
            ValueError: A setting out of range.
        """
        settings = {
            "width": width,
            "intervention": intervention,
            "activation": activation,
            "scaling": scaling,
            "dropout": dropout,
            "l2": l2,
        }
        super().__init__(problem, settings=settings, scaling=scaling, dropout=dropout, l2=l2)
        if width < 1:
            raise ValueError(f"width is {width}; an embedding needs one number at least")
        if not 0 <= intervention <= 1:
            raise ValueError(f"intervention is {intervention}; it is a probability in [0, 1]")
        if activation not in get_args(EmbeddingActivation):
            raise ValueError(f"activation is {activation!r}; choose one of {list(get_args(EmbeddingActivation))}")
        num_concepts = problem.concepts.num_concepts
        self.width = width
        self.intervention = intervention
        self.activation: EmbeddingActivation = activation
        self.embedding = nn.Linear(problem.patch_width, num_concepts * 2 * width)
        self.scorer = nn.Linear(2 * width, 1)
        self.head = nn.Linear(num_concepts * width, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures, truth_BM: Tensor | None = None) -> ConceptOutput:
        """See `Bottleneck.forward`; `truth_BM` serves RandInt, in training only."""
        patch_BND = self.patches(features)
        both_BMX = self.embedding(self.pooled(patch_BND)).unflatten(1, (-1, 2 * self.width))
        if self.activation == "leaky_relu":
            both_BMX = F.leaky_relu(both_BMX)
        logit_BM = self.scorer(both_BMX)[..., 0]
        context_BM2C = both_BMX.unflatten(2, (2, self.width))
        probability_BM = logit_BM.sigmoid()
        if self.training and truth_BM is not None:
            replaced_BM = (torch.rand_like(probability_BM) < self.intervention) & ~truth_BM.isnan()
            probability_BM = torch.where(replaced_BM, truth_BM.to(probability_BM.dtype), probability_BM)
        weight_MD = torch.einsum("x,mxd->md", self.scorer.weight[0], self.embedding.weight.unflatten(0, (-1, 2 * self.width)))
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.head(_mixed(probability_BM, context_BM2C).flatten(1)),
            grid=features.grid,
            evidence_BNM=self.evidence(patch_BND, weight_MD) if self.activation == "identity" else None,
            context_BX=context_BM2C,
            losses=self.penalty(weight_MD),
        )

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M C) mixtures of the embeddings, concept after concept.

        Raises:
            ValueError: No embeddings are given.
        """
        return self._mixtures(concept_logit_BM, context_BX).flatten(1)

    def contributions(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, K, M) what the mixture of each concept adds to each class logit."""
        weight_KMC = self.head.weight.unflatten(1, (-1, self.width))
        return torch.einsum("kmc,bmc->bkm", weight_KMC, self._mixtures(concept_logit_BM, context_BX))

    def _mixtures(self, concept_logit_BM: Tensor, context_BX: Tensor | None) -> Tensor:
        if context_BX is None:
            raise ValueError(
                "the head of CEM reads the embeddings of the pictures, and none are given; hand on `ConceptOutput.context_BX` of the "
                "same pictures (for the same reason regime 'independent' is impossible: labels have no embeddings)"
            )
        return _mixed(concept_logit_BM.sigmoid(), context_BX)


def _mixed(probability_BM: Tensor, context_BM2C: Tensor) -> Tensor:
    """(B, M, C)."""
    return context_BM2C[:, :, 1].lerp(context_BM2C[:, :, 0], probability_BM[..., None])
