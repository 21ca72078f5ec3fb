"""Gradients of a plan by implicit differentiation: memory and time do not depend on the iterations.

B pictures, N patches, M concepts. At the fixed point, with r and c the sums of the plan's rows and columns, p = relax / (relax + eps)
(1 where balanced) and S = plan / r, an infinitesimal change of cost, theta and gamma changes u and v so that

    (r / p_u) du + P dv = P dC / eps + (r / (p_u theta)) dtheta        P dC: row sums of P * dC
    P^T du + (c / p_v) dv = P^T dC / eps + (c / (p_v gamma)) dgamma

The system is symmetric. For a gradient G of the plan, W = S * G, g_i = sum_j W_ij, eliminating the patches leaves one of size M,

    (diag(c) / p_v - p_u S^T diag(r) S) y = W^T r - p_u S^T (r g),      x = p_u (g - S y)

    dC = -P (G - x - y) / eps,   dtheta = (r / theta) (g - S y),   dgamma = (c / (p_v gamma)) y

It has one null direction where both sides are balanced, a constant, which the right-hand side has no part of. Everything is computed
from the plan, as S is its rows over their sums: on a processor a softmax would take more time than all else together. Rows whose sums
are too small for that are made anew, as a softmax, so that theta's gradient stays finite for the smallest saliency; an entry of exactly
0 has none.
The formula holds where the iteration has converged; `dotcbm.transport.sinkhorn` sees to that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dotcbm.transport.backend_torch import groups_of
from dotcbm.transport.memory import fresh_like
from dotcbm.transport.plan import Settings, TransportPlan

__all__ = ["attach_gradient"]

_DIRECT = 32  # concepts up to which a factorisation is faster than conjugate gradients (reports/benchmarks)
_MAX_STEPS = 200
_TOLERANCE_FLOAT64 = 1e-13
# Curvature over squared length below which a direction is the null direction but for rounding; other eigenvalues are far above.
_FLAT = {torch.float32: 1e-6, torch.float64: 1e-14}
_GROUP_ELEMENTS = 2**20  # of each of three arrays in a group of pictures, at most
# Sums of a plan's row below which its entries may be too small to tell their shares.
_SMALL = {torch.float32: 1e-30, torch.float64: 1e-290}


def attach_gradient(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    found: TransportPlan,
    settings: Settings,
) -> Tensor:
    """found.plan_BNM as a function of the first three; what else is in `found` has no gradient."""
    return _Plan.apply(cost_BNM, theta_BN, gamma_BM, found, settings)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, found: TransportPlan, settings: Settings) -> Tensor:
        ctx.save_for_backward(cost_BNM, theta_BN, gamma_BM, found.log_v_BM, found.plan_BNM)
        ctx.settings = settings
        return found.plan_BNM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cost_BNM, theta_BN, gamma_BM, log_v_BM, plan_BNM = ctx.saved_tensors
        with torch.autocast(cost_BNM.device.type, enabled=False):
            gradients = _gradients(grads[0], cost_BNM, theta_BN, gamma_BM, log_v_BM, plan_BNM, settings=ctx.settings)
        return (*gradients, None, None)


def _gradients(
    grad_BNM: Tensor,
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    log_v_BM: Tensor,
    plan_BNM: Tensor,
    *,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    d_cost, d_theta, d_gamma = (
        fresh_like(cost_BNM),
        torch.empty_like(theta_BN),
        torch.empty_like(gamma_BM),
    )
    for rows in groups_of(cost_BNM, _GROUP_ELEMENTS):
        given = (tensor[rows] for tensor in (grad_BNM, cost_BNM, theta_BN, gamma_BM, log_v_BM, plan_BNM))
        d_theta[rows], d_gamma[rows] = _group(*given, settings=settings, out_GNM=d_cost[rows])
    return d_cost, d_theta, d_gamma


def _group(
    grad_GNM: Tensor,
    cost_GNM: Tensor,
    theta_GN: Tensor,
    gamma_GM: Tensor,
    log_v_GM: Tensor,
    plan_GNM: Tensor,
    *,
    settings: Settings,
    out_GNM: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of theta and gamma; that of the cost goes to out_GNM."""
    eps, (power_u, power_v) = settings.eps, settings.powers
    row_GN, column_GM = plan_GNM.sum(2), plan_GNM.sum(1)
    small_GN = row_GN < _SMALL[row_GN.dtype]
    over_row_GN = torch.where(small_GN, 0.0, row_GN.reciprocal())
    # -plan * grad / eps, in one pass; its sums are small, and scaled back.
    weighted_GNM = torch.addcmul(plan_GNM.new_zeros(()), plan_GNM, grad_GNM, value=-1 / eps, out=out_GNM)
    mean_GN = weighted_GNM.sum(2).mul_(-eps) * over_row_GN
    right_GM = torch.sub(weighted_GNM.sum(1).mul_(-eps), _rows_times(mean_GN, plan_GNM), alpha=power_u)
    y_GM, of_rows_GN = _solve_schur(plan_GNM, over_row_GN, column_GM, right_GM, settings)
    inner_GN = mean_GN - of_rows_GN
    weighted_GNM.addcmul_(plan_GNM, (power_u * inner_GN)[:, :, None], value=1 / eps).addcmul_(plan_GNM, y_GM[:, None], value=1 / eps)
    ratio_GN = torch.ones_like(row_GN) if power_u == 1 else row_GN / theta_GN.where(theta_GN > 0, 1.0)
    tiny_GN = small_GN & (theta_GN > 0)
    if bool(tiny_GN.any()):
        image_R = tiny_GN.nonzero()[:, 0]
        scaled_RM = log_v_GM[image_R] - cost_GNM[tiny_GN] / eps
        inner_GN[tiny_GN] = (scaled_RM.softmax(1) * (grad_GNM[tiny_GN] - y_GM[image_R])).sum(1)
        ratio_GN[tiny_GN] = ((1 - power_u) * scaled_RM.logsumexp(1)).exp()
    d_theta_GN = torch.where(theta_GN > 0, ratio_GN * inner_GN, 0.0)
    ratio_GM = torch.ones_like(gamma_GM) if power_v == 1 else column_GM / (power_v * gamma_GM.where(gamma_GM > 0, 1.0))
    return d_theta_GN, torch.where(gamma_GM > 0, ratio_GM * y_GM, 0.0)


