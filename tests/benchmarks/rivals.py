"""Everything that solves balanced entropic transport here: ours, POT, hand-written torch, geomloss and flash-sinkhorn.

B pictures, N patches, M concepts, D features. Libraries other than torch are imported where they are used: they are slow to load
(POT) or no dependencies of ours (geomloss, flash-sinkhorn).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from dotcbm.transport.sinkhorn import Gradient, Solver, sinkhorn

from .problems import Inputs

# POT imports every array library that it finds, and JAX takes three quarters of a GPU's memory when it is.
os.environ.setdefault("POT_BACKEND_DISABLE_JAX", "1")

__all__ = ["Method", "Missing", "Passes", "Solve", "methods", "most_passes", "ours_name", "pot_batch", "solve_ours"]

# Made in all, or (B,) by each picture. A tensor stays on the device: reading it would make the host wait, inside what is timed.
Passes = int | Tensor
# (inputs, eps, num_iter, tol) to the plan (B, N, M) and the passes. tol None: exactly num_iter passes.
Solve = Callable[[Inputs, float, int, float | None], tuple[Tensor, Passes]]


@dataclass(frozen=True)
class Method:
    """A solver that can be run.

    Attributes:
        name: For the tables.
        solve: See `Solve`.
        stops_itself: It takes a tolerance on the L1 residual. Others are given the smallest number of passes that
            reaches it, found before the clock starts: the most favourable setting they could have.
        backward: It has a right gradient of the plan; where not, `why_not` says what is missing.
        fixed: It is also timed at a fixed number of passes.
        slow: A call takes a second: it is timed three times only, and its passes are found on one set of inputs.
        why_not: See `backward`.
    """

    name: str
    solve: Solve
    stops_itself: bool = False
    backward: bool = True
    fixed: bool = True
    slow: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Missing:
    """A solver that cannot be run here, or not in this way, and why."""

    name: str
    reason: str


def methods(device: torch.device, *, compiled: bool) -> tuple[list[Method], list[Missing]]:
    """What can run on this device, ours first, and what cannot.

    Args:
        device: CPU or CUDA.
        compiled: Whether torch.compile takes part.
    """
    found: list[Method] = []
    missing: list[Missing] = []
    if device.type == "cuda":
        found.append(Method(ours_name("triton"), partial(solve_ours, solver="triton"), stops_itself=True))
    found.append(Method(ours_name("torch"), partial(solve_ours, solver="torch"), stops_itself=True))
    found.append(Method("dotcbm pot, implicit gradients", partial(solve_ours, solver="pot"), stops_itself=True))
    found.append(Method("POT solve_batch, autodiff", pot_batch))
    if device.type == "cpu":
        found.append(Method("POT loop over images", _pot_loop))
    found.append(Method("logsumexp, unrolled", partial(_logsumexp, one_pass=_one_pass, plan_of=_plan_of)))
    found.append(Method("logsumexp, unrolled, checks every pass", _logsumexp_checked, stops_itself=True, fixed=False))
    if compiled:
        # One pass is compiled, not the loop: unrolled 50 times, the graph compiles for minutes into the same two kernels a pass.
        one_pass = torch.compile(_one_pass, fullgraph=True, dynamic=False)
        plan_of = torch.compile(_plan_of, fullgraph=True, dynamic=False)
        found.append(Method("logsumexp, torch.compile of a pass", partial(_logsumexp, one_pass=one_pass, plan_of=plan_of)))
    else:
        missing.append(Missing("logsumexp, torch.compile of a pass", "not asked for: add --compile"))

    if not find_spec("geomloss"):
        missing.append(Missing("geomloss", "not installed"))
    elif not find_spec("geomloss.ot"):
        missing.append(Missing("geomloss", "does not apply: before 0.3 it takes points, not costs"))
    else:
        why_not = "its gradient is that of the transport cost (envelope), not of the plan"
        found.append(Method("geomloss ot.solve_batch", _geomloss, backward=False, why_not=why_not))
    if device.type == "cpu":
        missing.append(Missing("flash-sinkhorn", "does not apply: CUDA only"))
    elif not find_spec("flash_sinkhorn"):
        missing.append(Missing("flash-sinkhorn", "not installed"))
    else:
        why_not = "it has no gradient of the plan"
        # Two launches a picture and pass: at 50 passes a call takes a second, and says nothing that the equal residual does not.
        found.append(Method("flash-sinkhorn loop over images", _flash, backward=False, fixed=False, slow=True, why_not=why_not))
    return found, missing


def most_passes(passes: Passes) -> int:
    """The most that a picture made."""
    return passes if isinstance(passes, int) else int(passes.max())


def ours_name(solver: Literal["torch", "triton"]) -> str:
    """What the tables call our own solver."""
    return f"dotcbm {solver}"


def solve_ours(
    inputs: Inputs, eps: float, num_iter: int, tol: float | None, *, solver: Solver, gradient: Gradient = "implicit"
) -> tuple[Tensor, Passes]:
    """Our door, without looking at values, as models call it. A fixed number of passes is made without acceleration."""
    result = sinkhorn(
        inputs.cost_BNM,
        inputs.theta_BN,
        inputs.gamma_BM,
        eps=eps,
        max_iter=num_iter,
        tol=tol,
        solver=solver,
        gradient=gradient,
        accelerate=tol is not None,
        check=False,
    )
    return result.plan_BNM, result.num_iter_B


def pot_batch(inputs: Inputs, eps: float, num_iter: int, tol: float | None) -> tuple[Tensor, int]:
    """POT's batched solver, unrolled. Its own tolerance is another norm, looked at every tenth pass: 0 leaves the count to num_iter."""
    import ot

    result: Any = ot.solve_batch(
        inputs.cost_BNM,
        eps,
        inputs.theta_BN,
        inputs.gamma_BM,
        max_iter=num_iter,
        tol=0.0 if tol is None else tol,
        method="log_sinkhorn",
        grad="autodiff",
    )
    return result.plan, result.log["n_iter"] + 1


