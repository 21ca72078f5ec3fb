"""Every edge case of the transport layer, with the answer that is promised for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dotcbm.transport.cost import cosine_cost
from dotcbm.transport.sinkhorn import sinkhorn

RELAX = [(None, None), (0.3, None), (None, 0.2), (0.3, 0.2)]


def problem(B: int = 2, N: int = 6, M: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(N * 100 + M)
    cost = 2 * torch.rand(B, N, M, generator=rng, dtype=torch.float64)
    theta = torch.randn(B, N, generator=rng, dtype=torch.float64).softmax(-1)
    gamma = torch.randn(M, generator=rng, dtype=torch.float64).softmax(-1)
    return cost.to(dtype), theta.to(dtype), gamma.to(dtype)


@pytest.mark.parametrize(("relax_patch", "relax_concept"), RELAX)
def test_zero_masses_equal_the_problem_without_them(relax_patch, relax_concept):
    cost, theta, gamma = problem(dtype=torch.float64)
    wide_cost = torch.full((2, 8, 5), 0.01, dtype=torch.float64)  # cheap, so that mass would go there if it could
    wide_cost[:, :6, :4] = cost
    wide_theta, wide_gamma = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    wide_theta[:, :6], wide_gamma[:4] = theta, gamma
    inputs = [x.requires_grad_() for x in (wide_cost, wide_theta, wide_gamma)]
    options = {"eps": 0.1, "tol": None, "max_iter": 40, "relax_patch": relax_patch, "relax_concept": relax_concept}
    wide = sinkhorn(*inputs, **options)
    narrow = sinkhorn(cost, theta, gamma, **options)
    torch.testing.assert_close(wide.plan_BNM[:, :6, :4], narrow.plan_BNM, atol=1e-14, rtol=1e-10)
    assert (wide.plan_BNM[:, 6:] == 0).all()
    assert (wide.plan_BNM[:, :, 4] == 0).all()
    assert (wide.log_u_BN[:, 6:] == -torch.inf).all()
    assert (wide.log_v_BM[:, 4] == -torch.inf).all()
    torch.testing.assert_close(wide.residual_B, narrow.residual_B, atol=1e-14, rtol=1e-8)
    grad_cost, grad_theta, grad_gamma = torch.autograd.grad(wide.plan_BNM.square().sum(), inputs)
    assert all(g.isfinite().all() for g in (grad_cost, grad_theta, grad_gamma))
    for zero in (grad_cost[:, 6:], grad_cost[:, :, 4], grad_theta[:, 6:], grad_gamma[4]):
        assert (zero == 0).all()
    assert grad_theta[:, :6].abs().min() > 0


@pytest.mark.parametrize(("N", "M"), [(1, 1), (1, 5), (5, 1)])
def test_one_patch_or_one_concept_is_the_product_of_the_marginals(N, M):
    cost, theta, gamma = problem(N=N, M=M)
    result = sinkhorn(cost.requires_grad_(), theta, gamma, eps=0.05)
    torch.testing.assert_close(result.plan_BNM, theta[:, :, None] * gamma, atol=0, rtol=5e-6)
    result.plan_BNM.square().sum().backward()
    assert cost.grad is not None
    assert cost.grad.abs().max() < 1e-5


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4])
def test_eps_far_below_what_exp_can_hold(eps):
    # Two clusters: patches 0-2 cost nothing at concept 0, patches 3-5 nothing at concept 1. exp(-2 / 1e-3) is 0 in every precision.
    cost = torch.tensor([[0.0, 2.0]] * 3 + [[2.0, 0.0]] * 3)[None].requires_grad_()
    theta = torch.full((6,), 1 / 6)
    result = sinkhorn(cost, theta, torch.tensor([0.5, 0.5]), eps=eps)
    expected = torch.tensor([[1 / 6, 0.0]] * 3 + [[0.0, 1 / 6]] * 3)[None]
    torch.testing.assert_close(result.plan_BNM, expected, atol=1e-6, rtol=0)
    assert result.log_v_BM.isfinite().all()
    result.plan_BNM.square().sum().backward()
    assert cost.grad is not None
    assert cost.grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_a_concept_that_every_patch_dislikes_does_not_underflow(eps):
    cost, theta, gamma = problem(N=30, M=8)
    cost[:, :, 5] += 100.0  # exp(-100 / eps) relative to the other columns
    result = sinkhorn(cost, theta, gamma, eps=eps, max_iter=50, tol=None)
    assert result.plan_BNM.isfinite().all()
    reference = sinkhorn(cost.double(), theta.double(), gamma.double(), eps=eps, max_iter=50, tol=None, check=False)
    torch.testing.assert_close(result.plan_BNM.sum(1)[:, 5], reference.plan_BNM.sum(1)[:, 5].float(), atol=5e-3, rtol=0)
    assert (result.plan_BNM.sum(1)[:, 5] > 0.05).all()  # of gamma = 0.32; not yet converged, but no zero


def test_saliency_so_small_that_its_products_underflow():
    cost, _, gamma = problem(N=6, M=4)
    theta = torch.tensor([1e-38, 1e-42, 0.5, 0.5, 1e-30, 0.0])
    theta = theta.expand(2, 6).clone().requires_grad_()
    result = sinkhorn(cost, theta, gamma, eps=0.01, max_iter=500)
    assert result.plan_BNM.isfinite().all()
    result.plan_BNM.sum(1).square().sum().backward()
    assert theta.grad is not None
    assert theta.grad.isfinite().all()


def test_mass_that_only_the_smallest_number_can_carry():
    # Three concepts that only patch 0 likes, whose share of 1.4e-45 cannot be divided by three: sums of zero, no infinite potential.
    cost = torch.full((1, 6, 4), 2.0)
    cost[0, 0], cost[0, :, 3] = 0.0, 0.0
    cost.requires_grad_()
    theta = torch.tensor([1e-45, 0.2, 0.2, 0.2, 0.2, 0.2])
    result = sinkhorn(cost, theta, torch.full((4,), 0.25), eps=0.01, max_iter=500)
    torch.testing.assert_close(result.plan_BNM[0, 1:], torch.full((5, 4), 0.05), atol=1e-3, rtol=0)
    result.plan_BNM.square().sum().backward()
    assert cost.grad is not None
    assert cost.grad.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, -3.0, 50.0])
def test_looking_at_values_does_not_change_them(offset):
    cost, theta, gamma = problem()
    cost[1] += offset
    looked, blind = (sinkhorn(cost, theta, gamma, eps=0.05, solver="torch", check=check) for check in (True, False))
    for name, value in vars(looked).items():
        assert torch.equal(value, vars(blind)[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_not_finite_names_the_picture(bad):
    cost, theta, gamma = problem(B=4)
    cost[2, 1, 3] = bad
    with pytest.raises(ValueError, match="cost of picture 2 of the batch"):
        sinkhorn(cost, theta, gamma, eps=0.1)


def test_marginals_that_do_not_sum_to_one_are_errors_where_they_must_be_met():
    cost, theta, gamma = problem()
    with pytest.raises(ValueError, match=r"theta of picture 1 of the batch sums to 2, not 1"):
        sinkhorn(cost, theta * torch.tensor([[1.0], [2.0]]), gamma, eps=0.1)
    with pytest.raises(ValueError, match=r"gamma of picture 0 of the batch sums to 0\.5, not 1"):
        sinkhorn(cost, theta, gamma / 2, eps=0.1)
    relaxed = sinkhorn(cost, theta, gamma / 2, eps=0.1, relax_patch=0.3, relax_concept=0.3)
    assert relaxed.plan_BNM.isfinite().all()


@pytest.mark.parametrize("relax", [None, 0.3])
def test_negative_nan_and_missing_mass(relax):
    cost, theta, gamma = problem()
    options = {"eps": 0.1, "relax_patch": relax, "relax_concept": relax}
    negative, nan = theta.clone(), theta.clone()
    negative[1, 0] *= -1
    nan[0, 2] = float("nan")
    with pytest.raises(ValueError, match="theta of picture 1 of the batch holds negative"):
        sinkhorn(cost, negative, gamma, **options)
    with pytest.raises(ValueError, match="theta of picture 0 of the batch holds negative, NaN"):
        sinkhorn(cost, nan, gamma, **options)
    with pytest.raises(ValueError, match="gamma of picture 0 of the batch sums to 0"):
        sinkhorn(cost, theta, torch.zeros(4), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relax", [None, 0.3])
def test_half_precision_inputs_are_accumulated_in_float32(dtype, relax):
    cost, theta, gamma = problem(N=196, M=30, dtype=dtype)
    cost.requires_grad_()
    options = {"eps": 0.1, "tol": None, "max_iter": 20, "relax_patch": relax, "relax_concept": relax}
    result = sinkhorn(cost, theta, gamma, **options)
    assert result.plan_BNM.dtype == torch.float32
    total_theta = theta.double() / (theta.double().sum(1, keepdim=True) if relax is None else 1)
    total_gamma = gamma.double() / (gamma.double().sum() if relax is None else 1)
    reference = sinkhorn(cost.detach().double(), total_theta, total_gamma, **options)
    torch.testing.assert_close(result.plan_BNM.double(), reference.plan_BNM, atol=1e-7, rtol=1e-3)
    result.plan_BNM.square().sum().backward()
    assert cost.grad is not None
    assert cost.grad.dtype == dtype


def test_rounded_marginals_are_brought_back_to_one_total():
    cost, _, gamma = problem(N=196, M=30, dtype=torch.bfloat16)
    theta = torch.full((2, 196), 1 / 196, dtype=torch.bfloat16)
    assert (theta.double().sum(1) - gamma.double().sum()).abs().max() > 1e-3
    result = sinkhorn(cost, theta, gamma, eps=0.2, tol=1e-4, max_iter=500)
    assert (result.residual_B < 1e-4).all()


def test_autocast_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    patch, concept = torch.randn(2, 20, 16, generator=rng), torch.randn(5, 16, generator=rng)
    theta, gamma = torch.full((20,), 0.05), torch.full((5,), 0.2)
    plain = sinkhorn(cosine_cost(patch, concept), theta, gamma, eps=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (patch @ concept.T).dtype == torch.bfloat16
        mixed = sinkhorn(cosine_cost(patch, concept), theta, gamma, eps=0.05)
    assert mixed.plan_BNM.dtype == torch.float32
    assert torch.equal(mixed.plan_BNM, plain.plan_BNM)


@pytest.mark.parametrize("relax", [None, 0.3])
def test_any_memory_layout(relax):
    cost, theta, gamma = problem(N=6, M=4)
    strided = cost.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = theta.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    options = {"eps": 0.1, "relax_patch": relax, "relax_concept": relax}
    a, b = sinkhorn(strided, wide, gamma.expand(2, 4), **options), sinkhorn(cost, theta, gamma, **options)
    torch.testing.assert_close(a.plan_BNM, b.plan_BNM, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("relax", [None, 0.3])
def test_an_empty_batch(relax):
    cost, theta, gamma = problem()
    result = sinkhorn(cost[:0].requires_grad_(), theta[:0], gamma, eps=0.1, relax_patch=relax, relax_concept=relax)
    assert result.plan_BNM.shape == (0, 6, 4)
    assert result.residual_B.shape == (0,)
    result.plan_BNM.sum().backward()


def test_one_set_of_marginals_for_all_pictures():
    cost, theta, gamma = problem()
    shared = sinkhorn(cost, theta[0], gamma, eps=0.1, tol=None, max_iter=20).plan_BNM
    spelled = sinkhorn(cost, theta[0].repeat(2, 1), gamma.repeat(2, 1), eps=0.1, tol=None, max_iter=20).plan_BNM
    assert torch.equal(shared, spelled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0; it must be positive"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"tol": 0.0}, "tol is 0.0; give a positive number, or None"),
        ({"relax_patch": -1.0}, "relax_patch is -1.0"),
        ({"relax_concept": 0.0}, "only the patches can be free"),
        ({"relax_patch": 0.0, "relax_concept": 1.0}, "only the patches can be free"),
        ({"relax_concept": -2.0}, "relax_concept is -2.0"),
        ({"solver": "emd"}, "solver is 'emd'; choose"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(*problem(), **{"eps": 0.1, **options})


def test_shapes_that_do_not_fit():
    cost, theta, gamma = problem()
    with pytest.raises(ValueError, match=r"cost has shape \(6, 4\); give \(B, N, M\)"):
        sinkhorn(cost[0], theta, gamma, eps=0.1)
    with pytest.raises(ValueError, match="at least one patch and one concept"):
        sinkhorn(cost[:, :0], theta[:, :0], gamma, eps=0.1)
    with pytest.raises(ValueError, match=r"theta has shape \(2, 5\); a cost of shape \(2, 6, 4\) needs \(6,\) or \(2, 6\)"):
        sinkhorn(cost, theta[:, :5], gamma, eps=0.1)
    with pytest.raises(ValueError, match=r"gamma has shape \(6,\)"):
        sinkhorn(cost, theta, theta[0], eps=0.1)
    with pytest.raises(ValueError, match=r"theta has shape \(1, 6\)"):
        sinkhorn(cost, theta[:1], gamma, eps=0.1)
