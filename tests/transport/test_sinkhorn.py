"""The torch solver against a slow loop, its mathematical properties, and the paper's degenerate readout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dotcbm.transport.sinkhorn import TransportPlan, sinkhorn

EXACT = {"max_iter": 20_000, "tol": 1e-12}
RELAX = [(None, None), (0.3, None), (None, 0.2), (0.3, 0.2)]


def problem(seed: int, B: int = 2, N: int = 6, M: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(B, N, M, generator=rng, dtype=torch.float64)
    theta = torch.randn(B, N, generator=rng, dtype=torch.float64).softmax(-1)
    gamma = torch.randn(B, M, generator=rng, dtype=torch.float64).softmax(-1)
    return cost.to(dtype), theta.to(dtype), gamma.to(dtype)


def slow_loop(cost: list[list[float]], theta: list[float], gamma: list[float], eps: float, iterations: int) -> list[list[float]]:
    """Sinkhorn and Knopp's scaling, one number at a time, the columns first."""
    rows, columns = range(len(theta)), range(len(gamma))
    kernel = [[math.exp(-cost[i][j] / eps) for j in columns] for i in rows]
    u, v = list(theta), [1.0] * len(gamma)
    for _ in range(iterations):
        v = [gamma[j] / sum(u[i] * kernel[i][j] for i in rows) for j in columns]
        u = [theta[i] / sum(kernel[i][j] * v[j] for j in columns) for i in rows]
    return [[u[i] * kernel[i][j] * v[j] for j in columns] for i in rows]


@pytest.mark.parametrize("iterations", [1, 2, 7, 200])
def test_every_iterate_equals_a_slow_loop(iterations):
    cost, theta, gamma = problem(0)
    result = sinkhorn(cost, theta, gamma, eps=0.3, max_iter=iterations, tol=None)
    expected = [slow_loop(cost[b].tolist(), theta[b].tolist(), gamma[b].tolist(), 0.3, iterations) for b in range(2)]
    torch.testing.assert_close(result.plan_BNM, torch.tensor(expected, dtype=torch.float64), atol=1e-13, rtol=1e-10)
    assert result.num_iter == iterations
    off = (torch.tensor(expected, dtype=torch.float64).sum(1) - gamma).abs().sum(1)
    torch.testing.assert_close(result.residual_B, off, atol=1e-13, rtol=1e-9)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    B=st.integers(1, 3),
    N=st.integers(1, 9),
    M=st.integers(1, 9),
    eps=st.floats(0.1, 1.0),
    relax=st.sampled_from(RELAX),
)
def test_plan_is_what_its_potentials_say_and_meets_its_marginals(seed, B, N, M, eps, relax):
    cost, theta, gamma = problem(seed, B, N, M)
    result = sinkhorn(cost, theta, gamma, eps=eps, relax_patch=relax[0], relax_concept=relax[1], **EXACT)
    assert (result.residual_B < 1e-12).all()
    rebuilt = (result.log_u_BN[:, :, None] + result.log_v_BM[:, None] - cost / eps).exp()
    torch.testing.assert_close(result.plan_BNM, rebuilt, atol=1e-12, rtol=1e-9)
    sides = ((result.plan_BNM.sum(2), theta, result.log_u_BN, relax[0]), (result.plan_BNM.sum(1), gamma, result.log_v_BM, relax[1]))
    for got, marginal, log_scale, strength in sides:
        # Stationarity of a relaxed side: potential = -strength * log(side / marginal).
        expected = marginal if strength is None else marginal * (-(log_scale - marginal.log()) * eps / strength).exp()
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), relax=st.sampled_from(RELAX))
def test_permuting_concepts_and_patches_permutes_the_plan(seed, relax):
    cost, theta, gamma = problem(seed, N=7, M=5)
    rng = torch.Generator().manual_seed(seed)
    patches, concepts = torch.randperm(7, generator=rng), torch.randperm(5, generator=rng)
    options = {"eps": 0.1, "max_iter": 60, "tol": None, "relax_patch": relax[0], "relax_concept": relax[1]}
    plan = sinkhorn(cost, theta, gamma, **options).plan_BNM
    permuted = sinkhorn(cost[:, patches][:, :, concepts], theta[:, patches], gamma[:, concepts], **options).plan_BNM
    torch.testing.assert_close(permuted, plan[:, patches][:, :, concepts], atol=1e-13, rtol=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 5.0))
