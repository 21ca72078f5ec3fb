"""A concept bottleneck that also learns the class before the concepts.

Sheth and Ebrahimi Kahou, "Auxiliary Losses for Learning Generalizable Concept-based Models", NeurIPS 2023. Concepts are read from a
latent of the picture. Two losses shape that latent: an auxiliary head predicts the class from it (Coop-CBM), and the concept
orthogonal loss (COL) pulls pictures together that agree on a concept and turns apart those that do not. The class itself is read
from the concepts only. For concept j, with cosines of the latents of a batch:

    d+_j  the mean over pairs of pictures with the same label of j      d-_j  the mean over pairs with different labels
    COL = mean_j (1 - d+_j) + gamma |d-_j|

Departures: the latent is a linear layer (or one with a ReLU) on the scaled mean of the patches of an encoder that may be frozen (the
paper trains Inception-v3, and its latent is that network's last layer); COL takes the absolute value, as the orthogonal
projection loss that it follows does (Ranasinghe et al., ICCV 2021; the authors' code has the bare mean, which rewards opposite
latents) and averages over concepts where the code adds them; a concept counts where the batch holds pairs of both kinds, unknown labels
in none. With several processes, pairs are those within a process. With the linear latent concept logits are linear in the
patches and have an exact account over them; with the ReLU they have none, and `evidence_BNM` is None.

The regime is "joint" in the paper; the auxiliary losses serve the others as well.

B pictures, N patches of a picture, M concepts, K classes, D features, L width of the latent.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.pooling import PooledBottleneck, Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["CoopCBM", "LatentActivation", "concept_orthogonal_loss"]

LatentActivation = Literal["identity", "relu"]


def concept_orthogonal_loss(latent_BL: Tensor, truth_BM: Tensor, *, gamma: float = 0.5) -> Tensor:
    """COL, see the head of this file.

    Args:
        latent_BL: (B, L) latents; a zero vector has cosine 0 with everything.
        truth_BM: (B, M) concepts in [0, 1], NaN where unknown; above 0.5 a concept is there.
        gamma: Weight of pairs that differ; 0.5 in the authors' code.

    Returns:
        A scalar in [0, 2 + gamma]; 0 where no concept has pairs of both kinds.
    """
    unit_BL = F.normalize(latent_BL.float(), dim=1)
    known_BM = (~truth_BM.isnan()).float()
    sign_BM = torch.where(truth_BM > 0.5, 1.0, -1.0) * known_BM

    def over_pairs(value_BB: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) sums over the ordered pairs of two pictures that agree and that differ."""
        value_BB = value_BB - value_BB.diagonal().diag()
        all_M, signed_M = ((value_BB @ x_BM * x_BM).sum(0) for x_BM in (known_BM, sign_BM))
        return (all_M + signed_M) / 2, (all_M - signed_M) / 2

    same_M, different_M = over_pairs(unit_BL @ unit_BL.T)
    num_same_M, num_different_M = over_pairs(torch.ones(len(unit_BL), len(unit_BL), device=unit_BL.device))
    counts_M = (num_same_M > 0) & (num_different_M > 0)
    each_M = 1 - same_M / num_same_M.clamp(min=1) + gamma * (different_M / num_different_M.clamp(min=1)).abs()
    return torch.where(counts_M, each_M, 0.0).sum() / counts_M.sum().clamp(min=1)


