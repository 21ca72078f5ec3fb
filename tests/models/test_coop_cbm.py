"""Coop-CBM: the auxiliary head, the concept orthogonal loss, and linear concepts through a latent."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes.baselines import B, K, M, check_promises, make_features, make_problem, roundtrip, train
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.losses import concept_loss
from dotcbm.models.coop_cbm import CoopCBM, concept_orthogonal_loss


def make(**settings) -> CoopCBM:
    torch.manual_seed(0)
    return CoopCBM(make_problem(), width=5, **settings)


def slow_loss(latent_BL: torch.Tensor, truth_BM: torch.Tensor, gamma: float) -> float:
    each = []
    for j in range(truth_BM.shape[1]):
        same, different = [], []
        for a, b in permutations(range(len(latent_BL)), 2):
            if truth_BM[a, j].isnan() or truth_BM[b, j].isnan():
                continue
            cosine = F.cosine_similarity(latent_BL[a], latent_BL[b], dim=0)
            (same if truth_BM[a, j] == truth_BM[b, j] else different).append(float(cosine))
        if same and different:
            each.append(1 - sum(same) / len(same) + gamma * abs(sum(different) / len(different)))
    return sum(each) / len(each) if each else 0.0


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 7), gamma=st.floats(0, 2))
def test_the_orthogonal_loss_pair_by_pair(seed, size, gamma) -> None:
    generator = torch.Generator().manual_seed(seed)
    latent_BL = torch.randn(size, 3, generator=generator)
    truth_BM = torch.randint(0, 2, (size, 4), generator=generator).float()
    truth_BM[torch.rand(size, 4, generator=generator) < 0.2] = torch.nan
    value = float(concept_orthogonal_loss(latent_BL, truth_BM, gamma=gamma))
    assert value == pytest.approx(slow_loss(latent_BL, truth_BM, gamma), abs=1e-5)
    assert -1e-5 <= value <= 2 + gamma + 1e-5


def test_the_orthogonal_loss_at_its_ends() -> None:
    truth_BM = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    apart = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert float(concept_orthogonal_loss(apart, truth_BM)) == pytest.approx(0.0, abs=1e-6)
    assert float(concept_orthogonal_loss(torch.ones(4, 2), truth_BM, gamma=0.5)) == pytest.approx(0.5, abs=1e-6)
    opposite = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert float(concept_orthogonal_loss(opposite, truth_BM, gamma=0.5)) == pytest.approx(0.5, abs=1e-6)  # not rewarded


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_the_formula(activation) -> None:
    model, features = make(activation=activation, scaling="none").eval(), make_features()
    out = model(features)
    assert model.auxiliary is not None
    assert out.auxiliary_BK is not None
    for b in range(B):
        latent = model.latent.weight @ features.patch_BND[b].mean(0)
        latent = (latent + model.latent.bias).relu() if activation == "relu" else latent
        logit_M = model.concept.weight @ latent + model.concept.bias
        assert torch.allclose(out.concept_logit_BM[b], logit_M, atol=1e-5)
        assert torch.allclose(out.class_logit_BK[b], model.head.weight @ logit_M.sigmoid() + model.head.bias, atol=1e-5)
        assert torch.allclose(out.auxiliary_BK[b], model.auxiliary.weight @ latent + model.auxiliary.bias, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"activation": "relu", "l2": 0.2}, {"scaling": "half", "l2": 0.3, "head_on": "logit"}, {"auxiliary": 0.0}]
)
def test_it_keeps_the_promises_of_a_bottleneck(settings) -> None:
    model = make(**settings)
    check_promises(model)
    assert (model(make_features()).evidence_BNM is None) == (settings.get("activation") == "relu")


def test_its_losses_are_those_of_the_paper() -> None:
    features, label_B = make_features(), torch.tensor([0, 2, 1])
    truth_BM = (torch.rand(B, M, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    model = make(auxiliary=0.3, orthogonal=0.2, gamma=0.7, scaling="none").train()
    out = model(features, truth_BM=truth_BM)
    terms = model.losses(out, concepts_BM=truth_BM, label_B=label_B)
    assert terms.keys() == {"concept", "orthogonal", "auxiliary"}
    assert out.auxiliary_BK is not None
    assert torch.allclose(terms["auxiliary"], 0.3 * F.cross_entropy(out.auxiliary_BK, label_B))
    assert torch.allclose(terms["concept"], concept_loss(out.concept_logit_BM, truth_BM))
    latent_BL = features.patch_BND.mean(1) @ model.latent.weight.T
    assert torch.allclose(terms["orthogonal"], 0.2 * concept_orthogonal_loss(latent_BL, truth_BM, gamma=0.7))
    terms["auxiliary"].backward(retain_graph=True)
    assert model.latent.weight.grad is not None  # the class shapes what the concepts are read from
    assert model.concept.weight.grad is None
    assert "orthogonal" not in model.eval()(features, truth_BM=truth_BM).losses
    bare = make(auxiliary=0.0, orthogonal=0.0)
    assert bare.losses(bare(features, truth_BM=truth_BM), concepts_BM=truth_BM, label_B=label_B).keys() == {"concept"}


def test_an_intervention_moves_the_classes_by_the_head_s_weight() -> None:
    model = make().eval()
    out = model(make_features())
    changed_BM = out.concept_logit_BM.clone()
    changed_BM[:, 1] = -torch.inf
    moved_BK = model.classify(changed_BM) - out.class_logit_BK
    assert torch.allclose(moved_BK, -out.concept_BM[:, 1:2] * model.head.weight[:, 1], atol=1e-5)
    assert moved_BK.shape == (B, K)


def test_training_reduces_the_loss(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, CoopCBM, width=8)
    assert last < 0.7 * first
    assert figures["test/concept_auroc"] > 0.6


@pytest.mark.parametrize("settings", [{"activation": "relu"}, {"scaling": "half", "auxiliary": 0.0}])
def test_saved_and_read_back(tmp_path: Path, settings) -> None:
    roundtrip(tmp_path, CoopCBM, width=8, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"activation": "gelu"}, "activation is 'gelu'; choose one of"),
        ({"auxiliary": -1.0}, r"auxiliary is -1\.0"),
        ({"orthogonal": -0.1}, r"orthogonal -0\.1"),
        ({"gamma": -0.5}, r"gamma -0\.5"),
        ({"head_on": "both"}, "head_on is 'both'"),
        ({"scaling": "twice"}, "scaling is 'twice'"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        CoopCBM(make_problem(), **settings)
