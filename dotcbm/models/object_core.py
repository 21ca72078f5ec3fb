"""How far the object's core reaches, chosen on the training pictures without a mask.

The norms of an encoder's features rise over the object, on one data set to a plateau and on another to a few peaks: no cut is right for
both. A narrow core keeps to what is surely object, and off the background; too narrow a one leaves parts out, and what is said of them
can no longer be predicted. That is measured as the parts are (`dotcbm.models.parts.score_parts`): by how well the details that each
group's parts collect within a core predict the group's concepts in held-out classes. Of all cores, the narrowest is taken that predicts
hardly worse than the best one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dotcbm.models.parts import Parts, collected_details, group_shares, score_parts
from dotcbm.structures import PatchFeatures
from dotcbm.transport.priors import core_prior

__all__ = ["CORES", "choose_core", "core_scores"]

CORES = (0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.0)
"""From narrow to wide; 0 is all patches above the mean of their picture. 0.9 was best on none of three data sets."""


def choose_core(score_R: Tensor, *, tolerance: float) -> float:
    """The narrowest of `CORES` whose score is at most `tolerance` below the best; the widest where the best is no further above chance.

    Args:
        score_R: (R,) of `core_scores`.
        tolerance: In AUROC.
    """
    if not score_R.max() > 0.5 + tolerance:
        return CORES[-1]
    return CORES[int((score_R >= score_R.max() - tolerance).nonzero()[0])]


def core_scores(
    patches: PatchFeatures,
    parts: Parts,
    *,
    concept_nM: Tensor,
    label_n: Tensor,
    group_M: Tensor,
    num_parts: int,
    eps: float,
    softness: float,
    smoothing: int,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """(R,) mean over the groups of the AUROC of their parts, for each of `CORES`. The parts are those of the first clustering.

    Args:
        patches: See `dotcbm.models.parts.find_parts`; so are concept_nM, label_n and group_M.
        parts: What was found there.
        num_parts: Parts of one clustering.
        eps, softness, smoothing: Of the transport and the prior that concepts will be read by (`dotcbm.models.dot_cbm.DotCBM`).
        advance: Called after each core.
    """
    share_GC = group_shares(parts.score_GC[:, :num_parts], num_clusterings=1)
    scores = []
    for core in CORES:
        detail_nCL = collected_details(
            patches,
            parts,
            part_CE=parts.part_CE[:num_parts],
            eps=eps,
            prior=lambda chunk, core=core: core_prior(chunk, core=core, softness=softness, smoothing=smoothing),
        )
        score_GC = score_parts(detail_nCL, concept_nM=concept_nM, label_n=label_n, group_M=group_M)
        scores.append((score_GC * share_GC).sum(1).mean())
        advance()
    return torch.stack(scores)
