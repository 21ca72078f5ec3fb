"""The sparse concept bottleneck: contrastive training with Gumbel noise.

Semenov, Ivanov, Beznosikov and Gasnikov, "Sparse Concept Bottleneck Models: Gumbel Tricks in Contrastive Learning",
arXiv 2404.03323, 2024 (github.com/Andron00e/SparseCBM); DOT-CBM's table compares with a "SparseCBM", which it does not define
further and which we take to be this one. A square matrix W maps the M similarities psi(x) of a picture and the concepts' texts,
as a frozen CLIP gives them, to activations W psi(x). It is trained by a contrastive loss in which both softmaxes, over concepts
and over the pictures of a batch, are relaxed categorical samples (Gumbel-softmax, temperature tau): with a small tau few concepts
win a picture. A linear head reads the activations. The paper's variant "l1-CBM" penalises |W|_1 instead.

Departures:

- The paper's loss pairs picture k of a batch with row k of W, though rows are concepts and not pictures (and its code averages
  over all pairs of picture and concept). Here the labels (or a teacher's scores, `dotcbm.data.teacher`) say which pairs belong
  together: all pairs of a picture and a concept that it shows are positives, weighted by the label.
- `similarity: text` is the paper's psi, for open_clip encoders with the text tower of the same model. Without an image-text model
  ("linear") psi is a linear layer on pooled features, which absorbs W: a product of two linear layers is one. Its
  activations are sums over patches, with an exact map.
- The logarithm of the similarity inside the exponent (it may be negative) is left out, as in the authors' code.
- The activations are standardised for the head, and a slope and an offset for each concept, fitted to the labels beside the
  training, give probabilities (see `dotcbm.models.label_free`). The head is fitted after the concepts; "joint" is the paper's way.

B pictures, N patches, M concepts.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.models.linear_concepts import Calibration, LinearConcepts
from dotcbm.models.pooling import Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["Similarity", "SparseCBM", "gumbel_contrastive"]

Similarity = Literal["linear", "text"]

_CLIP_SCALE = 100.0  # CLIP's logits are 100 cos: its learned temperature, clipped there (Radford et al., 2021)


def gumbel_contrastive(score_BM: Tensor, target_BM: Tensor, *, tau: float, noise: bool) -> Tensor:
    """-(log-likelihood of a picture's concepts + log-likelihood of a concept's pictures) / 2 under Gumbel-softmax samples.

        y_ij = exp((s_ij + g_ij) / tau) / sum_k exp((s_ik + g_ik) / tau)

    and the same over the pictures, with other noise; -log y is averaged over the positives of each row (column), weighted by
    the target, then over the rows (columns) that have some.

    Args:
        score_BM: (B, M).
        target_BM: (B, M) in [0, 1]; NaN where unknown: that pair takes no part.
        tau: Temperature, positive.
        noise: Draw g from Gumbel(0, 1); 0 otherwise.

    Returns:
        A scalar; 0 where there is no positive.
    """
    known_BM = ~target_BM.isnan()
    weight_BM = torch.where(known_BM, target_BM, 0.0).float()
    terms: list[Tensor] = []
    for dim in (1, 0):
        noisy_BM = score_BM.float()
        if noise:
            noisy_BM = noisy_BM - torch.empty_like(noisy_BM).exponential_().log()  # minus the log of an exponential is Gumbel
        noisy_BM = (noisy_BM / tau).masked_fill(~known_BM, torch.finfo(torch.float32).min)
        each = -(weight_BM * noisy_BM.log_softmax(dim)).sum(dim)
        mass = weight_BM.sum(dim)
        terms.append((each / mass.clamp(min=1e-6) * (mass > 0)).sum() / (mass > 0).sum().clamp(min=1))
    return (terms[0] + terms[1]) / 2


class SparseCBM(Bottleneck):
    """Activations trained by a contrastive loss with Gumbel noise, then a linear head."""

    reads_mean: ClassVar[bool] = True

    text_MD: Tensor | None

    def __init__(
        self,
        problem: Problem,
        *,
        similarity: Similarity = "linear",
        tau: float = 1.0,
        l1: float = 0.0,
        scaling: Scaling = "full",
        dropout: float = 0.0,
    ) -> None:
        """Args:
        problem: What the data and the encoder fix; for "text" with embeddings of the concept names as wide as the global token.
        similarity: What stands before the activations; see the head of this file.
        tau: Temperature of the Gumbel-softmax; 1 is the authors' code's.
        l1: Strength of l1 / M |W|_1, of the paper's other variant, which has 1e-3.
        scaling: Of the pooled features with "linear"; see `dotcbm.models.linear_concepts.LinearConcepts`.
        dropout: Share of the pooled features dropped in training, with "linear".

        Raises:
            ValueError: A setting out of range, or "text" without embeddings that fit.
        """
        super().__init__(problem, settings={"similarity": similarity, "tau": tau, "l1": l1, "scaling": scaling, "dropout": dropout})
        if similarity not in get_args(Similarity):
            raise ValueError(f"similarity is {similarity!r}; choose one of {list(get_args(Similarity))}")
        if not tau > 0:
            raise ValueError(f"tau is {tau}; a temperature is positive")
        if l1 < 0:
            raise ValueError(f"l1 is {l1}; a penalty is not negative")
        self.similarity: Similarity = similarity
        self.tau = tau
        self.l1 = l1
        num_concepts = problem.concepts.num_concepts
        text_MD = problem.text_MD if similarity == "text" else None
        if similarity == "text" and (text_MD is None or text_MD.shape[1] != problem.global_width):
            found = "there are none" if text_MD is None else f"theirs is {text_MD.shape[1]}"
            raise ValueError(
                f"similarity 'text' needs embeddings of the concepts of the global token's width {problem.global_width}, and {found}; "
                "take encoder and text from the same open_clip model, or similarity 'linear'"
            )
        self.register_buffer("text_MD", None if text_MD is None else F.normalize(text_MD.float(), dim=-1))
        if text_MD is None:
            self.concept: LinearConcepts | nn.Linear = LinearConcepts(problem, scaling=scaling, dropout=dropout, bias=False)
        else:
            self.concept = nn.Linear(num_concepts, num_concepts, bias=False)
        self.calibration = Calibration(problem)
        self.head = nn.Linear(num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        evidence_BNM = None
        if isinstance(self.concept, LinearConcepts):
            weight = self.concept.linear.weight
            activation_BM = self.concept(features.patch_BND)
            if not self.training:
                evidence_BNM = self.concept.maps(features.patch_BND) * (self.calibration.slope_M / features.patch_BND.shape[1])
        else:
            weight = self.concept.weight
            assert self.text_MD is not None
            unit_BD = F.normalize(features.global_BD.to(weight.dtype), dim=-1)
            activation_BM = self.concept(_CLIP_SCALE * (unit_BD @ self.text_MD.T))
        logit_BM = self.calibration(activation_BM)
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=evidence_BNM,
            losses={"l1": self.l1 / weight.shape[0] * weight.abs().sum()} if self.training and self.l1 else {},
        )

    def losses(
        self, output: ConceptOutput, *, concepts_BM: Tensor, label_B: Tensor, pos_weight_M: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "concept": `gumbel_contrastive` of the activations, with noise in training; "calibration": see `Calibration`."""
        del label_B
        activation_BM = self.calibration.activation(output.concept_logit_BM)
        return {
            "concept": gumbel_contrastive(activation_BM, concepts_BM, tau=self.tau, noise=self.training),
            "calibration": self.calibration.loss(output.concept_logit_BM, concepts_BM, pos_weight_M=pos_weight_M),
            **output.losses,
        }

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) standardised activations."""
        del context_BX
        return self.calibration.standardised(concept_logit_BM)
