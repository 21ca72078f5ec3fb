"""The products of sparse experts by rows, as Triton kernels: what surrounds a product is done where it is read or written.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert. With g a row's gate, x its token and dy
the gradient of that token's output,

    up      z = x up + bias;  gated = g GELU(z)              x read through the order
    down    y = gated down + g bias                           written to the token's row where K = 1
    hidden  dh = dy down^T;  dz = g dh GELU'(z);  dg = sum dh GELU(z);  sums of dz over a tile's rows      dy read through the order
    token   dx = dz up^T                                      as `down`

and what sums over rows, gradients of weights and biases, is in `triton_sums`. Where rows were put in order, x and dy are read as they lie.

The gate enters with GELU and not with the output: then the gradient of `down` is a plain product of what is in memory, and no product has
to scale an operand on its way from memory to the tensor cores (ScatterMoE, arXiv 2403.08245, scales the gradient in a pass of its own).
That d(gate) comes out of dh and GELU(z), and needs no output of the experts, is SonicMoE's (arXiv 2512.14080). Ours: GELU(z) is kept
beside z, since here it needs no recomputation and costs a dense MLP in PyTorch the same memory.

A tile is up to BM rows of one expert, which a map tells (see `triton_sorting`), by BN columns; programs next to each other take the same
rows, so that these are read from memory once. In `up`, `down` and `token` a program stays and takes one tile after another: the loops over
tiles and over a tile's steps are one for the compiler, which so has the operands of the next tile read while the last is finished. In
`hidden` this does not pay, as the sums of columns are products too. Sums are in float32, and nothing is added atomically: results are the
same in every run. Rows beyond the end of a tile repeat its last one where they are read, and are not written.
"""

# Triton compiles these functions; to a checker of Python their values are not what they are.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["hidden_gradient_kernel", "out_kernel", "rows_of", "up_kernel"]

_INTERPRETED = tl.constexpr(bool(os.environ.get("TRITON_INTERPRET")))
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
_MINUS_HALF_LOG2E = tl.constexpr(-0.7213475204444817)
# erfc(x) = t (a1 + t (a2 + ...)) exp(-x^2), t = 1 / (1 + p x), x >= 0, to 1.5e-7: Abramowitz and Stegun 7.1.26.
_P = tl.constexpr(0.3275911)
_A1, _A2, _A3 = tl.constexpr(0.254829592), tl.constexpr(-0.284496736), tl.constexpr(1.421413741)
_A4, _A5 = tl.constexpr(-1.453152027), tl.constexpr(1.061405429)