class CoopCBM(PooledBottleneck):
    """Linear concepts on a latent that an auxiliary class head reads too; linear classes on the concepts."""

    trains_on_truth: ClassVar[bool] = True

    def __init__(
        self,
        problem: Problem,
        *,
        width: int = 256,
        activation: LatentActivation = "identity",
        auxiliary: float = 1.0,
        orthogonal: float = 0.1,
        gamma: float = 0.5,
        scaling: Scaling = "full",
        dropout: float = 0.0,
        l2: float = 0.0,
        head_on: Literal["probability", "logit"] = "probability",
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        width: L.
        activation: Of the latent.
        auxiliary: Weight of the auxiliary class loss; 0 for no auxiliary head.
        orthogonal: Weight of COL.
        gamma: In COL, see `concept_orthogonal_loss`.
        scaling: Of the pooled features, see `PooledBottleneck`.
        dropout: Share of the features dropped in training.
        l2: Strength of the penalty on the weights from features to concepts, see `PooledBottleneck`; with a ReLU on those of both
            layers, each.
        head_on: What the class head reads, see `CBM`.

        Raises:
            ValueError: A setting out of range.
        """
        settings = {
            "width": width,
            "activation": activation,
            "auxiliary": auxiliary,
            "orthogonal": orthogonal,
            "gamma": gamma,
            "scaling": scaling,
            "dropout": dropout,
            "l2": l2,
            "head_on": head_on,
        }
        super().__init__(problem, settings=settings, scaling=scaling, dropout=dropout, l2=l2)
        if width < 1:
            raise ValueError(f"width is {width}; the latent needs one number at least")
        if activation not in get_args(LatentActivation):
            raise ValueError(f"activation is {activation!r}; choose one of {list(get_args(LatentActivation))}")
        if min(auxiliary, orthogonal, gamma) < 0:
            raise ValueError(f"auxiliary is {auxiliary}, orthogonal {orthogonal} and gamma {gamma}; a weight is not negative")
        if head_on not in ("probability", "logit"):
            raise ValueError(f"head_on is {head_on!r}; choose 'probability' or 'logit'")
        num_concepts, num_classes = problem.concepts.num_concepts, problem.concepts.num_classes
        self.activation: LatentActivation = activation
        self.auxiliary_weight = auxiliary
        self.orthogonal = orthogonal
        self.gamma = gamma
        self.head_on: Literal["probability", "logit"] = head_on
        self.latent = nn.Linear(problem.patch_width, width, bias=activation == "relu")  # the concepts' biases do for a linear one
        self.concept = nn.Linear(width, num_concepts)
        self.start_at_frequency(self.concept.bias)
        self.auxiliary = nn.Linear(width, num_classes) if auxiliary else None
        self.head = nn.Linear(num_concepts, num_classes)

    def forward(self, features: PatchFeatures, truth_BM: Tensor | None = None) -> ConceptOutput:
        """See `Bottleneck.forward`; `truth_BM` serves COL, in training only."""
        patch_BND = self.patches(features)
        latent_BL = self.latent(self.pooled(patch_BND))
        linear = self.activation == "identity"
        if not linear:
            latent_BL = latent_BL.relu()
        logit_BM = self.concept(latent_BL)
        weight_MD = self.concept.weight @ self.latent.weight
        losses = self.penalty(weight_MD) if linear else self.penalty(self.concept.weight, self.latent.weight)
        if self.training and self.orthogonal and truth_BM is not None:
            losses["orthogonal"] = self.orthogonal * concept_orthogonal_loss(latent_BL, truth_BM, gamma=self.gamma)
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=self.evidence(patch_BND, weight_MD) if linear else None,
            auxiliary_BK=None if self.auxiliary is None else self.auxiliary(latent_BL),
            losses=losses,
        )

    def losses(
        self, output: ConceptOutput, *, concepts_BM: Tensor, label_B: Tensor, pos_weight_M: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Those of `Bottleneck.losses`, and "auxiliary"."""
        terms = super().losses(output, concepts_BM=concepts_BM, label_B=label_B, pos_weight_M=pos_weight_M)
        if output.auxiliary_BK is not None:
            terms["auxiliary"] = self.auxiliary_weight * F.cross_entropy(output.auxiliary_BK, label_B)
        return terms

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) probabilities or logits."""
        del context_BX
        return concept_logit_BM if self.head_on == "logit" else concept_logit_BM.sigmoid()
