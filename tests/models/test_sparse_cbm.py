"""Contrastive training with Gumbel noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.baselines import D, M, check_promises, make_features, make_problem, roundtrip, train

from dotcbm.models.sparse_cbm import SparseCBM, gumbel_contrastive

TEXT = torch.randn(M, D, generator=torch.Generator().manual_seed(3))


def slow_contrastive(score: torch.Tensor, target: torch.Tensor, *, tau: float) -> float:
    """Without noise, with loops."""
    total = []
    for s, t in ((score, target), (score.T, target.T)):
        rows = []
        for i in range(len(s)):
            known = [k for k in range(s.shape[1]) if not t[i, k].isnan()]
            mass = sum(float(t[i, k]) for k in known)
            if not mass:
                continue
            partition = sum(float((s[i, k] / tau).exp()) for k in known)
            rows.append(sum(-float(t[i, k]) * (float(s[i, k]) / tau - math.log(partition)) for k in known) / mass)
        total.append(sum(rows) / len(rows))
    return sum(total) / 2


def test_the_loss_without_noise_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    score, target = torch.randn(5, M, generator=generator), torch.rand(5, M, generator=generator)
    target[0] = 0.0  # a picture without concepts
    target[1, 2], target[:, 4] = torch.nan, torch.nan
    for tau in (0.5, 1.0, 3.0):
        assert float(gumbel_contrastive(score, target, tau=tau, noise=False)) == pytest.approx(
            slow_contrastive(score, target, tau=tau), abs=1e-5
        )


def test_the_noise_is_gumbels() -> None:
    """The largest of scores plus noise is at j with probability softmax(scores)_j: the Gumbel-max trick."""
    torch.manual_seed(0)
    score = torch.tensor([[0.0, 1.0, 2.0]])
    tau = 1e-3  # y is then one at the winner and zero elsewhere
    wins = torch.zeros(3)
    for _ in range(2000):
        given = score.clone().requires_grad_()
        gumbel_contrastive(given, torch.ones_like(score), tau=tau, noise=True).backward()
        assert given.grad is not None
        # The softmax over a single picture is constant; the one over the concepts has the gradient (y - 1/3) / tau / 2.
        wins += (given.grad[0] * 2 * tau + 1 / 3).round()
    assert torch.allclose(wins / 2000, score.softmax(1)[0], atol=0.03)


def test_no_positive_costs_nothing() -> None:
    score = torch.randn(3, M, requires_grad=True)
    for target in (torch.zeros(3, M), torch.full((3, M), torch.nan)):
        loss = gumbel_contrastive(score, target, tau=1.0, noise=True)
        loss.backward()
        assert loss == 0
        assert score.grad is not None
        assert (score.grad == 0).all()


def test_the_loss_falls_on_the_activations_themselves() -> None:
    torch.manual_seed(0)
    model = SparseCBM(make_problem(), scaling="none", tau=0.7).train()
    for seed in range(3):
        model(make_features(seed))
    model.eval()
    features = make_features(5, pictures=8)
    concepts = torch.rand(8, M).round()
    activation = F.linear(features.patch_BND.mean(1), model.concept.linear.weight)  # pyright: ignore
    terms = model.losses(model(features), concepts_BM=concepts, label_B=torch.zeros(8, dtype=torch.long))
    assert torch.allclose(terms["concept"], gumbel_contrastive(activation, concepts, tau=0.7, noise=False), atol=1e-4)
    model.train()
    again = [float(model.losses(model(features), concepts_BM=concepts, label_B=torch.zeros(8))["concept"].detach()) for _ in range(2)]
    assert again[0] != again[1]  # noise in training


def test_text_similarities_go_through_a_square_matrix() -> None:
    torch.manual_seed(0)
    problem = replace(make_problem(), text_MD=TEXT)
    model = SparseCBM(problem, similarity="text").train()
    for seed in range(3):
        model(make_features(seed))
    features = make_features(4)
    out = model.eval()(features)
    psi = 100 * F.normalize(features.global_BD, dim=-1) @ F.normalize(TEXT, dim=-1).T
    assert model.concept.weight.shape == (M, M)  # pyright: ignore
    assert torch.allclose(model.calibration.activation(out.concept_logit_BM), psi @ model.concept.weight.T, atol=1e-2)  # pyright: ignore
    assert out.evidence_BNM is None
    check_promises(model)


@pytest.mark.parametrize("scaling", ["none", "half", "full"])
def test_it_keeps_the_promises_of_a_bottleneck(scaling: Any) -> None:
    torch.manual_seed(0)
    check_promises(SparseCBM(make_problem(), scaling=scaling))


def test_the_penalty_of_the_other_variant() -> None:
    model = SparseCBM(make_problem(), l1=0.2).train()
    assert torch.allclose(model(make_features()).losses["l1"], 0.2 / M * model.concept.linear.weight.abs().sum())  # pyright: ignore


def test_training_reduces_the_loss_and_finds_concepts(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, SparseCBM, epochs=8)
    assert last < first
    assert figures["test/concept_auroc"] > 0.6  # a frozen random encoder; 0.5 is chance


def test_joint_training_is_the_papers_way(tmp_path: Path) -> None:
    first, last, _ = train(tmp_path, SparseCBM, regime="joint")
    assert last < first


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, SparseCBM, tau=0.5, l1=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"similarity": "far"}, "similarity is 'far'"),
        ({"similarity": "text"}, "width 16, and there are none"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"l1": -1.0}, "l1 is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseCBM(make_problem(), **given)


def test_texts_of_another_space_are_refused() -> None:
    with pytest.raises(ValueError, match="width 16, and theirs is 5"):
        SparseCBM(replace(make_problem(), text_MD=torch.randn(M, 5)), similarity="text")
