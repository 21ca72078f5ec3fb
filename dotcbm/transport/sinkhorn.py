"""Entropic optimal transport from patches to concepts: the one door to every solver.

B pictures, N patches, M concepts. Balanced transport is DOT-CBM's (9)-(10) (Xie et al., CVPR 2025, arXiv 2505.07209)

    plan = argmin <plan, cost> - eps H(plan),  rows sum to theta, columns to gamma,

and a relaxed side replaces its constraint by relax * KL(side of the plan | marginal), with the entropy taken relative to
theta x gamma (for balanced transport the same problem), as in Chizat et al. 2018 and as POT does by default. relax -> inf is
the balanced problem.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from dotcbm.tracing import exporting
from dotcbm.transport.backend_torch import solve_torch
from dotcbm.transport.exported import solve_exported
from dotcbm.transport.heatmap_statistics import HeatmapStatistics, statistics_of_plan
from dotcbm.transport.implicit import attach_gradient
from dotcbm.transport.plan import Extent, Settings, TransportPlan, safe_log
from dotcbm.transport.unrolled import solve_unrolled

__all__ = ["ConceptScores", "Gradient", "HeatmapStatistics", "Solver", "TransportPlan", "concept_scores", "sinkhorn", "solved_eagerly"]

Solver = Literal["auto", "torch", "triton", "pot"]
Gradient = Literal["implicit", "unroll"]

_HAS_TRITON = find_spec("triton") is not None
_MOST_IN_TRITON = 1024  # concepts; a program keeps a row of the cost in registers

# Residual from which on the implicit formula is not trusted; at it gradients are off by a few per cent.
_CONVERGED = 1e-2

# Sums of up to 1000 float32 masses are off by a few 1e-6; half precision marginals by a few 1e-3.
_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class ConceptScores(NamedTuple):
    """What `concept_scores` returns.

    Attributes:
        score_BM: (B, M) sums over patches of plan * (1 - cost).
        residual_B: (B,) as in `TransportPlan`.
        statistics: Where each concept's mass lies, if that was asked for.
    """

    score_BM: Tensor
    residual_B: Tensor
    statistics: HeatmapStatistics | None


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
    `residual_B` is the violation of the columns. With the solver "pot" it is that of the concepts, rows are as far off as it stopped,
    and `residual_B` is the violation of both. Computed in float32 at least, also for half precision and under autocast.
    A patch or concept with a marginal of exactly zero is not there: its row or column of the plan and all its gradients are
    zero.

    In an exported program (`torch.export` that is not strict, `torch.onnx`) a loop does what the solver "torch" does, without gradients.
    With the solver "pot", the gradient "unroll" or under strict export a program makes `max_iter` plain iterations, as does a function
    under torch.compile, but for Triton, and but for `solved_eagerly`.

    Args:
        cost_BNM: (B, N, M) finite cost; any layout.
        theta_BN: (B, N) or (N,) non-negative patch marginal.
        gamma: (B, M) or (M,) non-negative concept marginal.
        eps: Entropy, > 0, in units of the cost.
        max_iter: Most updates of the two potentials.
        tol: Each picture stops once its residual is below it; None makes max_iter plain iterations.
        solver: "torch", "triton" (CUDA, float32), "pot" (Python Optimal Transport, slower, the reference), or "auto": Triton where it
            runs, else torch.
        gradient: "implicit" differentiates the fixed point, in memory that does not grow with the iterations, and falls back to
            "unroll" with a warning where the residual is above 0.01 (with Triton only under `check`, as looking waits for the device).
            Potentials have gradients only where unrolled.
        accelerate: Extrapolate the concepts' potential where the plain iteration is slow; without effect where tol is None.
        relax_patch: Strength, >= 0, of the Kullback-Leibler penalty that replaces the constraint on the rows; None keeps it. At 0 the
            rows are free, theta is no more than the measure that the entropy is relative to, and the plan is gamma_j
            softmax_i(log theta_i - cost_ij / eps): no solver is asked.
        relax_concept: The same for the columns.
        check: Look at values: reject costs that are not finite and wrong marginals, and warn where tol was not reached. On CUDA every look
            waits for the device.

    Returns:
        Plan, scaled potentials, residual and number of iterations.

    Raises:
        ValueError: Shapes that do not fit, eps, max_iter, tol or relax out of range, and with `check` a NaN or infinite cost,
            negative or NaN marginals, marginals that do not sum to 1 (balanced) or that have no mass (relaxed).
    """
    chosen, extent, cost_BNM, theta_BN, gamma_BM = _prepared(
        cost_BNM, theta_BN, gamma, eps=eps, max_iter=max_iter, tol=tol, solver=solver, relax=(relax_patch, relax_concept), check=check
    )
    if relax_patch == 0:
        return _free_patches(cost_BNM, theta_BN, gamma_BM, eps=eps)
    settings = Settings(eps, max_iter, tol, relax_patch, relax_concept)
    with _full_precision(cost_BNM.device.type):
        result = _solve(
            cost_BNM,
            theta_BN,
            gamma_BM,
            settings,
            solver=chosen,
            gradient=gradient,
            accelerate=accelerate,
            check=check,
            extent=extent,
        )
    if check and tol is not None:
        _warn_of_residual(result.residual_B, eps=eps, tol=tol, max_iter=max_iter)
    return result


