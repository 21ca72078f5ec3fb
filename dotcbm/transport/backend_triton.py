"""Sinkhorn on CUDA by the kernels of `triton_kernels`: registered operators with gradients, for eager code, torch.compile and CUDA graphs.

B pictures, N patches, M concepts. Neither operator waits for the device; the plan, the cost's gradient and what the caller holds are
all that has size B N M.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dotcbm.transport.plan import TransportPlan
from dotcbm.transport.triton_kernels import backward_kernel, forward_kernel

__all__ = ["blocks", "solve_triton"]

_LOG2E = 1.4426950408889634
_CG_STEPS, _CG_TOLERANCE = 100, 1e-5
_TILE = 4096  # elements of a tile


def solve_triton(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    *,
    eps: float,
    max_iter: int,
    tol: float | None,
    relax_patch: float | None,
    relax_concept: float | None,
    accelerate: bool,
) -> TransportPlan:
    """See `dotcbm.transport.sinkhorn.sinkhorn`. Inputs are checked and batched on every side; the cost may be in half precision."""
    relax = [-1.0 if r is None else r for r in (relax_patch, relax_concept)]
    plan_BNM, log_u_BN, log_v_BM, _, residual_B, num_iter_B = _forward(
        cost_BNM, theta_BN, gamma_BM, eps, max_iter, 0.0 if tol is None else tol, relax[0], relax[1], accelerate
    )
    return TransportPlan(plan_BNM, log_u_BN, log_v_BM, residual_B, num_iter_B)


def blocks(num_concepts: int) -> tuple[int, int]:
    """Sizes of the one or two blocks, powers of two, into which the concepts are cut; the second is 1 for none."""
    first = max(16, 1 << (num_concepts.bit_length() - 1))
    rest = num_concepts - first
    if rest <= 0:
        return first, 1
    second = max(16, 1 << (rest - 1).bit_length())
    return (first, second) if second < first else (2 * first, 1)


def _settings(num_patches: int, num_concepts: int) -> dict[str, int]:
    first, second = blocks(num_concepts)
    rows = max(1, min(64, _TILE // (first + (second if second > 1 else 0))))
    rows = 1 << (rows.bit_length() - 1)
    while rows > 1 and rows >= 2 * num_patches:
        rows //= 2
    return {"BLOCK_N": rows, "A": first, "B": second, "num_warps": 8 if first >= 128 else 4}


def _powers(eps: float, relax_patch: float, relax_concept: float) -> tuple[float, float]:
    power_u, power_v = (1.0 if r < 0 else r / (r + eps) for r in (relax_patch, relax_concept))
    return power_u, power_v


@torch.library.custom_op("dotcbm::sinkhorn", mutates_args=())
def _forward(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    relax_patch: float,
    relax_concept: float,
    accelerate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plan, potentials, log2 sums of the rows, residual, iterations; a negative relax is none."""
    plan_BNM, log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B = _like(cost_BNM)
    B, N, M = cost_BNM.shape
    if B:
        power_u, power_v = _powers(eps, relax_patch, relax_concept)
        forward_kernel[(B,)](
            cost_BNM,
            theta_BN,
            gamma_BM,
            plan_BNM,
            log_u_BN,
            log_v_BM,
            row_BN,
            residual_B,
            num_iter_B,
            plan_BNM,
            N,
            M,
            *cost_BNM.stride(),
            *theta_BN.stride(),
            *gamma_BM.stride(),
            _LOG2E / eps,
            tol,
            max_iter,
            power_u,
            power_v,
            0.0 if relax_concept < 0 else eps / relax_concept,
            RELAX_U=relax_patch >= 0,
            RELAX_V=relax_concept >= 0,
            ACCELERATE=accelerate,
            WRITE_PLAN=True,
            SCORE=False,
            **_settings(N, M),
        )
    return plan_BNM, log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B


@_forward.register_fake
def _(cost_BNM: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del rest
    return _like(cost_BNM)


def _like(cost_BNM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, M = cost_BNM.shape
    new = cost_BNM.new_empty
    full = torch.float32
    return (
        new((B, N, M), dtype=full),
        new((B, N), dtype=full),
        new((B, M), dtype=full),
        new((B, N), dtype=full),
        new((B,), dtype=full),
        new((B,), dtype=torch.int32),
    )


@torch.library.custom_op("dotcbm::sinkhorn_backward", mutates_args=())
def _backward(
    grad_BNM: Tensor,
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    log_u_BN: Tensor,
    log_v_BM: Tensor,
    row_BN: Tensor,
    eps: float,
    relax_patch: float,
    relax_concept: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_cost_BNM, d_theta_BN, d_gamma_BM = _gradients_like(cost_BNM)
    B, N, M = cost_BNM.shape
    if B:
        power_u, power_v = _powers(eps, relax_patch, relax_concept)
        backward_kernel[(B,)](
            cost_BNM,
            theta_BN,
            gamma_BM,
            log_u_BN,
            log_v_BM,
            row_BN,
            grad_BNM,
            d_cost_BNM,
            d_theta_BN,
            d_gamma_BM,
            N,
            M,
            *cost_BNM.stride(),
            *theta_BN.stride(),
            *gamma_BM.stride(),
            *grad_BNM.stride(),
            _LOG2E / eps,
            1 / eps,
            _CG_TOLERANCE,
            _CG_STEPS,
            power_u,
            power_v,
            RELAX_U=relax_patch >= 0,
            RELAX_V=relax_concept >= 0,
            SCORE=False,
            **_settings(N, M),
        )
    return d_cost_BNM, d_theta_BN, d_gamma_BM


@_backward.register_fake
def _(grad_BNM: Tensor, cost_BNM: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del grad_BNM, rest
    return _gradients_like(cost_BNM)


def _gradients_like(cost_BNM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, N, M = cost_BNM.shape
    new = cost_BNM.new_empty
    return new((B, N, M), dtype=cost_BNM.dtype), new((B, N), dtype=torch.float32), new((B, M), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost_BNM, theta_BN, gamma_BM, eps, _, _, relax_patch, relax_concept, _ = inputs
    _, log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B = output
    ctx.mark_non_differentiable(log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B)
    ctx.save_for_backward(cost_BNM, theta_BN, gamma_BM, log_u_BN, log_v_BM, row_BN)
    ctx.settings = (eps, relax_patch, relax_concept)


def _differentiate(ctx: Any, grad_BNM: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    del rest
    gradients = _backward(grad_BNM, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
