"""Parts of an object, found in the patches of training pictures without part labels.

A part looks alike on all objects, so its patches form a cluster: on birds the best of 12 clusters of patches for each concept, chosen
by key points, points at 80 % of them. Which cluster belongs to which group of concepts ("bill shape") is the question that
class-level labels leave open, because the encoder's last features tell classes apart everywhere on the object. Two things answer it:

- **Details** (`PatchFeatures.detail_BNL`: early stages of the encoder, which see few pixels) know the colour of a wing only where the
  wing is.
- **Unseen classes.** A predictor that must name the wing's colour on classes that it has never seen cannot do so by knowing the
  class. So a cluster is scored for a group by how well the details that it collects predict the group's concepts in
  pictures of held-out classes (ridge regression, AUROC), less what it scores for the average group.

The clusters of a group are weighted by a softmax of the score, and several clusterings stand side by side.

n pictures, N patches, D and L widths of features and details, E of the part space, C parts, G groups, M concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dotcbm.metrics.concepts import concept_auroc
from dotcbm.structures import PatchFeatures
from dotcbm.transport.cost import cosine_cost
from dotcbm.transport.priors import patch_prior, standardise
from dotcbm.transport.sinkhorn import sinkhorn

__all__ = ["Parts", "cluster", "collected_details", "find_parts", "group_shares", "part_plan", "score_parts", "within_class_share"]

_FOREGROUND = 0.3  # deviations of the norm above which a patch takes part in the clustering
_SAMPLE = 30_000  # patches that are clustered
_PASSES = 40  # of k-means
_CHUNK = 64  # pictures whose patches are in memory in full precision
_EPS, _TEMPERATURE = 0.1, 1.0  # of the plans by which parts collect details: wider than those that concepts are read by
_RIDGE = 100.0  # on standardised features; 10 to 100 give the same within the noise
_FOLDS = 10
_SHARE_TEMPERATURE = 0.007  # of the shares, in AUROC; 0.004 to 0.012 give the same within the noise


@dataclass(frozen=True)
class Parts:
    """What was found.

    Attributes:
        centre_D, basis_DE: Part space: (patch - centre) @ basis, compared by cosine.
        part_CE: Unit vectors; those of one clustering lie side by side.
        activity: 0-d, mean absolute value of a foreground patch's features.
        score_GC: How well each part serves each group, in AUROC.
    """

    centre_D: Tensor
    basis_DE: Tensor
    part_CE: Tensor
    activity: Tensor
    score_GC: Tensor


def find_parts(
    patches: PatchFeatures,
    *,
    concept_nM: Tensor,
    label_n: Tensor,
    group_M: Tensor,
    num_parts: int,
    num_clusterings: int,
    part_width: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Parts:
    """See the head of this file.

    Args:
        patches: Of n training pictures, in any precision; computed with where they lie. Without details the patches in part space
            stand in for them, which give parts to groups less well.
        concept_nM: In [0, 1], NaN where unknown.
        label_n: Classes.
        group_M: Group of each concept, from 0.
        num_parts, num_clusterings, part_width: See `dotcbm.models.dot_cbm.DotCBM`.
        seed: Of the clusterings.
        advance: Called after each clustering.

    Raises:
        ValueError: Fewer foreground patches than parts.
    """
    centre_D, basis_DE, activity = _part_space(patches, width=part_width)
    foreground_FE = torch.cat(
        [
            _embedded(part[chosen], centre_D, basis_DE)
            for part, chosen in zip(patches.patch_BND.split(_CHUNK), _foreground(patches).split(_CHUNK), strict=True)
        ]
    )
    if len(foreground_FE) < num_parts:
        raise ValueError(f"{len(foreground_FE)} patches of the training pictures stand out, too few for {num_parts} parts; lower num_parts")
    found = Parts(centre_D, basis_DE, foreground_FE[:0], activity, torch.zeros(0))
    parts, scores = [], []
    for clustering in range(num_clusterings):
        generator = torch.Generator().manual_seed(seed * num_clusterings + clustering)
        chosen_X = torch.randperm(len(foreground_FE), generator=generator)[:_SAMPLE].to(foreground_FE.device)
        part_CE = cluster(foreground_FE[chosen_X], num_parts, generator=generator)
        detail_nCL = collected_details(patches, found, part_CE=part_CE, eps=_EPS, prior=_wide_prior)
        parts.append(part_CE)
        scores.append(score_parts(detail_nCL, concept_nM=concept_nM, label_n=label_n, group_M=group_M))
        advance()
    return Parts(centre_D, basis_DE, torch.cat(parts), activity, torch.cat(scores, 1))


def collected_details(
    patches: PatchFeatures, parts: Parts, *, part_CE: Tensor, eps: float, prior: Callable[[PatchFeatures], Tensor]
) -> Tensor:
    """(n, C, L) the details that each part collects in each picture: their mean over its plan. Without details, those of the patches in
    part space and their squares stand in.

    Args:
        patches: Of n pictures.
        parts: Whose space the parts lie in.
        part_CE: The C parts.
        eps: Of the transport; its patch marginal is free.
        prior: (B, N) theta of some of the pictures.
    """
    collected = []
    for rows in torch.arange(len(patches.patch_BND)).split(_CHUNK):
        chunk = patches.rows(rows)
        embedded_BNE = _embedded(chunk.patch_BND, parts.centre_D, parts.basis_DE)
        plan_BNC = part_plan(embedded_BNE, part_CE, prior(chunk), eps=eps, relax_patch=0.0)[0]
        detail_BNL = chunk.detail_BNL if chunk.detail_BNL is not None else torch.cat([embedded_BNE, embedded_BNE.square()], 2)
        collected.append(plan_BNC.transpose(1, 2) @ detail_BNL.to(plan_BNC.dtype))
    return torch.cat(collected)


def part_plan(
    embedded_BNE: Tensor, part_CE: Tensor, theta_BN: Tensor, *, eps: float, relax_patch: float | None, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """(B, N, C) the transport of patches onto parts at cosine cost, each part's column scaled to sum to 1, and (B,) its residual.

    Args:
        embedded_BNE: Patches in part space.
        part_CE: Parts, all of the same mass.
        theta_BN: (B, N) sums to 1.
        eps, relax_patch, iterations: See `dotcbm.transport.sinkhorn.sinkhorn`.
    """
    num_parts = len(part_CE)
    transport = sinkhorn(
        cosine_cost(embedded_BNE, part_CE),
        theta_BN,
        theta_BN.new_full((num_parts,), 1 / num_parts),
        eps=eps,
        max_iter=iterations,
        tol=None,
        relax_patch=relax_patch,
        check=False,
    )
    return transport.plan_BNM / transport.plan_BNM.sum(1, keepdim=True).clamp(min=1e-12), transport.residual_B


def group_shares(score_GC: Tensor, *, num_clusterings: int) -> Tensor:
    """(G, C) weight of each part for each group, rows summing to 1: a softmax within each clustering, clusterings alike.

    A part that predicts everything well (it collects the whole object) is no part of anything: its mean over the groups is taken off.
    """
    shares = []
    for score_GX in score_GC.chunk(num_clusterings, 1):
        above_GX = score_GX - score_GX.mean(0)
        shares.append((above_GX / _SHARE_TEMPERATURE).softmax(1) / num_clusterings)
    return torch.cat(shares, 1)


def cluster(unit_FE: Tensor, num_parts: int, *, generator: torch.Generator) -> Tensor:
    """(num_parts, E) unit centres of spherical k-means (Dhillon and Modha 2001), started as k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        unit_FE: (F, E) vectors of length 1, at least as many as parts.
        num_parts: How many.
        generator: On the CPU; all that is drawn is drawn there, so that a GPU draws the same.
    """
    first = int(torch.randint(len(unit_FE), (), generator=generator))
    centres_CE = unit_FE[first : first + 1]
    while len(centres_CE) < num_parts:
        away_F = (1 - unit_FE @ centres_CE.T).amin(1).clamp(min=0).cpu().double()
        if not away_F.sum() > 0:  # fewer different patches than parts
            away_F = torch.ones_like(away_F)
        drawn = int(torch.multinomial(away_F, 1, generator=generator))
        centres_CE = torch.cat([centres_CE, unit_FE[drawn : drawn + 1]])
    for _ in range(_PASSES):
        nearest_F = (unit_FE @ centres_CE.T).argmax(1)
        total_CE = _sums_by_centre(unit_FE, nearest_F, num_parts)
        norm_C1 = total_CE.norm(dim=1, keepdim=True)
        centres_CE = torch.where(norm_C1 > 0, total_CE / norm_C1.clamp(min=1e-12), centres_CE)
    return centres_CE


def _sums_by_centre(unit_FE: Tensor, nearest_F: Tensor, num_parts: int) -> Tensor:
    """(num_parts, E) sums of the vectors that have a centre in common, to the same bits in every run.

    CUDA's index_add_ adds in any order: two runs would find parts that differ in the last digits, and end with other weights.
    """
    if unit_FE.device.type == "cuda":
        return F.one_hot(nearest_F, num_parts).to(unit_FE.dtype).T @ unit_FE
    return unit_FE.new_zeros(num_parts, unit_FE.shape[1]).index_add_(0, nearest_F, unit_FE)


def score_parts(detail_nCL: Tensor, *, concept_nM: Tensor, label_n: Tensor, group_M: Tensor) -> Tensor:
    """(G, C) mean AUROC of each group's concepts in held-out classes, predicted from what each part collected; 0.5 where undefined.

    Args:
        detail_nCL: (n, C, L) details, averaged over each part.
        concept_nM: In [0, 1], NaN where unknown; taken as present above 0.5, and as the concept's mean where unknown.
        label_n: Classes. Where concepts vary within classes, folds are of pictures: knowing the class then does not help.
        group_M: Group of each concept.
    """
    device = detail_nCL.device
    known_nM = ~concept_nM.isnan()
    truth_nM = torch.where(known_nM, (concept_nM > 0.5).to(concept_nM.dtype), torch.nan).to(device)
    target_nM = torch.where(known_nM, concept_nM, concept_nM.nanmean(0).nan_to_num(0.0)).to(device, detail_nCL.dtype)
    fold_n = _folds(label_n, varies=bool((within_class_share(concept_nM, label_n) > 1e-9).any())).to(device)
    num_groups = int(group_M.max()) + 1
    if len(fold_n.unique()) == 1:  # nothing can be held out
        return torch.full((num_groups, detail_nCL.shape[1]), 0.5)
    scores = []
    for detail_nL in detail_nCL.unbind(1):
        z_nL = (detail_nL - detail_nL.mean(0)) / (detail_nL.std(0) + 1e-6)
        predicted_nM = torch.zeros_like(target_nM)
        for fold in fold_n.unique():
            held_n = fold_n == fold
            x_XL, y_XM = z_nL[~held_n], target_nM[~held_n]
            x_mean_L, y_mean_M = x_XL.mean(0), y_XM.mean(0)
            x_XL = x_XL - x_mean_L
            gram_LL = x_XL.T @ x_XL + _RIDGE * torch.eye(x_XL.shape[1], dtype=x_XL.dtype, device=device)
            predicted_nM[held_n] = (z_nL[held_n] - x_mean_L) @ torch.linalg.solve(gram_LL, x_XL.T @ (y_XM - y_mean_M)) + y_mean_M
        scores.append(concept_auroc(predicted_nM, truth_nM))
    score_MC = torch.stack(scores, 1)
    member_GM = F.one_hot(group_M, num_groups).T.to(score_MC)
    defined_MC = ~score_MC.isnan()
    total_GC, count_GC = member_GM @ score_MC.nan_to_num(0.0), member_GM @ defined_MC.to(score_MC)
    return torch.where(count_GC > 0, total_GC / count_GC.clamp(min=1), 0.5).cpu()


def _folds(label_n: Tensor, *, varies: bool) -> Tensor:
    """(n,) number of the fold of each picture: of its class, or of itself where concepts vary within classes."""
    generator = torch.Generator().manual_seed(0)
    label_n = label_n.cpu()
    number_n = torch.arange(len(label_n)) if varies else label_n
    order = torch.randperm(int(number_n.max()) + 1, generator=generator)
    return order[number_n] % _FOLDS


def within_class_share(concept_nM: Tensor, label_n: Tensor) -> Tensor:
    """(M,) the share of each concept's variance that lies within classes: 0 for labels of classes, 1 where classes say nothing of it.

    Args:
        concept_nM: In [0, 1], NaN where unknown. Of a concept that does not vary at all the share is 0.
        label_n: Classes.
    """
    within_M = torch.zeros(concept_nM.shape[1], dtype=torch.float64)
    values_nM = concept_nM.double().cpu()
    whole_M = _squares_about_mean(values_nM)
    for label in label_n.unique():
        within_M += _squares_about_mean(values_nM[(label_n == label).cpu()])
    return torch.where(whole_M > 1e-9, within_M / whole_M.clamp(min=1e-9), 0.0).float()


def _squares_about_mean(value_nM: Tensor) -> Tensor:
    return (value_nM - value_nM.nanmean(0)).square().nansum(0)


def _part_space(patches: PatchFeatures, *, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(D,) mean, (D, E) leading directions and 0-d mean absolute value of the foreground patches."""
    foreground_nN = _foreground(patches)
    num_features = patches.patch_BND.shape[2]
    activity = patches.patch_BND.new_zeros((), dtype=torch.float32)
    total_D = patches.patch_BND.new_zeros(num_features, dtype=torch.float32)
    second_DD = patches.patch_BND.new_zeros(num_features, num_features, dtype=torch.float32)
    for part_BND, chosen_BN in zip(patches.patch_BND.split(_CHUNK), foreground_nN.split(_CHUNK), strict=True):
        chosen_XD = part_BND[chosen_BN].float()
        total_D += chosen_XD.sum(0)
        activity += chosen_XD.abs().sum() / num_features
        second_DD += chosen_XD.T @ chosen_XD
    count = foreground_nN.sum().clamp(min=1)
    centre_D = total_D / count
    covariance_DD = (second_DD / count - centre_D[:, None] * centre_D).double().cpu()
    basis_DE = torch.linalg.eigh(covariance_DD).eigenvectors[:, -min(width, num_features) :].to(centre_D)
    return centre_D, basis_DE, activity / count


def _embedded(patch_BND: Tensor, centre_D: Tensor, basis_DE: Tensor) -> Tensor:
    return F.normalize((patch_BND.float() - centre_D) @ basis_DE, dim=-1)


def _foreground(patches: PatchFeatures) -> Tensor:
    """(n, N) bool: patches longer than most of their picture."""
    norm_nN = torch.cat([part.float().norm(dim=2) for part in patches.patch_BND.split(_CHUNK)])
    return standardise(norm_nN) > _FOREGROUND


def _wide_prior(patches: PatchFeatures) -> Tensor:
    return patch_prior("norm", patches, temperature=_TEMPERATURE, smoothing=3)