def concept_scores(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma: Tensor,
    *,
    eps: float,
    max_iter: int = 100,
    tol: float | None = 1e-3,
    solver: Solver = "auto",
    relax_patch: float | None = None,
    relax_concept: float | None = None,
    statistics: bool = False,
    check: bool = True,
) -> ConceptScores:
    """What a cosine readout needs in training: (B, M) sum_i plan_ij (1 - cost_ij), differentiable.

    With Triton the plan is never written, forward or backward; with other solvers this is `sinkhorn` and the sum. Gradients are
    implicit. Arguments and errors are those of `sinkhorn`, but for

    Args:
        statistics: Say too where each concept's mass lies.
    """
    chosen, _, prepared, theta_BN, gamma_BM = _prepared(
        cost_BNM, theta_BN, gamma, eps=eps, max_iter=max_iter, tol=tol, solver=solver, relax=(relax_patch, relax_concept), check=check
    )
    settings = Settings(eps, max_iter, tol, relax_patch, relax_concept)
    if chosen != "triton" or relax_patch == 0 or exporting():
        found = sinkhorn(prepared, theta_BN, gamma_BM, solver=chosen, check=False, **settings._asdict())
        score_BM, residual_B = (found.plan_BNM * (1 - prepared)).sum(1), found.residual_B
        told = statistics_of_plan(found.plan_BNM) if statistics else None
    else:
        from dotcbm.transport.backend_triton import scores_triton

        with _full_precision(cost_BNM.device.type):
            score_BM, residual_B, told = scores_triton(
                prepared, theta_BN, gamma_BM, settings, accelerate=tol is not None, statistics=statistics
            )
    if check and tol is not None:
        _warn_of_residual(residual_B, eps=eps, tol=tol, max_iter=max_iter)
    return ConceptScores(score_BM, residual_B, told)


# torch.compile guards a program by the first, as a bool; by the second, which would do alone, it does not.
_leaves_solvers = False
_untraced: Callable[..., TransportPlan] | None = None


@contextmanager
def solved_eagerly() -> Iterator[None]:
    """Within the block a function under torch.compile leaves the solvers but Triton's to Python, and is traced before and after them.

    Its plans and gradients are then those of eager code: traced, `sinkhorn` stops at no tolerance and differentiates its iterations.
    Not for export, nor for functions that must be one graph.
    """
    global _leaves_solvers, _untraced
    if _untraced is None:  # once, and not on import, which would take a second more
        _untraced = cast(Callable[..., TransportPlan], torch.compiler.disable(_solve))
    before, _leaves_solvers = _leaves_solvers, True
    try:
        yield
    finally:
        _leaves_solvers = before


def _prepared(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma: Tensor,
    *,
    eps: float,
    max_iter: int,
    tol: float | None,
    solver: Solver,
    relax: tuple[float | None, float | None],
    check: bool,
) -> tuple[Solver, Extent | None, Tensor, Tensor, Tensor]:
    """The solver to take, and what it takes: checked, batched, in one floating type (for Triton, a cost in half precision stays)."""
    theta_BN, gamma_BM = _batched(cost_BNM, theta_BN, gamma)
    _check_settings(eps=eps, max_iter=max_iter, tol=tol, relax_patch=relax[0], relax_concept=relax[1])
    balanced = relax == (None, None)
    extent = _check_values(cost_BNM, theta_BN, gamma_BM, balanced=balanced) if check else None
    chosen = _chosen(solver, cost_BNM)
    dtype = torch.float64 if torch.float64 in (cost_BNM.dtype, theta_BN.dtype, gamma_BM.dtype) else torch.float32
    if chosen != "triton" or relax[0] == 0:
        cost_BNM = cost_BNM.to(dtype)
    theta_BN, gamma_BM = (_widened(mass, dtype, balanced=balanced) for mass in (theta_BN, gamma_BM))
    return chosen, extent, cost_BNM, theta_BN, gamma_BM


def _full_precision(device: str) -> AbstractContextManager[object]:
    # Entered only where it changes something: exporters stumble over the context.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _warn_of_residual(residual_B: Tensor, *, eps: float, tol: float, max_iter: int) -> None:
    if bool((residual_B >= tol).any()):
        warnings.warn(
            f"transport with eps={eps:g} did not reach tol={tol:g} within max_iter={max_iter}; "
            "raise max_iter or eps, or see residual_B for how far each picture is",
            stacklevel=3,
        )


