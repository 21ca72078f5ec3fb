"""Sinkhorn and its implicit gradient as Triton kernels: one program a picture, nothing of size N x M in memory but cost and plan.

The formulas are those of `backend_torch` and `implicit`, in the log domain and in logarithms to base 2. Once an iteration a program
streams its picture's cost, in tiles of R patches by all M concepts; each program decides for itself when it stops, so that nothing
waits for the host. All sums are in float32, whatever the cost is.

A tile is K = M / 32 pieces of (R, 32), as many as are needed and no power of two. A patch's row of a piece lies within one warp and
those of all pieces in the same, so that its sums need no barrier. What is known of the concepts lies in an array `work` between the
tiles (pieces of 32 values) and the update (all at once).
"""

# Triton compiles these functions; to a checker of Python their values are not what they are.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

# ruff: noqa: RUF005 (it cannot unpack into a tuple either)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["WORK_BACKWARD", "WORK_FORWARD", "backward_kernel", "forward_kernel"]

# Vectors over the concepts that a program of either kernel needs room for, and as many again as so many tiles have rows.
WORK_FORWARD, WORK_BACKWARD = (3, 1), (5, 2)

_SLOW = tl.constexpr(0.4)  # see backend_torch
_FLAT = tl.constexpr(1e-6)  # see implicit
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(1.2e-38)
_NO = tl.constexpr(float("-inf"))
_NOTHING = tl.constexpr(-1e30)  # a logarithm of nothing that differences do not make NaN
# Were the compiler to know that strides divide by 16, it would read four numbers a thread and move them between warps for the rest.
_STRIDES = ["M", "cost_b", "cost_n", "theta_b", "gamma_b"]


@triton.jit
def _tile(ptr, rows, stride_n, stride_m, M, K: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Pieces FIRST to LAST of K, each (R, 32), 0 beyond the last concept."""
    tile = ()
    for j in tl.static_range(FIRST, LAST):
        columns = j * 32 + tl.arange(0, 32)[None, :]
        if j < K - 1:
            piece = tl.load(ptr + rows * stride_n + columns * stride_m)
        else:
            piece = tl.load(ptr + rows * stride_n + columns * stride_m, mask=columns < M, other=0.0)
        tile = tile + (piece.to(tl.float32),)
    return tile


@triton.jit
def _pieces(ptr, K: tl.constexpr):
    """K pieces (1, 32) of a vector over the concepts."""
    pieces = ()
    for j in tl.static_range(K):
        pieces = pieces + (tl.load(ptr + j * 32 + tl.arange(0, 32)[None, :]),)
    return pieces


@triton.jit
def _zeros(R: tl.constexpr, K: tl.constexpr):
    tile = ()
    for _ in tl.static_range(K):
        tile = tile + (tl.zeros((R, 32), tl.float32),)
    return tile


@triton.jit
def _sum_rows(tile, K: tl.constexpr):
    """(R, 1)."""
    total = tile[0]
    for j in tl.static_range(1, K):
        total += tile[j]
    return tl.sum(total, 1, keep_dims=True)


@triton.jit
def _exponentials(y, cost, scale, K: tl.constexpr):
    """K pieces 2^(y_j - C_ij scale - most_i), and (R, 1) most_i and their sum."""
    x = ()
    for j in tl.static_range(K):
        x = x + (y[j] - cost[j] * scale,)
    most = x[0]
    for j in tl.static_range(1, K):
        most = tl.maximum(most, x[j])
    most = tl.max(most, 1, keep_dims=True)
    e = ()
    for j in tl.static_range(K):
        e = e + (tl.exp2(x[j] - most),)
    return e, most, _sum_rows(e, K)


@triton.jit
def _plus_weighted(tile, weight, other, K: tl.constexpr):
    """tile + weight * other; weight is (R, 1)."""
    result = ()
    for j in tl.static_range(K):
        result = result + (tile[j] + weight * other[j],)
    return result


@triton.jit
def _store_parts(ptr, tile, R: tl.constexpr, K: tl.constexpr):
    """Write a tile for `_columns`: sums across warps in shared memory, piece by piece, would wait K times at a barrier."""
    rows = tl.arange(0, R)[:, None]
    for j in tl.static_range(K):
        tl.store(ptr + rows * (32 * K) + j * 32 + tl.arange(0, 32)[None, :], tile[j])


@triton.jit
def _columns(ptr, offs, held, R: tl.constexpr, K: tl.constexpr):
    """Sums over the rows of what `_store_parts` wrote, after a barrier; all warps add in the same order."""
    total = tl.load(ptr + offs, mask=held, other=0.0)
    for i in tl.static_range(1, R):
        total += tl.load(ptr + i * (32 * K) + offs, mask=held, other=0.0)
    return total


@triton.jit
def _store_tile(ptr, rows, n_ok, tile, M, K: tl.constexpr):
    for j in tl.static_range(K):
        columns = j * 32 + tl.arange(0, 32)[None, :]
        tl.store(ptr + rows * M + columns, tile[j], mask=n_ok & (columns < M))


@triton.jit
def _store_rows(ptr, offs_n, N, value):
    """Write (R, 1), by the first lane of those that hold a row: to spread it over the lanes would wait at a barrier."""
    lanes = tl.arange(0, 32)[None, :]
    tl.store(ptr + tl.minimum(offs_n, N - 1) + lanes, value + tl.zeros((1, 32), tl.float32), mask=(offs_n < N) & (lanes == 0))


@triton.jit
def _store_first_columns(
    ptr,
    cost_ptr,
    theta_ptr,
    cost_n,
    cost_m,
    theta_n,
    N,
    M,
    scale,
    R: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Write log2 sum_i theta_i 2^(-C_ij scale) for pieces FIRST to LAST."""
    most, total = (), ()
    for _ in tl.static_range(FIRST, LAST):
        most = most + (tl.full((R, 32), _NOTHING, tl.float32),)
        total = total + (tl.zeros((R, 32), tl.float32),)
    for start in range(0, N, R):
        offs_n = start + tl.arange(0, R)[:, None]
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=offs_n < N, other=0.0).to(tl.float32)
        log_theta = tl.where(theta > 0, tl.log2(tl.where(theta > 0, theta, 1.0)), _NOTHING)
        cost = _tile(cost_ptr, tl.minimum(offs_n, N - 1), cost_n, cost_m, M, K, FIRST, LAST)
        new_most, new_total = (), ()
        for j in tl.static_range(LAST - FIRST):
            x = log_theta - cost[j] * scale
            new = tl.maximum(most[j], x)
            new_most = new_most + (new,)
            new_total = new_total + (total[j] * tl.exp2(most[j] - new) + tl.exp2(x - new),)
        most, total = new_most, new_total
    for j in tl.static_range(LAST - FIRST):
        top = tl.max(most[j], 0, keep_dims=True)
        column = tl.sum(total[j] * tl.exp2(most[j] - top), 0, keep_dims=True)
        tl.store(ptr + (FIRST + j) * 32 + tl.arange(0, 32)[None, :], tl.log2(tl.maximum(column, _TINY)) + top)


