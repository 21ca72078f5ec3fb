"""The products of sparse experts, forward and backward, as Triton kernels: what surrounds a product is done where it is read or written.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert. With g a row's gate, x its token and dy
the gradient of that token's output,

    up      z = x up + bias;  gated = g GELU(z)              x read through the order
    down    y = gated down + g bias                           written to the token's row where K = 1
    hidden  dh = dy down^T;  dz = g dh GELU'(z);  dg = sum dh GELU(z);  sums of dz over a tile's rows      dy read through the order
    token   dx = dz up^T                                      as `down`
    bias    dg += dy bias;  sums of g dy over a tile's rows   dy read through the order, no product; for K = 1
    gate    dg += dy bias;  a table of g by token and expert  for K > 1, where a product over tokens reads less than a pass over rows
    weight  d(up) = x^T dz;  d(down)^T = dy^T gated           over the rows of a chunk of one expert; x, dy read through the order

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

__all__ = [
    "add_chunks_kernel",
    "add_slots_kernel",
    "add_tiles_kernel",
    "bias_gate_kernel",
    "bias_gradient_kernel",
    "dispatch_kernel",
    "hidden_gradient_kernel",
    "out_kernel",
    "up_kernel",
    "weight_gradient_kernel",
]

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
def _rows_of(tile_ptr, tile):
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
        expert, begin, end = _rows_of(tile_ptr, i // across)
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
        expert, begin, end = _rows_of(tile_ptr, i // across)
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
    expert, begin, end = _rows_of(tile_ptr, tile)
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
    expert, begin, end = _rows_of(tile_ptr, tile)
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
    expert, begin, end = _rows_of(tile_ptr, tile)
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
