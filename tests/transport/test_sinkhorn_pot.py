"""Our solver against Python Optimal Transport in float64: values and gradients, balanced and relaxed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dotcbm.transport.sinkhorn import sinkhorn

ot = pytest.importorskip("ot", reason="POT is not installed (pip install 'dotcbm[pot]')")

RELAX = [(None, None), (0.3, None), (None, 0.2), (0.3, 0.2)]


def problem(seed: int, B: int, N: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    patch = torch.nn.functional.normalize(torch.randn(B, N, 8, generator=rng, dtype=torch.float64), dim=-1)
    concept = torch.nn.functional.normalize(torch.randn(M, 8, generator=rng, dtype=torch.float64), dim=-1)
    theta = torch.randn(B, N, generator=rng, dtype=torch.float64).softmax(-1)
    gamma = torch.randn(B, M, generator=rng, dtype=torch.float64).softmax(-1)
    return 1 - patch @ concept.T, theta, gamma


def gradients(plan: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.randn(plan.shape, generator=torch.Generator().manual_seed(9), dtype=plan.dtype)
    return list(torch.autograd.grad((plan * weight).sum(), inputs))


def tangent(gradient: Tensor) -> Tensor:
    """Marginals of balanced transport can only move with their sum fixed, so that a constant in their gradient means nothing."""
    return gradient - gradient.mean(-1, keepdim=True)


@pytest.mark.parametrize(("eps", "N", "M"), [(0.5, 49, 12), (0.05, 49, 30), (0.05, 30, 49), (0.02, 16, 9)])
def test_balanced_plan_and_gradients_equal_pot_autodiff(eps, N, M):
    ours = [x.requires_grad_() for x in problem(1, 3, N, M)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    plan = sinkhorn(*ours, eps=eps, max_iter=5000, tol=1e-11).plan_BNM
    # POT itself, not our wrapper of it.
    result = ot.solve_batch(theirs[0], eps, theirs[1], theirs[2], max_iter=5000, tol=1e-12, method="log_sinkhorn", grad="autodiff")
    torch.testing.assert_close(plan, result.plan, atol=1e-9, rtol=0)
    for ours_x, theirs_x in zip(gradients(plan, *ours), gradients(result.plan, *theirs), strict=True):
        scale = tangent(theirs_x).abs().max()
        assert scale > 1e-3
        torch.testing.assert_close(tangent(ours_x) / scale, tangent(theirs_x) / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("relax_patch", "relax_concept"), RELAX[1:])
@pytest.mark.parametrize("eps", [0.3, 0.05])
def test_relaxed_plan_and_gradients_equal_pot(eps, relax_patch, relax_concept):
    ours = [x.requires_grad_() for x in problem(2, 2, 20, 9)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    plan = sinkhorn(*ours, eps=eps, max_iter=5000, tol=1e-12, relax_patch=relax_patch, relax_concept=relax_concept).plan_BNM
    strength = tuple(float("inf") if r is None else r for r in (relax_patch, relax_concept))
    cost, theta, gamma = theirs
    reference = torch.stack(
        [ot.unbalanced.sinkhorn_unbalanced(theta[b], gamma[b], cost[b], eps, strength, numItermax=5000, stopThr=1e-13) for b in range(2)]
    )
    torch.testing.assert_close(plan, reference, atol=1e-9, rtol=0)
    for ours_x, theirs_x in zip(gradients(plan, *ours), gradients(reference, *theirs), strict=True):
        torch.testing.assert_close(ours_x, theirs_x, atol=1e-6 * float(theirs_x.abs().max()), rtol=0)


@pytest.mark.parametrize(("relax_patch", "relax_concept"), RELAX)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_two_solvers_agree_also_where_masses_are_zero(dtype, relax_patch, relax_concept):
    cost, theta, gamma = problem(3, 3, 12, 7)
    theta[1, 4] = theta[2, 0] = gamma[0, 3] = 0.0
    theta, gamma = theta / theta.sum(1, keepdim=True), gamma / gamma.sum(1, keepdim=True)
    results = {}
    for solver in ("torch", "pot"):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (cost, theta, gamma)]
        result = sinkhorn(*inputs, eps=0.1, max_iter=3000, tol=1e-5, solver=solver, relax_patch=relax_patch, relax_concept=relax_concept)
        results[solver] = (result, gradients(result.plan_BNM, *inputs))
    (a, grad_a), (b, grad_b) = results["torch"], results["pot"]
    assert a.plan_BNM.dtype == b.plan_BNM.dtype == dtype
    torch.testing.assert_close(a.plan_BNM, b.plan_BNM, atol=2e-5, rtol=0)
    for result in (a, b):
        assert (result.residual_B < 1e-5).all()
        rebuilt = (result.log_u_BN[:, :, None] + result.log_v_BM[:, None] - cost.to(dtype) / 0.1).exp()
        torch.testing.assert_close(rebuilt, result.plan_BNM, atol=1e-6, rtol=1e-4)
        assert (result.plan_BNM[1, 4] == 0).all()
        assert (result.plan_BNM[0, :, 3] == 0).all()
    for grad in (grad_a, grad_b):
        assert all(g.isfinite().all() for g in grad)
        assert grad[1][1, 4] == grad[1][2, 0] == grad[2][0, 3] == 0
    torch.testing.assert_close(grad_a[0], grad_b[0], atol=2e-3 * float(grad_b[0].abs().max()), rtol=0)


@pytest.mark.parametrize("relax", [None, 0.3])
def test_pot_takes_an_empty_batch_and_shared_marginals(relax):
    cost, theta, gamma = problem(4, 2, 6, 5)
    options = {"eps": 0.1, "solver": "pot", "relax_patch": relax, "relax_concept": relax}
    empty = sinkhorn(cost[:0], theta[0], gamma[0], **options)
    assert empty.plan_BNM.shape == (0, 6, 5)
    assert empty.log_u_BN.shape == (0, 6)
    assert empty.log_v_BM.shape == (0, 5)
    assert empty.residual_B.shape == (0,)
    shared = sinkhorn(cost, theta[0], gamma[0], **options).plan_BNM
    single = sinkhorn(cost[1:], theta[:1], gamma[:1], **options).plan_BNM
    torch.testing.assert_close(shared[1:], single, atol=2e-3, rtol=0)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_pot_keeps_our_tolerance(tol):
    cost, theta, gamma = problem(5, 2, 196, 30)
    result = sinkhorn(cost, theta, gamma, eps=0.01, tol=tol, max_iter=3000, solver="pot")
    assert result.num_iter < 3000
    assert (result.residual_B < tol).all()
