"""Sinkhorn and its implicit gradient as Triton kernels: one program a picture, nothing of size N x M in memory but cost and plan.

The formulas are those of `backend_torch` and `implicit`, in the log domain and in logarithms to base 2. A program streams its picture's
cost in tiles of R patches by all M concepts, once an iteration, and keeps what it knows of the concepts in registers. What it needs
again of the patches it leaves in (B, N) arrays. All sums are in float32, whatever the cost is. Every program decides for itself when
it stops: nothing waits for the host.

Concepts come in one or two blocks, each of K x W with W <= 128: a tile is (K, R, W), so that a patch's row lies within one warp and
its sums need no barrier. 312 concepts are 2 x 128 and 1 x 64. The second block is absent where KB * WB is 1.
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


@triton.jit
def _concepts(gamma_ptr, stride, start, M, K: tl.constexpr, W: tl.constexpr):
    """(K, W) indices of a block of concepts, their masses, and which of them have any."""
    offs = start + tl.arange(0, K)[:, None] * W + tl.arange(0, W)[None, :]
    gamma = tl.load(gamma_ptr + offs * stride, mask=offs < M, other=0.0).to(tl.float32)
    return offs, gamma, gamma > 0


@triton.jit
def _cost(ptr, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok):
    """(K, R, W), 0 where there is nothing."""
    where = offs_n[None, :, None] * stride_n + offs_m[:, None, :] * stride_m
    return tl.load(ptr + where, mask=n_ok[None, :, None] & m_ok[:, None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offs_n, n_ok, offs_m, M, value):
    tl.store(ptr + offs_n[None, :, None] * M + offs_m[:, None, :], value, mask=n_ok[None, :, None] & (offs_m < M)[:, None, :])


@triton.jit
def _exponents(ptr, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok, y, scale):
    """(K, R, W) y_j - C_ij / eps, -inf where there is no concept."""
    return tl.where(m_ok[:, None, :], y[:, None, :] - _cost(ptr, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok) * scale, _NO)


@triton.jit
def _row_sum(x):
    """(R,) of (K, R, W)."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def _row_max(x):
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def _total(x):
    """Of all of a (K, W)."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _first_columns(
    cost_ptr, theta_ptr, stride_n, stride_m, theta_n, offs_m, m_ok, N, scale, R: tl.constexpr, K: tl.constexpr, W: tl.constexpr
):
    """(K, W) log2 sum_i theta_i 2^(-C_ij scale)."""
    most = tl.full((K, R, W), _NO, tl.float32)
    total = tl.zeros((K, R, W), tl.float32)
    for start in range(0, N, R):
        offs_n = start + tl.arange(0, R)
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=offs_n < N, other=0.0).to(tl.float32)
        log_theta = tl.where(theta > 0, tl.log2(tl.where(theta > 0, theta, 1.0)), _NO)
        x = log_theta[None, :, None] - _cost(cost_ptr, offs_n, theta > 0, stride_n, stride_m, offs_m, m_ok) * scale
        new = tl.maximum(most, x)
        safe = tl.where(new == _NO, 0.0, new)
        total = total * tl.exp2(most - safe) + tl.exp2(x - safe)
        most = new
    top = tl.max(most, 1)
    safe = tl.where(top == _NO, 0.0, top)
    return tl.log2(tl.maximum(tl.sum(total * tl.exp2(most - safe[:, None, :]), 1), _TINY)) + safe


@triton.jit
def _updated(y, column, gamma, log_gamma, ok, mapped, power_v, over_relax_v, RELAX_V: tl.constexpr):
    """(K, W) the next potential, and a block's shares of the residual and of the product that tells momentum to stop."""
    target = gamma
    if RELAX_V:
        target = gamma * tl.exp2(-over_relax_v * (y - log_gamma))
    new = (1 - power_v) * log_gamma + power_v * (y + log_gamma - tl.log2(tl.maximum(column, _TINY)))
    residual = _total(tl.where(ok, tl.abs(column - target), 0.0))
    return new, residual, _total(tl.where(ok, (y - new) * (new - mapped) * gamma, 0.0))


