"""The dot-product head: adapted patches against adapted concepts, pooled over the picture.

The honest baseline of DOT-CBM's ablation (Xie et al., CVPR 2025, arXiv 2505.07209, "dot product"): the same adapters and readouts, with
a pooling where DOT-CBM has a transport plan.

    mean      weight_ij = 1 / N
    max       weight_ij = 1 at the patch with the largest cosine, 0 elsewhere
    softmax   weight_ij = softmax_i(cos_ij / temperature)

Every concept looks for its patches alone: nothing makes concepts compete for patches, and no patch has to be explained. The weights,
divided by M, are the plan of the transport whose patch marginal is left free: with the temperature for eps the softmax is its solution
for uniform gamma, the maximum its limit without entropy, the mean its limit with nothing else. So the output holds them as its plan;
but not those of the mean, which are the same everywhere and look at no place: its map is the evidence, what each patch adds.

Departures: the paper says neither how it pools nor from what it reads; cosines as in its cost, the three usual poolings, and the
readouts of `dotcbm.models.readout`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dotcbm.losses import OrthogonalityForm, orthogonality
from dotcbm.models.adapters import AdapterKind, make_adapter
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_embedding import ConceptEmbedding
from dotcbm.models.readout import BiasStart, Readout, ReadoutKind
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem
from dotcbm.transport.cost import cosine_similarity

__all__ = ["DotProduct", "Pooling"]

Pooling = Literal["mean", "max", "softmax"]


class DotProduct(Bottleneck):
    """Cosines of patches and concepts, pooled over the patches."""

    def __init__(
        self,
        problem: Problem,
        *,
        pooling: Pooling = "max",
        temperature: float = 0.05,
        dim: int = 256,
        adapter: AdapterKind = "mlp",
        dropout: float = 0.4,
        readout: ReadoutKind = "cosine",
        readout_scale: float = 10.0,
        readout_bias: BiasStart = "zero",
        orthogonality_form: OrthogonalityForm = "squared",
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        pooling: See the head of this file.
        temperature: Of the softmax pooling, on cosines.
        dim: Width D of the shared space.
        adapter: See `make_adapter`.
        dropout: In the adapters.
        readout: See `dotcbm.models.readout`.
        readout_scale: Of the cosine readout's alpha at the start.
        readout_bias: Where the readout's biases start.
        orthogonality_form: See `dotcbm.losses.orthogonality`.
        """
        super().__init__(
            problem,
            settings={
                "pooling": pooling,
                "temperature": temperature,
                "dim": dim,
                "adapter": adapter,
                "dropout": dropout,
                "readout": readout,
                "readout_scale": readout_scale,
                "readout_bias": readout_bias,
                "orthogonality_form": orthogonality_form,
            },
        )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.pooling: Pooling = pooling
        self.temperature = temperature
        self.orthogonality_form: OrthogonalityForm = orthogonality_form
        self.patch_adapter = make_adapter(adapter, width_in=problem.patch_width, width_out=dim, dropout=dropout)
        self.concept = ConceptEmbedding(problem, dim=dim, adapter=adapter, dropout=dropout)
        num_concepts = problem.concepts.num_concepts
        self.readout = Readout(
            readout,
            problem,
            width=problem.patch_width,
            scale=readout_scale,
            bias=readout_bias,
        )
        self.head = nn.Linear(num_concepts, problem.concepts.num_classes)

    def pool_weights(self, cosine_BNM: Tensor) -> Tensor:
        """(B, N, M) weights that sum to 1 over the patches."""
        if self.pooling == "mean":
            return torch.full_like(cosine_BNM, 1 / cosine_BNM.shape[1])
        if self.pooling == "softmax":
            return (cosine_BNM / self.temperature).softmax(1)
        return torch.zeros_like(cosine_BNM).scatter(1, cosine_BNM.argmax(1, keepdim=True), 1.0)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        patch_BND = features.patch_BND.to(self.head.weight.dtype)
        adapted_BND = self.patch_adapter(patch_BND)
        concept_MD = self.concept()
        cosine_BNM = cosine_similarity(adapted_BND, concept_MD)
        weight_BNM = self.pool_weights(cosine_BNM)
        logit_BM, evidence_BNM = self.readout(weight_BNM, cosine_BNM=cosine_BNM, feature_BND=patch_BND)
        num_concepts = weight_BNM.shape[2]
        looks = not self.training and self.pooling != "mean"
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=evidence_BNM,
            plan_BNM=weight_BNM / num_concepts if looks else None,
            gamma_BM=torch.full_like(logit_BM, 1 / num_concepts) if looks else None,
            losses={
                "vop": orthogonality(adapted_BND, form=self.orthogonality_form),
                "top": orthogonality(concept_MD, form=self.orthogonality_form),
            }
            if self.training
            else {},
        )
