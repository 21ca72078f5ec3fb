"""Readouts: from patch weights and features to concept logits.

A readout turns the weight that each patch has for a concept (its share of the concept's transported mass, or of an
attention) into the concept's logit. All but the printed one are sums over patches, so that what a patch adds to the logit,
its evidence, is exact and not an attribution made afterwards.

    paper    logit_j = 1 - min_i weight_ij mass_j cost_ij      (DOT-CBM, equation 12)
    cosine   logit_j = alpha_j sum_i weight_ij cos_ij + beta_j, alpha_j > 0
    value    logit_j = sum_i weight_ij (v_j . x_i) + beta_j

`paper` is degenerate: a column of the plan holds mass gamma_j spread over N patches and a cosine cost is at most 2, so the
minimum lies in [0, 2 gamma_j / N] and every probability equals sigmoid(1) to four digits whatever the picture shows. It
stays selectable so that an ablation can show it. With weights 1 / N, `value` on the encoder's features is the vanilla CBM.

Where beta starts decides how far a cosine gets. Concepts are rare; started at 0, the readout first learns their frequency by turning
all patches away from all concepts, and does not always come back from there. `bias="frequency"` starts it there.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.structures import Problem

__all__ = ["BiasStart", "Readout", "ReadoutKind", "frequency_logit"]

ReadoutKind = Literal["paper", "cosine", "value"]
BiasStart = Literal["zero", "frequency"]


def frequency_logit(problem: Problem) -> Tensor:
    """(M,) logits of the concepts' frequency in training, cut at 1 in 100; 0 where it is not known.

    The start of the biases of linear concepts on centred features, which carry the frequency alone: at a rate of 0.005 a few hundred
    steps do not bring them there.
    """
    frequency_M = problem.concept_frequency_M
    if frequency_M is None:
        return torch.zeros(problem.concepts.num_concepts)
    return torch.logit(frequency_M.float(), eps=0.01)


class Readout(nn.Module):
    """Patch weights to concept logits; see the head of this file."""

    def __init__(self, kind: ReadoutKind, problem: Problem, *, width: int, scale: float = 10.0, bias: BiasStart = "zero") -> None:
        """Args:
        kind: Which formula.
        problem: Gives the number of concepts, and their frequency.
        width: Width D of the features that `value` reads.
        scale: alpha_j at the start; cosines of a fresh model are small.
        bias: Where beta_j starts: at 0, or at the logit of the concept's frequency in training.

        Raises:
            ValueError: A scale that is not positive, or a start that does not exist.
        """
        super().__init__()
        if scale <= 0:
            raise ValueError(f"readout_scale must be positive, got {scale}: with a negative one, unlike patches would speak for a concept")
        if bias not in get_args(BiasStart):
            raise ValueError(f"readout_bias is {bias!r}; choose one of {list(get_args(BiasStart))}")
        num_concepts = problem.concepts.num_concepts
        self.kind: ReadoutKind = kind
        if kind == "cosine":
            # softplus keeps alpha positive; its inverse gives the start.
            self.raw_alpha_M = nn.Parameter(torch.full((num_concepts,), scale, dtype=torch.float64).expm1().log().float())
        if kind == "value":
            self.value = nn.Linear(width, num_concepts, bias=False)
        if kind != "paper":
            self.beta_M = nn.Parameter(frequency_logit(problem) if bias == "frequency" else torch.zeros(num_concepts))

    def forward(
        self, weight_BNM: Tensor, *, cosine_BNM: Tensor, feature_BND: Tensor, mass_BM: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The logits and, where they are sums over patches, the summands.

        Args:
            weight_BNM: (B, N, M) non-negative; a column sums to at most 1.
            cosine_BNM: (B, N, M) similarity of patches and concepts in [-1, 1].
            feature_BND: (B, N, D) what `value` reads.
            mass_BM: (B, M) mass of each concept; only `paper` reads it. 1 if None.

        Returns:
            logit_BM and evidence_BNM (None for `paper`), with logit = evidence.sum(1) + beta.
        """
        if self.kind == "paper":
            plan_BNM = weight_BNM if mass_BM is None else weight_BNM * mass_BM[:, None, :]
            return 1 - (plan_BNM * (1 - cosine_BNM)).amin(1), None
        if self.kind == "cosine":
            evidence_BNM = F.softplus(self.raw_alpha_M) * weight_BNM * cosine_BNM
        else:
            evidence_BNM = weight_BNM * self.value(feature_BND)
        return evidence_BNM.sum(1) + self.beta_M, evidence_BNM