@triton.jit
def forward_kernel(
    cost_ptr,
    theta_ptr,
    gamma_ptr,
    plan_ptr,
    score_ptr,
    log_u_ptr,
    log_v_ptr,
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
    WA: tl.constexpr,
    KB: tl.constexpr,
    WB: tl.constexpr,
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
    BOTH: tl.constexpr = KB * WB > 1
    offs_a, gamma_a, ok_a = _concepts(gamma_ptr, gamma_m, 0, M, KA, WA)
    offs_b, gamma_c, ok_b = _concepts(gamma_ptr, gamma_m, KA * WA, M, KB, WB)
    log_gamma_a, log_gamma_b = tl.log2(tl.where(ok_a, gamma_a, 1.0)), tl.log2(tl.where(ok_b, gamma_c, 1.0))
    first_a = _first_columns(cost_ptr, theta_ptr, cost_n, cost_m, theta_n, offs_a, ok_a, N, scale, R, KA, WA)
    y_a = tl.where(ok_a, log_gamma_a - power_v * first_a, 0.0)
    y_b = tl.zeros((KB, WB), tl.float32)
    if BOTH:
        first_b = _first_columns(cost_ptr, theta_ptr, cost_n, cost_m, theta_n, offs_b, ok_b, N, scale, R, KB, WB)
        y_b = tl.where(ok_b, log_gamma_b - power_v * first_b, 0.0)
    mapped_a, mapped_b, best_a, best_b = y_a, y_b, y_a, y_b
    least = tl.full((), float("inf"), tl.float32)
    last = tl.full((), float("inf"), tl.float32)
    momentum = tl.full((), 1.0, tl.float32)
    fast = tl.full((), 1, tl.int32)
    count = tl.full((), 0, tl.int32)
    while (count < max_iter) & (least >= tol):
        sum_a = tl.zeros((KA, R, WA), tl.float32)
        sum_b = tl.zeros((KB, R, WB), tl.float32)
        for start in range(0, N, R):
            offs_n = start + tl.arange(0, R)
            n_ok = offs_n < N
            theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
            x_a = _exponents(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a, y_a, scale)
            most = _row_max(x_a)
            if BOTH:
                x_b = _exponents(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b, y_b, scale)
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
        new_a, residual, against = _updated(y_a, tl.sum(sum_a, 1), gamma_a, log_gamma_a, ok_a, mapped_a, power_v, over_relax_v, RELAX_V)
        new_b = y_b
        if BOTH:
            new_b, more, also = _updated(y_b, tl.sum(sum_b, 1), gamma_c, log_gamma_b, ok_b, mapped_b, power_v, over_relax_v, RELAX_V)
            residual += more
            against += also
        if ACCELERATE:
            better = residual < least
            best_a, best_b = tl.where(better, y_a, best_a), tl.where(better, y_b, best_b)
            least = tl.where(better, residual, least)
            ratio = residual / last
            fast = tl.where(ratio > 1, 1, tl.where(ratio > _SLOW, 0, fast))
            momentum = tl.where((fast == 1) | (against > 0), 1.0, momentum)
            following = (1 + tl.sqrt(1 + 4 * momentum * momentum)) / 2
            ahead = tl.where(fast == 1, 0.0, (momentum - 1) / following)
            y_a, y_b = new_a + ahead * (new_a - mapped_a), new_b + ahead * (new_b - mapped_b)
            mapped_a, mapped_b, last, momentum = new_a, new_b, residual, following
        else:
            best_a, best_b, least = y_a, y_b, residual
            y_a, y_b = new_a, new_b
        count += 1
    tl.store(log_v_ptr + b * M + offs_a, tl.where(ok_a, best_a * _LN2, _NO), mask=offs_a < M)
    if BOTH:
        tl.store(log_v_ptr + b * M + offs_b, tl.where(ok_b, best_b * _LN2, _NO), mask=offs_b < M)
    tl.store(residual_ptr + b, least)
    tl.store(num_iter_ptr + b, count)
    score_a = tl.zeros((KA, R, WA), tl.float32)
    score_b = tl.zeros((KB, R, WB), tl.float32)
    for start in range(0, N, R):
        offs_n = start + tl.arange(0, R)
        n_ok = offs_n < N
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
        x_a = _exponents(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a, best_a, scale)
        most = _row_max(x_a)
        if BOTH:
            x_b = _exponents(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b, best_b, scale)
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
    row = tl.load(row_ptr + offs_n, mask=n_ok, other=0.0)
    if RELAX_U:
        mass = tl.exp2(tl.load(log_u_ptr + offs_n, mask=n_ok, other=_NO) * _LOG2E + row)
    else:
        mass = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
    return offs_n, n_ok, row, mass


@triton.jit
def _soft(cost, v, row, scale, n_ok, m_ok):
    """(K, R, W) S, the plan's rows as shares."""
    return tl.exp2(tl.where(m_ok[:, None, :] & n_ok[None, :, None], v[:, None, :] - cost * scale - row[None, :, None], _NO))


@triton.jit
def _gradient(ptr, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok, cost, SCORE: tl.constexpr):
    """(K, R, W) gradient of the plan; of scores, (1 - C_ij) times that of score j (which has no stride over patches)."""
    gradient = _cost(ptr, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok)
    if SCORE:
        gradient *= 1 - cost
    return gradient


@triton.jit
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
    WA: tl.constexpr,
    KB: tl.constexpr,
    WB: tl.constexpr,
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
    BOTH: tl.constexpr = KB * WB > 1
    offs_a, gamma_a, ok_a = _concepts(gamma_ptr + b * gamma_b, gamma_m, 0, M, KA, WA)
    offs_b, gamma_c, ok_b = _concepts(gamma_ptr + b * gamma_b, gamma_m, KA * WA, M, KB, WB)
    v_a = tl.load(log_v_ptr + b * M + offs_a, mask=ok_a, other=0.0) * _LOG2E
    v_b = tl.load(log_v_ptr + b * M + offs_b, mask=ok_b, other=0.0) * _LOG2E
    column_a, column_b = tl.zeros((KA, R, WA), tl.float32), tl.zeros((KB, R, WB), tl.float32)
    right_a, right_b = tl.zeros((KA, R, WA), tl.float32), tl.zeros((KB, R, WB), tl.float32)
    for start in range(0, N, R):
        offs_n, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
        cost_a = _cost(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a)
        s_a = _soft(cost_a, v_a, row, scale, n_ok, ok_a)
        w_a = s_a * _gradient(grad_ptr, offs_n, n_ok, grad_n, grad_m, offs_a, ok_a, cost_a, SCORE)
        mean = _row_sum(w_a)
        if BOTH:
            cost_c = _cost(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b)
            s_b = _soft(cost_c, v_b, row, scale, n_ok, ok_b)
            w_b = s_b * _gradient(grad_ptr, offs_n, n_ok, grad_n, grad_m, offs_b, ok_b, cost_c, SCORE)
            mean += _row_sum(w_b)
            column_b += mass[None, :, None] * s_b
            right_b += mass[None, :, None] * (w_b - power_u * mean[None, :, None] * s_b)
        column_a += mass[None, :, None] * s_a
        right_a += mass[None, :, None] * (w_a - power_u * mean[None, :, None] * s_a)
        tl.store(d_theta_ptr + offs_n, mean, mask=n_ok)
    sums_a, sums_b = tl.sum(column_a, 1), tl.sum(column_b, 1)
    scale_a = tl.where(ok_a & (sums_a > 0), tl.rsqrt(tl.maximum(sums_a, _TINY)), 0.0)
    scale_b = tl.where(ok_b & (sums_b > 0), tl.rsqrt(tl.maximum(sums_b, _TINY)), 0.0)
    rest_a, rest_b = scale_a * tl.sum(right_a, 1), scale_b * tl.sum(right_b, 1)
    solved_a, solved_b = tl.zeros((KA, WA), tl.float32), tl.zeros((KB, WB), tl.float32)
    to_a, to_b = rest_a, rest_b
    square = _total(rest_a * rest_a) + _total(rest_b * rest_b)
    enough = square * tolerance * tolerance
    count = tl.full((), 0, tl.int32)
    while (count < max_steps) & (square > enough):
        d_a, d_b = scale_a * to_a, scale_b * to_b
        image_a, image_b = tl.zeros((KA, R, WA), tl.float32), tl.zeros((KB, R, WB), tl.float32)
        for start in range(0, N, R):
            offs_n, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
            s_a = _soft(_cost(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a), v_a, row, scale, n_ok, ok_a)
            inner = _row_sum(s_a * d_a[:, None, :])
            if BOTH:
                s_b = _soft(_cost(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b), v_b, row, scale, n_ok, ok_b)
                inner += _row_sum(s_b * d_b[:, None, :])
                image_b += (mass * inner)[None, :, None] * s_b
            image_a += (mass * inner)[None, :, None] * s_a
        full_a = to_a / power_v - power_u * scale_a * tl.sum(image_a, 1)
        full_b = to_b / power_v - power_u * scale_b * tl.sum(image_b, 1)
        curvature = _total(to_a * full_a) + _total(to_b * full_b)
        bent = curvature > (_total(to_a * to_a) + _total(to_b * to_b)) * _FLAT
        length = tl.where(bent, square / tl.where(bent, curvature, 1.0), 0.0)
        solved_a += length * to_a
        solved_b += length * to_b
        rest_a -= length * full_a
        rest_b -= length * full_b
        new = _total(rest_a * rest_a) + _total(rest_b * rest_b)
        to_a = rest_a + new / square * to_a
        to_b = rest_b + new / square * to_b
        square = tl.where(bent, new, 0.0)
        count += 1
    y_a, y_b = scale_a * solved_a, scale_b * solved_b
    for start in range(0, N, R):
        offs_n, n_ok, row, mass = _patches(theta_ptr, log_u_ptr, row_ptr, start, N, theta_n, R, RELAX_U)
        theta = tl.load(theta_ptr + offs_n * theta_n, mask=n_ok, other=0.0)
        cost_a = _cost(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a)
        s_a = _soft(cost_a, v_a, row, scale, n_ok, ok_a)
        inner = tl.load(d_theta_ptr + offs_n, mask=n_ok, other=0.0) - _row_sum(s_a * y_a[:, None, :])
        if BOTH:
            cost_c = _cost(cost_ptr, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b)
            s_b = _soft(cost_c, v_b, row, scale, n_ok, ok_b)
            inner -= _row_sum(s_b * y_b[:, None, :])
        g_a = _gradient(grad_ptr, offs_n, n_ok, grad_n, grad_m, offs_a, ok_a, cost_a, SCORE)
        out_a = -inverse_eps * (g_a - power_u * inner[None, :, None] - y_a[:, None, :])
        if SCORE:  # the cost is also what is summed
            out_a -= tl.load(grad_ptr + offs_a * grad_m, mask=ok_a, other=0.0)[:, None, :]
        _store(d_cost_ptr + b * N * M, offs_n, n_ok, offs_a, M, mass[None, :, None] * s_a * out_a)
        if BOTH:
            g_b = _gradient(grad_ptr, offs_n, n_ok, grad_n, grad_m, offs_b, ok_b, cost_c, SCORE)
            out_b = -inverse_eps * (g_b - power_u * inner[None, :, None] - y_b[:, None, :])
            if SCORE:
                out_b -= tl.load(grad_ptr + offs_b * grad_m, mask=ok_b, other=0.0)[:, None, :]
            _store(d_cost_ptr + b * N * M, offs_n, n_ok, offs_b, M, mass[None, :, None] * s_b * out_b)
        if RELAX_U:
            inner *= tl.exp2((1 - power_u) * row)
        tl.store(d_theta_ptr + offs_n, tl.where(theta > 0, inner, 0.0), mask=n_ok)
    if RELAX_V:
        y_a *= sums_a / (power_v * tl.where(ok_a, gamma_a, 1.0))
        y_b *= sums_b / (power_v * tl.where(ok_b, gamma_c, 1.0))
    tl.store(d_gamma_ptr + b * M + offs_a, tl.where(ok_a, y_a, 0.0), mask=offs_a < M)
    if BOTH:
        tl.store(d_gamma_ptr + b * M + offs_b, tl.where(ok_b, y_b, 0.0), mask=offs_b < M)
