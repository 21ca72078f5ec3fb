"""Bottlenecks that read their concepts from the mean of the patch features.

Where a concept's logit is linear in the mean, it is the sum over patches of w_j . f_i / N: its class activation map (Zhou et al.,
CVPR 2016) is an exact account of the logit. The pooled features are standardised, wholly or half, with batch statistics in
training and running ones afterwards, so that the logit stays linear in the patches.

B pictures, N patches of a picture, M concepts, D features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.models.readout import frequency_logit
from dotcbm.structures import PatchFeatures, Problem

__all__ = ["PooledBottleneck", "Scaling"]

Scaling = Literal["none", "half", "full"]


class PooledBottleneck(Bottleneck):
    """What bottlenecks on pooled features share: scaling, dropout, a penalty on concept weights, and the account over patches.

    Subclasses set `head`.

    Attributes:
        scaling: How pooled features are scaled.
        l2: Strength of the penalty.
        norm: Running statistics of the pooled features; None without scaling.
        dropout: Of the scaled features.
    """

    reads_mean: ClassVar[bool] = True

    def __init__(self, problem: Problem, *, settings: dict[str, Any], scaling: Scaling, dropout: float, l2: float) -> None:
        """Args:
        problem: What the data and the encoder fix.
        settings: See `Bottleneck`.
        scaling: "full" gives every pooled feature mean 0 and deviation 1 over the training pictures; "half" divides by the
            root of the deviation only, so that with an `l2` features that hardly vary are trusted less.
        dropout: Share of the features dropped in training.
        l2: Strength of the penalty l2 / 2 times the mean over concepts of the squared norm of their weights. Unlike the
            optimizer's decoupled weight decay it is part of the loss, beside the concepts' loss times the task's concept_weight.

        Raises:
            ValueError: A scaling that does not exist, or a negative l2.
        """
        super().__init__(problem, settings=settings)
        if scaling not in ("none", "half", "full"):
            raise ValueError(f"scaling is {scaling!r}; choose 'none', 'half' or 'full'")
        if l2 < 0:
            raise ValueError(f"l2 is {l2}; a penalty is not negative")
        self.scaling: Scaling = scaling
        self.l2 = l2
        self.norm = None if scaling == "none" else nn.BatchNorm1d(problem.patch_width, affine=False)
        self.dropout = nn.Dropout(dropout)

    def start_at_frequency(self, bias_M: Tensor) -> None:
        """Set the biases of linear concepts to `frequency_logit` where features are centred; elsewhere they carry more than it."""
        if self.norm is not None:
            with torch.no_grad():
                bias_M.copy_(frequency_logit(self.problem))

    def patches(self, features: PatchFeatures) -> Tensor:
        """(B, N, D) patches in the precision of the weights."""
        return features.patch_BND.to(next(self.parameters()).dtype)

    def pooled(self, patch_BND: Tensor) -> Tensor:
        """(B, D) mean of the patches, scaled, and in training with dropout."""
        return self.dropout(self.scaled(patch_BND.mean(1)))

    def scaled(self, feature: Tensor) -> Tensor:
        """(..., D) features, scaled. In training this updates the running statistics."""
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

    def evidence(self, patch_BND: Tensor, weight_MD: Tensor) -> Tensor | None:
        """(B, N, M) what each patch adds to logits with these weights of the pooled features; None in training, where none is read."""
        return None if self.training else self.scaled(patch_BND) @ weight_MD.T / patch_BND.shape[1]

    def penalty(self, *weights: Tensor) -> dict[str, Tensor]:
        """The term "l2" of the loss, for one or more matrices with a row a concept; none in evaluation or where l2 is 0."""
        if not (self.training and self.l2):
            return {}
        return {"l2": self.l2 / 2 * torch.stack([weight.square().sum(1).mean() for weight in weights]).sum()}
