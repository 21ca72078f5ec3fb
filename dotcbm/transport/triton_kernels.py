"""Sinkhorn and its implicit gradient as Triton kernels: one program a picture, nothing of size N x M in memory but cost and plan.

The formulas are those of `backend_torch` and `implicit`, in the log domain and in logarithms to base 2. A program streams its picture's
cost in tiles of BLOCK_N patches by all M concepts, once an iteration, and keeps vectors over the concepts in registers. M is cut into
a block of A = 2^k concepts and, where that wastes less, one more of B: 312 is 256 + 64. What a program needs again of the patches it
leaves in (B, N) arrays. All sums are in float32, whatever the cost is.

Every program decides for itself when it stops: nothing waits for the host.
"""

# Triton compiles these functions; to a type checker of Python its values are not what they are.
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]

_SLOW = tl.constexpr(0.4)  # see backend_torch
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(1.2e-38)
_NO = tl.constexpr(float("-inf"))


@triton.jit
def _exponents(cost_ptr, base, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok, y, scale):
    """(BLOCK_N, block) y_j - C_ij / eps, -inf where there is no concept."""
    cost = tl.load(cost_ptr + base + offs_n[:, None] * stride_n + offs_m[None, :] * stride_m, mask=n_ok[:, None] & m_ok[None, :], other=0.0)
    return tl.where(m_ok[None, :], y[None, :] - cost.to(tl.float32) * scale, _NO)


@triton.jit
def _concepts(gamma_ptr, row, stride_m, start, M, BLOCK: tl.constexpr):
    """Indices of a block of concepts, their masses, and which of them are there."""
    offs = start + tl.arange(0, BLOCK)
    gamma = tl.load(gamma_ptr + row + offs * stride_m, mask=offs < M, other=0.0).to(tl.float32)
    return offs, gamma, gamma > 0


