"""Post-hoc CBM: support vector machines for concepts, distances for the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes.baselines import GRID, B, D, M, check_promises, make_features, make_problem, roundtrip, train

from dotcbm.models.post_hoc import PostHocCBM, hinge_loss
from dotcbm.structures import PatchFeatures
from dotcbm.training.head_fit import check_reads_truth


def make(**settings) -> PostHocCBM:
    torch.manual_seed(0)
    return PostHocCBM(make_problem(), **settings)


def test_the_formula() -> None:
    model, features = make(scaling="none").eval(), make_features()
    out = model(features)
    for b in range(B):
        x_D = features.patch_BND[b].mean(0)
        distance_M = torch.stack([(w_D @ x_D + bias) / w_D.norm() for w_D, bias in zip(model.concept.weight, model.concept.bias)])
        assert torch.allclose(model.head_input(out.concept_logit_BM)[b], distance_M, atol=1e-5)
        assert torch.allclose(out.class_logit_BK[b], model.head.weight @ distance_M + model.head.bias, atol=1e-5)


def test_the_hinge_loss_label_by_label() -> None:
    value_BM = torch.tensor([[2.0, 0.5, -3.0], [-0.5, -2.0, 9.0]])
    truth_BM = torch.tensor([[1.0, 1.0, torch.nan], [1.0, 0.0, 0.0]])
    assert float(hinge_loss(value_BM, truth_BM)) == pytest.approx((0 + 0.5 + 1.5 + 0 + 10) / 5)
    weighed = hinge_loss(value_BM, truth_BM, pos_weight_M=torch.tensor([2.0, 3.0, 5.0]))
    assert float(weighed) == pytest.approx((0 + 3 * 0.5 + 2 * 1.5 + 0 + 10) / 5)
    unknown = torch.zeros(2, 3, requires_grad=True)
    loss = hinge_loss(unknown, torch.full((2, 3), torch.nan))
    loss.backward()
    assert float(loss.detach()) == 0
    assert unknown.grad is not None
    assert float(unknown.grad.abs().sum()) == 0


def test_its_optimum_is_the_support_vector_machine_of_scikit_learn() -> None:
    svm = pytest.importorskip("sklearn.svm")
    generator = torch.Generator().manual_seed(0)
    n, c = 60, 0.2
    x_nD = torch.randn(n, D, generator=generator)
    truth_nM = (x_nD @ torch.randn(D, M, generator=generator) + torch.randn(n, M, generator=generator) > 0).float()
    features = PatchFeatures(x_nD[:, None, :], x_nD, (1, 1))
    model = make(scaling="none", l2=1 / (n * c)).train()
    optimizer = torch.optim.Adam(model.concept.parameters(), lr=0.02)
    for step in range(1500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 ** (step // 200)
        optimizer.zero_grad()
        # The hinge is averaged over concepts as well, and so is the margin term: the sum of M separate machines.
        terms = model.losses(model(features), concepts_BM=truth_nM, label_B=torch.zeros(n, dtype=torch.long))
        assert terms.keys() == {"concept", "l2"}
        (terms["concept"] + terms["l2"]).backward()
        optimizer.step()
    for j in range(M):
        exact = svm.SVC(C=c, kernel="linear", tol=1e-6).fit(x_nD.numpy(), truth_nM[:, j].numpy())
        ours = model.concept.weight[j].detach()
        assert torch.allclose(ours, torch.tensor(exact.coef_[0], dtype=torch.float32), atol=0.02)
        agree = (model(features).concept_logit_BM[:, j].detach() > 0).numpy() == exact.predict(x_nD.numpy())
        assert agree.mean() > 0.98


@pytest.mark.parametrize("settings", [{}, {"scaling": "half", "l2": 0.3, "dropout": 0.1}, {"scaling": "none", "l2": 0.0}])
def test_it_keeps_the_promises_of_a_bottleneck(settings) -> None:
    model = make(**settings)
    check_promises(model)
    assert model(make_features()).evidence_BNM is not None


def test_the_class_loss_never_moves_the_vectors() -> None:
    model = make().train()
    model(make_features()).class_logit_BK.square().sum().backward()
    assert model.concept.weight.grad is None
    assert model.head.weight.grad is not None


def test_an_intervention_moves_the_classes_by_weight_and_norm() -> None:
    model = make().eval()
    out = model(make_features())
    changed_BM = out.concept_logit_BM.clone()
    changed_BM[:, 4] += 2.0
    expected_K = 2 * model.head.weight[:, 4] / model.concept.weight[4].norm()
    assert torch.allclose(model.classify(changed_BM) - out.class_logit_BK, expected_K.expand(B, -1), atol=1e-5)


def test_a_concept_without_a_vector_has_distance_zero_and_not_nan() -> None:
    model = make().eval()
    with torch.no_grad():
        model.concept.weight[0].zero_()
        model.concept.bias[0] = 0.0
    out = model(make_features())
    assert (model.head_input(out.concept_logit_BM)[:, 0] == 0).all()
    assert out.class_logit_BK.isfinite().all()
    assert out.grid == GRID


def test_training_reduces_the_loss(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, PostHocCBM, l2=0.001)
    assert last < 0.7 * first
    assert figures["test/concept_auroc"] > 0.6
    assert figures["test/accuracy"] > 0.4


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, PostHocCBM, scaling="half", l2=0.1)


def test_bad_settings() -> None:
    for settings, message in (({"l2": -1.0}, "penalty"), ({"scaling": "twice"}, "scaling is 'twice'")):
        with pytest.raises(ValueError, match=message):
            PostHocCBM(make_problem(), **settings)  # pyright: ignore[reportArgumentType]


def test_true_labels_are_no_distances() -> None:
    with pytest.raises(ValueError, match="independent"):
        check_reads_truth(make())
