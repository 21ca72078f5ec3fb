"""Plans and gradients against POT in float64, unrolled to convergence.

B pictures, N patches, M concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from .problems import Size, make_inputs
from .rivals import Method, most_passes, ours_name, pot_batch, solve_ours
from .tables import Table

__all__ = ["Errors", "correctness_table", "measure_errors"]

SIZE: Size = (4, 49, 24)
# float32 cannot get below about 1e-6.
CONVERGED_TOL = 1e-6
MODEL_TOL = 1e-3
# The graph of the reference keeps 75 KB a pass at this size.
REFERENCE_PASSES = 10_000
REFERENCE_TOL = 1e-13


@dataclass(frozen=True)
class Errors:
    """Relative errors (Frobenius) of one solver in float32; None where it has no gradient.

    Attributes:
        method: Its name and setting.
        eps: Entropy.
        passes: Made.
        plan: Error of the plan.
        cost: Of the gradient of the cost.
        theta: Of theta's gradient, without its mean.
        gamma: Of gamma's gradient, without its mean.
    """

    method: str
    eps: float
    passes: int
    plan: float
    cost: float | None = None
    theta: float | None = None
    gamma: float | None = None


def measure_errors(found: Sequence[Method], *, all_eps: Sequence[float], device: torch.device) -> list[Errors]:
    """Every solver at convergence, and ours at the tolerance that models use as well, for each entropy."""
    ours = [method for method in found if method.name in (ours_name("torch"), ours_name("triton"))]
    loose = [(Method(f"{method.name}, tol {MODEL_TOL:g}", method.solve, stops_itself=True), MODEL_TOL) for method in ours]
    unrolled = Method(f"{ours_name('torch')}, unrolled", partial(solve_ours, solver="torch", gradient="unroll"), stops_itself=True)
    settings = [*loose, *((method, CONVERGED_TOL) for method in [unrolled, *found])]
    return [_errors(method, tol, eps, device) for eps in all_eps for method, tol in settings]


def correctness_table(errors: Sequence[Errors]) -> Table:
    """One line for each solver and entropy."""

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    lines = [[x.method, f"{x.eps:g}", str(x.passes), *map(text, (x.plan, x.cost, x.theta, x.gamma))] for x in errors]
    note = (
        f"Relative error (Frobenius) in float32 at {SIZE}, against POT solve_batch in float64, unrolled to {REFERENCE_TOL:g}. Solvers "
        f"with a tolerance stop at {CONVERGED_TOL:g} unless they say otherwise, the others after as many passes as the reference made. "
        "Marginals of different mass have no plan: the gradients of theta and gamma are compared without their mean."
    )
    return Table("Correctness", ["solver", "eps", "passes", "plan", "cost gradient", "theta gradient", "gamma gradient"], lines, note)


def _errors(method: Method, tol: float, eps: float, device: torch.device) -> Errors:
    plan_BNM, gradients, enough = _reference(eps)
    inputs = make_inputs(SIZE, device=device, seed=0)
    if not method.backward:
        with torch.no_grad():
            found_BNM, passes = method.solve(inputs, eps, enough, None)
        return Errors(method.name, eps, most_passes(passes), _relative(found_BNM, plan_BNM))
    inputs = inputs.with_gradients()
    found_BNM, passes = method.solve(inputs, eps, enough, tol if method.stops_itself else None)
    cost, theta, gamma = inputs.gradients(found_BNM)
    errors = map(_relative, (found_BNM.detach(), cost, _centred(theta), _centred(gamma)), (plan_BNM, *gradients))
    return Errors(method.name, eps, most_passes(passes), *errors)


@cache
def _reference(eps: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], int]:
    """The plan and its gradients, on the CPU, and the passes that they took."""
    inputs = make_inputs(SIZE, device=torch.device("cpu"), seed=0).double().with_gradients()
    plan_BNM, passes = pot_batch(inputs, eps, REFERENCE_PASSES, REFERENCE_TOL)
    assert passes < REFERENCE_PASSES, f"POT's reference at eps {eps} has not converged in {passes} passes"
    cost, theta, gamma = inputs.gradients(plan_BNM)
    return plan_BNM.detach(), (cost, _centred(theta), _centred(gamma)), passes


def _centred(gradient: Tensor) -> Tensor:
    return gradient - gradient.mean(1, keepdim=True)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())
