"""The statistics of heatmaps as a Triton kernel: one program a picture and 32 concepts, from cost and potentials; no plan in memory."""

# Triton compiles these functions; to a checker of Python their values are not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dotcbm.transport.heatmap_statistics import HeatmapStatistics

__all__ = ["statistics_triton"]

_ROWS, _COLUMNS = 32, 32
_LOG2E = 1.4426950408889634
_NO = tl.constexpr(float("-inf"))


@triton.jit
def _kernel(
    cost_ptr,
    log_u_ptr,
    log_v_ptr,
    peak_ptr,
    share_ptr,
    spread_ptr,
    N,
    M,
    cost_b,
    cost_n,
    cost_m,
    scale,
    log2e,
    R: tl.constexpr,
    C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    ok = columns < M
    v = tl.load(log_v_ptr + b * M + columns, mask=ok, other=_NO)[None, :] * log2e
    mass = tl.zeros((R, C), tl.float32)
    weighted = tl.zeros((R, C), tl.float32)
    most = tl.full((R, C), _NO, tl.float32)
    at = tl.zeros((R, C), tl.int32)
    for start in range(0, N, R):
        rows = start + tl.arange(0, R)
        u = tl.load(log_u_ptr + b * N + rows, mask=rows < N, other=_NO)[:, None] * log2e
        here = (rows < N)[:, None] & ok[None, :]
        cost = tl.load(cost_ptr + b * cost_b + rows[:, None] * cost_n + columns[None, :] * cost_m, mask=here, other=0.0).to(tl.float32)
        x = u + v - cost * scale  # log2 of the plan
        plan = tl.exp2(x)
        mass += plan
        weighted += tl.where(plan > 0, plan * x, 0.0)
        at = tl.where(x > most, start + tl.arange(0, R)[:, None], at)
        most = tl.maximum(most, x)
    top = tl.max(most, 0)
    total = tl.sum(mass, 0)
    present = total > 0
    divisor = tl.where(present, total, 1.0)
    peak = tl.min(tl.where(most == top[None, :], at, N), 0)
    entropy = tl.log2(divisor) - tl.sum(weighted, 0) / divisor
    out = b * M + columns
    tl.store(peak_ptr + out, tl.where(present, peak, 0).to(tl.int64), mask=ok)
    tl.store(share_ptr + out, tl.where(present, tl.exp2(top) / divisor, 0.0), mask=ok)
    tl.store(spread_ptr + out, tl.where(present, tl.exp2(entropy), 0.0), mask=ok)


_KERNEL: Any = _kernel


@torch.library.custom_op("dotcbm::heatmap_statistics", mutates_args=())
def _operator(cost_BNM: Tensor, log_u_BN: Tensor, log_v_BM: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    peak_BM, share_BM, spread_BM = _empty(log_v_BM)
    B, N, M = cost_BNM.shape
    if B:
        grid = (B, triton.cdiv(M, _COLUMNS))
        out = (peak_BM, share_BM, spread_BM)
        _KERNEL[grid](
            cost_BNM, log_u_BN, log_v_BM, *out, N, M, *cost_BNM.stride(), _LOG2E / eps, _LOG2E, R=_ROWS, C=_COLUMNS, num_warps=4
        )  # fmt: skip
    return peak_BM, share_BM, spread_BM


@_operator.register_fake
def _(cost_BNM: Tensor, log_u_BN: Tensor, log_v_BM: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    del cost_BNM, log_u_BN, eps
    return _empty(log_v_BM)


def _empty(log_v_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(log_v_BM, dtype=torch.int64), torch.empty_like(log_v_BM), torch.empty_like(log_v_BM)


def statistics_triton(cost_BNM: Tensor, log_u_BN: Tensor, log_v_BM: Tensor, *, eps: float) -> HeatmapStatistics:
    """See `dotcbm.transport.heatmap_statistics`; of the plan with these potentials (float32, contiguous)."""
    return HeatmapStatistics(*torch.ops.dotcbm.heatmap_statistics(cost_BNM.detach(), log_u_BN, log_v_BM, eps))
