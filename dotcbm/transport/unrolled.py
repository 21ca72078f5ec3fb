"""Sinkhorn in the log domain, differentiated by unrolling: for traced programs, and where implicit gradients would be wrong.

B pictures, N patches, M concepts. Balanced problems take the form with one exponential an element and iteration: with
the row update folded into a softmax over the concepts,

    S = softmax_j(v_j - C_ij / eps),  c = S^T theta,  v += log gamma - log c,  plan = theta * S.

theta's gradient comes from S, not from plan / theta, so tiny saliencies keep a finite gradient. Relaxed problems take
two logsumexps an iteration, since their row sums are not known beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.transport.plan import Settings, TransportPlan, safe_log, side_target

__all__ = ["solve_unrolled"]


def solve_unrolled(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings) -> TransportPlan:
    """See `dotcbm.transport.sinkhorn.sinkhorn`. Inputs are checked, of one floating type, and batched on every side."""
    return (_balanced if settings.balanced else _relaxed)(cost_BNM, theta_BN, gamma_BM, settings)


def _balanced(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings) -> TransportPlan:
    eps, max_iter, tol = settings.eps, settings.max_iter, settings.tol
    kernel_BNM = cost_BNM * (-1 / eps)
    theta_BN, absent_BN = _split_zeros(theta_BN)
    gamma_BM, absent_BM = _split_zeros(gamma_BM)
    log_theta_BN, log_gamma_BM = safe_log(theta_BN), safe_log(gamma_BM)
    tiny = torch.finfo(cost_BNM.dtype).tiny

    # The first update is a logsumexp. After it c_j >= gamma_j * theta_i / N for some i, in every later iteration, so that
    # the sums of S cannot underflow however small eps is; the clamp only guards against a theta_i that is itself near tiny.
    start_BN = log_theta_BN + absent_BN
    v_BM = log_gamma_BM - torch.logsumexp(start_BN.unsqueeze(2) + kernel_BNM, dim=1)
    num_iter = 1
    while True:
        # softmax's backward needs its output only: the graph holds one (B, N, M) tensor an iteration.
        S_BNM = torch.softmax((v_BM + absent_BM).unsqueeze(1) + kernel_BNM, dim=2)
        c_BM = torch.bmm(theta_BN.unsqueeze(1), S_BNM).squeeze(1)
        if num_iter == max_iter or (tol is not None and _below(tol, c_BM, gamma_BM)):
            break
        v_BM = v_BM + log_gamma_BM - c_BM.clamp_min(tiny).log()  # an absent concept's v stays masked, whatever it is
        num_iter += 1

    log_v_BM = v_BM + absent_BM
    return TransportPlan(
        plan_BNM=theta_BN.unsqueeze(2) * S_BNM,
        log_u_BN=log_theta_BN + absent_BN - torch.logsumexp(log_v_BM.unsqueeze(1) + kernel_BNM, dim=2),
        log_v_BM=log_v_BM,
        residual_B=(c_BM - gamma_BM).detach().abs().sum(1),
        num_iter_B=torch.full_like(theta_BN[:, 0], num_iter, dtype=torch.int32),
    )


def _relaxed(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings) -> TransportPlan:
    eps, max_iter, tol = settings.eps, settings.max_iter, settings.tol
    kernel_BNM = cost_BNM * (-1 / eps)
    theta_BN, absent_BN = _split_zeros(theta_BN)
    gamma_BM, absent_BM = _split_zeros(gamma_BM)
    log_theta_BN, log_gamma_BM = safe_log(theta_BN) + absent_BN, safe_log(gamma_BM) + absent_BM
    power_u, power_v = settings.powers

    f_BN = torch.zeros_like(theta_BN)
    num_iter = 0
    while True:
        g_BM = -power_v * torch.logsumexp((log_theta_BN + f_BN).unsqueeze(2) + kernel_BNM, dim=1)
        f_BN = -power_u * torch.logsumexp((log_gamma_BM + g_BM).unsqueeze(1) + kernel_BNM, dim=2)
        num_iter += 1
        if tol is None and num_iter < max_iter:
            continue
        plan_BNM = ((log_theta_BN + f_BN).unsqueeze(2) + (log_gamma_BM + g_BM).unsqueeze(1) + kernel_BNM).exp()
        target_BM = side_target(gamma_BM, scaled_potential=g_BM, eps=eps, relax=settings.relax_concept)
        if num_iter == max_iter or (tol is not None and _below(tol, plan_BNM.sum(1), target_BM)):
            return TransportPlan(
                plan_BNM=plan_BNM,
                log_u_BN=log_theta_BN + f_BN,
                log_v_BM=log_gamma_BM + g_BM,
                residual_B=(plan_BNM.sum(1) - target_BM).detach().abs().sum(1),
                num_iter_B=torch.full_like(theta_BN[:, 0], num_iter, dtype=torch.int32),
            )


def _split_zeros(mass: Tensor) -> tuple[Tensor, Tensor]:
    """The mass with its gradient cut at exact zeros, and 0 where there is mass, -inf where there is none."""
    present = mass > 0
    zero = mass.new_zeros(())
    return mass.where(present, zero), zero.where(present, mass.new_full((), float("-inf")))


def _below(tol: float, sums: Tensor, target: Tensor) -> bool:
    return bool(((sums - target).detach().abs().sum(1) < tol).all())