def test_constants_on_rows_and_columns_of_the_cost_change_no_balanced_plan(seed, size):
    cost, theta, gamma = problem(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    row, column = (size * torch.randn(2, n, generator=rng, dtype=torch.float64) for n in (6, 4))
    plan = sinkhorn(cost, theta, gamma, eps=0.2, **EXACT).plan_BNM
    shifted = sinkhorn(cost + row[:, :, None] + column[:, None], theta, gamma, eps=0.2, **EXACT).plan_BNM
    torch.testing.assert_close(shifted, plan, atol=1e-10, rtol=0)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), eps=st.floats(0.1, 0.5))
def test_cost_gradient_has_zero_row_and_column_sums(seed, eps):
    cost, theta, gamma = problem(seed)
    cost.requires_grad_()
    weight = torch.randn(cost.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = sinkhorn(cost, theta, gamma, eps=eps, **EXACT).plan_BNM
    (gradient,) = torch.autograd.grad((plan * weight).sum(), cost)
    assert gradient.abs().max() > 1e-6
    assert gradient.sum(1).abs().max() < 1e-8
    assert gradient.sum(2).abs().max() < 1e-8


@pytest.mark.parametrize(("relax_patch", "relax_concept"), RELAX)
def test_gradients_against_finite_differences(relax_patch, relax_concept):
    cost, theta, gamma = problem(3, N=4, M=3)
    inputs = (cost, theta.log(), gamma.log())

    def plan(cost: Tensor, theta_logit: Tensor, gamma_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = sinkhorn(
            cost,
            theta_logit.softmax(-1),
            gamma_logit.softmax(-1),
            eps=0.2,
            max_iter=25,
            tol=None,
            relax_patch=relax_patch,
            relax_concept=relax_concept,
        )
        return result.plan_BNM, result.log_u_BN, result.log_v_BM

    assert torch.autograd.gradcheck(plan, [x.requires_grad_() for x in inputs])


def test_relaxing_ever_less_approaches_the_balanced_plan():
    cost, theta, gamma = problem(4)
    balanced = sinkhorn(cost, theta, gamma, eps=0.2, **EXACT).plan_BNM
    gaps = [
        (sinkhorn(cost, theta, gamma, eps=0.2, relax_patch=r, relax_concept=r, max_iter=20_000, tol=1e-9).plan_BNM - balanced).abs().max()
        for r in (1.0, 10.0, 100.0)
    ]
    # The gap falls like 1 / strength in the end.
    assert gaps[0] > 4 * gaps[1]
    assert 8 < gaps[1] / gaps[2] < 12


def test_relaxed_transport_leaves_out_what_fits_nowhere():
    cost = torch.full((1, 4, 3), 0.1)
    cost[:, :, 2] = 2.0  # a concept that no patch shows
    result = sinkhorn(cost, torch.full((4,), 0.25), torch.full((3,), 1 / 3), eps=0.05, relax_patch=0.2, relax_concept=0.2)
    mass = result.plan_BNM.sum(1)[0]
    assert mass[2] < 0.1 * mass[0]


def test_tolerance_stops_early_and_for_the_whole_batch():
    cost, theta, gamma = problem(5, B=3, N=49, M=20)
    loose = sinkhorn(cost, theta, gamma, eps=0.1, tol=1e-2, max_iter=1000)
    tight = sinkhorn(cost, theta, gamma, eps=0.1, tol=1e-6, max_iter=1000)
    assert 1 < loose.num_iter < tight.num_iter < 1000
    assert (loose.residual_B < 1e-2).all()
    assert (tight.residual_B < 1e-6).all()
    one_less = sinkhorn(cost, theta, gamma, eps=0.1, tol=None, max_iter=tight.num_iter - 1)
    assert (one_less.residual_B >= 1e-6).any()
    torch.testing.assert_close(tight.plan_BNM.sum(2), theta, atol=1e-15, rtol=1e-12)


def test_a_tolerance_that_is_not_reached_warns():
    cost, theta, gamma = problem(6)
    with pytest.warns(UserWarning, match=r"eps=0\.01 did not reach tol=1e-09 within max_iter=3"):
        result = sinkhorn(cost, theta, gamma, eps=0.01, tol=1e-9, max_iter=3)
    assert result.num_iter == 3
    assert isinstance(result, TransportPlan)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), N=st.integers(2, 40), M=st.integers(2, 12), eps=st.floats(0.05, 1.0), flat=st.booleans())
