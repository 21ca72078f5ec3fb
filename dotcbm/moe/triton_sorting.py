"""Assignments sorted by expert, and the tiles of each expert's rows, as Triton kernels: counts never leave the device.

T tokens, K experts per token, E experts, R = T K assignments. A counting sort, stable as `dispatch.Order.of` is, in three launches where
torch.sort, searchsorted and scatter take about ten.
"""

# Triton compiles these functions; to a checker of Python their values are not what they are.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Sorted", "TileMap", "sort_by_expert", "tile_map"]

# Elements of the table (assignments of a program, experts) that a program holds; 64 registers a thread.
_TABLE = 8192
_MOST_ASSIGNMENTS = 256
_SCANNED = 1024
_MAPPED = 32


class Sorted(NamedTuple):
    """As `dispatch.Order`, in int32."""

    order_R: Tensor
    """(R,) row r in the order of experts is assignment order_R[r] = token * K + slot."""
    inverse_R: Tensor
    """(R,) its inverse."""
    end_E: Tensor
    """(E,) where the rows of each expert end."""


class TileMap(NamedTuple):
    """Which rows each program of a launch takes; int32."""

    tile_L4: Tensor
    """(L, 4) expert (-1: nothing to do), first row, row after the last, and slot: the tile's number among those of the experts that have
    several tiles, -1 where the expert has this one only."""
    span_E3: Tensor
    """(E, 3) an expert's first tile, how many there are, and the slot of the first."""


@triton.jit
def _experts_of(index_ptr, offs, R):
    return tl.load(index_ptr + offs, mask=offs < R, other=-1).to(tl.int32)


