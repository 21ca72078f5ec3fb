"""The cubed cosine and its calibration, and the label-free bottleneck built on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.baselines import GRID, B, K, M, N, check_promises, make_features, make_problem, roundtrip, train
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.models.label_free import LabelFreeCBM
from dotcbm.models.linear_concepts import Calibration, LinearConcepts, Moments, cubed_cosine
from dotcbm.models.vlg_cbm import VLGCBM


def slow_similarity(activation: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Column by column, with a loop, in float64."""
    found = []
    for j in range(activation.shape[1]):
        known = ~target[:, j].isnan()
        a, t = activation[known, j].double(), target[known, j].double()
        a, t = (a - a.mean()) ** 3, (t - t.mean()) ** 3
        norm = (a.square().sum() * t.square().sum()).sqrt()
        found.append((a * t).sum() / norm if norm > 1e-12 else torch.tensor(0.0, dtype=torch.float64))
    return torch.stack(found)


def test_the_similarity_is_the_papers_column_by_column() -> None:
    generator = torch.Generator().manual_seed(0)
    activation, target = torch.randn(20, 7, generator=generator), torch.rand(20, 7, generator=generator)
    target[3:9, 2] = torch.nan  # unknown
    target[:, 4] = torch.nan  # never known
    target[:, 5] = 1.0  # does not vary
    target[1:, 6] = torch.nan  # known once
    found = cubed_cosine(activation, target)
    assert torch.allclose(found.double(), slow_similarity(activation, target), atol=1e-5)
    assert (found[4:] == 0).all()


@settings(max_examples=30)
@given(st.integers(2, 12), st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 1000))
def test_scale_and_offset_do_not_matter(batch: int, scale: float, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    activation, target = torch.randn(batch, 3, generator=generator), torch.rand(batch, 3, generator=generator)
    plain = cubed_cosine(activation, target)
    assert (plain.abs() <= 1 + 1e-5).all()
    assert torch.allclose(cubed_cosine(scale * activation + offset, target), plain, atol=2e-2 * max(1, abs(offset) / scale / 100))
    assert torch.allclose(cubed_cosine(activation, activation), torch.ones(3), atol=1e-4)
    assert torch.allclose(cubed_cosine(-activation, activation), -torch.ones(3), atol=1e-4)


def test_columns_that_do_not_vary_give_no_gradient() -> None:
    activation = torch.randn(6, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[1.0, 0.0, torch.nan]]).repeat(6, 1)
    target[0, 1] = 1.0
    cubed_cosine(activation, target).sum().backward()
    assert activation.grad is not None
    assert activation.grad.isfinite().all()
    assert (activation.grad[:, [0, 2]] == 0).all()
    assert activation.grad[:, 1].abs().sum() > 0
    constant = torch.full((6, 1), 0.1, requires_grad=True)
    cubed_cosine(constant, torch.rand(6, 1)).sum().backward()
    assert (constant.grad == 0).all()  # pyright: ignore


def test_its_gradient_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    activation, target = torch.randn(9, 4, generator=generator), torch.rand(9, 4, generator=generator)
    ours = activation.clone().requires_grad_()
    slow = activation.double().requires_grad_()
    cubed_cosine(ours, target).sum().backward()
    slow_similarity(slow, target).sum().backward()
    assert torch.allclose(ours.grad.double(), slow.grad, atol=1e-4)  # pyright: ignore


def test_moments_converge_and_never_move_outside_of_training() -> None:
    moments = Moments(2)
    generator = torch.Generator().manual_seed(0)
    first = 3 + 0.5 * torch.randn(400, 2, generator=generator)
    moments.update(first)
    assert torch.allclose(moments.mean_X, first.mean(0), atol=1e-5)
    assert torch.allclose(moments.deviation_X, first.std(0, unbiased=False), atol=1e-5)
    for _ in range(60):
        moments.update(-7 + 2 * torch.randn(400, 2, generator=generator))
    assert torch.allclose(moments.mean_X, torch.full((2,), -7.0), atol=0.2)
    before = moments.mean_X.clone()
    moments.update(torch.ones(1, 2))  # one picture has no deviation
    moments.eval().update(torch.ones(5, 2))
    assert torch.equal(moments.mean_X, before)


@pytest.mark.parametrize("scaling", ["none", "half", "full"])
def test_activations_are_means_of_maps_of_scaled_features(scaling: Any) -> None:
    torch.manual_seed(0)
    layer = LinearConcepts(make_problem(), scaling=scaling, dropout=0.0, bias=True)
    for seed in range(4):
        layer(make_features(seed, pictures=6).patch_BND * 3 + 1)
    layer.eval()
    patch = make_features(9).patch_BND
    assert torch.allclose(layer(patch), layer.maps(patch).mean(1) + layer.linear.bias, atol=1e-5)
    pooled = patch.mean(1)
    if layer.moments is not None:
        deviation = layer.moments.deviation_X
        centred = pooled - layer.moments.mean_X
        pooled = centred / deviation if scaling == "full" else centred / (deviation * deviation.mean()).sqrt()
    assert torch.allclose(layer(patch), layer.linear(pooled), atol=1e-5)