@triton.jit
def _column_start(
    cost_ptr,
    theta_ptr,
    base,
    theta_row,
    stride_n,
    stride_m,
    theta_stride,
    offs_m,
    m_ok,
    N,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(block,) log2 sum_i theta_i 2^(-C_ij scale)."""
    most = tl.full((BLOCK_N, BLOCK), _NO, tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        theta = tl.load(theta_ptr + theta_row + offs_n * theta_stride, mask=offs_n < N, other=0.0).to(tl.float32)
        n_ok = theta > 0
        cost = tl.load(
            cost_ptr + base + offs_n[:, None] * stride_n + offs_m[None, :] * stride_m, mask=n_ok[:, None] & m_ok[None, :], other=0.0
        )
        x = tl.where(n_ok[:, None], tl.log2(tl.where(n_ok, theta, 1.0))[:, None] - cost.to(tl.float32) * scale, _NO)
        new = tl.maximum(most, x)
        safe = tl.where(new == _NO, 0.0, new)
        total = total * tl.exp2(most - safe) + tl.exp2(x - safe)
        most = new
    top = tl.max(most, 0)
    safe = tl.where(top == _NO, 0.0, top)
    return tl.log2(tl.maximum(tl.sum(total * tl.exp2(most - safe[None, :]), 0), _TINY)) + safe


@triton.jit
def forward_kernel(
    cost_ptr,
    theta_ptr,
    gamma_ptr,
    plan_ptr,
    log_u_ptr,
    log_v_ptr,
    row_ptr,
    residual_ptr,
    num_iter_ptr,
    score_ptr,
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
    BLOCK_N: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    RELAX_U: tl.constexpr,
    RELAX_V: tl.constexpr,
    ACCELERATE: tl.constexpr,
    WRITE_PLAN: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Potentials and, with WRITE_PLAN, the plan of a picture; with SCORE, the column sums of plan * (1 - cost).

    scale is log2(e) / eps; over_relax_v is eps / relax_concept; row_ptr takes log2 sum_j 2^(v_j - C_ij / eps).
    """
    b = tl.program_id(0).to(tl.int64)
    base = b * cost_b
    theta_row, gamma_row = b * theta_b, b * gamma_b
    offs_a, gamma_a, ok_a = _concepts(gamma_ptr, gamma_row, gamma_m, 0, M, A)
    offs_b, gamma_c, ok_b = _concepts(gamma_ptr, gamma_row, gamma_m, A, M, B)
    log_gamma_a, log_gamma_b = tl.log2(tl.where(ok_a, gamma_a, 1.0)), tl.log2(tl.where(ok_b, gamma_c, 1.0))
    y_a = log_gamma_a - power_v * _column_start(
        cost_ptr, theta_ptr, base, theta_row, cost_n, cost_m, theta_n, offs_a, ok_a, N, scale, BLOCK_N, A
    )
    y_b = tl.zeros((B,), tl.float32)
    if B > 1:
        y_b = log_gamma_b - power_v * _column_start(
            cost_ptr, theta_ptr, base, theta_row, cost_n, cost_m, theta_n, offs_b, ok_b, N, scale, BLOCK_N, B
        )
    mapped_a, mapped_b, best_a, best_b = y_a, y_b, y_a, y_b
    least = tl.full((), float("inf"), tl.float32)
    last = tl.full((), float("inf"), tl.float32)
    momentum = tl.full((), 1.0, tl.float32)
    fast = tl.full((), 1, tl.int32)
    count = tl.full((), 0, tl.int32)
    while (count < max_iter) & (least >= tol):
        sum_a = tl.zeros((BLOCK_N, A), tl.float32)
        sum_b = tl.zeros((BLOCK_N, B), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            theta = tl.load(theta_ptr + theta_row + offs_n * theta_n, mask=offs_n < N, other=0.0).to(tl.float32)
            x_a = _exponents(cost_ptr, base, offs_n, offs_n < N, cost_n, cost_m, offs_a, ok_a, y_a, scale)
            most = tl.max(x_a, 1)
            if B > 1:
                x_b = _exponents(cost_ptr, base, offs_n, offs_n < N, cost_n, cost_m, offs_b, ok_b, y_b, scale)
                most = tl.maximum(most, tl.max(x_b, 1))
            e_a = tl.exp2(x_a - most[:, None])
            total = tl.sum(e_a, 1)
            if B > 1:
                e_b = tl.exp2(x_b - most[:, None])
                total += tl.sum(e_b, 1)
            weight = theta / total
            if RELAX_U:
                weight *= tl.exp2((1 - power_u) * (most + tl.log2(total)))
            sum_a += weight[:, None] * e_a
            if B > 1:
                sum_b += weight[:, None] * e_b
        column_a = tl.sum(sum_a, 0)
        target_a = gamma_a
        if RELAX_V:
            target_a = gamma_a * tl.exp2(-over_relax_v * (y_a - log_gamma_a))
        residual = tl.sum(tl.where(ok_a, tl.abs(column_a - target_a), 0.0), 0)
        new_a = (1 - power_v) * log_gamma_a + power_v * (y_a + log_gamma_a - tl.log2(tl.maximum(column_a, _TINY)))
        against = tl.sum(tl.where(ok_a, (y_a - new_a) * (new_a - mapped_a) * gamma_a, 0.0), 0)
        new_b = y_b
        if B > 1:
            column_b = tl.sum(sum_b, 0)
            target_b = gamma_c
            if RELAX_V:
                target_b = gamma_c * tl.exp2(-over_relax_v * (y_b - log_gamma_b))
            residual += tl.sum(tl.where(ok_b, tl.abs(column_b - target_b), 0.0), 0)
            new_b = (1 - power_v) * log_gamma_b + power_v * (y_b + log_gamma_b - tl.log2(tl.maximum(column_b, _TINY)))
            against += tl.sum(tl.where(ok_b, (y_b - new_b) * (new_b - mapped_b) * gamma_c, 0.0), 0)
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
    if B > 1:
        tl.store(log_v_ptr + b * M + offs_b, tl.where(ok_b, best_b * _LN2, _NO), mask=offs_b < M)
    tl.store(residual_ptr + b, least)
    tl.store(num_iter_ptr + b, count)
    score_a = tl.zeros((BLOCK_N, A), tl.float32)
    score_b = tl.zeros((BLOCK_N, B), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        theta = tl.load(theta_ptr + theta_row + offs_n * theta_n, mask=offs_n < N, other=0.0).to(tl.float32)
        x_a = _exponents(cost_ptr, base, offs_n, offs_n < N, cost_n, cost_m, offs_a, ok_a, best_a, scale)
        most = tl.max(x_a, 1)
        if B > 1:
            x_b = _exponents(cost_ptr, base, offs_n, offs_n < N, cost_n, cost_m, offs_b, ok_b, best_b, scale)
            most = tl.maximum(most, tl.max(x_b, 1))
        e_a = tl.exp2(x_a - most[:, None])
        total = tl.sum(e_a, 1)
        if B > 1:
            e_b = tl.exp2(x_b - most[:, None])
            total += tl.sum(e_b, 1)
        row = most + tl.log2(total)
        weight = theta / total
        if RELAX_U:
            weight *= tl.exp2((1 - power_u) * row)
        log_u = tl.where(theta > 0, (tl.log2(tl.where(theta > 0, theta, 1.0)) - power_u * row) * _LN2, _NO)
        tl.store(log_u_ptr + b * N + offs_n, log_u, mask=offs_n < N)
        tl.store(row_ptr + b * N + offs_n, row, mask=offs_n < N)
        plan_a = weight[:, None] * e_a
        if WRITE_PLAN:
            tl.store(plan_ptr + (b * N + offs_n[:, None]) * M + offs_a[None, :], plan_a, mask=(offs_n < N)[:, None] & (offs_a < M)[None, :])
        if SCORE:
            score_a += tl.where(ok_a[None, :], plan_a * (1 - (best_a[None, :] - x_a) / scale), 0.0)
        if B > 1:
            plan_b = weight[:, None] * e_b
            if WRITE_PLAN:
                tl.store(
                    plan_ptr + (b * N + offs_n[:, None]) * M + offs_b[None, :], plan_b, mask=(offs_n < N)[:, None] & (offs_b < M)[None, :]
                )
            if SCORE:
                score_b += tl.where(ok_b[None, :], plan_b * (1 - (best_b[None, :] - x_b) / scale), 0.0)
    if SCORE:
        tl.store(score_ptr + b * M + offs_a, tl.sum(score_a, 0), mask=offs_a < M)
        if B > 1:
            tl.store(score_ptr + b * M + offs_b, tl.sum(score_b, 0), mask=offs_b < M)


@triton.jit
def _soft(cost_ptr, base, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok, v, row, scale):
    """(BLOCK_N, block) S, the plan's rows as shares, and the cost."""
    cost = tl.load(
        cost_ptr + base + offs_n[:, None] * stride_n + offs_m[None, :] * stride_m, mask=n_ok[:, None] & m_ok[None, :], other=0.0
    ).to(tl.float32)
    x = tl.where(m_ok[None, :] & n_ok[:, None], v[None, :] - cost * scale - row[:, None], _NO)
    return tl.exp2(x), cost


@triton.jit
def _gradient(grad_ptr, base, offs_n, n_ok, stride_n, stride_m, offs_m, m_ok, cost, SCORE: tl.constexpr):
    """(BLOCK_N, block) gradient of the plan; of scores, (1 - C_ij) times that of score j, which has no stride over patches."""
    grad = tl.load(
        grad_ptr + base + offs_n[:, None] * stride_n + offs_m[None, :] * stride_m, mask=n_ok[:, None] & m_ok[None, :], other=0.0
    ).to(tl.float32)
    if SCORE:
        grad *= 1 - cost
    return grad


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
    BLOCK_N: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    RELAX_U: tl.constexpr,
    RELAX_V: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Gradients of cost, theta and gamma, see `implicit`; conjugate gradients until the residual has fallen to `tolerance`."""
    b = tl.program_id(0).to(tl.int64)
    base, grad_base = b * cost_b, b * grad_b
    offs_a, gamma_a, ok_a = _concepts(gamma_ptr, b * gamma_b, gamma_m, 0, M, A)
    offs_b, gamma_c, ok_b = _concepts(gamma_ptr, b * gamma_b, gamma_m, A, M, B)
    v_a = tl.where(ok_a, tl.load(log_v_ptr + b * M + offs_a, mask=ok_a, other=0.0), 0.0) * _LOG2E
    v_b = tl.where(ok_b, tl.load(log_v_ptr + b * M + offs_b, mask=ok_b, other=0.0), 0.0) * _LOG2E
    column_a, column_b = tl.zeros((BLOCK_N, A), tl.float32), tl.zeros((BLOCK_N, B), tl.float32)
    right_a, right_b = tl.zeros((BLOCK_N, A), tl.float32), tl.zeros((BLOCK_N, B), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        n_ok = offs_n < N
        row = tl.load(row_ptr + b * N + offs_n, mask=n_ok, other=0.0)
        mass = tl.load(theta_ptr + b * theta_b + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
        if RELAX_U:
            mass = tl.exp2(tl.load(log_u_ptr + b * N + offs_n, mask=n_ok, other=_NO) * _LOG2E + row)
        s_a, cost_a = _soft(cost_ptr, base, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a, v_a, row, scale)
        w_a = s_a * _gradient(grad_ptr, grad_base, offs_n, n_ok, grad_n, grad_m, offs_a, ok_a, cost_a, SCORE)
        mean = tl.sum(w_a, 1)
        if B > 1:
            s_b, cost_c = _soft(cost_ptr, base, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b, v_b, row, scale)
            w_b = s_b * _gradient(grad_ptr, grad_base, offs_n, n_ok, grad_n, grad_m, offs_b, ok_b, cost_c, SCORE)
            mean += tl.sum(w_b, 1)
            column_b += mass[:, None] * s_b
            right_b += mass[:, None] * (w_b - power_u * mean[:, None] * s_b)
        column_a += mass[:, None] * s_a
        right_a += mass[:, None] * (w_a - power_u * mean[:, None] * s_a)
        tl.store(d_theta_ptr + b * N + offs_n, mean, mask=n_ok)
    sums_a, sums_b = tl.sum(column_a, 0), tl.sum(column_b, 0)
    scale_a = tl.where(ok_a & (sums_a > 0), tl.rsqrt(tl.maximum(sums_a, _TINY)), 0.0)
    scale_b = tl.where(ok_b & (sums_b > 0), tl.rsqrt(tl.maximum(sums_b, _TINY)), 0.0)
    rest_a, rest_b = scale_a * tl.sum(right_a, 0), scale_b * tl.sum(right_b, 0)
    solved_a, solved_b = tl.zeros((A,), tl.float32), tl.zeros((B,), tl.float32)
    to_a, to_b = rest_a, rest_b
    square = tl.sum(rest_a * rest_a, 0) + tl.sum(rest_b * rest_b, 0)
    enough = square * tolerance * tolerance
    count = tl.full((), 0, tl.int32)
    while (count < max_steps) & (square > enough):
        d_a, d_b = scale_a * to_a, scale_b * to_b
        image_a, image_b = tl.zeros((BLOCK_N, A), tl.float32), tl.zeros((BLOCK_N, B), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            n_ok = offs_n < N
            row = tl.load(row_ptr + b * N + offs_n, mask=n_ok, other=0.0)
            mass = tl.load(theta_ptr + b * theta_b + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
            if RELAX_U:
                mass = tl.exp2(tl.load(log_u_ptr + b * N + offs_n, mask=n_ok, other=_NO) * _LOG2E + row)
            s_a, cost_a = _soft(cost_ptr, base, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a, v_a, row, scale)
            inner = tl.sum(s_a * d_a[None, :], 1)
            if B > 1:
                s_b, cost_c = _soft(cost_ptr, base, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b, v_b, row, scale)
                inner += tl.sum(s_b * d_b[None, :], 1)
                image_b += (mass * inner)[:, None] * s_b
            image_a += (mass * inner)[:, None] * s_a
        full_a = to_a / power_v - power_u * scale_a * tl.sum(image_a, 0)
        full_b = to_b / power_v - power_u * scale_b * tl.sum(image_b, 0)
        curvature = tl.sum(to_a * full_a, 0) + tl.sum(to_b * full_b, 0)
        length = tl.where(curvature > _TINY, square / tl.maximum(curvature, _TINY), 0.0)
        solved_a += length * to_a
        solved_b += length * to_b
        rest_a -= length * full_a
        rest_b -= length * full_b
        new = tl.sum(rest_a * rest_a, 0) + tl.sum(rest_b * rest_b, 0)
        to_a = rest_a + new / square * to_a
        to_b = rest_b + new / square * to_b
        square = tl.where(length > 0, new, 0.0)
        count += 1
    y_a, y_b = scale_a * solved_a, scale_b * solved_b
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        n_ok = offs_n < N
        row = tl.load(row_ptr + b * N + offs_n, mask=n_ok, other=0.0)
        theta = tl.load(theta_ptr + b * theta_b + offs_n * theta_n, mask=n_ok, other=0.0).to(tl.float32)
        mass, over_theta = theta, tl.full((BLOCK_N,), 1.0, tl.float32)
        if RELAX_U:
            mass = tl.exp2(tl.load(log_u_ptr + b * N + offs_n, mask=n_ok, other=_NO) * _LOG2E + row)
            over_theta = tl.exp2((1 - power_u) * row)
        s_a, cost_a = _soft(cost_ptr, base, offs_n, n_ok, cost_n, cost_m, offs_a, ok_a, v_a, row, scale)
        inner = tl.sum(s_a * y_a[None, :], 1)
        if B > 1:
            s_b, cost_c = _soft(cost_ptr, base, offs_n, n_ok, cost_n, cost_m, offs_b, ok_b, v_b, row, scale)
            inner += tl.sum(s_b * y_b[None, :], 1)
        inner = tl.load(d_theta_ptr + b * N + offs_n, mask=n_ok, other=0.0) - inner
        factor = -inverse_eps * mass
        g_a = _gradient(grad_ptr, grad_base, offs_n, n_ok, grad_n, grad_m, offs_a, ok_a, cost_a, SCORE)
        out_a = factor[:, None] * s_a * (g_a - power_u * inner[:, None] - y_a[None, :])
        if SCORE:  # the cost is also what is summed
            out_a -= mass[:, None] * s_a * tl.load(grad_ptr + grad_base + offs_a * grad_m, mask=ok_a, other=0.0)[None, :].to(tl.float32)
        tl.store(d_cost_ptr + (b * N + offs_n[:, None]) * M + offs_a[None, :], out_a, mask=n_ok[:, None] & (offs_a < M)[None, :])
        if B > 1:
            g_b = _gradient(grad_ptr, grad_base, offs_n, n_ok, grad_n, grad_m, offs_b, ok_b, cost_c, SCORE)
            out_b = factor[:, None] * s_b * (g_b - power_u * inner[:, None] - y_b[None, :])
            if SCORE:
                out_b -= mass[:, None] * s_b * tl.load(grad_ptr + grad_base + offs_b * grad_m, mask=ok_b, other=0.0)[None, :].to(tl.float32)
            tl.store(d_cost_ptr + (b * N + offs_n[:, None]) * M + offs_b[None, :], out_b, mask=n_ok[:, None] & (offs_b < M)[None, :])
        tl.store(d_theta_ptr + b * N + offs_n, tl.where(theta > 0, over_theta * inner, 0.0), mask=n_ok)
    ratio_a, ratio_b = tl.full((A,), 1.0, tl.float32), tl.full((B,), 1.0, tl.float32)
    if RELAX_V:
        ratio_a = sums_a / (power_v * tl.where(ok_a, gamma_a, 1.0))
        ratio_b = sums_b / (power_v * tl.where(ok_b, gamma_c, 1.0))
    tl.store(d_gamma_ptr + b * M + offs_a, tl.where(ok_a, ratio_a * y_a, 0.0), mask=offs_a < M)
    if B > 1:
        tl.store(d_gamma_ptr + b * M + offs_b, tl.where(ok_b, ratio_b * y_b, 0.0), mask=offs_b < M)
