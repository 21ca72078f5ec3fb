"""How much mass each patch and each concept has before anything is transported.

B pictures, N patches, M concepts, K classes, D features. The paper is DOT-CBM (Xie et al., CVPR 2025, arXiv 2505.07209).
Departures: saliencies are standardised, because raw dot products saturate the softmax (4) and raw cosines leave it flat;
gamma (18) as printed sums to M - 1, so it is renormalised, which leaves it nearly uniform.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dotcbm.structures import ConceptSet, PatchFeatures
from dotcbm.transport.cost import unit

__all__ = [
    "ConceptPrior",
    "PatchPrior",
    "concept_prior",
    "core_prior",
    "map_to_grid",
    "neighbour_mean",
    "patch_prior",
    "perplexity",
    "standardise",
]

PatchPrior = Literal["dot", "cosine", "norm", "uniform", "external", "border"]
ConceptPrior = Literal["eq18", "figure2", "uniform"]


def patch_prior(
    kind: PatchPrior,
    features: PatchFeatures,
    *,
    temperature: float,
    smoothing: int = 1,
    external_BN: Tensor | None = None,
) -> Tensor:
    """The patch marginal theta = softmax(S / temperature), for a saliency S.

    S is by kind
        dot       <g, p_i>, the paper's (4), raw: its scale is the encoder's
        cosine    cos(g, p_i)
        norm      |p_i|
        uniform   constant
        external  `external_BN`: a saliency map or mask, averaged onto the grid (`map_to_grid`)
        border    1 - the mean cosine of p_i to the patches at the picture's border, the boundary prior of Wei et al.
                  2012 ("Geodesic saliency using background priors"): what looks like the border is background
    and, except for "dot", standardised in each picture to zero mean and unit deviation (a constant map gives zeros).

    Args:
        kind: Which saliency.
        features: Patches and global token of the batch.
        temperature: > 0; in deviations of S, except for "dot".
        smoothing: Side, odd, of the square of patches over which S is averaged first (`neighbour_mean`); 1 for no averaging.
        external_BN: (B, N) saliency, used by and needed for "external" alone.

    Returns:
        (B, N) theta, float32 at least, sums to 1.

    Raises:
        ValueError: A global token of another width than the patches for "dot" and "cosine", a missing, superfluous or
            misshapen external map, temperature or smoothing out of range, an unknown kind.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if (external_BN is not None) != (kind == "external"):
        given = "was given" if external_BN is not None else "is missing"
        raise ValueError(f'external_BN {given} with the patch prior {kind!r}; it goes with "external" and only there')
    saliency_BN = neighbour_mean(_saliency(kind, features, external_BN), features.grid, side=smoothing)
    if kind != "dot":
        saliency_BN = standardise(saliency_BN)
    return torch.softmax(saliency_BN / temperature, dim=-1)


def core_prior(features: PatchFeatures, *, core: float | Tensor, softness: float, smoothing: int = 3) -> Tensor:
    """The patch marginal that is even over the core of what stands out: theta ~ sigmoid((S / max S - core) / edge), S the norms of the
    patches, averaged over neighbours (`neighbour_mean`) and standardised in each picture.

    Unlike a softmax of S it does not prefer one place of the core to another: where in it to look is left to the transport.

    Args:
        features: Of the batch.
        core: Share of the way from a picture's mean to its maximum from which a patch belongs to the core, below 1; a 0-d tensor is not
            checked.
        softness: Of the edge, > 0, as a share of what lies above it: edge = softness (1 - core). A wide core has a soft edge.
        smoothing: Side, odd, of the square of patches over which norms are averaged.

    Returns:
        (B, N) theta, float32 at least, sums to 1; even over all patches where nothing stands out.

    Raises:
        ValueError: core, softness or smoothing out of range.
    """
    if not isinstance(core, Tensor) and not core < 1:
        raise ValueError(f"core is {core}; at 1 and above no patch belongs to it")
    if not softness > 0:
        raise ValueError(f"softness is {softness}; it must be positive")
    saliency_BN = standardise(neighbour_mean(_saliency("norm", features, None), features.grid, side=smoothing))
    highest_B1 = saliency_BN.amax(-1, keepdim=True)
    share_BN = saliency_BN / highest_B1.where(highest_B1 > 0, 1.0)
    return F.logsigmoid((share_BN - core) / (softness * (1 - core))).softmax(-1)


