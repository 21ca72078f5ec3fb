"""Sinkhorn and its implicit gradient as Triton kernels: one program a picture, nothing of size N x M in memory but cost and plan.

The formulas are those of `backend_torch` and `implicit`, in the log domain and in logarithms to base 2. A program streams its picture's
cost in tiles of R patches by all M concepts, once an iteration; of the concepts it keeps in registers what the tiles need, and leaves
the rest in (B, M) arrays, as what it needs again of the patches in (B, N) arrays. All sums are in float32, whatever the cost is. Every
program decides for itself when it stops: nothing waits for the host.

Concepts come in one or two blocks of K x 32: a tile is (K, R, 32), so that the row of a patch lies within one warp and its sums need no
barrier. 312 concepts are 8 x 32 and 2 x 32. The second block is absent where KB is 0. Strides are not specialised: were the compiler
to know that they divide by 16, it would read four numbers a thread and move them between warps for everything else.
"""

# Triton compiles these functions; to a checker of Python their values are not what they are.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]

_SLOW = tl.constexpr(0.4)  # see backend_torch
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(1.2e-38)
_FLAT = tl.constexpr(1e-6)  # see implicit
_NO = tl.constexpr(float("-inf"))
_NOTHING = tl.constexpr(-1e30)  # a logarithm of nothing that differences do not make NaN
_STRIDES = ["M", "cost_b", "cost_n", "theta_b", "gamma_b"]


@triton.jit
def _concepts(gamma_ptr, stride, start, M, K: tl.constexpr):
    """(K, 32) indices of a block of concepts, their masses, and which of them have any."""
    offs = start + tl.arange(0, K)[:, None] * 32 + tl.arange(0, 32)[None, :]
    gamma = tl.load(gamma_ptr + offs * stride, mask=offs < M, other=0.0).to(tl.float32)
    return offs, gamma, gamma > 0


@triton.jit
def _cost(ptr, offs_n, N, stride_n, stride_m, offs_m, M, FULL: tl.constexpr):
    """(K, R, 32). Beyond the ends it is that of the last patch or concept, which is cheaper than a mask and must count for nothing.

    FULL says that no concept of the block is beyond the end: its addresses then differ by constants.
    """
    columns = offs_m if FULL else tl.minimum(offs_m, M - 1)
    return tl.load(ptr + (tl.minimum(offs_n, N - 1) * stride_n)[None, :, None] + columns[:, None, :] * stride_m).to(tl.float32)


@triton.jit
def _store(ptr, offs_n, n_ok, offs_m, M, value):
    tl.store(ptr + offs_n[None, :, None] * M + offs_m[:, None, :], value, mask=n_ok[None, :, None] & (offs_m < M)[:, None, :])


@triton.jit
def _exponents(ptr, offs_n, N, stride_n, stride_m, offs_m, M, y, scale, FULL: tl.constexpr):
    """(K, R, 32) y_j - C_ij / eps; y is `_NOTHING` where there is no concept."""
    return y[:, None, :] - _cost(ptr, offs_n, N, stride_n, stride_m, offs_m, M, FULL) * scale


@triton.jit
def _row_sum(x):
    """(R,) of (K, R, 32)."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _row_max(x):
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def _total(x):
    """Of all of a (K, 32)."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _first_columns(
    cost_ptr, theta_ptr, stride_n, stride_m, theta_n, offs_m, N, M, scale, R: tl.constexpr, K: tl.constexpr, FULL: tl.constexpr
):
    """(K, 32) log2 sum_i theta_i 2^(-C_ij scale)."""
    most = tl.full((K, R, 32), _NOTHING, tl.float32)
    total = tl.zeros((K, R, 32), tl.float32)
    for start in range(0, N, R):
        offs_n = start + tl.arange(0, R)
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=offs_n < N, other=0.0).to(tl.float32)
        log_theta = tl.where(theta > 0, tl.log2(tl.where(theta > 0, theta, 1.0)), _NOTHING)
        x = log_theta[None, :, None] - _cost(cost_ptr, offs_n, N, stride_n, stride_m, offs_m, M, FULL) * scale
        new = tl.maximum(most, x)
        total = total * tl.exp2(most - new) + tl.exp2(x - new)
        most = new
    top = tl.max(most, 1)
    return tl.log2(tl.maximum(tl.sum(total * tl.exp2(most - top[:, None, :]), 1), _TINY)) + top


