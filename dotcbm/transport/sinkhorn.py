"""Entropic optimal transport from patches to concepts: the one door to every solver.

B pictures, N patches, M concepts. Balanced transport is DOT-CBM's (9)-(10) (Xie et al., CVPR 2025, arXiv 2505.07209)

    plan = argmin <plan, cost> - eps H(plan),  rows sum to theta, columns to gamma,

and a relaxed side replaces its constraint by relax * KL(side of the plan | marginal), with the entropy taken relative to
theta x gamma (for balanced transport the same problem), as in Chizat et al. 2018 and as POT does by default. relax -> inf is
the balanced problem.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from dotcbm.transport.backend_torch import solve_torch
from dotcbm.transport.plan import TransportPlan, safe_log

__all__ = ["Solver", "TransportPlan", "sinkhorn"]

Solver = Literal["torch", "pot"]

# Sums of up to 1000 float32 masses are off by a few 1e-6; half precision marginals by a few 1e-3.
_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def sinkhorn(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma: Tensor,
    *,
    eps: float,
    max_iter: int = 100,
    tol: float | None = 1e-3,
    solver: Solver = "torch",
    relax_patch: float | None = None,
    relax_concept: float | None = None,
    check: bool = True,
) -> TransportPlan:
    """The entropic plan of every picture, differentiable with respect to cost, theta and gamma.

    The last update is that of the patches: rows meet theta (or, relaxed, their optimality condition) to rounding, and
    `residual_B` is the violation of the columns. Computed in float32 at least, also for half precision and under autocast.
    A patch or concept with a marginal of exactly zero is not there: its row or column of the plan and all its gradients are
    zero. Without `tol` and `check` no step depends on values, so the function can be exported.

    Args:
        cost_BNM: (B, N, M) finite cost; any layout.
        theta_BN: (B, N) or (N,) non-negative patch marginal.
        gamma: (B, M) or (M,) non-negative concept marginal.
        eps: Entropy, > 0, in units of the cost.
        max_iter: Most updates of the two potentials.
        tol: Stop once the residual of every picture is below it; None makes max_iter updates.
        solver: "torch" (ours) or "pot" (Python Optimal Transport, slower, the reference).
        relax_patch: Strength, >= 0, of the Kullback-Leibler penalty that replaces the constraint on the rows; None keeps it. At 0 the
            rows are free, theta is no more than the measure that the entropy is relative to, and the plan is gamma_j
            softmax_i(log theta_i - cost_ij / eps): no solver is asked.
        relax_concept: The same for the columns.
        check: Look at values: reject costs that are not finite and wrong marginals, and warn where tol was not reached.

    Returns:
        Plan, scaled potentials, residual and number of iterations.

    Raises:
        ValueError: Shapes that do not fit, eps, max_iter, tol or relax out of range, and with `check` a NaN or infinite cost,
            negative or NaN marginals, marginals that do not sum to 1 (balanced) or that have no mass (relaxed).
    """
    theta_BN, gamma_BM = _batched(cost_BNM, theta_BN, gamma)
    _check_settings(eps=eps, max_iter=max_iter, tol=tol, relax_patch=relax_patch, relax_concept=relax_concept)
    balanced = relax_patch is None and relax_concept is None
    if check:
        _check_values(cost_BNM, theta_BN, gamma_BM, balanced=balanced)
    dtype = torch.float64 if torch.float64 in (cost_BNM.dtype, theta_BN.dtype, gamma_BM.dtype) else torch.float32
    cost_BNM = cost_BNM.to(dtype)
    theta_BN, gamma_BM = (_widened(mass, dtype, balanced=balanced) for mass in (theta_BN, gamma_BM))

    if solver == "torch":
        solve = solve_torch
    elif solver == "pot":
        from dotcbm.transport.backend_pot import solve_pot as solve
    else:
        raise ValueError(f'solver is {solver!r}; choose "torch" or "pot"')
    device = cost_BNM.device.type
    # Entered only where it changes something: exporters stumble over the context.
    full_precision = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    if relax_patch == 0:
        return _free_patches(cost_BNM, theta_BN, gamma_BM, eps=eps)
    with full_precision:
        result = solve(
            cost_BNM, theta_BN, gamma_BM, eps=eps, max_iter=max_iter, tol=tol, relax_patch=relax_patch, relax_concept=relax_concept
        )
    if check and tol is not None and bool((result.residual_B >= tol).any()):
        warnings.warn(
            f"transport with eps={eps:g} did not reach tol={tol:g} within max_iter={max_iter}; "
            "raise max_iter or eps, or see residual_B for how far each picture is",
            stacklevel=2,
        )
    return result


def _free_patches(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, *, eps: float) -> TransportPlan:
    """The plan whose rows are free: each column is a softmax over the patches that have mass."""
    log_u_BN = torch.where(theta_BN > 0, theta_BN, 1.0).log().masked_fill(theta_BN <= 0, -torch.inf)
    log_v_BM = safe_log(gamma_BM) - (log_u_BN[..., None] - cost_BNM / eps).logsumexp(1)
    log_v_BM = log_v_BM.masked_fill(gamma_BM <= 0, -torch.inf)
    plan_BNM = (log_u_BN[..., None] + log_v_BM[:, None] - cost_BNM / eps).exp()
    return TransportPlan(plan_BNM, log_u_BN, log_v_BM, (plan_BNM.sum(1) - gamma_BM).abs().sum(1).detach(), 0)


def _batched(cost_BNM: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    if cost_BNM.ndim != 3 or 0 in cost_BNM.shape[1:]:
        raise ValueError(f"the cost has shape {tuple(cost_BNM.shape)}; give (B, N, M) with at least one patch and one concept")
    B, N, M = cost_BNM.shape
    sides = []
    for name, mass, count in (("theta", theta, N), ("gamma", gamma, M)):
        # Number of dimensions first: comparing B with N would tie an exported program to B != N.
        fits = mass.shape[0] == count if mass.ndim == 1 else mass.ndim == 2 and mass.shape[1] == count and mass.shape[0] == B
        if not fits:
            raise ValueError(f"{name} has shape {tuple(mass.shape)}; a cost of shape {(B, N, M)} needs ({count},) or ({B}, {count})")
        sides.append(mass.expand(B, count))
    return sides[0], sides[1]


def _check_settings(*, eps: float, max_iter: int, tol: float | None, relax_patch: float | None, relax_concept: float | None) -> None:
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}; it must be positive and finite (0.01 to 0.5 suit a cosine cost)")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}; at least one iteration is needed")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol is {tol}; give a positive number, or None to make all max_iter iterations")
    for name, relax in (("relax_patch", relax_patch), ("relax_concept", relax_concept)):
        if relax is not None and not 0 <= relax < float("inf"):
            raise ValueError(f"{name} is {relax}; it must be finite and not negative, or None for a marginal that is met exactly")
    if relax_concept == 0 or (relax_patch == 0 and relax_concept is not None):
        raise ValueError(f"relax_patch is {relax_patch} and relax_concept {relax_concept}; only the patches can be free, and then alone")


def _check_values(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, *, balanced: bool) -> None:
    bad_B = ~cost_BNM.detach().isfinite().flatten(1).all(1)
    if bad_B.any():
        raise ValueError(f"the cost of picture {_first(bad_B)} of the batch holds NaN or infinite values; look at that picture's features")
    for name, mass in (("theta", theta_BN.detach()), ("gamma", gamma_BM.detach())):
        bad_B = ~((mass >= 0) & mass.isfinite()).all(1)
        if bad_B.any():
            raise ValueError(f"{name} of picture {_first(bad_B)} of the batch holds negative, NaN or infinite values; masses must be >= 0")
        total_B = mass.double().sum(1)
        bad_B = (total_B - 1).abs() > _SUM_TOLERANCE.get(mass.dtype, 1e-4) if balanced else total_B <= 0
        if bad_B.any():
            i = _first(bad_B)
            if balanced:
                message = f"sums to {total_B[i]:.6g}, not 1; divide it by its sum, or relax that side (relax_patch, relax_concept)"
            else:
                message = f"sums to {total_B[i]:.6g}; it must hold some mass"
            raise ValueError(f"{name} of picture {i} of the batch {message}")


def _widened(mass: Tensor, dtype: torch.dtype, *, balanced: bool) -> Tensor:
    if balanced and mass.dtype in (torch.float16, torch.bfloat16):
        # Rounding leaves the two sides with totals that differ by up to 1e-2, which no plan can meet.
        mass = mass.to(dtype)
        return mass / mass.sum(1, keepdim=True)
    return mass.to(dtype)


def _first(bad_B: Tensor) -> int:
    return int(bad_B.nonzero()[0])