def _chosen(solver: Solver, cost_BNM: Tensor) -> Solver:
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; choose one of {list(get_args(Solver))}")
    if solver == "auto":
        suits = cost_BNM.dtype != torch.float64 and cost_BNM.shape[2] <= _MOST_IN_TRITON
        return "triton" if cost_BNM.device.type == "cuda" and suits and _HAS_TRITON else "torch"
    if solver == "triton":
        if not _HAS_TRITON:
            raise ValueError('solver is "triton", which is not installed; choose "auto" or "torch"')
        if cost_BNM.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            raise ValueError(f'solver is "triton", which runs on CUDA, and the cost is on {cost_BNM.device}; choose "auto" or "torch"')
        if cost_BNM.dtype == torch.float64:
            raise ValueError('solver is "triton", which computes in float32, and the cost is in float64; choose "auto" or "torch"')
        if cost_BNM.shape[2] > _MOST_IN_TRITON:
            raise ValueError(
                f'solver is "triton", which takes up to {_MOST_IN_TRITON} concepts, and there are {cost_BNM.shape[2]}; choose "torch"'
            )
    return solver


def _solve(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    settings: Settings,
    *,
    solver: Solver,
    gradient: Gradient,
    accelerate: bool,
    check: bool,
    extent: Extent | None,
) -> TransportPlan:
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (cost_BNM, theta_BN, gamma_BM))
    accelerate = accelerate and settings.tol is not None
    if exporting() and settings.tol is not None and solver != "pot" and gradient == "implicit":
        with torch.no_grad():
            cost, theta, gamma = cost_BNM.detach().to(theta_BN.dtype), theta_BN.detach(), gamma_BM.detach()
            return solve_exported(cost, theta, gamma, settings, tol=settings.tol, accelerate=accelerate)
    if _leaves_solvers and _untraced is not None and solver != "triton" and torch.compiler.is_compiling():
        settled = {"solver": solver, "gradient": gradient, "accelerate": accelerate, "check": check, "extent": extent}
        return _untraced(cost_BNM, theta_BN, gamma_BM, settings, **settled)
    if exporting() if solver == "triton" else torch.compiler.is_compiling():
        # Unrolled, a traced program cannot look at values.
        return solve_unrolled(cost_BNM.to(theta_BN.dtype), theta_BN, gamma_BM, settings._replace(tol=None))
    if differentiate and gradient == "unroll":
        return _unrolled(cost_BNM, theta_BN, gamma_BM, settings, solver=solver)
    if solver == "triton":
        from dotcbm.transport.backend_triton import solve_triton

        found = solve_triton(cost_BNM, theta_BN, gamma_BM, settings, accelerate=accelerate)
        # Looking at the residual waits for the device.
        trusted = not (differentiate and check) or _trusted(found, settings)
        return found if trusted else _unrolled(cost_BNM, theta_BN, gamma_BM, settings, solver=solver)
    with torch.no_grad():
        cost, theta, gamma = cost_BNM.detach(), theta_BN.detach(), gamma_BM.detach()
        if solver == "torch":
            found = solve_torch(cost, theta, gamma, settings, accelerate=accelerate, extent=extent)
        else:
            found = _unrolled(cost, theta, gamma, settings, solver=solver)
    if not differentiate:
        return found
    if not _trusted(found, settings):
        return _unrolled(cost_BNM, theta_BN, gamma_BM, settings, solver=solver)
    return replace(found, plan_BNM=attach_gradient(cost_BNM, theta_BN, gamma_BM, found, settings))


def _unrolled(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings, *, solver: Solver) -> TransportPlan:
    if solver == "pot":
        from dotcbm.transport.backend_pot import solve_pot

        return solve_pot(cost_BNM, theta_BN, gamma_BM, settings)
    return solve_unrolled(cost_BNM.to(theta_BN.dtype), theta_BN, gamma_BM, settings)


def _trusted(found: TransportPlan, settings: Settings) -> bool:
    """Whether the implicit formula holds there; says so if not."""
    if not bool((found.residual_B > _CONVERGED).any()):
        return True
    # The same words each time, so that Python says it once.
    warnings.warn(
        f"transport with eps={settings.eps:g} left a residual above {_CONVERGED:g} within max_iter={settings.max_iter}, too "
        "much for implicit gradients: "
        "its iterations are unrolled, which takes more time and memory; raise max_iter or eps",
        stacklevel=4,
    )
    return False


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
        sides.append(mass if mass.ndim == 2 else mass.expand(B, count))
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


def _check_values(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, *, balanced: bool) -> Extent:
    """The least and the largest cost."""
    # One pass, as either is NaN where an element is; only then is it worth another to see whose.
    least, most = torch.stack(cost_BNM.detach().aminmax()).tolist() if len(cost_BNM) else (0.0, 0.0)
    if not (math.isfinite(least) and math.isfinite(most)):
        bad_B = ~cost_BNM.detach().isfinite().flatten(1).all(1)
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
    return least, most


def _widened(mass: Tensor, dtype: torch.dtype, *, balanced: bool) -> Tensor:
    if balanced and mass.dtype in (torch.float16, torch.bfloat16):
        # Rounding leaves the two sides with totals that differ by up to 1e-2, which no plan can meet.
        mass = mass.to(dtype)
        return mass / mass.sum(1, keepdim=True)
    return mass.to(dtype)


def _first(bad_B: Tensor) -> int:
    return int(bad_B.nonzero()[0])
