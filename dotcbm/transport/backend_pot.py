"""Sinkhorn by POT (Python Optimal Transport 0.9.7), the reference that other solvers are tested against.

B pictures, N patches, M concepts. Balanced problems go through `ot.solve_batch`, where gradients are to be unrolled with
`grad="autodiff"`, the only of its modes with a right gradient of the plan ("last_step" detaches the cost, "envelope" gives the
plan none). POT has no batched
unbalanced solver, so relaxed problems loop over the pictures with `ot.unbalanced.sinkhorn_unbalanced`. That one multiplies
instead of adding logarithms, so it runs in float64, where exp(-cost / eps) of a cosine cost holds down to eps = 0.003.

POT stops by other rules: balanced, it looks at the rows (its last update is the columns') every tenth iteration; relaxed, at the
relative change of the scalings. `residual_B` is measured on what it returns, rows and columns together.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dotcbm.transport.plan import Settings, TransportPlan, safe_log, side_target

__all__ = ["solve_pot"]


def solve_pot(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings) -> TransportPlan:
    """See `dotcbm.transport.sinkhorn.sinkhorn`. Inputs are checked, of one floating type, and batched on every side."""
    eps, max_iter, tol, relax_patch, relax_concept = settings
    if not len(cost_BNM):  # POT takes the maximum of an empty batch's errors
        return TransportPlan(cost_BNM * 1, theta_BN * 1, gamma_BM * 1, cost_BNM.new_zeros(0), torch.zeros(0, dtype=torch.int32))
    if settings.balanced:
        plan_BNM, log_u_BN, log_v_BM, num_iter = _balanced(cost_BNM, theta_BN, gamma_BM, eps=eps, max_iter=max_iter, tol=tol)
        num_iter_B = torch.full((len(cost_BNM),), num_iter, dtype=torch.int32, device=cost_BNM.device)
    else:
        wide = zip(cost_BNM.double(), theta_BN.double(), gamma_BM.double(), strict=True)
        relax = (float("inf") if relax_patch is None else relax_patch, float("inf") if relax_concept is None else relax_concept)
        plans, log_us, log_vs, counts = zip(*(_relaxed(*x, eps=eps, max_iter=max_iter, tol=tol, relax=relax) for x in wide), strict=True)
        plan_BNM, log_u_BN, log_v_BM = (torch.stack(x).to(cost_BNM.dtype) for x in (plans, log_us, log_vs))
        num_iter_B = torch.tensor(counts, dtype=torch.int32, device=cost_BNM.device)

    f_BN, g_BM = log_u_BN - safe_log(theta_BN), log_v_BM - safe_log(gamma_BM)
    rows_BN = side_target(theta_BN, scaled_potential=f_BN.where(theta_BN > 0, 0.0), eps=eps, relax=relax_patch)
    columns_BM = side_target(gamma_BM, scaled_potential=g_BM.where(gamma_BM > 0, 0.0), eps=eps, relax=relax_concept)
    residual_B = (plan_BNM.sum(2) - rows_BN).abs().sum(1) + (plan_BNM.sum(1) - columns_BM).abs().sum(1)
    return TransportPlan(plan_BNM, log_u_BN, log_v_BM, residual_B.detach(), num_iter_B)


def _import_ot() -> Any:
    # POT imports every array library that it finds, and JAX takes three quarters of a GPU's memory when it is.
    for name in ("JAX", "TENSORFLOW", "CUPY"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")
    import ot

    return ot


def _balanced(
    cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, *, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    ot = _import_ot()
    row_BN, column_BM = theta_BN > 0, gamma_BM > 0
    # At a zero mass POT's gradient is NaN: it gets the smallest number instead, without gradient.
    tiny = cost_BNM.new_full((), torch.finfo(cost_BNM.dtype).tiny)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (cost_BNM, theta_BN, gamma_BM))
    result: Any = ot.solve_batch(
        cost_BNM,
        eps,
        theta_BN.where(row_BN, tiny),
        gamma_BM.where(column_BM, tiny),
        max_iter=max_iter,
        # POT's error is the L2 norm, and L1 <= sqrt(N) L2.
        tol=0.0 if tol is None else tol / cost_BNM.shape[1] ** 0.5,
        method="log_sinkhorn",
        grad="autodiff" if differentiate else "detach",
    )
    log_u_BN, log_v_BM = result.potentials
    absent = cost_BNM.new_full((), float("-inf"))
    plan_BNM = result.plan.where(row_BN.unsqueeze(2) & column_BM.unsqueeze(1), cost_BNM.new_zeros(()))
    return plan_BNM, log_u_BN.where(row_BN, absent), log_v_BM.where(column_BM, absent), result.log["n_iter"] + 1


def _relaxed(
    cost_NM: Tensor,
    theta_N: Tensor,
    gamma_M: Tensor,
    *,
    eps: float,
    max_iter: int,
    tol: float | None,
    relax: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, int]:
    ot = _import_ot()
    N, M = cost_NM.shape
    # POT divides by the sums of empty rows: it never sees them.
    row, column = theta_N.nonzero().squeeze(1), gamma_M.nonzero().squeeze(1)
    theta_N, gamma_M = theta_N[row], gamma_M[column]
    plan_NM, log = ot.unbalanced.sinkhorn_unbalanced(
        theta_N,
        gamma_M,
        cost_NM[row][:, column],
        eps,
        relax,
        method="sinkhorn",
        reg_type="kl",
        numItermax=max_iter,
        stopThr=0.0 if tol is None else tol,
        log=True,
    )
    log_u_N = cost_NM.new_full((N,), float("-inf")).index_copy(0, row, theta_N.log() + log["logu"])
    log_v_M = cost_NM.new_full((M,), float("-inf")).index_copy(0, column, gamma_M.log() + log["logv"])
    full_NM = cost_NM.new_zeros(N, M).index_put((row.unsqueeze(1), column.unsqueeze(0)), plan_NM)
    return full_NM, log_u_N, log_v_M, len(log["err"])