@triton.jit
def _mapped(y, column, gamma_ptr, gamma_m, log_mapped_ptr, offs, M, power_v, over_relax_v, RELAX_V: tl.constexpr):
    """(K, 32) what an iteration makes of y and what the one before made of its own, and a block's shares of the residual and of the
    product that tells momentum to stop.
    """
    gamma = tl.load(gamma_ptr + offs * gamma_m, mask=offs < M, other=0.0).to(tl.float32)
    ok = gamma > 0
    log_gamma = tl.log2(tl.where(ok, gamma, 1.0))
    last = tl.load(log_mapped_ptr + offs, mask=ok, other=_NOTHING)
    target = gamma
    if RELAX_V:
        target = gamma * tl.exp2(-over_relax_v * (y - log_gamma))
    new = tl.where(ok, (1 - power_v) * log_gamma + power_v * (y + log_gamma - tl.log2(tl.maximum(column, _TINY))), _NOTHING)
    residual = _total(tl.where(ok, tl.abs(column - target), 0.0))
    return new, last, residual, _total((y - new) * (new - last) * gamma)


@triton.jit(do_not_specialize=_STRIDES)
def forward_kernel(
    cost_ptr,
    theta_ptr,
    gamma_ptr,
    plan_ptr,
    score_ptr,
    log_u_ptr,
    log_v_ptr,
    log_mapped_ptr,
    row_ptr,
    residual_ptr,
    num_iter_ptr,
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
    KA: tl.constexpr,
    KB: tl.constexpr,
    FULL_A: tl.constexpr,
    RELAX_U: tl.constexpr,
    RELAX_V: tl.constexpr,
    ACCELERATE: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Potentials of a picture and its plan or, with SCORE, the column sums of plan * (1 - cost) in its place.

    scale is log2(e) / eps, over_relax_v eps / relax_concept; row_ptr takes log2 sum_j 2^(v_j - C_ij scale).
    """
    b = tl.program_id(0).to(tl.int64)
    cost_ptr += b * cost_b
    theta_ptr += b * theta_b
    gamma_ptr += b * gamma_b
    BOTH: tl.constexpr = KB > 0
    LB: tl.constexpr = KB if KB > 0 else 1  # an array cannot be empty
    log_v_ptr += b * M
    log_mapped_ptr += b * M
    offs_a, gamma_a, ok_a = _concepts(gamma_ptr, gamma_m, 0, M, KA)
    offs_b, gamma_c, ok_b = _concepts(gamma_ptr, gamma_m, KA * 32, M, LB)
    first_a = _first_columns(cost_ptr, theta_ptr, cost_n, cost_m, theta_n, offs_a, N, M, scale, R, KA, FULL_A)
    y_a = tl.where(ok_a, tl.log2(tl.where(ok_a, gamma_a, 1.0)) - power_v * first_a, _NOTHING)
    y_b = tl.zeros((LB, 32), tl.float32)
    tl.store(log_mapped_ptr + offs_a, y_a, mask=offs_a < M)
    if BOTH:
        first_b = _first_columns(cost_ptr, theta_ptr, cost_n, cost_m, theta_n, offs_b, N, M, scale, R, LB, False)
        y_b = tl.where(ok_b, tl.log2(tl.where(ok_b, gamma_c, 1.0)) - power_v * first_b, _NOTHING)
        tl.store(log_mapped_ptr + offs_b, y_b, mask=offs_b < M)
    least = tl.full((), float("inf"), tl.float32)
    last = tl.full((), float("inf"), tl.float32)
    momentum = tl.full((), 1.0, tl.float32)
    fast = tl.full((), 1, tl.int32)
    count = tl.full((), 0, tl.int32)
    while (count < max_iter) & (least >= tol):
        sum_a = tl.zeros((KA, R, 32), tl.float32)
        sum_b = tl.zeros((LB, R, 32), tl.float32)
        for start in range(0, N, R):
            offs_n = start + tl.arange(0, R)
            n_ok = offs_n < N
            theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
            x_a = _exponents(cost_ptr, offs_n, N, cost_n, cost_m, offs_a, M, y_a, scale, FULL_A)
            most = _row_max(x_a)
            if BOTH:
                x_b = _exponents(cost_ptr, offs_n, N, cost_n, cost_m, offs_b, M, y_b, scale, False)
                most = tl.maximum(most, _row_max(x_b))
            e_a = tl.exp2(x_a - most[None, :, None])
            total = _row_sum(e_a)
            if BOTH:
                e_b = tl.exp2(x_b - most[None, :, None])
                total += _row_sum(e_b)
            weight = theta / total
            if RELAX_U:
                weight = tl.where(theta > 0, weight * tl.exp2((1 - power_u) * (most + tl.log2(total))), 0.0)
            sum_a += weight[None, :, None] * e_a
            if BOTH:
                sum_b += weight[None, :, None] * e_b
        new_a, last_a, residual, against = _mapped(
            y_a, tl.sum(sum_a, 1), gamma_ptr, gamma_m, log_mapped_ptr, offs_a, M, power_v, over_relax_v, RELAX_V
        )
        if BOTH:
            new_b, last_b, more, also = _mapped(
                y_b, tl.sum(sum_b, 1), gamma_ptr, gamma_m, log_mapped_ptr, offs_b, M, power_v, over_relax_v, RELAX_V
            )
            residual += more
            against += also
        ahead = tl.full((), 0.0, tl.float32)
        kept = M
        if ACCELERATE:
            better = residual < least
            kept = tl.where(better, M, 0)
            ratio = residual / last
            fast = tl.where(ratio > 1, 1, tl.where(ratio > _SLOW, 0, fast))
            momentum = tl.where((fast == 1) | (against > 0), 1.0, momentum)
            following = (1 + tl.sqrt(1 + 4 * momentum * momentum)) / 2
            ahead = tl.where(fast == 1, 0.0, (momentum - 1) / following)
            last, momentum = residual, following
            least = tl.where(better, residual, least)
        else:
            least = residual
        tl.debug_barrier()  # all warps have read what the last iteration left
        tl.store(log_v_ptr + offs_a, tl.where(ok_a, y_a * _LN2, _NO), mask=offs_a < kept)
        tl.store(log_mapped_ptr + offs_a, new_a, mask=offs_a < M)
        y_a = new_a + ahead * (new_a - last_a)
        if BOTH:
            tl.store(log_v_ptr + offs_b, tl.where(ok_b, y_b * _LN2, _NO), mask=offs_b < kept)
            tl.store(log_mapped_ptr + offs_b, new_b, mask=offs_b < M)
            y_b = new_b + ahead * (new_b - last_b)
        count += 1
    tl.debug_barrier()
    best_a = tl.load(log_v_ptr + offs_a, mask=ok_a, other=_NOTHING) * _LOG2E
    best_b = tl.load(log_v_ptr + offs_b, mask=ok_b, other=_NOTHING) * _LOG2E
    tl.store(residual_ptr + b, least)
    tl.store(num_iter_ptr + b, count)
    score_a = tl.zeros((KA, R, 32), tl.float32)
    score_b = tl.zeros((LB, R, 32), tl.float32)
    for start in range(0, N, R):
        offs_n = start + tl.arange(0, R)
        n_ok = offs_n < N
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
        x_a = _exponents(cost_ptr, offs_n, N, cost_n, cost_m, offs_a, M, best_a, scale, FULL_A)
        most = _row_max(x_a)
        if BOTH:
            x_b = _exponents(cost_ptr, offs_n, N, cost_n, cost_m, offs_b, M, best_b, scale, False)
            most = tl.maximum(most, _row_max(x_b))
        e_a = tl.exp2(x_a - most[None, :, None])
        total = _row_sum(e_a)
        if BOTH:
            e_b = tl.exp2(x_b - most[None, :, None])
            total += _row_sum(e_b)
        row = most + tl.log2(total)
        weight = theta / total
        if RELAX_U:
            weight = tl.where(theta > 0, weight * tl.exp2((1 - power_u) * row), 0.0)
        log_u = tl.where(theta > 0, (tl.log2(tl.where(theta > 0, theta, 1.0)) - power_u * row) * _LN2, _NO)
        tl.store(log_u_ptr + b * N + offs_n, log_u, mask=n_ok)
        tl.store(row_ptr + b * N + offs_n, row, mask=n_ok)
        plan_a = weight[None, :, None] * e_a
        if SCORE:
            score_a += tl.where(ok_a[:, None, :], plan_a * (1 - (best_a[:, None, :] - x_a) / scale), 0.0)
        else:
            _store(plan_ptr + b * N * M, offs_n, n_ok, offs_a, M, plan_a)
        if BOTH:
            plan_b = weight[None, :, None] * e_b
            if SCORE:
                score_b += tl.where(ok_b[:, None, :], plan_b * (1 - (best_b[:, None, :] - x_b) / scale), 0.0)
            else:
                _store(plan_ptr + b * N * M, offs_n, n_ok, offs_b, M, plan_b)
    if SCORE:
        tl.store(score_ptr + b * M + offs_a, tl.sum(score_a, 1), mask=offs_a < M)
        if BOTH:
            tl.store(score_ptr + b * M + offs_b, tl.sum(score_b, 1), mask=offs_b < M)


@triton.jit
def _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R: tl.constexpr, RELAX_U: tl.constexpr):
    """(R,) indices, which are there, log2 sums of the rows, and masses of the plan's rows."""
    offs_n = start + tl.arange(0, R)
    n_ok = offs_n < N
    row = tl.load(row_ptr + tl.minimum(offs_n, N - 1))
    if RELAX_U:
        mass = tl.exp2(tl.load(log_u_ptr + offs_n, mask=n_ok, other=_NO) * _LOG2E + row)
    else:
        mass = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
    return offs_n, n_ok, row, mass


@triton.jit
def _soft(cost, v, row, scale):
    """(K, R, 32) S, the plan's rows as shares."""
    return tl.exp2(v[:, None, :] - cost * scale - row[None, :, None])


@triton.jit
def _gradient(ptr, offs_n, N, stride_n, stride_m, offs_m, M, cost, FULL: tl.constexpr, SCORE: tl.constexpr):
    """(K, R, 32) gradient of the plan; of scores, (1 - C_ij) times that of score j (which has no stride over patches)."""
    gradient = _cost(ptr, offs_n, N, stride_n, stride_m, offs_m, M, FULL)
    if SCORE:
        gradient *= 1 - cost
    return gradient


@triton.jit
def _begun(work_ptr, column, right, offs, M):
    """Write the start of a block's conjugate gradients; its share of the squared residual."""
    scale = tl.where(column > 0, tl.rsqrt(tl.maximum(column, _TINY)), 0.0)
    rest = scale * right
    tl.store(work_ptr + offs, scale, mask=offs < M)
    tl.store(work_ptr + M + offs, tl.zeros_like(rest), mask=offs < M)
    tl.store(work_ptr + 2 * M + offs, rest, mask=offs < M)
    tl.store(work_ptr + 3 * M + offs, rest, mask=offs < M)
    return _total(rest * rest)


@triton.jit
def _curved(work_ptr, image, offs, M, power_u, power_v):
    """The matrix times the direction, and a block's shares of the direction's curvature and squared length."""
    to = tl.load(work_ptr + 3 * M + offs, mask=offs < M, other=0.0)
    full = to / power_v - power_u * tl.load(work_ptr + offs, mask=offs < M, other=0.0) * image
    return full, _total(to * full), _total(to * to)


@triton.jit
def _rest(work_ptr, full, step, offs, M):
    """The residual after a step, and a block's share of its square."""
    rest = tl.load(work_ptr + 2 * M + offs, mask=offs < M, other=0.0) - step * full
    return rest, _total(rest * rest)


@triton.jit
def _advance(work_ptr, rest, step, turn, offs, M):
    """Write a block's solution, residual and direction. All warps have read them, and each writes the same."""
    to = tl.load(work_ptr + 3 * M + offs, mask=offs < M, other=0.0)
    solved = tl.load(work_ptr + M + offs, mask=offs < M, other=0.0) + step * to
    tl.debug_barrier()
    tl.store(work_ptr + M + offs, solved, mask=offs < M)
    tl.store(work_ptr + 2 * M + offs, rest, mask=offs < M)
    tl.store(work_ptr + 3 * M + offs, rest + turn * to, mask=offs < M)


@triton.jit
def _over_gamma(work_ptr, gamma, offs, M):
    """A column's sum over its mass."""
    scale = tl.load(work_ptr + offs, mask=offs < M, other=0.0)
    return tl.where((scale > 0) & (gamma > 0), 1 / tl.where(scale > 0, scale * scale, 1.0) / tl.where(gamma > 0, gamma, 1.0), 0.0)


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
    KA: tl.constexpr,
    KB: tl.constexpr,
    FULL_A: tl.constexpr,
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
    BOTH: tl.constexpr = KB > 0
    LB: tl.constexpr = KB if KB > 0 else 1  # an array cannot be empty
    offs_a, gamma_a, ok_a = _concepts(gamma_ptr + b * gamma_b, gamma_m, 0, M, KA)
    offs_b, gamma_c, ok_b = _concepts(gamma_ptr + b * gamma_b, gamma_m, KA * 32, M, LB)
    v_a = tl.load(log_v_ptr + b * M + offs_a, mask=ok_a, other=_NOTHING) * _LOG2E
    v_b = tl.load(log_v_ptr + b * M + offs_b, mask=ok_b, other=_NOTHING) * _LOG2E
    column_a, column_b = tl.zeros((KA, R, 32), tl.float32), tl.zeros((LB, R, 32), tl.float32)
    right_a, right_b = tl.zeros((KA, R, 32), tl.float32), tl.zeros((LB, R, 32), tl.float32)
    for start in range(0, N, R):
        offs_n, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
        cost_a = _cost(cost_ptr, offs_n, N, cost_n, cost_m, offs_a, M, FULL_A)
        s_a = _soft(cost_a, v_a, row, scale)
        w_a = s_a * _gradient(grad_ptr, offs_n, N, grad_n, grad_m, offs_a, M, cost_a, FULL_A, SCORE)
        mean = _row_sum(w_a)
        if BOTH:
            cost_c = _cost(cost_ptr, offs_n, N, cost_n, cost_m, offs_b, M, False)
            s_b = _soft(cost_c, v_b, row, scale)
            w_b = s_b * _gradient(grad_ptr, offs_n, N, grad_n, grad_m, offs_b, M, cost_c, False, SCORE)
            mean += _row_sum(w_b)
            column_b += mass[None, :, None] * s_b
            right_b += mass[None, :, None] * (w_b - power_u * mean[None, :, None] * s_b)
        column_a += mass[None, :, None] * s_a
        right_a += mass[None, :, None] * (w_a - power_u * mean[None, :, None] * s_a)
        tl.store(d_theta_ptr + offs_n, mean, mask=n_ok)
    # Of a block: scale, solved, rest and direction, one after the other.
    work_ptr += b * 4 * M
    square = _begun(work_ptr, tl.sum(column_a, 1), tl.sum(right_a, 1), offs_a, M)
    if BOTH:
        square += _begun(work_ptr, tl.sum(column_b, 1), tl.sum(right_b, 1), offs_b, M)
    enough = square * tolerance * tolerance
    count = tl.full((), 0, tl.int32)
    while (count < max_steps) & (square > enough):
        tl.debug_barrier()
        d_a = tl.load(work_ptr + offs_a, mask=offs_a < M, other=0.0) * tl.load(work_ptr + 3 * M + offs_a, mask=offs_a < M, other=0.0)
        d_b = tl.load(work_ptr + offs_b, mask=offs_b < M, other=0.0) * tl.load(work_ptr + 3 * M + offs_b, mask=offs_b < M, other=0.0)
        image_a, image_b = tl.zeros((KA, R, 32), tl.float32), tl.zeros((LB, R, 32), tl.float32)
        for start in range(0, N, R):
            offs_n, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
            s_a = _soft(_cost(cost_ptr, offs_n, N, cost_n, cost_m, offs_a, M, FULL_A), v_a, row, scale)
            inner = _row_sum(s_a * d_a[:, None, :])
            if BOTH:
                s_b = _soft(_cost(cost_ptr, offs_n, N, cost_n, cost_m, offs_b, M, False), v_b, row, scale)
                inner += _row_sum(s_b * d_b[:, None, :])
                image_b += (mass * inner)[None, :, None] * s_b
            image_a += (mass * inner)[None, :, None] * s_a
        full_a, curvature, length_of = _curved(work_ptr, tl.sum(image_a, 1), offs_a, M, power_u, power_v)
        if BOTH:
            full_b, more, also = _curved(work_ptr, tl.sum(image_b, 1), offs_b, M, power_u, power_v)
            curvature += more
            length_of += also
        bent = curvature > length_of * _FLAT
        step = tl.where(bent, square / tl.where(bent, curvature, 1.0), 0.0)
        rest_a, new = _rest(work_ptr, full_a, step, offs_a, M)
        if BOTH:
            rest_b, more = _rest(work_ptr, full_b, step, offs_b, M)
            new += more
        tl.debug_barrier()
        _advance(work_ptr, rest_a, step, new / square, offs_a, M)
        if BOTH:
            _advance(work_ptr, rest_b, step, new / square, offs_b, M)
        square = tl.where(bent, new, 0.0)
        count += 1
    tl.debug_barrier()
    y_a = tl.load(work_ptr + offs_a, mask=offs_a < M, other=0.0) * tl.load(work_ptr + M + offs_a, mask=offs_a < M, other=0.0)
    y_b = tl.load(work_ptr + offs_b, mask=offs_b < M, other=0.0) * tl.load(work_ptr + M + offs_b, mask=offs_b < M, other=0.0)
    for start in range(0, N, R):
        offs_n, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0)
        cost_a = _cost(cost_ptr, offs_n, N, cost_n, cost_m, offs_a, M, FULL_A)
        s_a = _soft(cost_a, v_a, row, scale)
        inner = tl.load(d_theta_ptr + offs_n, mask=n_ok, other=0.0) - _row_sum(s_a * y_a[:, None, :])
        if BOTH:
            cost_c = _cost(cost_ptr, offs_n, N, cost_n, cost_m, offs_b, M, False)
            s_b = _soft(cost_c, v_b, row, scale)
            inner -= _row_sum(s_b * y_b[:, None, :])
        g_a = _gradient(grad_ptr, offs_n, N, grad_n, grad_m, offs_a, M, cost_a, FULL_A, SCORE)
        out_a = -inverse_eps * (g_a - power_u * inner[None, :, None] - y_a[:, None, :])
        if SCORE:  # the cost is also what is summed
            out_a -= tl.load(grad_ptr + offs_a * grad_m, mask=ok_a, other=0.0)[:, None, :]
        _store(d_cost_ptr + b * N * M, offs_n, n_ok, offs_a, M, mass[None, :, None] * s_a * out_a)
        if BOTH:
            g_b = _gradient(grad_ptr, offs_n, N, grad_n, grad_m, offs_b, M, cost_c, False, SCORE)
            out_b = -inverse_eps * (g_b - power_u * inner[None, :, None] - y_b[:, None, :])
            if SCORE:
                out_b -= tl.load(grad_ptr + offs_b * grad_m, mask=ok_b, other=0.0)[:, None, :]
            _store(d_cost_ptr + b * N * M, offs_n, n_ok, offs_b, M, mass[None, :, None] * s_b * out_b)
        if RELAX_U:
            inner *= tl.exp2((1 - power_u) * row)
        tl.store(d_theta_ptr + offs_n, tl.where(theta > 0, inner, 0.0), mask=n_ok)
    if RELAX_V:  # scale is one over the root of the column's sum
        y_a *= _over_gamma(work_ptr, gamma_a, offs_a, M) / power_v
        y_b *= _over_gamma(work_ptr, gamma_c, offs_b, M) / power_v
    tl.store(d_gamma_ptr + b * M + offs_a, tl.where(ok_a, y_a, 0.0), mask=offs_a < M)
    if BOTH:
        tl.store(d_gamma_ptr + b * M + offs_b, tl.where(ok_b, y_b, 0.0), mask=offs_b < M)