@triton.jit(do_not_specialize=_STRIDES)
def forward_kernel(
    cost_ptr,
    theta_ptr,
    gamma_ptr,
    value_ptr,
    log_u_ptr,
    log_v_ptr,
    row_ptr,
    residual_ptr,
    num_iter_ptr,
    work_ptr,
    N,
    M,
    cost_b,
    cost_n,
    cost_m,
    theta_b,
    theta_n,
    gamma_b,
    gamma_m,
    scale,
    tol,
    max_iter,
    power_u,
    power_v,
    over_relax_v,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    RELAX_U: tl.constexpr,
    RELAX_V: tl.constexpr,
    ACCELERATE: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Potentials of a picture and its plan or, with SCORE, the column sums of plan * (1 - cost) in its place.

    scale is log2(e) / eps, over_relax_v eps / relax_concept, V the power of two that holds 32 K; row_ptr takes
    log2 sum_j 2^(v_j - C_ij scale).
    """
    b = tl.program_id(0).to(tl.int64)
    cost_ptr += b * cost_b
    theta_ptr += b * theta_b
    gamma_ptr += b * gamma_b
    log_u_ptr += b * N
    row_ptr += b * N
    y_ptr = work_ptr + b * ((3 + R) * 32 * K)
    mapped_ptr = y_ptr + 32 * K
    column_ptr = mapped_ptr + 32 * K
    part_ptr = column_ptr + 32 * K
    offs = tl.arange(0, V)
    held = offs < 32 * K
    # In halves where there are many: what a column needs on the way would not fit into registers.
    HALF: tl.constexpr = K if K <= 16 else (K + 1) // 2
    _store_first_columns(column_ptr, cost_ptr, theta_ptr, cost_n, cost_m, theta_n, N, M, scale, R, K, 0, HALF)
    if HALF < K:
        _store_first_columns(column_ptr, cost_ptr, theta_ptr, cost_n, cost_m, theta_n, N, M, scale, R, K, HALF, K)
    tl.debug_barrier()
    gamma = tl.load(gamma_ptr + offs * gamma_m, mask=offs < M, other=0.0).to(tl.float32)
    ok = gamma > 0
    first = tl.log2(tl.where(ok, gamma, 1.0)) - power_v * tl.load(column_ptr + offs, mask=held, other=0.0)
    tl.store(y_ptr + offs, tl.where(ok, first, _NOTHING), mask=held)
    tl.store(mapped_ptr + offs, tl.where(ok, first, _NOTHING), mask=held)
    least = tl.full((), float("inf"), tl.float32)
    last = tl.full((), float("inf"), tl.float32)
    momentum = tl.full((), 1.0, tl.float32)
    fast = tl.full((), 1, tl.int32)
    count = tl.full((), 0, tl.int32)
    while (count < max_iter) & (least >= tol):
        tl.debug_barrier()
        pieces = _pieces(y_ptr, K)
        sums = _zeros(R, K)
        for start in range(0, N, R):
            offs_n = start + tl.arange(0, R)[:, None]
            theta = tl.load(theta_ptr + offs_n * theta_n, mask=offs_n < N, other=0.0).to(tl.float32)
            cost = _tile(cost_ptr, tl.minimum(offs_n, N - 1), cost_n, cost_m, M, K, 0, K)
            e, most, total = _exponentials(pieces, cost, scale, K)
            weight = theta / total
            if RELAX_U:
                weight = tl.where(theta > 0, weight * tl.exp2((1 - power_u) * (most + tl.log2(total))), 0.0)
            sums = _plus_weighted(sums, weight, e, K)
        _store_parts(part_ptr, sums, R, K)
        tl.debug_barrier()
        gamma = tl.load(gamma_ptr + offs * gamma_m, mask=offs < M, other=0.0).to(tl.float32)
        ok = gamma > 0
        log_gamma = tl.log2(tl.where(ok, gamma, 1.0))
        column = _columns(part_ptr, offs, held, R, K)
        y = tl.load(y_ptr + offs, mask=held, other=_NOTHING)
        mapped = tl.load(mapped_ptr + offs, mask=held, other=_NOTHING)
        target = gamma
        if RELAX_V:
            target = gamma * tl.exp2(-over_relax_v * (y - log_gamma))
        residual = tl.sum(tl.where(ok, tl.abs(column - target), 0.0), 0)
        new = (1 - power_v) * log_gamma + power_v * (y + log_gamma - tl.log2(tl.maximum(column, _TINY)))
        new = tl.where(ok, new, _NOTHING)
        following = new
        kept = M
        if ACCELERATE:
            better = residual < least
            kept = tl.where(better, M, 0)
            least = tl.where(better, residual, least)
            ratio = residual / last
            fast = tl.where(ratio > 1, 1, tl.where(ratio > _SLOW, 0, fast))
            against = tl.sum((y - new) * (new - mapped) * gamma, 0) > 0
            momentum = tl.where((fast == 1) | against, 1.0, momentum)
            next_momentum = (1 + tl.sqrt(1 + 4 * momentum * momentum)) / 2
            following = new + tl.where(fast == 1, 0.0, (momentum - 1) / next_momentum) * (new - mapped)
            last, momentum = residual, next_momentum
        else:
            least = residual
        tl.store(log_v_ptr + b * M + offs, tl.where(ok, y * _LN2, _NO), mask=offs < kept)
        tl.store(mapped_ptr + offs, new, mask=held)
        tl.store(y_ptr + offs, following, mask=held)
        count += 1
    tl.store(residual_ptr + b, least)
    tl.store(num_iter_ptr + b, count)
    tl.store(y_ptr + offs, tl.load(log_v_ptr + b * M + offs, mask=ok, other=_NOTHING) * _LOG2E, mask=held)
    tl.debug_barrier()
    pieces = _pieces(y_ptr, K)
    sums = _zeros(R, K)
    for start in range(0, N, R):
        offs_n = start + tl.arange(0, R)[:, None]
        n_ok = offs_n < N
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
        cost = _tile(cost_ptr, tl.minimum(offs_n, N - 1), cost_n, cost_m, M, K, 0, K)
        e, most, total = _exponentials(pieces, cost, scale, K)
        row = most + tl.log2(total)
        weight = theta / total
        if RELAX_U:
            weight = tl.where(theta > 0, weight * tl.exp2((1 - power_u) * row), 0.0)
        log_u = tl.where(theta > 0, (tl.log2(tl.where(theta > 0, theta, 1.0)) - power_u * row) * _LN2, _NO)
        _store_rows(log_u_ptr, offs_n, N, log_u)
        _store_rows(row_ptr, offs_n, N, row)
        plan = ()
        for j in tl.static_range(K):
            plan = plan + (weight * e[j] * (1 - cost[j]) if SCORE else weight * e[j],)
        if SCORE:
            sums = _plus_weighted(sums, 1.0, plan, K)
        else:
            _store_tile(value_ptr + b * N * M, offs_n, n_ok, plan, M, K)
    if SCORE:
        for j in tl.static_range(K):
            columns = j * 32 + tl.arange(0, 32)[None, :]
            tl.store(value_ptr + b * M + columns, tl.sum(sums[j], 0, keep_dims=True), mask=columns < M)


@triton.jit
def _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R: tl.constexpr, RELAX_U: tl.constexpr):
    """(R, 1) rows to read, which are there, log2 sums of the rows, and masses of the plan's rows."""
    offs_n = start + tl.arange(0, R)[:, None]
    n_ok, rows = offs_n < N, tl.minimum(offs_n, N - 1)
    row = tl.load(row_ptr + rows)
    if RELAX_U:
        mass = tl.exp2(tl.load(log_u_ptr + offs_n, mask=n_ok, other=_NO) * _LOG2E + row)
    else:
        mass = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
    return rows, n_ok, row, mass


@triton.jit
def _shares(v, cost, row, scale, K: tl.constexpr):
    """K pieces of S, the plan's rows as shares."""
    s = ()
    for j in tl.static_range(K):
        s = s + (tl.exp2(v[j] - cost[j] * scale - row),)
    return s


@triton.jit
def _gradient(ptr, rows, stride_n, stride_m, M, cost, K: tl.constexpr, SCORE: tl.constexpr):
    """K pieces of the plan's gradient; of scores, (1 - C_ij) times that of score j, which has no stride over patches."""
    gradient = _tile(ptr, rows, stride_n, stride_m, M, K, 0, K)
    result = ()
    for j in tl.static_range(K):
        result = result + (gradient[j] * (1 - cost[j]) if SCORE else gradient[j],)
    return result


@triton.jit
def _times(tile, other, K: tl.constexpr):
    result = ()
    for j in tl.static_range(K):
        result = result + (tile[j] * other[j],)
    return result


@triton.jit(do_not_specialize=[*_STRIDES, "grad_b", "grad_n"])
def backward_kernel(
    cost_ptr,
    theta_ptr,
    gamma_ptr,
    log_u_ptr,
    log_v_ptr,
    row_ptr,
    grad_ptr,
    d_cost_ptr,
    d_theta_ptr,
    d_gamma_ptr,
    work_ptr,
    N,
    M,
    cost_b,
    cost_n,
    cost_m,
    theta_b,
    theta_n,
    gamma_b,
    gamma_m,
    grad_b,
    grad_n,
    grad_m,
    scale,
    inverse_eps,
    tolerance,
    max_steps,
    power_u,
    power_v,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    RELAX_U: tl.constexpr,
    RELAX_V: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Gradients of cost, theta and gamma, see `implicit`: conjugate gradients until the residual has fallen to `tolerance`."""
    b = tl.program_id(0).to(tl.int64)
    cost_ptr += b * cost_b
    theta_ptr += b * theta_b
    grad_ptr += b * grad_b
    log_u_ptr += b * N
    row_ptr += b * N
    d_theta_ptr += b * N
    v_ptr = work_ptr + b * ((5 + 2 * R) * 32 * K)
    scaled_ptr = v_ptr + 32 * K  # what a tile is multiplied by
    solved_ptr = scaled_ptr + 32 * K
    rest_ptr = solved_ptr + 32 * K
    to_ptr = rest_ptr + 32 * K
    part_ptr = to_ptr + 32 * K
    offs = tl.arange(0, V)
    held = offs < 32 * K
    gamma = tl.load(gamma_ptr + b * gamma_b + offs * gamma_m, mask=offs < M, other=0.0).to(tl.float32)
    ok = gamma > 0
    tl.store(v_ptr + offs, tl.load(log_v_ptr + b * M + offs, mask=ok, other=_NOTHING) * _LOG2E, mask=held)
    tl.debug_barrier()
    v = _pieces(v_ptr, K)
    columns, right = _zeros(R, K), _zeros(R, K)
    for start in range(0, N, R):
        rows, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
        cost = _tile(cost_ptr, rows, cost_n, cost_m, M, K, 0, K)
        s = _shares(v, cost, row, scale, K)
        w = _times(s, _gradient(grad_ptr, rows, grad_n, grad_m, M, cost, K, SCORE), K)
        mean = _sum_rows(w, K)
        columns = _plus_weighted(columns, mass, s, K)
        right = _plus_weighted(_plus_weighted(right, mass, w, K), -power_u * mean * mass, s, K)
        _store_rows(d_theta_ptr, start + tl.arange(0, R)[:, None], N, mean)
    _store_parts(part_ptr, columns, R, K)
    _store_parts(part_ptr + R * 32 * K, right, R, K)
    tl.debug_barrier()
    column = _columns(part_ptr, offs, held, R, K)
    scaling = tl.where(column > 0, tl.rsqrt(tl.maximum(column, _TINY)), 0.0)
    rest = scaling * _columns(part_ptr + R * 32 * K, offs, held, R, K)
    square = tl.sum(rest * rest, 0)
    enough = square * tolerance * tolerance
    tl.store(scaled_ptr + offs, scaling * rest, mask=held)
    tl.store(rest_ptr + offs, rest, mask=held)
    tl.store(to_ptr + offs, rest, mask=held)
    tl.store(solved_ptr + offs, tl.zeros((V,), tl.float32), mask=held)
    count = tl.full((), 0, tl.int32)
    while (count < max_steps) & (square > enough):
        tl.debug_barrier()
        direction = _pieces(scaled_ptr, K)
        image = _zeros(R, K)
        for start in range(0, N, R):
            rows, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
            s = _shares(v, _tile(cost_ptr, rows, cost_n, cost_m, M, K, 0, K), row, scale, K)
            image = _plus_weighted(image, mass * _sum_rows(_times(s, direction, K), K), s, K)
        _store_parts(part_ptr, image, R, K)
        tl.debug_barrier()
        to = tl.load(to_ptr + offs, mask=held, other=0.0)
        rest = tl.load(rest_ptr + offs, mask=held, other=0.0)
        full = to / power_v - power_u * scaling * _columns(part_ptr, offs, held, R, K)
        curvature = tl.sum(to * full, 0)
        bent = curvature > tl.sum(to * to, 0) * _FLAT
        step = tl.where(bent, square / tl.where(bent, curvature, 1.0), 0.0)
        rest -= step * full
        new = tl.sum(rest * rest, 0)
        tl.store(solved_ptr + offs, tl.load(solved_ptr + offs, mask=held, other=0.0) + step * to, mask=held)
        to = rest + new / square * to
        tl.store(rest_ptr + offs, rest, mask=held)
        tl.store(to_ptr + offs, to, mask=held)
        tl.store(scaled_ptr + offs, scaling * to, mask=held)
        square = tl.where(bent, new, 0.0)
        count += 1
    y = scaling * tl.load(solved_ptr + offs, mask=held, other=0.0)
    tl.store(scaled_ptr + offs, y, mask=held)
    if RELAX_V:
        y *= column / (power_v * tl.where(ok, gamma, 1.0))
    tl.store(d_gamma_ptr + b * M + offs, tl.where(ok, y, 0.0), mask=offs < M)
    tl.debug_barrier()
    shift = _pieces(scaled_ptr, K)
    for start in range(0, N, R):
        rows, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
        theta = tl.load(theta_ptr + rows * theta_n).to(tl.float32)
        cost = _tile(cost_ptr, rows, cost_n, cost_m, M, K, 0, K)
        s = _shares(v, cost, row, scale, K)
        inner = tl.load(d_theta_ptr + rows) - _sum_rows(_times(s, shift, K), K)
        gradient = _gradient(grad_ptr, rows, grad_n, grad_m, M, cost, K, SCORE)
        out = ()
        for j in tl.static_range(K):
            out = out + (mass * s[j] * (power_u * inner + shift[j] - gradient[j]) * inverse_eps,)
        if SCORE:  # the cost is also what is summed
            direct = _tile(grad_ptr, rows, grad_n, grad_m, M, K, 0, K)
            out = _plus_weighted(out, -mass, _times(s, direct, K), K)
        _store_tile(d_cost_ptr + b * N * M, rows, n_ok, out, M, K)
        if RELAX_U:
            inner *= tl.exp2((1 - power_u) * row)
        _store_rows(d_theta_ptr, start + tl.arange(0, R)[:, None], N, tl.where(theta > 0, inner, 0.0))
