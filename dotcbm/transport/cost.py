"""The price of sending a patch to a concept, and the null patch and null concept that take what fits nowhere.

B pictures, N patches, M concepts, D features.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["add_null", "cosine_cost", "cosine_similarity", "strip_null", "unit"]


def cosine_similarity(patch_BND: Tensor, concept_MD: Tensor) -> Tensor:
    """The cosine between every patch and every concept; 0, with a finite gradient, where a vector is zero.

    Computed in float32 at least, also under autocast: a bfloat16 cosine moves the best patch of about 5 % of the concepts.

    Args:
        patch_BND: (B, N, D).
        concept_MD: (M, D).

    Returns:
        (B, N, M) in [-1, 1].

    Raises:
        ValueError: Widths that differ.
    """
    if patch_BND.ndim != 3 or concept_MD.ndim != 2 or patch_BND.shape[2] != concept_MD.shape[1]:
        raise ValueError(
            f"patches of shape {tuple(patch_BND.shape)} and concepts of shape {tuple(concept_MD.shape)} do not meet; "
            "give (B, N, D) and (M, D), adapted to one width D"
        )
    device = patch_BND.device.type
    # Entered only where it changes something: exporters stumble over the context.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        dtype = torch.float64 if torch.float64 in (patch_BND.dtype, concept_MD.dtype) else torch.float32
        return (unit(patch_BND.to(dtype)) @ unit(concept_MD.to(dtype)).T).clamp(-1, 1)


def cosine_cost(patch_BND: Tensor, concept_MD: Tensor) -> Tensor:
    """1 - `cosine_similarity`: (B, N, M) in [0, 2]; 1 where a vector is zero."""
    return 1 - cosine_similarity(patch_BND, concept_MD)


def add_null(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    *,
    null_concept_mass: float,
    null_patch_mass: float,
    null_cost: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append a concept "nothing" (column M) and a patch "nowhere" (row N), so that not every patch needs a concept, nor the reverse.

    Every cell of the new row and column costs `null_cost`, the corner included, as the dustbins of SuperGlue (Sarlin et al.
    2020): matching patch i to concept j and null to null, cost C_ij + null_cost, against leaving both unmatched, 2 null_cost, a
    pair pays where C_ij < null_cost. With only one of the two, balanced plans do not depend on null_cost at all (a constant
    on a column or row never changes them); its mass alone then says how much is taken out.

    Args:
        cost_BNM: (B, N, M).
        theta_BN: (B, N), sums to 1.
        gamma_BM: (B, M) or (M,), sums to 1.
        null_concept_mass: Share of all column mass for the null concept, in [0, 1); 0 appends no column.
        null_patch_mass: Share of all row mass for the null patch, in [0, 1); 0 appends no row.
        null_cost: Cost of the new cells; a scalar tensor may be learned.

    Returns:
        Cost, theta and gamma (B, M') with the null entries; both marginals sum to 1 again. `strip_null` undoes it on the plan.

    Raises:
        ValueError: A mass outside [0, 1), or a null_cost that is no scalar.
    """
    for name, mass in (("null_concept_mass", null_concept_mass), ("null_patch_mass", null_patch_mass)):
        if not 0 <= mass < 1:
            raise ValueError(f"{name} is {mass}; it is a share of the whole mass in [0, 1), and 0 switches it off")
    if isinstance(null_cost, Tensor) and null_cost.numel() != 1:
        raise ValueError(f"null_cost has shape {tuple(null_cost.shape)}; give one number")
    price = torch.as_tensor(null_cost, dtype=cost_BNM.dtype, device=cost_BNM.device).reshape(1, 1, 1)
    B = cost_BNM.shape[0]
    gamma_BM = gamma_BM.expand(B, gamma_BM.shape[-1])
    theta_BN = theta_BN.expand(B, theta_BN.shape[-1])
    if null_concept_mass > 0:
        cost_BNM = torch.cat([cost_BNM, price.expand(B, cost_BNM.shape[1], 1)], dim=2)
        gamma_BM = torch.cat([gamma_BM * (1 - null_concept_mass), gamma_BM.new_full((B, 1), null_concept_mass)], dim=1)
    if null_patch_mass > 0:
        cost_BNM = torch.cat([cost_BNM, price.expand(B, 1, cost_BNM.shape[2])], dim=1)
        theta_BN = torch.cat([theta_BN * (1 - null_patch_mass), theta_BN.new_full((B, 1), null_patch_mass)], dim=1)
    return cost_BNM, theta_BN, gamma_BM


def strip_null(plan_BNM: Tensor, *, num_patches: int, num_concepts: int) -> Tensor:
    """The (B, N, M) part of a plan between real patches and real concepts; its mass is below 1 where nulls took some."""
    return plan_BNM[:, :num_patches, :num_concepts]


def unit(x: Tensor) -> Tensor:
    """Vectors (last dimension) of length 1; a zero vector stays zero and hands its gradient on as it is.

    `torch.nn.functional.normalize` divides by max(norm, 1e-12), whose gradient at a zero vector is 1e12.
    """
    square = x.square().sum(-1, keepdim=True)
    return x * square.where(square > 0, square.new_ones(())).rsqrt()
