"""Cosine cost and null entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.transport.cost import add_null, cosine_cost, cosine_similarity, strip_null, unit
from dotcbm.transport.sinkhorn import sinkhorn


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e6))
def test_cosine_equals_torchs_and_ignores_length(seed, scale):
    rng = torch.Generator().manual_seed(seed)
    patch, concept = torch.randn(2, 5, 3, generator=rng), torch.randn(4, 3, generator=rng)
    expected = torch.nn.functional.cosine_similarity(patch[:, :, None].double(), concept[None, None].double(), dim=-1)
    got = cosine_similarity(scale * patch, concept)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    cost = cosine_cost(patch, concept)
    assert cost.min() >= 0
    assert cost.max() <= 2
    torch.testing.assert_close(cost, 1 - cosine_similarity(patch, concept))


def test_parallel_vectors_cost_no_less_than_zero_and_no_more_than_two():
    x = torch.randn(1, 200, 7, generator=torch.Generator().manual_seed(0))
    cost = cosine_cost(torch.cat([x, -x], dim=1), x[0])
    assert cost.min() >= 0
    assert cost.max() <= 2


def test_zero_vectors_have_cosine_zero_and_a_small_gradient():
    patch, concept = torch.randn(1, 3, 4), torch.randn(2, 4)
    patch[0, 1] = 0
    concept[1] = 0
    patch.requires_grad_()
    concept.requires_grad_()
    similarity = cosine_similarity(patch, concept)
    assert (similarity[0, 1] == 0).all()
    assert (similarity[0, :, 1] == 0).all()
    similarity.sum().backward()
    for grad in (patch.grad, concept.grad):
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.abs().max() < 1e3


def test_unit_vectors_gradient():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(unit, x)
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_autocast_kept_out(dtype):
    rng = torch.Generator().manual_seed(1)
    patch, concept = torch.randn(2, 9, 64, generator=rng).to(dtype), torch.randn(5, 64, generator=rng).to(dtype)
    expected = cosine_similarity(patch.double(), concept.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cosine_similarity(300 * patch, concept)  # squares overflow float16
    assert got.dtype == torch.float32
    # 300 * x is itself rounded, to 11 and to 8 bits.
    torch.testing.assert_close(got.double(), expected, atol=2e-4 if dtype == torch.float16 else 2e-3, rtol=0)


def test_widths_that_differ():
    with pytest.raises(ValueError, match=r"patches of shape \(1, 2, 3\) and concepts of shape \(4, 5\) do not meet"):
        cosine_cost(torch.zeros(1, 2, 3), torch.zeros(4, 5))


def test_null_entries_by_hand():
    cost = torch.arange(6.0).view(1, 3, 2)
    got_cost, theta, gamma = add_null(
        cost, torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0.9, 0.1]), null_concept_mass=0.4, null_patch_mass=0.25, null_cost=7.0
    )
    assert got_cost.tolist() == [[[0, 1, 7], [2, 3, 7], [4, 5, 7], [7, 7, 7]]]
    torch.testing.assert_close(theta, torch.tensor([[0.375, 0.225, 0.15, 0.25]]))
    torch.testing.assert_close(gamma, torch.tensor([[0.54, 0.06, 0.4]]))
    assert strip_null(got_cost, num_patches=3, num_concepts=2).equal(cost)


@pytest.mark.parametrize(("concept", "patch", "shape"), [(0.0, 0.0, (2, 3, 2)), (0.5, 0.0, (2, 3, 3)), (0.0, 0.5, (2, 4, 2))])
def test_a_null_of_no_mass_is_not_appended(concept, patch, shape):
    cost, theta, gamma = add_null(
        torch.rand(2, 3, 2),
        torch.full((2, 3), 1 / 3),
        torch.full((2, 2), 0.5),
        null_concept_mass=concept,
        null_patch_mass=patch,
        null_cost=1.0,
    )
    assert cost.shape == shape
    assert theta.shape == shape[:2]
    assert gamma.shape == (2, shape[2])
    torch.testing.assert_close(theta.sum(1), torch.ones(2))
    torch.testing.assert_close(gamma.sum(1), torch.ones(2))


def test_pairs_are_matched_where_they_cost_less_than_the_null_cost():
    cost = torch.tensor([[[0.2, 2.0], [2.0, 0.6]]])  # pairs of price 0.2 and 0.6
    half = torch.tensor([[0.5, 0.5]])
    for null_cost, matched in ((0.1, [False, False]), (0.4, [True, False]), (0.8, [True, True])):
        full = add_null(cost, half, half, null_concept_mass=0.5, null_patch_mass=0.5, null_cost=null_cost)
        plan = strip_null(sinkhorn(*full, eps=0.01, max_iter=2000).plan_BNM, num_patches=2, num_concepts=2)
        assert (plan[0].diagonal() > 0.125).tolist() == matched, null_cost


def test_the_null_cost_can_be_learned_only_with_both_nulls():
    cost = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta, gamma = torch.full((2, 6), 1 / 6, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    for patch_mass, learns in ((0.3, True), (0.0, False)):
        null_cost = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        full = add_null(cost, theta, gamma, null_concept_mass=0.4, null_patch_mass=patch_mass, null_cost=null_cost)
        plan = strip_null(sinkhorn(*full, eps=0.1, max_iter=2000, tol=1e-10).plan_BNM, num_patches=6, num_concepts=4)
        (gradient,) = torch.autograd.grad((plan * cost).sum(), null_cost)
        assert (gradient.abs() > 1e-3) == learns
        assert learns or gradient.abs() < 1e-9


def test_null_masses_and_costs_out_of_range():
    good = (torch.rand(1, 3, 2), torch.full((1, 3), 1 / 3), torch.full((1, 2), 0.5))
    with pytest.raises(ValueError, match=r"null_concept_mass is 1\.0"):
        add_null(*good, null_concept_mass=1.0, null_patch_mass=0.0, null_cost=1.0)
    with pytest.raises(ValueError, match=r"null_patch_mass is -0\.1"):
        add_null(*good, null_concept_mass=0.0, null_patch_mass=-0.1, null_cost=1.0)
    with pytest.raises(ValueError, match=r"null_cost has shape \(3,\); give one number"):
        add_null(*good, null_concept_mass=0.5, null_patch_mass=0.5, null_cost=torch.zeros(3))
