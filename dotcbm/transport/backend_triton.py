"""Sinkhorn on CUDA by the kernels of `triton_kernels`, with gradients, for eager code, torch.compile and CUDA graphs.

B pictures, N patches, M concepts. Nothing waits for the device; the plan, the cost's gradient and what the caller holds are all that
has size B N M, and of the scores alone not even the plan. Under torch.compile the kernels are registered operators; eager code takes a
plain autograd function, which costs the host less (1.15 and 0.70 ms for forward and backward on one machine).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dotcbm.transport import triton_kernels
from dotcbm.transport.heatmap_statistics import HeatmapStatistics
from dotcbm.transport.plan import Settings, TransportPlan
from dotcbm.transport.triton_statistics import statistics_triton

__all__ = ["scores_triton", "solve_triton"]

_FORWARD: Any = triton_kernels.forward_kernel  # called as kernel[grid](...), which no checker understands
_BACKWARD: Any = triton_kernels.backward_kernel
_LOG2E = 1.4426950408889634
_CG_STEPS = 100


class _Solved(NamedTuple):
    """Output of the forward operator: the plan, or (B, M) scores, potentials, log2 sums of the rows, residual, iterations."""

    value: Tensor
    log_u_BN: Tensor
    log_v_BM: Tensor
    row_BN: Tensor
    residual_B: Tensor
    num_iter_B: Tensor


def solve_triton(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings, *, accelerate: bool) -> TransportPlan:
    """See `dotcbm.transport.sinkhorn.sinkhorn`. Inputs are checked and batched on every side; the cost may be in half precision."""
    found = _apply(cost_BNM, theta_BN, gamma_BM, *settings, accelerate, scores=False)
    return TransportPlan(found.value, found.log_u_BN, found.log_v_BM, found.residual_B, found.num_iter_B)


def scores_triton(
    cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor, settings: Settings, *, accelerate: bool, statistics: bool
) -> tuple[Tensor, Tensor, HeatmapStatistics | None]:
    """(B, M) sum_i plan_ij (1 - cost_ij), whose plan is never written, (B,) the residual, and the statistics if they are asked for."""
    found = _apply(cost_BNM, theta_BN, gamma_BM, *settings, accelerate, scores=True)
    told = statistics_triton(cost_BNM, found.log_u_BN, found.log_v_BM, eps=settings.eps) if statistics else None
    return found.value, found.residual_B, told


def _tiles(num_concepts: int) -> dict[str, int]:
    """Shape of a tile and the warps that share it, by measurement (reports/benchmarks)."""
    pieces = -(-num_concepts // 32)
    num_warps = 16
    rows = 2 * num_warps if pieces <= 12 else num_warps
    return {"R": rows, "K": pieces, "V": 1 << (32 * pieces - 1).bit_length(), "num_warps": num_warps}


def _work(cost_BNM: Tensor, vectors: tuple[int, int], rows: int) -> Tensor:
    B, _, M = cost_BNM.shape
    fixed, tiles = vectors
    return cost_BNM.new_empty((B, fixed + tiles * rows, -(-M // 32) * 32), dtype=torch.float32)


def _apply(cost_BNM: Tensor, *arguments: Any, scores: bool) -> _Solved:
    if torch.compiler.is_compiling():
        return _Solved(*torch.ops.dotcbm.sinkhorn(cost_BNM, *arguments, scores))
    return _Solved(*_Eager.apply(cost_BNM, *arguments, scores))


def _forward(
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    eps: float,
    max_iter: int,
    tol: float | None,
    relax_patch: float | None,
    relax_concept: float | None,
    accelerate: bool,
    scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _empty(cost_BNM, scores=scores)
    B, N, M = cost_BNM.shape
    if B:
        value, log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B = found
        tiles = _tiles(M)
        power_u, power_v = Settings(eps, 0, None, relax_patch, relax_concept).powers
        _FORWARD[(B,)](
            cost_BNM,
            theta_BN,
            gamma_BM,
            value,
            log_u_BN,
            log_v_BM,
            row_BN,
            residual_B,
            num_iter_B,
            _work(cost_BNM, triton_kernels.WORK_FORWARD, tiles["R"]),
            N,
            M,
            *cost_BNM.stride(),
            *theta_BN.stride(),
            *gamma_BM.stride(),
            _LOG2E / eps,
            0.0 if tol is None else tol,
            max_iter,
            power_u,
            power_v,
            0.0 if relax_concept is None else eps / relax_concept,
            RELAX_U=relax_patch is not None,
            RELAX_V=relax_concept is not None,
            ACCELERATE=accelerate,
            SCORE=scores,
            **tiles,
        )
    return found


def _empty(cost_BNM: Tensor, *, scores: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, M = cost_BNM.shape
    shapes = ((B, M) if scores else (B, N, M), (B, N), (B, M), (B, N), (B,))
    value, log_u_BN, log_v_BM, row_BN, residual_B = (cost_BNM.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return value, log_u_BN, log_v_BM, row_BN, residual_B, cost_BNM.new_empty((B,), dtype=torch.int32)


def _backward(
    grad: Tensor,
    cost_BNM: Tensor,
    theta_BN: Tensor,
    gamma_BM: Tensor,
    log_u_BN: Tensor,
    log_v_BM: Tensor,
    row_BN: Tensor,
    eps: float,
    relax_patch: float | None,
    relax_concept: float | None,
    tolerance: float,
    scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(cost_BNM)
    B, N, M = cost_BNM.shape
    if B:
        tiles = _tiles(M)
        power_u, power_v = Settings(eps, 0, None, relax_patch, relax_concept).powers
        strides = (grad.stride(0), 0, grad.stride(1)) if scores else grad.stride()
        _BACKWARD[(B,)](
            cost_BNM,
            theta_BN,
            gamma_BM,
            log_u_BN,
            log_v_BM,
            row_BN,
            grad,
            *gradients,
            _work(cost_BNM, triton_kernels.WORK_BACKWARD, tiles["R"]),
            N,
            M,
            *cost_BNM.stride(),
            *theta_BN.stride(),
            *gamma_BM.stride(),
            *strides,
            _LOG2E / eps,
            1 / eps,
            tolerance,
            _CG_STEPS,
            power_u,
            power_v,
            RELAX_U=relax_patch is not None,
            RELAX_V=relax_concept is not None,
            SCORE=scores,
            **tiles,
        )
    return gradients


def _empty_gradients(cost_BNM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, N, M = cost_BNM.shape
    new = cost_BNM.new_empty
    return new((B, N, M)), new((B, N), dtype=torch.float32), new((B, M), dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost_BNM, theta_BN, gamma_BM, eps, max_iter, tol, relax_patch, relax_concept, _, scores = inputs
    _, log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B = output
    ctx.set_materialize_grads(False)  # else zeros are made for the five that have none
    ctx.mark_non_differentiable(log_u_BN, log_v_BM, row_BN, residual_B, num_iter_B)
    ctx.save_for_backward(cost_BNM, theta_BN, gamma_BM, log_u_BN, log_v_BM, row_BN)
    tolerance = Settings(eps, max_iter, tol, relax_patch, relax_concept).adjoint_tolerance
    ctx.settings = (eps, relax_patch, relax_concept, tolerance, scores)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        # Not `setup_context`, before which torch inspects the signature at every call.
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 10
        return (*_backward(grads[0], *ctx.saved_tensors, *ctx.settings), *(None,) * 7)


_operator = torch.library.custom_op("dotcbm::sinkhorn", _forward, mutates_args=())
_gradient_operator = torch.library.custom_op("dotcbm::sinkhorn_backward", _backward, mutates_args=())


@_operator.register_fake
def _(cost_BNM: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(cost_BNM, scores=inputs[-1])


@_gradient_operator.register_fake
def _(grad: Tensor, cost_BNM: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    del grad, inputs
    return _empty_gradients(cost_BNM)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.dotcbm.sinkhorn_backward(grads[0], *ctx.saved_tensors, *ctx.settings), *(None,) * 7)


_operator.register_autograd(_differentiate, setup_context=_remember)