@triton.jit
def _exp2(x):
    """To two units in the last place, in one instruction: Triton's own takes five more for numbers that are too small to matter here."""
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _reciprocal(x):
    """As `_exp2`."""
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _prefetch(ptr, row_M, H, n0, BN: tl.constexpr):
    """Have columns n0 to n0 + BN of rows of length H brought from memory to the cache while a product is made."""
    if not _INTERPRETED:
        LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
        column = tl.minimum(n0 + tl.arange(0, (BN + LINE - 1) // LINE) * LINE, H - 1)
        address = (ptr + row_M[:, None].to(tl.int64) * H + column[None, :]).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _fold_rows(x, dtype: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """x, (BM, BN), with its lower half of the rows added to the upper one and rounded to `dtype`.

    Threads that share a column are many; a thread has the same row of both halves, where rows are as they are for loads and stores.
    """
    return tl.sum(x.reshape(2, BM // 2, BN), 0).to(dtype)


@triton.jit
def _sum_columns(half, M: tl.constexpr):
    """Columns' sums of `half`, (M, N), by the tensor cores where these know its type."""
    if half.dtype == tl.float32 or _INTERPRETED:
        total = tl.sum(half.to(tl.float32), 0)
    else:
        total = tl.max(tl.dot(tl.full((16, M), 1.0, half.dtype), half), 0)  # of sixteen that are equal
    return total


@triton.jit
def _normal(z):
    """Phi(z) and exp(-z^2 / 2), of which the first takes the second: less than half the instructions of erf and exp."""
    x = tl.abs(z) * _SQRT_HALF
    exponential = _exp2(z * z * _MINUS_HALF_LOG2E)
    t = _reciprocal(1.0 + _P * x)
    beyond = 0.5 * exponential * t * (_A1 + t * (_A2 + t * (_A3 + t * (_A4 + t * _A5))))
    return tl.where(z < 0, beyond, 1 - beyond), exponential


@triton.jit
def rows_of(tile_ptr, tile):
    """A tile's expert (-1: none) and rows."""
    return tl.load(tile_ptr + 4 * tile), tl.load(tile_ptr + 4 * tile + 1), tl.load(tile_ptr + 4 * tile + 2)


@triton.jit
def _num_tiles(last_ptr):
    """How many there are: the last expert's first tile and their number."""
    return tl.load(last_ptr) + tl.load(last_ptr + 1)


@triton.jit
def _multiply(
    a,
    b,
    row_M,
    a_row,
    b_row,
    n0,
    K,
    N,
    A_DESC: tl.constexpr,
    B_DESC: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """(BM, BN) rows of `a` times the matrix that starts in row `b_row` of `b`, which has rows of length N or, transposed, of length K.

    Through descriptors `a` is read from row a_row on, else in rows row_M.
    """
    offs_n = n0 + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        offs_k = k + tl.arange(0, BK)
        if A_DESC:
            a_tile = a.load([a_row, k])
        else:
            a_ptrs = a + row_M[:, None].to(tl.int64) * K + offs_k[None, :]
            a_tile = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=(offs_k < K)[None, :], other=0.0)
        if B_DESC:
            b_tile = tl.trans(b.load([b_row + n0, k])) if B_TRANSPOSED else b.load([b_row + k, n0])
        else:
            if B_TRANSPOSED:
                b_ptrs = b + (b_row + offs_n)[None, :].to(tl.int64) * K + offs_k[:, None]
            else:
                b_ptrs = b + (b_row + offs_k)[:, None].to(tl.int64) * N + offs_n[None, :]
            held = (offs_k < K)[:, None] & (offs_n < N)[None, :]
            b_tile = tl.load(b_ptrs) if EVEN_K and EVEN_N else tl.load(b_ptrs, mask=held, other=0.0)
        if WIDEN:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _split(acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """PARTS pieces of the columns, in their order: what follows a product would not fit into registers for all of them at once."""
    if PARTS == 1:
        parts = (acc,)
    else:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        parts = _split(left, BM, BN // 2, PARTS // 2) + _split(right, BM, BN // 2, PARTS // 2)
    return parts


@triton.jit
def up_kernel(
    x,
    up,
    bias_ptr,
    gate_ptr,
    order_ptr,
    tile_ptr,
    last_ptr,
    z_ptr,
    gated_ptr,
    D,
    H,
    SLOTS,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    IN_ORDER: tl.constexpr,
    A_DESC: tl.constexpr,
    B_DESC: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """z = x up + bias, written where KEEP, and g GELU(z)."""
    across = tl.cdiv(H, BN)
    for i in tl.range(tl.program_id(0), _num_tiles(last_ptr) * across, tl.num_programs(0), flatten=True):
        n = i % across
        expert, begin, end = rows_of(tile_ptr, i // across)
        row = begin + tl.arange(0, BM)
        rows = tl.minimum(row, end - 1)
        assignment = tl.load(order_ptr + rows)
        rows = rows if IN_ORDER else assignment // SLOTS
        acc = _multiply(x, up, rows, begin, expert * D, n * BN, D, H, A_DESC, B_DESC, False, EVEN_K, EVEN_N, WIDEN, BM, BN, BK)
        gate = tl.load(gate_ptr + assignment)
        parts = _split(acc, BM, BN, PARTS)
        for j in tl.static_range(PARTS):
            offs_n = n * BN + j * (BN // PARTS) + tl.arange(0, BN // PARTS)
            z = parts[j]
            if HAS_BIAS:
                z += tl.load(bias_ptr + expert.to(tl.int64) * H + offs_n, mask=offs_n < H, other=0.0).to(tl.float32)[None, :]
            z = z.to(gated_ptr.dtype.element_ty)  # rounded first: backward sees the z that GELU saw
            ok = (row < end)[:, None]
            if not EVEN_N:
                ok = ok & (offs_n < H)[None, :]
            at = row[:, None].to(tl.int64) * H + offs_n[None, :]
            if KEEP:
                tl.store(z_ptr + at, z, mask=ok)
            z = z.to(tl.float32)
            below, _ = _normal(z)
            tl.store(gated_ptr + at, z * below * gate[:, None], mask=ok)


@triton.jit
def out_kernel(
    a,
    weight,
    bias_ptr,
    gate_ptr,
    order_ptr,
    tile_ptr,
    last_ptr,
    out_ptr,
    K,
    N,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCATTER: tl.constexpr,
    A_DESC: tl.constexpr,
    B_DESC: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Rows times their expert's weight, or its transpose, plus gate times bias; with SCATTER written to the token's row."""
    across = tl.cdiv(N, BN)
    for i in tl.range(tl.program_id(0), _num_tiles(last_ptr) * across, tl.num_programs(0), flatten=True):
        n = i % across
        expert, begin, end = rows_of(tile_ptr, i // across)
        row = begin + tl.arange(0, BM)
        rows = tl.minimum(row, end - 1)
        b_row = expert * N if TRANSPOSED else expert * K
        acc = _multiply(a, weight, rows, begin, b_row, n * BN, K, N, A_DESC, B_DESC, TRANSPOSED, EVEN_K, EVEN_N, WIDEN, BM, BN, BK)
        if SCATTER or HAS_BIAS:
            assignment = tl.load(order_ptr + rows)
        to = assignment if SCATTER else rows
        if HAS_BIAS:
            gate = tl.load(gate_ptr + assignment)
        parts = _split(acc, BM, BN, PARTS)
        for j in tl.static_range(PARTS):
            offs_n = n * BN + j * (BN // PARTS) + tl.arange(0, BN // PARTS)
            y = parts[j]
            if HAS_BIAS:
                bias = tl.load(bias_ptr + expert.to(tl.int64) * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
                y += gate[:, None] * bias[None, :]
            ok = (row < end)[:, None] & (offs_n < N)[None, :]
            tl.store(out_ptr + to[:, None].to(tl.int64) * N + offs_n[None, :], y, mask=ok)


@triton.jit
def hidden_gradient_kernel(
    dy,
    down,
    z_ptr,
    gate_ptr,
    order_ptr,
    tile_ptr,
    dz_ptr,
    dgate_ptr,
    sum_ptr,
    D,
    H,
    R,
    SLOTS,
    HAS_BIAS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    A_DESC: tl.constexpr,
    B_DESC: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dz; what these columns contribute to d(gate), at dgate[n, assignment]; and dz summed over the tile's rows, at sum[tile, column]."""
    across = tl.cdiv(H, BN)
    tile, n = tl.program_id(0) // across, tl.program_id(0) % across
    expert, begin, end = rows_of(tile_ptr, tile)
    if expert < 0:
        return
    row = begin + tl.arange(0, BM)
    rows = tl.minimum(row, end - 1)
    _prefetch(z_ptr, rows, H, n * BN, BN)
    assignment = tl.load(order_ptr + rows)
    rows = rows if IN_ORDER else assignment // SLOTS
    acc = _multiply(dy, down, rows, begin, expert * H, n * BN, D, H, A_DESC, B_DESC, True, EVEN_K, EVEN_N, WIDEN, BM, BN, BK)
    gate = tl.load(gate_ptr + assignment)
    dgate = tl.zeros((BM,), tl.float32)
    halves = ()
    parts = _split(acc, BM, BN, PARTS)
    for j in tl.static_range(PARTS):
        offs_n = n * BN + j * (BN // PARTS) + tl.arange(0, BN // PARTS)
        ok = (row < end)[:, None]
        if not EVEN_N:
            ok = ok & (offs_n < H)[None, :]
        at = row[:, None].to(tl.int64) * H + offs_n[None, :]
        z = tl.load(z_ptr + at, mask=ok, other=0.0).to(tl.float32)  # 0 beyond the last column, where GELU is 0 then
        below, exponential = _normal(z)
        dgate += tl.sum(parts[j] * (z * below), 1)
        dz = parts[j] * gate[:, None] * (below + z * (_INVERSE_SQRT_2PI * exponential))
        tl.store(dz_ptr + at, dz, mask=ok)
        if HAS_BIAS:
            half = _fold_rows(tl.where(ok, dz, 0.0), dz_ptr.dtype.element_ty, BM, BN // PARTS)
            halves += (half,)
            if j % 2:  # the columns of two parts in one product
                half = tl.join(halves[j - 1], half).permute(0, 2, 1).reshape(BM // 2, BN // PARTS * 2)
                offs_n = n * BN + (j - 1) * (BN // PARTS) + tl.arange(0, BN // PARTS * 2)
            if j % 2 or PARTS == 1:
                tl.store(sum_ptr + tile.to(tl.int64) * H + offs_n, _sum_columns(half, BM // 2), mask=offs_n < H)
    tl.store(dgate_ptr + n.to(tl.int64) * R + assignment, dgate, mask=row < end)