def _rows_times(a_GN: Tensor, matrix_GNM: Tensor) -> Tensor:
    return torch.bmm(a_GN[:, None], matrix_GNM)[:, 0]


def _solve_schur(plan_GNM: Tensor, over_row_GN: Tensor, column_GM: Tensor, right_GM: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(G, M) y of (diag(c) / p_v - p_u S^T diag(r) S) y = right, 0 for a concept without mass, and (G, N) S y."""
    present_GM = column_GM > 0
    scale_GM = torch.where(present_GM, column_GM.where(present_GM, 1.0).rsqrt(), 0.0)
    if column_GM.shape[1] <= _DIRECT:
        y_GM = _direct(plan_GNM, over_row_GN, right_GM, scale_GM, settings)
        return y_GM, torch.bmm(y_GM[:, None], plan_GNM.transpose(1, 2))[:, 0] * over_row_GN
    return _conjugate_gradients(plan_GNM, over_row_GN, right_GM, scale_GM, settings)


def _direct(plan_GNM: Tensor, over_row_GN: Tensor, right_GM: Tensor, scale_GM: Tensor, settings: Settings) -> Tensor:
    """By Cholesky, scaled to a unit diagonal of c. The null direction sqrt(c) of a balanced problem is lifted to eigenvalue 1."""
    power_u, power_v = settings.powers
    half_GNM = plan_GNM * over_row_GN.sqrt()[:, :, None] * scale_GM[:, None]
    identity_MM = torch.eye(right_GM.shape[1], dtype=right_GM.dtype, device=right_GM.device)
    matrix_GMM = identity_MM / power_v - power_u * half_GNM.transpose(1, 2) @ half_GNM
    if settings.balanced:
        null_GM = torch.where(scale_GM > 0, 1 / scale_GM.where(scale_GM > 0, 1.0), 0.0)
        null_GM = null_GM / null_GM.norm(dim=1, keepdim=True).clamp_min(torch.finfo(null_GM.dtype).tiny)
        matrix_GMM = matrix_GMM + null_GM[:, :, None] * null_GM[:, None]
    factor_GMM, failed_G = torch.linalg.cholesky_ex(matrix_GMM)
    solved_GM = torch.cholesky_solve((scale_GM * right_GM)[:, :, None], factor_GMM)[:, :, 0]
    if bool((failed_G > 0).any()):  # concepts that no patch tells apart: singular to rounding
        rest_GM, _ = _conjugate_gradients(plan_GNM, over_row_GN, right_GM, scale_GM, settings)
        return torch.where((failed_G > 0)[:, None], rest_GM, scale_GM * solved_GM)
    return scale_GM * solved_GM


def _conjugate_gradients(
    plan_GNM: Tensor, over_row_GN: Tensor, right_GM: Tensor, scale_GM: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """y and S y, which is the sum of what S made of the directions.

    On the matrix scaled to a unit diagonal of c, each picture until its residual has fallen by `adjoint_tolerance` (float64: 1e-13).
    """
    power_u, power_v = settings.powers
    tolerance = _TOLERANCE_FLOAT64 if right_GM.dtype == torch.float64 else settings.adjoint_tolerance
    flat = _FLAT[right_GM.dtype]
    # Rows, as products want them: for few pictures a step's time is the number of its calls.
    plan_GMN, over_row_G1N, scale_G1M = plan_GNM.transpose(1, 2), over_row_GN[:, None], scale_GM[:, None]
    residual_G1M = scale_G1M * right_GM[:, None]
    solved_G1M, direction_G1M, of_rows_G1N = torch.zeros_like(residual_G1M), residual_G1M, torch.zeros_like(over_row_G1N)
    square_G11 = _squares(residual_G1M)
    zero = square_G11.new_zeros(())  # a number would be made a tensor in every call
    enough_G11 = square_G11 * tolerance**2
    for _ in range(min(_MAX_STEPS, 2 * right_GM.shape[1])):
        open_G11 = square_G11 > enough_G11
        if not bool(open_G11.any()):
            break
        forward_G1N = torch.bmm(scale_G1M * direction_G1M, plan_GMN).mul_(over_row_G1N)
        own_G1M = direction_G1M if power_v == 1 else direction_G1M / power_v
        image_G1M = torch.addcmul(own_G1M, scale_G1M, torch.bmm(forward_G1N, plan_GNM), value=-power_u)
        curvature_G11 = (direction_G1M * image_G1M).sum(2, keepdim=True)
        bent_G11 = open_G11 & (curvature_G11 > flat * _squares(direction_G1M))
        length_G11 = torch.where(bent_G11, square_G11 / curvature_G11, zero)
        solved_G1M.addcmul_(length_G11, direction_G1M)
        of_rows_G1N.addcmul_(length_G11, forward_G1N)
        residual_G1M = torch.addcmul(residual_G1M, length_G11, image_G1M, value=-1)
        new_G11 = _squares(residual_G1M)
        # A picture that is done stays as it is: its direction would grow without bound.
        turn_G11 = torch.where(bent_G11, new_G11 / square_G11, zero)
        direction_G1M = torch.addcmul(residual_G1M, turn_G11, direction_G1M)
        square_G11 = torch.where(bent_G11, new_G11, zero)
    return (scale_G1M * solved_G1M)[:, 0], of_rows_G1N[:, 0]


def _squares(x_G1M: Tensor) -> Tensor:
    return x_G1M.square().sum(2, keepdim=True)
