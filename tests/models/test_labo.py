"""LaBo: a normalised class-concept matrix as the head, and scores that the class loss does not move."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes.baselines import B, D, K, M, N, check_promises, make_encoder, make_features, make_problem, roundtrip, train
from fakes.source import TinySource
from labo_pair import in_a_pair, steps
from torch import nn

from dotcbm.explain.explanation import explain
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.labo import LaBo
from dotcbm.structures import Problem


def make(**settings) -> LaBo:
    torch.manual_seed(0)
    return LaBo(make_problem(), **settings)


def test_the_formula() -> None:
    model, features = make(scale=7.0, temperature=0.5, scaling="none").eval(), make_features()
    out = model(features)
    table_KM = model.problem.concepts.class_concept_KM
    for b in range(B):
        score_M = (model.concept.weight @ features.patch_BND[b].mean(0) + model.concept.bias).sigmoid()
        for k in range(K):
            weights = [torch.exp(table_KM[k, j] / 0.5) for j in range(M)]
            expected = 7 * sum(w * s for w, s in zip(weights, score_M)) / sum(weights)
            assert torch.allclose(out.class_logit_BK[b, k], expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"head_on": "logit", "scale": 5.0}, {"scaling": "half", "l2": 0.6, "dropout": 0.1}])
def test_it_keeps_the_promises_of_a_bottleneck(settings) -> None:
    model = make(**settings)
    check_promises(model)
    assert model(make_features()).evidence_BNM is not None


def test_the_head_is_a_linear_layer_with_normalised_weights() -> None:
    model = make(scale=3.0)
    assert isinstance(model.head, nn.Linear)
    assert (model.head.weight >= 0).all()
    assert torch.allclose(model.head.weight.sum(1), torch.full((K,), 3.0))
    assert torch.equal(model.head.bias, torch.zeros(K))
    assert "head.bias" not in dict(model.named_parameters())
    with torch.no_grad():
        model.head.parametrizations.weight.original.mul_(4.0)  # as an optimizer would
    assert torch.allclose(model.head.weight.sum(1), torch.full((K,), 3.0))


def test_unknown_associations_start_at_the_mean() -> None:
    problem = make_problem(unknown=True)
    start_KM = LaBo(problem).head.parametrizations.weight.original
    assert torch.allclose(start_KM[1, 2], problem.concepts.class_concept_KM.nanmean())
    assert start_KM.isfinite().all()


def test_each_part_learns_from_its_own_loss() -> None:
    model = make().train()
    out = model(make_features())
    out.class_logit_BK.square().sum().backward(retain_graph=True)
    assert model.concept.weight.grad is None
    assert model.head.parametrizations.weight.original.grad.abs().sum() > 0
    model.zero_grad()
    out.concept_logit_BM.square().sum().backward()
    assert model.concept.weight.grad is not None
    assert model.head.parametrizations.weight.original.grad is None


def test_an_intervention_moves_the_classes_by_their_weight() -> None:
    model = make().eval()
    out = model(make_features())
    changed_BM = out.concept_logit_BM.clone()
    changed_BM[:, 3] = torch.inf
    expected_BK = (1 - out.concept_BM[:, 3:4]) * model.head.weight[:, 3]
    assert torch.allclose(model.classify(changed_BM) - out.class_logit_BK, expected_BK, atol=1e-4)


def test_training_reduces_the_loss_jointly_and_only_so(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, LaBo, regime="joint", temperature=0.2, scale=20.0)
    assert last < 0.7 * first
    assert figures["test/concept_auroc"] > 0.6
    with pytest.raises(ValueError, match="trained by gradients; set regime to 'joint'"):
        train(tmp_path, LaBo)


def test_saved_read_back_and_explained(tmp_path: Path) -> None:
    back = roundtrip(tmp_path, LaBo, scale=20.0, temperature=0.3, scaling="half")
    assert isinstance(back.bottleneck.head, nn.Linear)
    picture = TinySource().load("test").sample(0).image
    assert picture is not None
    explanation = explain(back, picture, target_class=1)
    assert torch.allclose(explanation.contribution_M.sum() + explanation.bias_K[1], explanation.class_logit_K[1], atol=1e-4)
    assert len(explanation.top_concepts(3)) > 0


def test_it_can_be_copied() -> None:
    model = make().eval()
    assert torch.equal(copy.deepcopy(model)(make_features()).class_logit_BK, model(make_features()).class_logit_BK)


def test_a_model_with_it_can_be_exported() -> None:
    encoder = make_encoder()
    problem = Problem(encoder.width, encoder.global_width, encoder.grid, TinySource().concepts)
    model = ConceptModel(encoder, LaBo(problem)).eval()

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image_B3HW: torch.Tensor) -> torch.Tensor:
            return self.model(image_B3HW).class_logit_BK

    image = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(Classes(), (image,)).module()
    assert torch.allclose(exported(image), model(image).class_logit_BK, atol=1e-5)


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """DDP sees the parameter behind the normalised weight, and all parameters get a gradient."""
    settings = {"temperature": 0.5, "scale": 5.0, "scaling": "none"}
    model = make(**settings).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, N, D, generator=generator), torch.rand(8, M, generator=generator).round(), torch.arange(8) % K) for _ in range(4)
    ]
    torch.save({"problem": model.problem, "settings": settings, "state": start, "batches": batches}, tmp_path / "given.pt")
    other = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("labo_pair.py")), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        pair = in_a_pair(0, str(tmp_path))
        said = other.communicate(timeout=120)[0]
    finally:
        other.kill()
    assert other.returncode == 0, said.decode()[-3000:]
    steps(model, batches)
    name = "head.parametrizations.weight.original"
    assert not torch.allclose(pair[name], start[name], atol=1e-3)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, pair[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, r"scale is 0\.0"),
        ({"temperature": -1.0}, r"temperature -1\.0"),
        ({"head_on": "both"}, "head_on is 'both'"),
        ({"l2": -1.0}, "penalty"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LaBo(make_problem(), **settings)