def test_dropout_hides_the_same_features_of_all_patches() -> None:
    torch.manual_seed(0)
    layer = LinearConcepts(make_problem(), scaling="none", dropout=0.5, bias=False)
    maps = layer.maps(torch.ones(B, N, 16))
    assert torch.allclose(maps, maps[:, :1].expand_as(maps), atol=1e-6)
    assert not torch.allclose(maps[0], maps[1])


def test_the_calibration_recovers_probabilities_and_leaves_the_activations_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    activation = 0.02 * torch.randn(4000, M, generator=generator) + 5
    truth = torch.sigmoid((activation - 5) / 0.02 * 1.5 - 1)
    labels = (torch.rand(4000, M, generator=generator) < truth).float()
    calibration = Calibration(make_problem())
    optimizer = torch.optim.Adam(calibration.parameters(), lr=0.05)
    activation.requires_grad_()
    for _ in range(150):
        optimizer.zero_grad()
        loss = calibration.loss(calibration(activation), labels)
        loss.backward()
        optimizer.step()
    assert activation.grad is None or (activation.grad == 0).all()
    assert (calibration(activation).sigmoid() - truth).abs().mean() < 0.02
    logit = calibration.eval()(activation)
    assert torch.allclose(calibration.activation(logit), activation, atol=1e-4)


def test_the_similarity_does_not_train_slope_and_offset() -> None:
    torch.manual_seed(0)
    model = LabelFreeCBM(make_problem()).train()
    concepts = (torch.rand(8, M) < 0.5).float()
    out = model(make_features(pictures=8))
    terms = model.losses(out, concepts_BM=concepts, label_B=torch.zeros(8, dtype=torch.long))
    assert terms.keys() == {"concept", "calibration"}
    terms["concept"].backward(retain_graph=True)
    assert model.concept.linear.weight.grad.abs().sum() > 0  # pyright: ignore
    assert model.calibration.beta_M.grad.abs().max() < 1e-6  # pyright: ignore
    assert model.calibration.raw_alpha_M.grad.abs().max() < 1e-6  # pyright: ignore
    model.zero_grad()
    terms["calibration"].backward()
    assert model.concept.linear.weight.grad is None or (model.concept.linear.weight.grad == 0).all()


def test_the_formula_end_to_end() -> None:
    torch.manual_seed(0)
    model = LabelFreeCBM(make_problem(), scaling="none")
    for seed in range(4):
        model.train()(make_features(seed))
    features = make_features(5)
    out = model.eval()(features)
    moments = model.calibration.moments
    activation = F.linear(features.patch_BND.mean(1), model.concept.linear.weight)
    z = (activation - moments.mean_X) / moments.deviation_X
    assert torch.allclose(out.concept_logit_BM, model.calibration.alpha_M * z + model.calibration.beta_M, atol=1e-5)
    assert torch.allclose(out.class_logit_BK, model.head(z), atol=1e-4)
    assert out.evidence_BNM is not None
    assert out.evidence_BNM.shape == (B, N, M)
    assert out.class_logit_BK.shape == (B, K)
    assert out.grid == GRID
    slope = model.calibration.alpha_M / moments.deviation_X
    assert torch.allclose(out.evidence_BNM, F.linear(features.patch_BND, model.concept.linear.weight) * slope / N, atol=1e-5)


@pytest.mark.parametrize("scaling", ["none", "half", "full"])
def test_it_keeps_the_promises_of_a_bottleneck(scaling: Any) -> None:
    torch.manual_seed(0)
    check_promises(LabelFreeCBM(make_problem(), scaling=scaling))


def test_soft_and_unknown_labels_are_learned_from() -> None:
    torch.manual_seed(0)
    model = LabelFreeCBM(make_problem()).train()
    concepts = torch.rand(8, M)
    concepts[:, 0] = torch.nan
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    features = make_features(pictures=8)
    for _ in range(60):
        optimizer.zero_grad()
        terms = model.losses(model(features), concepts_BM=concepts, label_B=torch.zeros(8, dtype=torch.long))
        (terms["concept"] + terms["calibration"]).backward()
        optimizer.step()
    # One column of M is unknown and counts 0.
    assert abs(float(terms["concept"].detach()) - 1 / M) < 0.05


def test_training_reduces_the_loss_and_finds_concepts(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, LabelFreeCBM)
    assert last < 0.7 * first
    assert figures["test/concept_auroc"] > 0.6  # a frozen random encoder; 0.5 is chance


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, LabelFreeCBM, scaling="half", dropout=0.1)


@pytest.mark.parametrize(("given", "message"), [({"scaling": "twice"}, "scaling is 'twice'"), ({"dropout": 1.0}, "dropout is 1.0")])
@pytest.mark.parametrize("kind", [LabelFreeCBM, VLGCBM])
def test_settings_out_of_range_are_refused(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(make_problem(), **given)