def _pot_loop(inputs: Inputs, eps: float, num_iter: int, tol: float | None) -> tuple[Tensor, int]:
    import ot

    settings = {"method": "sinkhorn_log", "numItermax": num_iter, "stopThr": 0.0 if tol is None else tol, "warn": False}
    plans: list[Any] = [
        ot.sinkhorn(theta_N, gamma_M, cost_NM, eps, **settings)
        for cost_NM, theta_N, gamma_M in zip(inputs.cost_BNM, inputs.theta_BN, inputs.gamma_BM, strict=True)
    ]
    return torch.stack(plans), num_iter


def _one_pass(kernel_BNM: Tensor, v_BM: Tensor, log_theta_BN: Tensor, log_gamma_BM: Tensor) -> tuple[Tensor, Tensor]:
    u_BN = log_theta_BN - torch.logsumexp(kernel_BNM + v_BM.unsqueeze(1), dim=2)
    return u_BN, log_gamma_BM - torch.logsumexp(kernel_BNM + u_BN.unsqueeze(2), dim=1)


def _plan_of(kernel_BNM: Tensor, u_BN: Tensor, v_BM: Tensor) -> Tensor:
    return (kernel_BNM + u_BN.unsqueeze(2) + v_BM.unsqueeze(1)).exp()


def _logsumexp(
    inputs: Inputs,
    eps: float,
    num_iter: int,
    tol: float | None,
    *,
    one_pass: Callable[..., tuple[Tensor, Tensor]],
    plan_of: Callable[..., Tensor],
) -> tuple[Tensor, int]:
    """What one writes in ten minutes: two logsumexps a pass, in torch, differentiated by autograd."""
    assert tol is None, "see _logsumexp_checked"
    kernel_BNM, log_theta_BN, log_gamma_BM = -inputs.cost_BNM / eps, inputs.theta_BN.log(), inputs.gamma_BM.log()
    u_BN, v_BM = log_theta_BN, torch.zeros_like(log_gamma_BM)
    for _ in range(num_iter):
        u_BN, v_BM = one_pass(kernel_BNM, v_BM, log_theta_BN, log_gamma_BM)
    return plan_of(kernel_BNM, u_BN, v_BM), num_iter


def _logsumexp_checked(inputs: Inputs, eps: float, num_iter: int, tol: float | None) -> tuple[Tensor, int]:
    """The same with a tolerance. The next row update tells the row sums of the plan so far: theta * exp(u - next u)."""
    assert tol is not None, "see _logsumexp"
    kernel_BNM, log_theta_BN, log_gamma_BM = -inputs.cost_BNM / eps, inputs.theta_BN.log(), inputs.gamma_BM.log()
    u_BN, v_BM = _one_pass(kernel_BNM, torch.zeros_like(log_gamma_BM), log_theta_BN, log_gamma_BM)
    passes = 1
    while passes < num_iter:
        next_u_BN = log_theta_BN - torch.logsumexp(kernel_BNM + v_BM.unsqueeze(1), dim=2)
        if bool(((inputs.theta_BN * ((u_BN - next_u_BN).exp() - 1)).detach().abs().sum(1) < tol).all()):
            break
        u_BN, v_BM = next_u_BN, log_gamma_BM - torch.logsumexp(kernel_BNM + next_u_BN.unsqueeze(2), dim=1)
        passes += 1
    return _plan_of(kernel_BNM, u_BN, v_BM), passes


def _geomloss(inputs: Inputs, eps: float, num_iter: int, tol: float | None) -> tuple[Tensor, int]:
    """Averaged updates of both sides while the entropy falls to eps; its tol is not read by the library (0.3.1)."""
    from geomloss import ot as geomloss_ot  # pyright: ignore[reportMissingImports]

    result = geomloss_ot.solve_batch(inputs.cost_BNM, reg=eps, a=inputs.theta_BN, b=inputs.gamma_BM, max_iter=num_iter)
    return result.plan, num_iter


def _flash(inputs: Inputs, eps: float, num_iter: int, tol: float | None) -> tuple[Tensor, int]:
    """Potentials from points: half the squared distance of unit vectors is 1 - cosine. The plan then takes the cost as given."""
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating  # pyright: ignore[reportMissingImports]

    solve = partial(sinkhorn_flashstyle_alternating, eps=eps, n_iters=num_iter, cost_scale=0.5, allow_tf32=False)
    triples = zip(inputs.patch_BND, inputs.theta_BN, inputs.gamma_BM, strict=True)
    f, g = zip(*(solve(patch_ND, inputs.concept_MD, theta_N, gamma_M) for patch_ND, theta_N, gamma_M in triples), strict=True)
    scaled_BNM = (torch.stack(f).unsqueeze(2) + torch.stack(g).unsqueeze(1) - inputs.cost_BNM) / eps
    return inputs.theta_BN.unsqueeze(2) * inputs.gamma_BM.unsqueeze(1) * scaled_BNM.exp(), num_iter
