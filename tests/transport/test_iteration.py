"""The iteration of the torch solver: momentum is safeguarded, the objective rises, potentials that grow are absorbed."""

from __future__ import annotations

import itertools

import pytest
import torch
from fakes.transport import RELAX, problem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dotcbm.transport import backend_torch
from dotcbm.transport.sinkhorn import sinkhorn


def random_problem(seed: int, N: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(3, N, M, generator=rng, dtype=torch.float64)
    return cost, *(torch.randn(3, n, generator=rng, dtype=torch.float64).softmax(1) for n in (N, M))


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12), st.sampled_from([0.02, 0.05, 0.1, 0.3, 1.0]), st.sampled_from(RELAX))
@example(7, 7, 7, 0.05, (None, None))
def test_momentum_needs_at_most_a_few_iterations_more_than_none(seed, N, M, eps, relax):
    inputs = random_problem(seed, N, M)
    options = {
        "eps": eps,
        "max_iter": 3000,
        "tol": 1e-3,
        "check": False,
        "solver": "torch",
        "relax_patch": relax[0],
        "relax_concept": relax[1],
    }
    plain, fast = (sinkhorn(*inputs, accelerate=accelerate, **options) for accelerate in (False, True))
    # The worst of 87,120 problems took 91 for 71, and 24 for 18: here seed 7, N = M = 7, eps 0.05 takes 25 for 21.
    assert (fast.num_iter_B <= 1.25 * plain.num_iter_B + 5).all()
    assert (fast.residual_B < 1e-3).all() or (plain.residual_B >= 1e-3).any()


def test_momentum_saves_most_iterations_where_they_are_many():
    cost, theta, gamma = problem(0, 8, 196, 112)
    counts = {
        a: sinkhorn(cost, theta, gamma, eps=0.01, max_iter=2000, accelerate=a, solver="torch").num_iter_B.double().mean()
        for a in (True, False)
    }
    assert counts[False] > 40
    assert counts[True] < 0.6 * counts[False]


@pytest.mark.parametrize("max_iter", [2, 5, 9, 20])
@pytest.mark.parametrize("seed", range(4))
def test_cut_short_it_returns_the_best_it_has_seen(seed, max_iter):
    inputs = random_problem(seed, 12, 9)
    options = {"eps": 0.02, "tol": 1e-9, "check": False, "solver": "torch"}
    residuals = [sinkhorn(*inputs, max_iter=k, **options).residual_B for k in range(1, max_iter + 1)]
    for before, after in itertools.pairwise(residuals):
        assert (after <= before).all()
    plan = sinkhorn(*inputs, max_iter=max_iter, **options).plan_BNM
    torch.testing.assert_close((plan.sum(1) - inputs[2]).abs().sum(1), residuals[-1])


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.03, 1.0))
def test_the_dual_objective_rises_with_every_plain_iteration(seed, eps):
    cost, theta, gamma = random_problem(seed, 7, 5)
    last = torch.full((3,), -torch.inf, dtype=torch.float64)
    for max_iter in range(1, 12):
        found = sinkhorn(cost, theta, gamma, eps=eps, max_iter=max_iter, tol=None, solver="torch")
        objective = (found.log_u_BN * theta).sum(1) + (found.log_v_BM * gamma).sum(1) - found.plan_BNM.sum((1, 2))
        assert (objective >= last - 1e-12).all()
        last = objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relax", RELAX)
def test_potentials_that_grow_are_absorbed(monkeypatch, dtype, relax):
    inputs = problem(2, 3, 20, 11)
    options = {
        "eps": 0.005,
        "max_iter": 4000,
        "tol": 1e-5,
        "check": False,
        "solver": "torch",
        "relax_patch": relax[0],
        "relax_concept": relax[1],
    }
    absorbed = []
    original = backend_torch._Group._absorb
    monkeypatch.setattr(backend_torch._Group, "_absorb", lambda self: (absorbed.append(1), original(self))[1])
    monkeypatch.setitem(backend_torch._DRIFT, dtype, 3.0)  # anything is too far
    monkeypatch.setitem(backend_torch._RANGE, dtype, 0.0)
    often = sinkhorn(*(x.to(dtype) for x in inputs), **options)
    assert len(absorbed) > 2
    monkeypatch.undo()
    expected = sinkhorn(*inputs, **{**options, "tol": 1e-7})
    torch.testing.assert_close(often.plan_BNM.double(), expected.plan_BNM, atol=2e-5, rtol=0)


def test_groups_of_pictures_change_nothing(monkeypatch):
    inputs = [x.float().requires_grad_() for x in problem(3, 7, 13, 60)]
    whole = sinkhorn(*inputs, eps=0.05, solver="torch")
    gradients = torch.autograd.grad(whole.plan_BNM.square().sum(), inputs)
    for module in ("backend_torch", "implicit"):
        monkeypatch.setattr(f"dotcbm.transport.{module}._GROUP_ELEMENTS", 2 * 13 * 60)
    parts = sinkhorn(*inputs, eps=0.05, solver="torch")
    torch.testing.assert_close(parts.plan_BNM, whole.plan_BNM)
    assert torch.equal(parts.num_iter_B, whole.num_iter_B)
    for a, b in zip(torch.autograd.grad(parts.plan_BNM.square().sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("eps", [0.2, 0.05, 0.02])
@pytest.mark.parametrize(("N", "M"), [(49, 40), (196, 44)])  # the second is solved by powers of two
def test_a_picture_does_not_depend_on_the_others_of_its_batch(eps, N, M):
    """Rounding that came from the batch once sent tokens to other experts on two processes than on one."""
    rng = torch.Generator().manual_seed(8)
    cost, weight = 0.3 + 1.2 * torch.rand(6, N, M, generator=rng), torch.randn(6, N, M, generator=rng)
    cost[3:] -= 0.25  # others than the first three reach lower
    theta = torch.rand(6, N, generator=rng).softmax(1)
    gamma = torch.full((6, M), 1 / M)

    def solved(rows):
        leaf = cost[rows].clone().requires_grad_()
        found = sinkhorn(leaf, theta[rows], gamma[rows], eps=eps, max_iter=300, solver="torch", check=False)
        return found.plan_BNM.detach(), found.num_iter_B, torch.autograd.grad((found.plan_BNM * weight[rows]).sum(), leaf)[0]

    together, alone = solved(slice(None)), [solved(slice(i, i + 1)) for i in range(6)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-10)
