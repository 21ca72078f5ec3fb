"""The elastic-net path against scikit-learn, its closed forms, and its own optimality conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dotcbm.metrics.sparsity import nec, truncate_weights
from dotcbm.training import sparse_head
from dotcbm.training.sparse_head import fit_path, fit_sparse_head, largest_strength


def problem(num=150, width=12, classes=4, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % classes
    centre = torch.randn(classes, width, generator=drawn)
    x = centre[label] + 1.5 * torch.randn(num, width, generator=drawn)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # correlated, as concepts are
    return x * torch.logspace(-2, 2, width) + 3, label


def standardised(x):
    return (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)


def objective(x, y, fit, *, alpha=0.99, class_weight=None):
    weight = fit.weight_KF * x.double().std(0, unbiased=False)
    loss = F.cross_entropy(x.double() @ fit.weight_KF.T + fit.bias_K, y, weight=class_weight)
    return float(loss + fit.l2 * (alpha * weight.abs().sum() + (1 - alpha) / 2 * weight.square().sum()))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of scikit-learn, on `penalty`
@pytest.mark.parametrize("alpha", [0.99, 0.5])
def test_objectives_are_those_of_scikit_learn(alpha):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem()
    path = fit_path(x, y, num_classes=4, alpha=alpha, num_strengths=20)
    for i in (3, 7, 10):
        fit = path.fits[i]
        model = linear_model.LogisticRegression(
            solver="saga", penalty="elasticnet", l1_ratio=alpha, C=1 / (len(y) * fit.l2), tol=1e-8, max_iter=20_000
        )
        theirs = model.fit(standardised(x).numpy(), y.numpy())
        logit = torch.from_numpy(theirs.decision_function(standardised(x).numpy()))
        weight = torch.from_numpy(theirs.coef_)
        penalty = fit.l2 * (alpha * weight.abs().sum() + (1 - alpha) / 2 * weight.square().sum())
        assert objective(x, y, fit, alpha=alpha) == pytest.approx(float(F.cross_entropy(logit, y) + penalty), abs=2e-5)
        np.testing.assert_allclose((x.double() @ fit.weight_KF.T + fit.bias_K).softmax(1), logit.softmax(1), atol=5e-3)


def test_the_largest_strength_is_where_the_first_weight_appears():
    x, y = problem()
    z, target = standardised(x), F.one_hot(y, 4).double()
    closed = float((z.T @ (target - target.mean(0))).abs().max()) / len(y) / 0.99
    assert largest_strength(x, y, num_classes=4) == pytest.approx(closed, rel=1e-12)
    path = fit_path(x, y, num_classes=4, num_strengths=50)
    assert path.strengths[0] == pytest.approx(closed)
    assert path.necs[0] == 0
    assert path.necs[1] > 0
    torch.testing.assert_close((x.double() @ path.fits[0].weight_KF.T + path.fits[0].bias_K).softmax(1)[0], target.mean(0))


def test_every_fit_meets_the_optimality_conditions():
    """Written out again for weights as they are folded back: nothing of the solver is used."""
    x, y = problem()
    path = fit_path(x, y, num_classes=4, num_strengths=25)
    z, target = standardised(x), F.one_hot(y, 4).double()
    for fit in path.fits:
        weight = fit.weight_KF * x.double().std(0, unbiased=False)
        residual = ((x.double() @ fit.weight_KF.T + fit.bias_K).softmax(1) - target) / len(y)
        slope = residual.T @ z + fit.l2 * 0.01 * weight
        off = torch.where(weight != 0, (slope + 0.99 * fit.l2 * weight.sign()).abs(), (slope.abs() - 0.99 * fit.l2).clamp(min=0))
        worst = max(float(off.max()), float(residual.sum(0).abs().max()))
        assert worst <= 0.0101 * fit.l2
        assert fit.gradient == pytest.approx(worst, abs=1e-9)


def test_newton_steps_change_the_speed_and_not_the_optimum(monkeypatch):
    x, y = problem()
    quick = fit_path(x, y, num_classes=4, max_nec=5)
    monkeypatch.setattr(sparse_head, "_MAX_SUPPORT", 0)
    monkeypatch.setattr(sparse_head, "_ROUNDS", 2000)
    monkeypatch.setattr(sparse_head, "_TOLERANCE", 1e-3)
    slow = fit_path(x, y, num_classes=4, max_nec=5)
    assert len(quick.fits) > 5
    for a, b in zip(quick.fits, slow.fits):
        assert objective(x, y, a) == pytest.approx(objective(x, y, b), abs=5e-5)  # what the looser one may be off by


def test_class_weights_are_those_of_the_objective():
    x, y = problem()
    class_weight = torch.tensor([3.0, 1.0, 1.0, 0.5])
    path = fit_path(x, y, num_classes=4, num_strengths=10, class_weight_K=class_weight)
    plain = fit_path(x, y, num_classes=4, num_strengths=10)
    fit = path.fits[4]
    least = objective(x, y, fit, class_weight=class_weight.double())
    for seed in range(8):
        drawn = torch.Generator().manual_seed(seed)
        near = type(fit)(
            fit.weight_KF * (1 + 0.02 * torch.randn(fit.weight_KF.shape, generator=drawn)),
            fit.bias_K + 0.02 * torch.randn(4, generator=drawn),
            fit.l2,
            0,
            0,
            0,
        )
        assert objective(x, y, near, class_weight=class_weight.double()) > least - 1e-6
    assert (fit.bias_K - plain.fits[4].bias_K).abs().max() > 0.1


def test_at_cuts_standardised_weights_and_keeps_their_bias():
    x, y = problem()
    path = fit_path(x, y, num_classes=4, val=(x[:40], y[:40]))
    for wanted in (1, 2, 5):
        fit = path.at(wanted)
        i = next(i for i, found in enumerate(path.necs) if found == min(n for n in path.necs if n >= wanted))
        full, deviation = path.fits[i], x.double().std(0, unbiased=False)
        assert nec(fit.weight_KF) == wanted
        kept = truncate_weights(full.weight_KF * deviation, wanted)
        torch.testing.assert_close(fit.weight_KF * deviation, kept)
        bias = full.bias_K + full.weight_KF @ x.double().mean(0)
        logit = standardised(x) @ kept.T + bias
        torch.testing.assert_close(x.double() @ fit.weight_KF.T + fit.bias_K, logit)
        assert fit.train_accuracy == float((logit.argmax(1) == y).double().mean())
        assert fit.val_accuracy == float((logit[:40].argmax(1) == y[:40]).double().mean())
        assert fit.l2 == path.strengths[i]


def test_the_short_path_gives_the_same_head():
    x, y = problem()
    torch.testing.assert_close(fit_sparse_head(x, y, num_classes=4, nec=3).weight_KF, fit_path(x, y, num_classes=4).at(3).weight_KF)


def test_a_path_that_ends_early_gives_its_last_fit():
    x, y = problem(width=3)
    path = fit_path(x, y, num_classes=4, max_nec=30)
    assert len(path.fits) == 50
    torch.testing.assert_close(path.at(30).weight_KF, path.fits[-1].weight_KF)
    assert math.isnan(path.at(2).val_accuracy)


def test_a_class_without_pictures_is_never_predicted_and_a_constant_input_never_used():
    x, y = problem()
    x[:, 2] = 7.0
    fit = fit_sparse_head(x, y + (y == 3), num_classes=6, nec=3)
    logit = x.double() @ fit.weight_KF.T + fit.bias_K
    assert set(logit.argmax(1).tolist()) <= {0, 1, 2, 4}
    assert logit.softmax(1)[:, [3, 5]].max() < 1e-10
    assert fit.weight_KF[:, 2].abs().max() == 0
    assert fit.weight_KF.isfinite().all()
    assert fit.bias_K.isfinite().all()


def test_a_fit_that_does_not_reach_its_optimum_says_so(monkeypatch):
    monkeypatch.setattr(sparse_head, "_ROUNDS", 1)
    monkeypatch.setattr(sparse_head, "_STEPS", 1)
    monkeypatch.setattr(sparse_head, "_MAX_SUPPORT", 0)
    x, y = problem()
    with pytest.warns(UserWarning, match="strengths from its optimum"):
        fit_path(x, y, num_classes=4, num_strengths=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"num_strengths": 0}, "num_strengths is 0"),
        ({"num_classes": 3}, "labels run from 0 to 3; 3 classes are 0 to 2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    x, y = problem()
    with pytest.raises(ValueError, match=message):
        fit_path(x, y, **{"num_classes": 4, **settings})


def test_bad_input_is_named():
    x, y = problem()
    with pytest.raises(ValueError, match="nec is 0"):
        fit_sparse_head(x, y, num_classes=4, nec=0)
    with pytest.raises(ValueError, match="give \\(n, F\\)"):
        fit_path(x, y[:-1], num_classes=4)
    x[17, 1] = torch.inf
    with pytest.raises(ValueError, match="training row 17 is not finite"):
        fit_path(x, y, num_classes=4)
