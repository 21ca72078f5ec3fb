"""The head against scikit-learn, and against its own optimality conditions."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dotcbm.training.head_fit import HEAD_L2_GRID, fit_head
from dotcbm.training.sparse_head import fit_sparse_head


def problem(num=120, width=6, classes=3, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % classes
    centre = torch.randn(classes, width, generator=drawn)
    scale = torch.logspace(-2, 2, width)
    return (centre[label] + 1.5 * torch.randn(num, width, generator=drawn)) * scale + 3, label


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_optimum_is_that_of_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem()
    fit = fit_head(x, y, num_classes=3, l2=l2)
    z = ((x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)).numpy()
    theirs = linear_model.LogisticRegression(C=1 / (l2 * len(y)), tol=1e-10, max_iter=10_000).fit(z, y.numpy())
    expected = theirs.predict_proba(z)
    ours = (x.double() @ fit.weight_KF.T + fit.bias_K).softmax(1).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert fit.train_accuracy == pytest.approx(float((expected.argmax(1) == y.numpy()).mean()), abs=0.01)
    assert math.isnan(fit.val_accuracy)


@pytest.mark.parametrize("l2", HEAD_L2_GRID)
def test_the_gap_to_the_optimum_is_small(l2):
    x, y = problem()
    z = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)

    def objective(fit):
        weight_KF = fit.weight_KF * x.double().std(0, unbiased=False)
        bias_K = fit.bias_K + fit.weight_KF @ x.double().mean(0)
        return float(F.cross_entropy(z @ weight_KF.T + bias_K, y) + l2 / 2 * weight_KF.square().sum())

    fit = fit_head(x, y, num_classes=3, l2=l2)
    # Strong convexity in the weights: the objective is within |gradient|^2 / (2 l2) of its least value.
    assert fit.gradient**2 * fit.weight_KF.numel() / (2 * l2) < 1e-5
    for seed in range(5):
        near = fit.weight_KF * (1 + 0.01 * torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)))
        assert objective(type(fit)(near, fit.bias_K, l2, 0, 0, 0)) > objective(fit) - 1e-6


def test_class_weights_are_those_of_repeated_pictures():
    x, y = problem(num=90)
    z = (x - x.mean(0)) / x.std(0)
    a = fit_head(torch.cat([z, z[y == 0]]), torch.cat([y, y[y == 0]]), num_classes=3, l2=1e-9)
    b = fit_head(z, y, num_classes=3, l2=1e-9, class_weight_K=torch.tensor([2.0, 1.0, 1.0]))
    # Standardisation sees the repeated pictures, but nearly without L2 the solution does not depend on the scaling.
    pa, pb = ((z.double() @ f.weight_KF.T + f.bias_K).softmax(1) for f in (a, b))
    assert (pa - pb).abs().max() < 0.02


def test_auto_takes_the_best_on_validation():
    x, y = problem(num=40, width=30)
    xv, yv = problem(num=200, width=30)
    chosen = fit_head(x, y, num_classes=3, val=(xv, yv))
    tried = [fit_head(x, y, num_classes=3, l2=l2, val=(xv, yv)) for l2 in HEAD_L2_GRID]
    assert chosen.val_accuracy >= max(fit.val_accuracy for fit in tried[:4]) - 1e-9
    assert chosen.l2 in HEAD_L2_GRID


def test_constant_inputs_get_no_weight():
    x, y = problem()
    x[:, 2] = 7.0
    fit = fit_head(x, y, num_classes=3, l2=1e-2)
    assert fit.weight_KF[:, 2].abs().max() < 1e-9


@pytest.mark.parametrize("fit", [partial(fit_head, l2=1e-3), partial(fit_sparse_head, nec=3)])
def test_inputs_constant_up_to_rounding_get_no_weight(fit):
    # The logits of concepts that every class has or none: -7 in the first six digits. Divided by their deviation they were noise of
    # the size of an input, and in single precision another one for each order of summation: 2 points of accuracy on the birds.
    x, y = problem()
    x = x.float()
    x[:, 2] = -7 + 1e-6 * torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    found = fit(x, y, num_classes=3)
    assert torch.equal(found.weight_KF[:, 2], torch.zeros(3, dtype=torch.float64))
    single_nK = x @ found.weight_KF.float().T + found.bias_K.float()
    assert torch.allclose(single_nK.double(), x.double() @ found.weight_KF.T + found.bias_K, atol=1e-4)


@pytest.mark.parametrize(("settings", "message"), [({}, "'auto' chooses on a validation split"), ({"l2": 0.0}, "must be positive")])
def test_bad_settings_are_named(settings, message):
    x, y = problem()
    with pytest.raises(ValueError, match=message):
        fit_head(x, y, num_classes=3, **settings)


def test_inputs_that_are_not_finite_are_named():
    x, y = problem()
    x[17, 1] = torch.nan
    with pytest.raises(ValueError, match="training row 17 is not finite"):
        fit_head(x, y, num_classes=3, l2=1.0)
