"""Cross-entropy on labels, normalised logits, a linear head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.baselines import M, N, check_promises, make_features, make_problem, roundtrip, train

from dotcbm.losses import concept_loss
from dotcbm.models.cbm import CBM
from dotcbm.models.vlg_cbm import VLGCBM


def test_the_formula() -> None:
    torch.manual_seed(0)
    model = VLGCBM(make_problem(), scaling="none").train()
    for seed in range(6):
        model(make_features(seed))
    features = make_features(8)
    out = model.eval()(features)
    layer = model.concept.linear
    logit = F.linear(features.patch_BND.mean(1), layer.weight, layer.bias)
    assert torch.allclose(out.concept_logit_BM, logit, atol=1e-5)
    normalised = (logit - model.moments.mean_X) / model.moments.deviation_X
    assert torch.allclose(out.class_logit_BK, model.head(normalised), atol=1e-4)
    assert out.evidence_BNM is not None
    assert torch.allclose(out.evidence_BNM, F.linear(features.patch_BND, layer.weight) / N, atol=1e-5)


def test_the_moments_are_those_of_the_training_logits() -> None:
    torch.manual_seed(0)
    model = VLGCBM(make_problem()).train()
    features = make_features(pictures=64)
    logit = model(features).concept_logit_BM
    z = model.head_input(logit)
    assert torch.allclose(z.mean(0), torch.zeros(M), atol=1e-5)
    assert torch.allclose(z.std(0, unbiased=False), torch.ones(M), atol=1e-4)


def test_its_concepts_are_the_vanilla_bottlenecks() -> None:
    torch.manual_seed(0)
    problem = make_problem()
    cbm, vlg = CBM(problem, scaling="none").eval(), VLGCBM(problem, scaling="none").eval()
    vlg.concept.linear.load_state_dict(cbm.concept.state_dict())
    ours, theirs = vlg(make_features()), cbm(make_features())
    assert torch.allclose(ours.concept_logit_BM, theirs.concept_logit_BM, atol=1e-5)
    concepts = torch.rand(3, M).round()
    label = torch.zeros(3, dtype=torch.long)
    loss = vlg.losses(ours, concepts_BM=concepts, label_B=label)["concept"]
    assert torch.allclose(loss, concept_loss(theirs.concept_logit_BM, concepts), atol=1e-5)


@pytest.mark.parametrize("scaling", ["none", "half", "full"])
def test_it_keeps_the_promises_of_a_bottleneck(scaling: Any) -> None:
    torch.manual_seed(0)
    check_promises(VLGCBM(make_problem(), scaling=scaling))


def test_the_penalty_is_half_the_mean_square_of_the_weights() -> None:
    model = VLGCBM(make_problem(), l2=0.3).train()
    weight_MD = model.concept.linear.weight
    assert torch.allclose(model(make_features()).losses["l2"], 0.15 * weight_MD.square().sum() / M)
    with pytest.raises(ValueError, match="l2 is -1"):
        VLGCBM(make_problem(), l2=-1)


def test_training_reduces_the_loss_and_finds_concepts(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, VLGCBM)
    assert last < 0.7 * first
    assert figures["test/concept_auroc"] > 0.6  # a frozen random encoder; 0.5 is chance


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, VLGCBM, scaling="half", l2=0.1)


def test_concepts_start_at_their_frequency() -> None:
    frequency = torch.tensor([0.2, 0.5, 0.9, 0.0, 1.0, 0.001])
    problem = replace(make_problem(), concept_frequency_M=frequency)
    model = VLGCBM(problem, scaling="full").train()
    features = make_features(pictures=64)
    with torch.no_grad():
        model.concept.linear.weight.zero_()
    expected = frequency.clamp(0.01, 0.99).expand(64, M)
    assert torch.allclose(model(features).concept_BM, expected, atol=1e-5)