@triton.jit
def _count_kernel(index_ptr, count_ptr, R, E, BLOCK: tl.constexpr, EP: tl.constexpr):
    """How many of a block's assignments go to each expert, at count[expert, block]."""
    block = tl.program_id(0)
    expert = _experts_of(index_ptr, block * BLOCK + tl.arange(0, BLOCK), R)
    offs_e = tl.arange(0, EP)
    count = tl.sum((expert[:, None] == offs_e[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + offs_e * tl.num_programs(0) + block, count, mask=offs_e < E)


@triton.jit
def _scan_kernel(count_ptr, total_ptr, num_blocks, N: tl.constexpr):
    """An expert's counts, replaced by those of the blocks before."""
    expert = tl.program_id(0)
    count_ptr += expert * num_blocks
    total = tl.full((), 0, tl.int32)
    for start in range(0, num_blocks, N):
        offs = start + tl.arange(0, N)
        count = tl.load(count_ptr + offs, mask=offs < num_blocks, other=0)
        tl.store(count_ptr + offs, total + tl.cumsum(count, 0) - count, mask=offs < num_blocks)
        total += tl.sum(count, 0)
    tl.store(total_ptr + expert, total)


@triton.jit
def _place_kernel(index_ptr, count_ptr, total_ptr, order_ptr, inverse_ptr, end_ptr, R, E, BLOCK: tl.constexpr, EP: tl.constexpr):
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts_of(index_ptr, offs, R)
    offs_e = tl.arange(0, EP)
    total = tl.load(total_ptr + offs_e, mask=offs_e < E, other=0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(end_ptr + offs_e, end, mask=offs_e < E)
    start = end - total + tl.load(count_ptr + offs_e * tl.num_programs(0) + block, mask=offs_e < E, other=0)
    chosen = (expert[:, None] == offs_e[None, :]).to(tl.int32)
    place = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + start[None, :]), 1)
    tl.store(inverse_ptr + offs, place, mask=offs < R)
    tl.store(order_ptr + place, offs, mask=offs < R)


@triton.jit
def _map_kernel(end_ptr, tile_ptr, span_ptr, length, size, E, N: tl.constexpr, EP: tl.constexpr):
    offs_e = tl.arange(0, EP)
    held = offs_e < E
    end = tl.load(end_ptr + offs_e, mask=held, other=0)
    begin = tl.load(end_ptr + offs_e - 1, mask=held & (offs_e > 0), other=0)
    count = tl.where(held, (end - begin + size - 1) // size, 0)
    after = tl.cumsum(count, 0)
    first = after - count
    several = tl.where(count > 1, count, 0)
    slot = tl.cumsum(several, 0) - several
    if tl.program_id(0) == 0:
        tl.store(span_ptr + 3 * offs_e, first, mask=held)
        tl.store(span_ptr + 3 * offs_e + 1, count, mask=held)
        tl.store(span_ptr + 3 * offs_e + 2, slot, mask=held)
    tile = tl.program_id(0) * N + tl.arange(0, N)
    here = (tile[:, None] >= first[None, :]) & (tile[:, None] < after[None, :])
    number = tile[:, None] - first[None, :]
    expert = tl.sum(tl.where(here, offs_e[None, :] + 1, 0), 1) - 1
    row = tl.sum(tl.where(here, begin[None, :] + number * size, 0), 1)
    last = tl.minimum(row + size, tl.sum(tl.where(here, end[None, :], 0), 1))
    among = tl.sum(tl.where(here & (count[None, :] > 1), slot[None, :] + number + 1, 0), 1) - 1
    ok = tile < length
    tl.store(tile_ptr + 4 * tile, expert, mask=ok)
    tl.store(tile_ptr + 4 * tile + 1, row, mask=ok)
    tl.store(tile_ptr + 4 * tile + 2, last, mask=ok)
    tl.store(tile_ptr + 4 * tile + 3, among, mask=ok)


_COUNT: Any = _count_kernel  # called as kernel[grid](...), which no checker understands
_SCAN: Any = _scan_kernel
_PLACE: Any = _place_kernel
_MAP: Any = _map_kernel


def sort_by_expert(index_TK: Tensor, num_experts: int) -> Sorted:
    """The order of a routing; ties keep the order of tokens.

    Args:
        index_TK: (T, K) integers in [0, E).
        num_experts: E.
    """
    index_R = index_TK.reshape(-1).contiguous()  # a view of one column is not
    R = len(index_R)
    order_R, inverse_R = (index_R.new_empty(R, dtype=torch.int32) for _ in range(2))
    if not R:
        return Sorted(order_R, inverse_R, index_R.new_zeros(num_experts, dtype=torch.int32))
    padded = _padded(num_experts)
    block = min(_MOST_ASSIGNMENTS, max(16, _TABLE // padded))
    num_blocks = triton.cdiv(R, block)
    end_E, total_E = (index_R.new_empty(num_experts, dtype=torch.int32) for _ in range(2))
    count_EB = index_R.new_empty((num_experts, num_blocks), dtype=torch.int32)
    _COUNT[(num_blocks,)](index_R, count_EB, R, num_experts, BLOCK=block, EP=padded)
    _SCAN[(num_experts,)](count_EB, total_E, num_blocks, N=_SCANNED)
    _PLACE[(num_blocks,)](index_R, count_EB, total_E, order_R, inverse_R, end_E, R, num_experts, BLOCK=block, EP=padded)
    return Sorted(order_R, inverse_R, end_E)


def tile_map(end_E: Tensor, num_rows: int, size: int) -> TileMap:
    """Tiles of up to `size` rows, none of which spans two experts: R // size + E at most, so that no count is waited for."""
    num_experts = len(end_E)
    length = num_rows // size + min(num_experts, num_rows)
    tile_L4 = end_E.new_empty((length, 4))
    span_E3 = end_E.new_empty((num_experts, 3))
    _MAP[(triton.cdiv(length, _MAPPED),)](end_E, tile_L4, span_E3, length, size, num_experts, N=_MAPPED, EP=_padded(num_experts))
    return TileMap(tile_L4, span_E3)


def _padded(num_experts: int) -> int:
    return max(16, triton.next_power_of_2(num_experts))
