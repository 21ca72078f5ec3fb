"""Sinkhorn in an exported program: `backend_torch` as a loop inside the graph, whose size does not depend on the number of passes.

B pictures, N patches, M concepts. The rules are those of `backend_torch`: each picture stops at its own tolerance, with the same momentum,
the same restarts and the iterate of the smallest residual. The arithmetic is in the log domain, in range at every eps, as a graph cannot
absorb potentials where they drift: with x_ij = v_j - C_ij / eps, a pass is

    r_i  = logsumexp_j x_ij,  S = softmax_j x_ij
    w_i  = theta_i exp((1 - p_u) r_i)              the plan's rows; theta where balanced
    c_j  = sum_i w_i S_ij                          its columns
    v_j <- log gamma_j - p_v (log c_j - v_j)

In float64 both make as many passes and agree to 4e-13 of a concept's mass. In float32 rounding decides where a residual lies at the
tolerance, or a ratio at the bound of the momentum: of 14,400 random pictures at eps 0.01 to 0.1, 10 made more or fewer passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from dotcbm.transport.backend_torch import SLOW
from dotcbm.transport.plan import Settings, TransportPlan, safe_log, side_target

__all__ = ["solve_exported"]


class _State(NamedTuple):
    """What a pass hands on; see `backend_torch`. v_BM is where the next one looks."""

    v_BM: Tensor
    mapped_BM: Tensor
    best_BM: Tensor
    least_B: Tensor
    last_B: Tensor
    momentum_B: Tensor
    fast_B: Tensor
    open_B: Tensor
    num_iter_B: Tensor


def solve_exported(
    cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings, *, tol: float, accelerate: bool
) -> TransportPlan:
    """See `dotcbm.transport.sinkhorn.sinkhorn`. Inputs are of one floating type, batched on every side; no gradients."""
    problem = _Problem(cost_BNM, theta_BN, gamma_BM, settings)

    def goes_on(*state: Tensor) -> Tensor:
        now = _State(*state)
        return (now.open_B & (now.num_iter_B < settings.max_iter)).any()

    def one_pass(*state: Tensor) -> tuple[Tensor, ...]:
        now = _State(*state)
        new_BM, residual_B = problem.step(now.v_BM)
        better_B = now.open_B & ~(residual_B >= now.least_B) if accelerate else now.open_B
        best_BM, least_B = torch.where(better_B[:, None], now.v_BM, now.best_BM), torch.where(better_B, residual_B, now.least_B)
        open_B = least_B >= tol
        next_BM, momentum_B, fast_B = new_BM, now.momentum_B.clone(), now.fast_B.clone()  # a graph's loop wants new tensors
        if accelerate:
            ratio_B = residual_B / now.last_B
            turn_BM = new_BM - now.mapped_BM
            against_B = ((now.v_BM - new_BM) * turn_BM * gamma_BM).sum(1) > 0
            fast_B = (now.fast_B & ~(ratio_B > SLOW)) | (ratio_B > 1)
            from_B = torch.where(fast_B | against_B, 1.0, now.momentum_B)
            momentum_B = (1 + (1 + 4 * from_B.square()).sqrt()) / 2
            next_BM = new_BM + torch.where(fast_B, 0.0, (from_B - 1) / momentum_B)[:, None] * turn_BM
        v_BM = torch.where(open_B[:, None], next_BM, best_BM)
        return _State(v_BM, new_BM, best_BM, least_B, residual_B, momentum_B, fast_B, open_B, now.num_iter_B + now.open_B)

    v_BM = problem.start()
    some_B = v_BM[:, 0]
    start = _State(
        v_BM,
        mapped_BM=v_BM.clone(),
        best_BM=v_BM.clone(),
        least_B=torch.full_like(some_B, torch.inf),
        last_B=torch.full_like(some_B, torch.inf),
        momentum_B=torch.ones_like(some_B),
        fast_B=torch.ones_like(some_B, dtype=torch.bool),
        open_B=torch.ones_like(some_B, dtype=torch.bool),
        num_iter_B=torch.zeros_like(some_B, dtype=torch.int32),
    )
    found = _State(*while_loop(goes_on, one_pass, tuple(start)))
    return problem.plan(found.best_BM, residual_B=found.least_B, num_iter_B=found.num_iter_B)


class _Problem:
    """The pictures' transport, and what one pass does to it."""

    def __init__(self, cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings) -> None:
        self.eps, self.relax_concept = settings.eps, settings.relax_concept
        self.power_u, self.power_v = settings.powers
        self.kernel_BNM = cost_BNM * (-1 / self.eps)
        self.theta_BN, self.gamma_BM, self.concept_BM = theta_BN, gamma_BM, gamma_BM > 0
        self.log_theta_BN = safe_log(theta_BN).masked_fill(theta_BN <= 0, -torch.inf)
        self.log_gamma_BM = safe_log(gamma_BM)
        self.tiny = torch.finfo(cost_BNM.dtype).tiny

    def start(self) -> Tensor:
        """(B, M) the concept potentials that the first pass looks at."""
        return self.log_gamma_BM - self.power_v * torch.logsumexp(self.log_theta_BN[:, :, None] + self.kernel_BNM, 1)

    def step(self, v_BM: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M) the concept potentials that come next, and (B,) the residual."""
        score_BNM = self._scores(v_BM)
        column_BM = torch.bmm(self._rows(score_BNM)[:, None], score_BNM.softmax(2))[:, 0]
        target_BM = side_target(self.gamma_BM, scaled_potential=v_BM - self.log_gamma_BM, eps=self.eps, relax=self.relax_concept)
        residual_B = (column_BM - target_BM).abs().sum(1)
        new_BM = self.log_gamma_BM - self.power_v * (column_BM.clamp_min(self.tiny).log() - v_BM)
        # The column of a concept that is not there is empty; its potential, which counts nowhere, must not grow.
        return torch.where(self.concept_BM, new_BM, 0.0), residual_B

    def plan(self, v_BM: Tensor, *, residual_B: Tensor, num_iter_B: Tensor) -> TransportPlan:
        """What belongs to the potentials v."""
        score_BNM = self._scores(v_BM)
        return TransportPlan(
            plan_BNM=self._rows(score_BNM)[:, :, None] * score_BNM.softmax(2),
            log_u_BN=self.log_theta_BN - self.power_u * score_BNM.logsumexp(2),
            log_v_BM=v_BM.masked_fill(~self.concept_BM, -torch.inf),
            residual_B=residual_B,
            num_iter_B=num_iter_B,
        )

    def _scores(self, v_BM: Tensor) -> Tensor:
        return v_BM.masked_fill(~self.concept_BM, -torch.inf)[:, None] + self.kernel_BNM

    def _rows(self, score_BNM: Tensor) -> Tensor:
        """(B, N) the sums of the plan's rows."""
        if self.power_u == 1:
            return self.theta_BN
        return self.theta_BN * ((1 - self.power_u) * score_BNM.logsumexp(2)).exp()
