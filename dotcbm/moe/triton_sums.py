"""Sums over the rows of sparse experts, as Triton kernels: gradients of weights and biases; and rows put in order, and added up by token.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert. Names as in `triton_kernels`:

    weight    d(up) = x^T dz;  d(down)^T = dy^T gated           over the rows of a chunk of one expert; x, dy read through the order
    bias      dg += dy bias;  sums of g dy over a tile's rows   dy read through the order, no product; for K = 1
    gate      dg += dy bias;  a table of g by token and expert  for K > 1, where a product over tokens reads less than a pass over rows
    dispatch  a token's row to the K places that it has in the order of experts
    add       what programs left in float32: chunks and tiles of an expert, rows of a token

Sums are in float32, and nothing is added atomically: results are the same in every run.
"""

# Triton compiles these functions; to a checker of Python their values are not what they are.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl

from dotcbm.moe.triton_kernels import rows_of

__all__ = [
    "add_chunks_kernel",
    "add_slots_kernel",
    "add_tiles_kernel",
    "bias_gate_kernel",
    "bias_gradient_kernel",
    "dispatch_kernel",
    "weight_gradient_kernel",
]


@triton.jit
def bias_gradient_kernel(
    dy_ptr,
    bias_ptr,
    gate_ptr,
    order_ptr,
    tile_ptr,
    dgate_ptr,
    sum_ptr,
    D,
    SUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """K = 1: what the bias of `down` adds to d(gate), at dgate[token]; with SUM, g dy summed over the tile's rows, at sum[tile, column]."""
    tile = tl.program_id(0)
    expert, begin, end = rows_of(tile_ptr, tile)
    if expert < 0:
        return
    row = begin + tl.arange(0, BM)
    ok = row < end
    token = tl.load(order_ptr + tl.minimum(row, end - 1))
    gate = tl.load(gate_ptr + token, mask=ok, other=0.0)
    dgate = tl.zeros((BM,), tl.float32)
    for d in range(0, D, BN):
        offs_d = d + tl.arange(0, BN)
        at = token[:, None].to(tl.int64) * D + offs_d[None, :]
        dy = tl.load(dy_ptr + at, mask=(offs_d < D)[None, :], other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert.to(tl.int64) * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        dgate += tl.sum(dy * bias[None, :], 1)
        if SUM:
            tl.store(sum_ptr + tile.to(tl.int64) * D + offs_d, tl.sum(dy * gate[:, None], 0), mask=offs_d < D)
    tl.store(dgate_ptr + token, dgate, mask=ok)


@triton.jit
def bias_gate_kernel(
    dy_ptr,
    bias_ptr,
    gate_ptr,
    index_ptr,
    dgate_ptr,
    table_ptr,
    T,
    D,
    E,
    SLOTS: tl.constexpr,
    TABLE: tl.constexpr,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """What the bias of `down` adds to d(gate), at dgate[assignment]; with TABLE, gates at table[token, expert], 0 where not chosen."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BE
    offs_e = first + tl.arange(0, BE)
    ok = token < T
    acc = tl.zeros((BT, BE), tl.float32)
    for d in range(0, D, BK):
        offs_d = d + tl.arange(0, BK)
        held = (offs_d < D)[None, :]
        dy = tl.load(dy_ptr + token[:, None].to(tl.int64) * D + offs_d[None, :], mask=ok[:, None] & held, other=0.0)
        bias = tl.load(bias_ptr + offs_e[:, None].to(tl.int64) * D + offs_d[None, :], mask=(offs_e < E)[:, None] & held, other=0.0)
        if WIDEN:
            dy, bias = dy.to(tl.float32), bias.to(tl.float32)
        acc = tl.dot(dy, tl.trans(bias), acc, input_precision="ieee")
    gates = tl.zeros((BT, BE), tl.float32)
    for slot in tl.static_range(SLOTS):
        assignment = token * SLOTS + slot
        expert = tl.load(index_ptr + assignment, mask=ok, other=-1).to(tl.int32)
        chosen = expert[:, None] == offs_e[None, :]
        here = (expert >= first) & (expert < first + BE)
        tl.store(dgate_ptr + assignment, tl.sum(tl.where(chosen, acc, 0.0), 1), mask=here)
        if TABLE:
            gates += tl.where(chosen, tl.load(gate_ptr + assignment, mask=ok, other=0.0)[:, None], 0.0)
    if TABLE:
        tl.store(table_ptr + token[:, None].to(tl.int64) * E + offs_e[None, :], gates, mask=ok[:, None] & (offs_e < E)[None, :])


@triton.jit
def dispatch_kernel(x_ptr, inverse_ptr, out_ptr, T, D, SLOTS: tl.constexpr, BT: tl.constexpr, B: tl.constexpr):
    """Each token's row to the K places that it has in the order of experts."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    offs = tl.program_id(1) * B + tl.arange(0, B)
    ok = (token < T)[:, None] & (offs < D)[None, :]
    x = tl.load(x_ptr + token[:, None].to(tl.int64) * D + offs[None, :], mask=ok, other=0.0)
    for slot in tl.static_range(SLOTS):
        row = tl.load(inverse_ptr + token * SLOTS + slot, mask=token < T, other=0)
        tl.store(out_ptr + row[:, None].to(tl.int64) * D + offs[None, :], x, mask=ok)


@triton.jit
def _add_product(acc, a_tile, b, row, ok, r, n0, N, DESC: tl.constexpr, EVEN_N: tl.constexpr, WIDEN: tl.constexpr, BN: tl.constexpr):
    """acc + a^T b, of BN columns of `b` from n0 on; `row` starts at r."""
    if DESC:
        b_tile = b.load([r, n0])
    else:
        offs_n = n0 + tl.arange(0, BN)
        held = ok[:, None] if EVEN_N else ok[:, None] & (offs_n < N)[None, :]
        b_tile = tl.load(b + row[:, None].to(tl.int64) * N + offs_n[None, :], mask=held, other=0.0)
    if WIDEN:
        b_tile = b_tile.to(tl.float32)
    return tl.dot(tl.trans(a_tile), b_tile, acc, input_precision="ieee")


@triton.jit
def weight_gradient_kernel(
    a_ptr,
    b,
    order_ptr,
    tile_ptr,
    out_ptr,
    work_ptr,
    M,
    N,
    size,
    SLOTS,
    TRANSPOSED: tl.constexpr,
    B_DESC: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The sum of a^T b over a chunk of an expert's rows: to `out` where it is the only one, else in float32 to its slot of `work`.

    `a` is read in the rows of the tokens and `b`, with B_DESC through a descriptor, in the order of experts: there the rows after the chunk
    are not masked, as those that they are multiplied with are zero. The result is written as it is or, TRANSPOSED, as b^T a. A tile has
    PARTS (1 or 3) sums of BN columns each, as Triton has sizes of powers of two alone.
    """
    across, down = tl.cdiv(N, PARTS * BN), tl.cdiv(M, BM)
    tile = tl.program_id(0) // (across * down)
    m, n = tl.program_id(0) // across % down, tl.program_id(0) % across
    expert, begin, end = rows_of(tile_ptr, tile)
    if expert < 0:
        return
    offs_m, offs_k = m * BM + tl.arange(0, BM), tl.arange(0, BK)
    n0 = n * PARTS * BN
    acc = tl.zeros((BM, BN), tl.float32)
    second, third = acc, acc
    for r in range(begin, end, BK):
        row = r + offs_k
        ok = row < end
        # A load that waits for another: with five stages the compiler has the order two steps before the rows, and these two before use.
        token = tl.load(order_ptr + row, mask=ok, other=0) // SLOTS
        a_ok = ok[:, None] if EVEN_M else ok[:, None] & (offs_m < M)[None, :]
        a_tile = tl.load(a_ptr + token[:, None].to(tl.int64) * M + offs_m[None, :], mask=a_ok, other=0.0)
        if WIDEN:
            a_tile = a_tile.to(tl.float32)
        acc = _add_product(acc, a_tile, b, row, ok, r, n0, N, B_DESC, EVEN_N, WIDEN, BN)
        if PARTS == 3:
            second = _add_product(second, a_tile, b, row, ok, r, n0 + BN, N, B_DESC, EVEN_N, WIDEN, BN)
            third = _add_product(third, a_tile, b, row, ok, r, n0 + 2 * BN, N, B_DESC, EVEN_N, WIDEN, BN)
    slot = tl.load(tile_ptr + 4 * tile + 3)
    for j in tl.static_range(PARTS):
        offs_n = n0 + j * BN + tl.arange(0, BN)
        total = acc if j == 0 else second if j == 1 else third
        at = offs_n[None, :] * M + offs_m[:, None] if TRANSPOSED else offs_m[:, None] * N + offs_n[None, :]
        held = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if slot < 0:
            tl.store(out_ptr + expert.to(tl.int64) * size + at, total, mask=held)
        else:
            tl.store(work_ptr + slot.to(tl.int64) * size + at, total, mask=held)


@triton.jit
def add_chunks_kernel(work_ptr, span_ptr, out_ptr, size, B: tl.constexpr):
    """Gradients of the experts that have several chunks, and zero for those that have none.

    A program takes many pieces: most experts have one chunk, and to start a program for each piece of them took longer than a sum.
    """
    expert = tl.program_id(1)
    count, slot = tl.load(span_ptr + 3 * expert + 1), tl.load(span_ptr + 3 * expert + 2)
    if count == 1:
        return
    for start in range(tl.program_id(0) * B, size, tl.num_programs(0) * B):
        offs = start + tl.arange(0, B)
        total = tl.zeros((B,), tl.float32)
        for i in range(count):
            total += tl.load(work_ptr + (slot + i).to(tl.int64) * size + offs, mask=offs < size, other=0.0)
        tl.store(out_ptr + expert.to(tl.int64) * size + offs, total, mask=offs < size)


@triton.jit
def add_tiles_kernel(sum_ptr, span_ptr, out_ptr, H, L: tl.constexpr, B: tl.constexpr):
    """Sums over each expert's tiles."""
    expert = tl.program_id(1)
    first, count = tl.load(span_ptr + 3 * expert), tl.load(span_ptr + 3 * expert + 1)
    offs = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros((L, B), tl.float32)
    for i in range(0, count, L):
        tile = i + tl.arange(0, L)
        at = (first + tile)[:, None].to(tl.int64) * H + offs[None, :]
        total += tl.load(sum_ptr + at, mask=(tile < count)[:, None] & (offs < H)[None, :], other=0.0)
    tl.store(out_ptr + expert.to(tl.int64) * H + offs, tl.sum(total, 0), mask=offs < H)


@triton.jit
def add_slots_kernel(row_ptr, inverse_ptr, out_ptr, T, D, SLOTS: tl.constexpr, BT: tl.constexpr, B: tl.constexpr):
    """(T, D) the sum over a token's experts of rows in the order of experts."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    offs = tl.program_id(1) * B + tl.arange(0, B)
    ok = (token < T)[:, None] & (offs < D)[None, :]
    total = tl.zeros((BT, B), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(inverse_ptr + token * SLOTS + slot, mask=token < T, other=0)
        total += tl.load(row_ptr + row[:, None].to(tl.int64) * D + offs[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + token[:, None].to(tl.int64) * D + offs[None, :], total, mask=ok)
