"""The losses of concept bottlenecks, as functions of tensors.

Orthogonality follows DOT-CBM (Xie et al., CVPR 2025, equations 6 and 7) with one departure: as printed, a signed mean of
cosines over all pairs, the loss rewards negative cosines without bound and counts each vector against itself. The default
`form="squared"` averages squared cosines over pairs i != j, which is zero exactly for orthogonal vectors; `"signed"` is
the printed mean (without the diagonal, a constant).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OrthogonalityForm", "concept_loss", "orthogonality"]

OrthogonalityForm = Literal["squared", "signed"]


def orthogonality(vector_XND: Tensor, weight_XN: Tensor | None = None, *, form: OrthogonalityForm = "squared") -> Tensor:
    """The weighted mean over pairs i != j of cos^2 (or cos) between vectors of one modality.

    With patches and their saliency this is L_VOP, with concept embeddings and no weights L_TOP.

    Args:
        vector_XND: (..., N, D), any scale; a zero vector has cosine 0 with everything.
        weight_XN: (..., N), clamped to be non-negative; equal weights if None. Their scale does not matter.
        form: See the head of this file.

    Returns:
        A scalar: in [0, 1] for "squared", in [-1, 1] for "signed". 0 where there is no pair.
    """
    unit = F.normalize(vector_XND.float(), dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    other = 1 - torch.eye(count := cosine.shape[-1], device=cosine.device)
    value = (cosine.square() if form == "squared" else cosine) * other
    if weight_XN is None:
        # The number of pairs is not summed: Triton 3.6 cannot compile a sum that depends on no input beside one that does.
        return (value.sum((-1, -2)) / max(count * (count - 1), 1)).mean()
    weight = weight_XN.float().clamp(min=0)
    pair = weight[..., :, None] * weight[..., None, :]
    total = (pair * other).sum((-1, -2))
    return ((pair * value).sum((-1, -2)) / total.clamp(min=torch.finfo(total.dtype).tiny)).mean()


def concept_loss(logit_BM: Tensor, target_BM: Tensor, *, pos_weight_M: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, averaged over the labels that are known.

    Args:
        logit_BM: (B, M) concept logits.
        target_BM: (B, M) in [0, 1]; NaN where unknown: left out of the mean.
        pos_weight_M: (M,) weight of the positive term of each concept.

    Returns:
        A scalar; 0 (with a zero gradient) where no label is known.
    """
    known = ~target_BM.isnan()
    target = torch.where(known, target_BM, 0.0).to(logit_BM.dtype)
    each = F.binary_cross_entropy_with_logits(logit_BM, target, pos_weight=pos_weight_M, reduction="none")
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)