def test_the_printed_score_hardly_depends_on_the_picture(seed, N, M, eps, flat):
    """(12): column j of Q sums to gamma_j over N patches and C <= 2, so min_i Q_ij C_ij <= 2 gamma_j / N."""
    cost, theta, gamma = problem(seed, N=N, M=M)
    if flat:  # opposite vectors everywhere, equal patches: the bound is met with equality
        cost, theta = torch.full_like(cost, 2.0), torch.full_like(theta, 1 / N)
    plan = sinkhorn(cost, theta, gamma, eps=eps, max_iter=20_000, tol=1e-10).plan_BNM
    score = (plan * cost).amin(1)
    bound = 2 * gamma / N
    assert (score <= bound + 1e-9).all()
    if flat:
        torch.testing.assert_close(score, bound, atol=1e-9, rtol=1e-6)
    probability = (1 - score).sigmoid()
    assert (probability >= (1 - bound - 1e-9).sigmoid()).all()
    assert (probability <= torch.ones(()).sigmoid() + 1e-6).all()


def test_the_printed_score_on_the_papers_shapes_says_the_same_of_every_picture():
    cost, theta, _ = problem(7, B=2, N=324, M=112)
    score = (sinkhorn(cost, theta, torch.full((112,), 1 / 112, dtype=torch.float64), eps=0.05).plan_BNM * cost).amin(1)
    probability = (1 - score).sigmoid()
    assert probability.min() >= 0.73104
    assert probability.max() <= 0.73106


def _free(seed: int, *, theta_0: float | None = None, gamma_0: float | None = None):
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(3, 7, 4, generator=generator, dtype=torch.float64)
    theta, gamma = (torch.rand(3, n, generator=generator, dtype=torch.float64) + 0.1 for n in (7, 4))
    if theta_0 is not None:
        theta[:, 0] = theta_0
    if gamma_0 is not None:
        gamma[:, 0] = gamma_0
    return cost, theta / theta.sum(1, keepdim=True), gamma / gamma.sum(1, keepdim=True)


@pytest.mark.parametrize("solver", ["torch", "pot"])
def test_free_patches_are_the_limit_of_relaxed_ones(solver):
    cost, theta, gamma = _free(0)
    free = sinkhorn(cost, theta, gamma, eps=0.2, relax_patch=0.0)
    limit = sinkhorn(cost, theta, gamma, eps=0.2, relax_patch=1e-7, max_iter=500, tol=None, solver=solver)
    torch.testing.assert_close(free.plan_BNM, limit.plan_BNM, atol=1e-5, rtol=1e-4)


@given(st.integers(0, 1000), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([None, 0.0]), st.sampled_from([None, 0.0]))
def test_free_patches_meet_the_concepts_and_what_potentials_say(seed, eps, theta_0, gamma_0):
    cost, theta, gamma = _free(seed, theta_0=theta_0, gamma_0=gamma_0)
    plan = sinkhorn(cost, theta, gamma, eps=eps, relax_patch=0.0)
    torch.testing.assert_close(plan.plan_BNM.sum(1), gamma)
    rebuilt = (plan.log_u_BN[:, :, None] + plan.log_v_BM[:, None] - cost / eps).exp()
    torch.testing.assert_close(plan.plan_BNM, rebuilt)
    assert plan.residual_B.max() < 1e-9
    if theta_0 is not None:
        assert plan.plan_BNM[:, 0].abs().max() == 0


def test_gradients_of_free_patches():
    cost, theta, gamma = _free(3)
    inputs = [x[:1].clone().requires_grad_() for x in (cost, theta, gamma)]
    assert torch.autograd.gradcheck(lambda *x: sinkhorn(*x, eps=0.3, relax_patch=0.0, check=False).plan_BNM, inputs)