def concept_prior(
    kind: ConceptPrior,
    concepts: ConceptSet,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The concept marginal gamma from the classes' concepts L.

    With r_i = sum_j sum_k L_ki L_kj / sum_k L_ki, how much company concept i keeps (17):
        eq18       (1 - softmax(r / temperature)) / (M - 1), the paper's (18) renormalised
        figure2    softmax(-r / temperature) with r standardised, after the paper's Figure 2
        uniform    1 / M
    Unknown (NaN) entries of L are left out pair by pair; a concept nobody knows anything about counts as average.

    Args:
        kind: Which prior.
        concepts: M concepts with their class-concept matrix.
        temperature: > 0.

    Returns:
        (M,) float32 gamma, sums to 1.

    Raises:
        ValueError: temperature out of range, an unknown kind.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    M = concepts.num_concepts
    # float64: with hundreds of concepts (18) differs from uniform in the fourth digit.
    L_KM = concepts.class_concept_KM.detach().double()
    if kind == "uniform":
        gamma_M = torch.full((M,), 1 / M, dtype=torch.float64, device=L_KM.device)
    elif kind == "eq18":
        gamma_M = 1 - torch.softmax(_company(L_KM) / temperature, dim=0) if M > 1 else torch.ones_like(L_KM[0])
    elif kind == "figure2":
        gamma_M = torch.softmax(-standardise(_company(L_KM)) / temperature, dim=0)
    else:
        raise ValueError(f"the concept prior is {kind!r}; choose eq18, figure2 or uniform")
    return (gamma_M / gamma_M.sum()).float()


def perplexity(p: Tensor) -> Tensor:
    """exp of the entropy over the last dimension: how many entries a distribution effectively uses, 1 to its length."""
    return (-torch.xlogy(p, p).sum(-1)).exp()


def map_to_grid(map_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean of a map or mask over the area of each patch.

    Args:
        map_BHW: (B, H, W) any real or bool map.
        grid: (grid_h, grid_w); where it does not divide (H, W), patches share the pixels on their seams.

    Returns:
        (B, N) float32 at least.

    Raises:
        ValueError: A map that is not (B, H, W).
    """
    if map_BHW.ndim != 3:
        raise ValueError(f"the map has shape {tuple(map_BHW.shape)}; give (B, H, W)")
    values = map_BHW if map_BHW.dtype == torch.float64 else map_BHW.float()
    return F.adaptive_avg_pool2d(values.unsqueeze(1), grid).flatten(1)


def neighbour_mean(map_BN: Tensor, grid: tuple[int, int], *, side: int) -> Tensor:
    """(B, N) the mean over a square of patches around each; at the grid's edges over those that exist.

    Raises:
        ValueError: A side that is even or below 1, or a map that does not fit the grid.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"a square of {side} patches a side has no patch in its middle; give 1, 3, 5, ...")
    if map_BN.ndim != 2 or map_BN.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"the map has shape {tuple(map_BN.shape)}; a grid of {grid[0]} x {grid[1]} needs (B, {grid[0] * grid[1]})")
    if side == 1:
        return map_BN
    map_B1hw = map_BN.unflatten(1, grid).unsqueeze(1)
    return F.avg_pool2d(map_B1hw, side, stride=1, padding=side // 2, count_include_pad=False).flatten(1)


def _saliency(kind: PatchPrior, features: PatchFeatures, external_BN: Tensor | None) -> Tensor:
    patch_BND, global_BD = _at_least_float32(features.patch_BND), _at_least_float32(features.global_BD)
    B, N, D = patch_BND.shape
    if kind in ("dot", "cosine"):
        if global_BD.shape[-1] != D:
            raise ValueError(
                f"the patch prior {kind!r} compares patches of width {D} with a global token of width {global_BD.shape[-1]}; "
                'choose "norm" or "border", or an encoder whose widths agree'
            )
        if kind == "cosine":
            patch_BND, global_BD = unit(patch_BND), unit(global_BD)
        return (patch_BND * global_BD.unsqueeze(1)).sum(-1)
    if kind == "norm":
        return patch_BND.norm(dim=-1)
    if kind == "uniform":
        return patch_BND.new_zeros(B, N)
    if kind == "external":
        if external_BN is None or tuple(external_BN.shape) != (B, N):
            shape = None if external_BN is None else tuple(external_BN.shape)
            raise ValueError(f"the external map has shape {shape}; these features need {(B, N)} (see map_to_grid)")
        return _at_least_float32(external_BN)
    if kind == "border":
        return _unlike_border(unit(patch_BND), features.grid)
    raise ValueError(f"the patch prior is {kind!r}; choose dot, cosine, norm, uniform, external or border")


def _unlike_border(unit_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    border = torch.zeros(grid, dtype=unit_BND.dtype, device=unit_BND.device)
    border[[0, -1], :] = 1
    border[:, [0, -1]] = 1
    border_N = border.flatten()
    total_BD = (unit_BND * border_N.unsqueeze(1)).sum(1)
    # A border patch is compared with the others: its cosine of 1 with itself says nothing.
    own_BN = border_N * unit_BND.square().sum(-1)
    similar_BN = (unit_BND * total_BD.unsqueeze(1)).sum(-1) - own_BN
    # The 1 of "1 - cosine" is lost in standardising; here it would only hide from it how large the rounding is.
    return -similar_BN / (border_N.sum() - border_N).clamp_min(1)


def standardise(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the last dimension; zeros where nothing varies."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    # Rounding leaves a constant map with a deviation of a few ulps, which must not be blown up to 1.
    ulps = 16 * torch.finfo(x.dtype).eps * x.detach().abs().amax(-1, keepdim=True)
    varies = variance > ulps.square()
    return centred * varies * variance.where(varies, variance.new_ones(())).rsqrt()


def _company(L_KM: Tensor) -> Tensor:
    known_KM = (~L_KM.isnan()).double()
    L_KM = L_KM.nan_to_num(0.0)
    both_MM = known_KM.T @ known_KM > 0
    together_MM = L_KM.T @ L_KM
    alone_MM = L_KM.T @ known_KM  # sum of L_ki over the classes where concept j is known as well
    share_MM = together_MM / alone_MM.where(alone_MM > 0, 1.0)  # a concept that no class shows keeps no company: 0
    num_known_M = both_MM.sum(1)
    M = L_KM.shape[1]
    r_M = M * (share_MM * both_MM).sum(1) / num_known_M.clamp_min(1)
    some_M = num_known_M > 0
    average = r_M[some_M].mean() if some_M.any() else r_M.new_zeros(())
    return r_M.where(some_M, average)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
