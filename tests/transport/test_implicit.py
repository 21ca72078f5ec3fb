"""Implicit gradients equal unrolled ones at the fixed point, at a memory that does not grow, and are not used elsewhere."""

from __future__ import annotations

import warnings

import pytest
import torch
from fakes.transport import RELAX, distance, problem, tangent
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.transport import implicit
from dotcbm.transport.sinkhorn import sinkhorn

EXACT = {"max_iter": 4000, "tol": 1e-12, "check": False, "solver": "torch"}


@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("M", [7, 60])  # a factorisation, conjugate gradients
@pytest.mark.parametrize("eps", [0.01, 0.05, 0.3])
def test_equal_to_unrolling(relax, M, eps):
    inputs = problem(1, 3, 25, M)
    # Pictures that are done early must not disturb those that are not.
    cost = inputs[0] * torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    leaves = [x.clone().requires_grad_() for x in (cost, *inputs[1:])]
    weight = torch.randn(cost.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"eps": eps, "relax_patch": relax[0], "relax_concept": relax[1], **EXACT}
    gradients = [
        torch.autograd.grad((sinkhorn(*leaves, gradient=gradient, **options).plan_BNM * weight).sum(), leaves)
        for gradient in ("implicit", "unroll")
    ]
    side = tangent if relax == (None, None) else lambda x: x
    for j, (ours, theirs) in enumerate(zip(*gradients, strict=True)):
        assert distance(ours if j == 0 else side(ours), theirs if j == 0 else side(theirs)) < 1e-6


@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("M", [3, 50])
def test_against_finite_differences(relax, M):
    cost, theta, gamma = problem(2, 1, 4, M)

    def plan(cost, theta_logit, gamma_logit):
        masses = theta_logit.softmax(-1), gamma_logit.softmax(-1)
        return sinkhorn(cost, *masses, eps=0.2, relax_patch=relax[0], relax_concept=relax[1], **EXACT).plan_BNM

    inputs = [x.requires_grad_() for x in (cost, theta.log(), gamma.log())]
    assert torch.autograd.gradcheck(plan, inputs, fast_mode=True)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 60), st.sampled_from([0.02, 0.1, 0.5]))
def test_rows_and_columns_of_the_costs_gradient_sum_to_zero(seed, M, eps):
    inputs = [x.requires_grad_() for x in problem(seed, 2, 9, M)]
    plan = sinkhorn(*inputs, eps=eps, max_iter=2000, tol=1e-9, check=False, solver="torch").plan_BNM
    weight = torch.randn(plan.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((plan * weight).sum(), inputs[0])
    assert gradient.sum(1).abs().max() < 1e-7
    assert gradient.sum(2).abs().max() < 1e-10


def test_both_ways_of_solving_give_the_same(monkeypatch):
    inputs = [x.requires_grad_() for x in problem(3, 4, 30, 20)]
    plan = sinkhorn(*inputs, eps=0.03, **EXACT).plan_BNM
    direct = torch.autograd.grad(plan.square().sum(), inputs, retain_graph=True)
    monkeypatch.setattr(implicit, "_DIRECT", 0)
    for a, b in zip(torch.autograd.grad(plan.square().sum(), inputs), direct, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-6)


def test_concepts_that_no_patch_tells_apart():
    """A factorisation meets a matrix that is singular to rounding."""
    cost, theta, gamma = problem(4, 2, 9, 6, torch.float32)
    cost = cost[:, :, :1].expand(-1, -1, 6).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn(cost, theta, gamma, eps=1e-3, solver="torch").plan_BNM.square().sum(), cost)
    assert gradient.isfinite().all()


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_iterations():
    inputs = [x.requires_grad_() for x in problem(5, 2, 30, 20)]

    def kept(**options) -> int:
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
            sinkhorn(*inputs, eps=0.05, tol=None, check=False, solver="torch", **options)
        return sum(saved)

    assert kept(max_iter=30) == kept(max_iter=300)
    assert kept(max_iter=60, gradient="unroll") > 1.8 * kept(max_iter=30, gradient="unroll")


def test_too_large_a_residual_is_unrolled_and_said():
    inputs = [x.requires_grad_() for x in problem(6, 2, 20, 12)]
    options = {"eps": 0.01, "max_iter": 3, "tol": None, "check": False, "solver": "torch"}
    with pytest.warns(UserWarning, match=r"eps=0\.01 left a residual above 0\.01 within max_iter=3, too much for implicit") as said:
        found, _ = (sinkhorn(scale * inputs[0], *inputs[1:], **options) for scale in (1, 2))
    assert len({str(warning.message) for warning in said}) == 1  # Python shows the same words once
    gradients = torch.autograd.grad(found.plan_BNM.square().sum(), inputs)
    unrolled = sinkhorn(*inputs, gradient="unroll", **options)
    for a, b in zip(gradients, torch.autograd.grad(unrolled.plan_BNM.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(*(x.detach() for x in inputs), **options)  # without gradients there is nothing to say


def test_gradient_of_a_plan_whose_rows_are_not_quite_met_keeps_them():
    """POT ends with the concepts, so that rows are off by what it stopped at; no change of the cost moves them all the same."""
    cost, theta, gamma = problem(3, 2, 30, 50)
    plan = sinkhorn(cost.requires_grad_(), theta, gamma, eps=0.05, tol=3e-3, solver="pot").plan_BNM
    assert (plan.sum(2) - theta).abs().max() > 1e-6
    gradient = torch.autograd.grad(plan.square().sum(), cost)[0]
    assert gradient.sum(2).abs().max() < 1e-10 * gradient.abs().max()


def test_backward_inside_autocast_computes_in_full_precision():
    inputs = [x.float().requires_grad_() for x in problem(7, 2, 20, 60)]
    plan = sinkhorn(*inputs, eps=0.05, solver="torch").plan_BNM
    expected = torch.autograd.grad(plan.square().sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(plan.square().sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("relax", [None, 0.4])
def test_rows_too_small_for_their_shares_have_the_gradient_of_their_softmax(relax):
    """From 1e-30 on a row of the plan underflows, whose shares decide its gradient: computed in float64, they do not."""
    rng = torch.Generator().manual_seed(5)
    cost, weight = torch.rand(2, 6, 40, generator=rng), torch.randn(2, 6, 40, generator=rng)
    theta = torch.tensor([[1e-33, 0.25, 0.25, 0.25, 0.25, 0.0], [1e-41, 1e-29, 0.5, 0.5, 1e-12, 0.0]])
    settings = {"eps": 0.05, "tol": 1e-6, "max_iter": 2000, "relax_patch": relax, "relax_concept": relax, "solver": "torch"}

    def gradient(dtype):
        mass = (theta.double() / theta.double().sum(1, keepdim=True)).to(dtype).requires_grad_()
        plan = sinkhorn(cost.to(dtype), mass, torch.full((40,), 1 / 40, dtype=dtype), check=False, **settings).plan_BNM
        return torch.autograd.grad((plan * weight).sum(), mass)[0].double()

    found, expected = gradient(torch.float32), gradient(torch.float64)
    centred = [x - x[theta > 1e-20].mean() if relax is None else x for x in (found, expected)]
    assert (found[theta == 0] == 0).all()
    torch.testing.assert_close(centred[0][theta > 0], centred[1][theta > 0], rtol=2e-3, atol=2e-3)
