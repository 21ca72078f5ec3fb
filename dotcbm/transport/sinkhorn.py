"""Entropic optimal transport from patches to concepts: the one door to every solver.

B pictures, N patches, M concepts. Balanced transport is DOT-CBM's (9)-(10) (Xie et al., CVPR 2025, arXiv 2505.07209)

    plan = argmin <plan, cost> - eps H(plan),  rows sum to theta, columns to gamma,

and a relaxed side replaces its constraint by relax * KL(side of the plan | marginal), with the entropy taken relative to
theta x gamma (for balanced transport the same problem), as in Chizat et al. 2018 and as POT does by default. relax -> inf is
the balanced problem.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from dotcbm.transport.backend_torch import solve_torch
from dotcbm.transport.implicit import attach_gradient
from dotcbm.transport.plan import TransportPlan, safe_log
from dotcbm.transport.unrolled import solve_unrolled

__all__ = ["Gradient", "Solver", "TransportPlan", "sinkhorn"]

Solver = Literal["auto", "torch", "triton", "pot"]
Gradient = Literal["implicit", "unroll"]

# Residual from which on the implicit formula is not trusted; at it gradients are off by a few per cent.
_CONVERGED = 1e-2

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
    solver: Solver = "auto",
    gradient: Gradient = "implicit",
    accelerate: bool = True,
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
    chosen = _chosen(solver, cost_BNM)
    dtype = torch.float64 if torch.float64 in (cost_BNM.dtype, theta_BN.dtype, gamma_BM.dtype) else torch.float32
    if chosen != "triton":  # which reads half precision as it is
        cost_BNM = cost_BNM.to(dtype)
    theta_BN, gamma_BM = (_widened(mass, dtype, balanced=balanced) for mass in (theta_BN, gamma_BM))
    device = cost_BNM.device.type
    # Entered only where it changes something: exporters stumble over the context.
    full_precision = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    if relax_patch == 0:
        return _free_patches(cost_BNM, theta_BN, gamma_BM, eps=eps)
    with full_precision:
        result = _solve(
            cost_BNM,
            theta_BN,
            gamma_BM,
            solver=chosen,
            gradient=gradient,
            eps=eps,
            max_iter=max_iter,
            tol=tol,
            relax_patch=relax_patch,
            relax_concept=relax_concept,
            accelerate=accelerate,
            check=check,
        )
    if check and tol is not None and bool((result.residual_B >= tol).any()):
        warnings.warn(
            f"transport with eps={eps:g} did not reach tol={tol:g} within max_iter={max_iter}; "
            "raise max_iter or eps, or see residual_B for how far each picture is",
            stacklevel=2,
        )
    return result


def _chosen(solver: Solver, cost_BNM: Tensor) -> Solver:
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; choose one of {list(get_args(Solver))}")
    if solver == "auto":
        wanted = cost_BNM.device.type == "cuda" and cost_BNM.dtype != torch.float64 and find_spec("triton") is not None
        return "triton" if wanted else "torch"
    if solver == "triton":
        if find_spec("triton") is None:
            raise ValueError('solver is "triton", which is not installed; choose "auto" or "torch"')
        if cost_BNM.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            raise ValueError(f'solver is "triton", which runs on CUDA, and the cost is on {cost_BNM.device}; choose "auto" or "torch"')
        if cost_BNM.dtype == torch.float64:
            raise ValueError('solver is "triton", which computes in float32, and the cost is in float64; choose "auto" or "torch"')
    return solver


def _solve(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    *,
    solver: Solver,
    gradient: Gradient,
    eps: float,
    max_iter: int,
    tol: float | None,
    relax_patch: float | None,
    relax_concept: float | None,
    accelerate: bool,
    check: bool,
) -> TransportPlan:
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (cost_BNM, theta_BN, gamma_BM))
    settings = {"eps": eps, "max_iter": max_iter, "tol": tol, "relax_patch": relax_patch, "relax_concept": relax_concept}
    unrolled = _pot() if solver == "pot" else solve_unrolled
    traced = torch.compiler.is_exporting() if solver == "triton" else torch.compiler.is_compiling()
    if traced or (differentiate and gradient == "unroll"):
        return unrolled(cost_BNM, theta_BN, gamma_BM, **settings)
    accelerate = accelerate and tol is not None
    if solver == "triton":
        found = _triton()(cost_BNM, theta_BN, gamma_BM, **settings, accelerate=accelerate)
        # Looking at the residual waits for the device.
        return found if not (differentiate and check) or _trusted(found, eps=eps) else unrolled(cost_BNM, theta_BN, gamma_BM, **settings)
    with torch.no_grad():
        inputs = [x.detach() for x in (cost_BNM, theta_BN, gamma_BM)]
        found = unrolled(*inputs, **settings) if solver == "pot" else solve_torch(*inputs, **settings, accelerate=accelerate)
    if not differentiate:
        return found
    if not _trusted(found, eps=eps):
        return unrolled(cost_BNM, theta_BN, gamma_BM, **settings)
    plan_BNM = attach_gradient(cost_BNM, theta_BN, gamma_BM, found, eps=eps, relax_patch=relax_patch, relax_concept=relax_concept)
    return replace(found, plan_BNM=plan_BNM)


def _trusted(found: TransportPlan, *, eps: float) -> bool:
    """Whether the implicit formula holds there; says so if not."""
    if not bool((found.residual_B > _CONVERGED).any()):
        return True
    warnings.warn(
        f"transport with eps={eps:g} left a residual of {float(found.residual_B.max()):.2g} after {found.num_iter} iterations, too "
        "much for implicit gradients: its iterations are unrolled, which takes more time and memory; raise max_iter or eps",
        stacklevel=4,
    )
    return False


def _triton() -> Callable[..., TransportPlan]:
    from dotcbm.transport.backend_triton import solve_triton

    return solve_triton


def _pot() -> Callable[..., TransportPlan]:
    from dotcbm.transport.backend_pot import solve_pot

    return solve_pot


def _free_patches(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, *, eps: float) -> TransportPlan:
    """The plan whose rows are free: each column is a softmax over the patches that have mass."""
    log_u_BN = torch.where(theta_BN > 0, theta_BN, 1.0).log().masked_fill(theta_BN <= 0, -torch.inf)
    log_v_BM = safe_log(gamma_BM) - (log_u_BN[..., None] - cost_BNM / eps).logsumexp(1)
    log_v_BM = log_v_BM.masked_fill(gamma_BM <= 0, -torch.inf)
    plan_BNM = (log_u_BN[..., None] + log_v_BM[:, None] - cost_BNM / eps).exp()
    return TransportPlan(
        plan_BNM,
        log_u_BN,
        log_v_BM,
        (plan_BNM.sum(1) - gamma_BM).abs().sum(1).detach(),
        torch.zeros_like(log_v_BM[:, 0], dtype=torch.int32),
    )


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
    # One pass; only where a sum is not finite is it worth three to see whether an element is the reason.
    bad_B = ~cost_BNM.detach().sum((1, 2), dtype=torch.promote_types(cost_BNM.dtype, torch.float32)).isfinite()
    if bad_B.any():
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
