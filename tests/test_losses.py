"""Losses against slow loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from dotcbm.losses import concept_loss, orthogonality


def _slow(vectors: torch.Tensor, weights: torch.Tensor, *, square: bool) -> float:
    total, mass = 0.0, 0.0
    for i in range(len(vectors)):
        for j in range(len(vectors)):
            if i == j:
                continue
            cosine = float(vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm()))
            pair = float(weights[i].clamp(min=0) * weights[j].clamp(min=0))
            total += pair * (cosine**2 if square else cosine)
            mass += pair
    return total / mass


@given(seed=st.integers(0, 10_000), n=st.integers(2, 7), square=st.booleans())
@settings(max_examples=25)
def test_orthogonality_is_the_weighted_mean_over_pairs(seed: int, n: int, square: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, 5, generator=generator)
    weights = torch.rand(n, generator=generator) + 0.1
    got = orthogonality(vectors[None], weights[None], form="squared" if square else "signed")
    assert float(got) == pytest.approx(_slow(vectors, weights, square=square), abs=1e-5)
    assert float(orthogonality(vectors * 7, weights * 3, form="squared" if square else "signed")) == pytest.approx(float(got), abs=1e-5)
    alike = orthogonality(vectors[None], form="squared" if square else "signed")
    assert float(alike) == pytest.approx(_slow(vectors, torch.ones(n), square=square), abs=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_orthogonality_sums_nothing_that_is_known_beforehand(weighted: bool) -> None:
    """Compiled for a GPU by Triton 3.6, such a sum beside another one fails: "operand #1 does not dominate this use" (32 concepts)."""
    given = (torch.randn(32, 8), torch.rand(32)) if weighted else (torch.randn(32, 8),)
    graph = make_fx(lambda *tensors: orthogonality(*tensors))(*given).graph
    depends = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (depends & set(node.all_input_nodes) and "_like" not in str(node.target)):
            depends.add(node)
        elif any(word in str(node.target) for word in ("sum", "mean")):
            pytest.fail(f"{node.target} of {node.all_input_nodes} depends on no input")
    assert any("sum" in str(node.target) for node in depends)


def test_orthogonality_is_zero_for_orthogonal_vectors_and_one_for_parallel_ones() -> None:
    assert float(orthogonality(torch.eye(4))) == 0
    assert float(orthogonality(torch.ones(4, 3))) == pytest.approx(1)


def test_the_signed_form_rewards_opposite_vectors_and_the_squared_one_does_not() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(orthogonality(opposite, form="signed")) == pytest.approx(-1)
    assert float(orthogonality(opposite, form="squared")) == pytest.approx(1)


def test_orthogonality_of_one_vector_or_no_weight_is_zero_with_a_finite_gradient() -> None:
    vector = torch.randn(1, 3, requires_grad=True)
    orthogonality(vector).backward()
    assert vector.grad is not None
    assert vector.grad.isfinite().all()
    assert float(orthogonality(torch.randn(4, 3), torch.zeros(4))) == 0


def test_concept_loss_leaves_unknown_labels_out() -> None:
    logit = torch.tensor([[2.0, -1.0], [0.5, 3.0]], requires_grad=True)
    target = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    loss = concept_loss(logit, target)
    by_hand = (math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5)) + math.log1p(math.exp(-3))) / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    assert logit.grad is not None
    assert logit.grad[0, 1] == 0
    assert logit.grad.isfinite().all()


def test_concept_loss_with_everything_known_is_the_library_s() -> None:
    logit, target = torch.randn(6, 4), (torch.rand(6, 4) > 0.5).float()
    weight = torch.rand(4) + 0.5
    expected = F.binary_cross_entropy_with_logits(logit, target, pos_weight=weight)
    assert torch.allclose(concept_loss(logit, target, pos_weight_M=weight), expected)


def test_concept_loss_with_nothing_known_is_zero() -> None:
    logit = torch.randn(2, 3, requires_grad=True)
    loss = concept_loss(logit, torch.full((2, 3), float("nan")))
    loss.backward()
    assert loss.item() == 0
    assert logit.grad is not None
    assert not logit.grad.any()
