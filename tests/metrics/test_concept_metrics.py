"""Concept and class metrics against scikit-learn and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as oracle

from dotcbm.metrics.classes import accuracy, balanced_accuracy, calibration_error, class_recall, group_accuracy, worst_group_accuracy
from dotcbm.metrics.concepts import (
    all_negative_error,
    concept_auroc,
    concept_average_precision,
    concept_error,
    concept_f1,
    macro_auroc,
    macro_average_precision,
    macro_f1,
)

# Few distinct values, so that ties are common.
tied_scores = arrays(
    np.float64, st.tuples(st.integers(2, 25), st.integers(1, 4)), elements=st.sampled_from([0.0, 0.1, 0.5, 0.5001, 0.9, 1.0])
)


def with_targets(draw: st.DataObject, score_NM: np.ndarray) -> np.ndarray:
    return draw.draw(arrays(np.float64, score_NM.shape, elements=st.sampled_from([0.0, 1.0, np.nan])))


@settings(max_examples=60)
@given(tied_scores, st.data())
def test_ranked_metrics_equal_scikit_learn_with_ties_and_unknown_labels(score_NM: np.ndarray, data: st.DataObject) -> None:
    target_NM = with_targets(data, score_NM)
    auroc_M = concept_auroc(torch.tensor(score_NM), torch.tensor(target_NM))
    precision_M = concept_average_precision(torch.tensor(score_NM), torch.tensor(target_NM))
    f1_M = concept_f1(torch.tensor(score_NM), torch.tensor(target_NM))
    error_M = concept_error(torch.tensor(score_NM), torch.tensor(target_NM))
    for j in range(score_NM.shape[1]):
        known = ~np.isnan(target_NM[:, j])
        score, target = score_NM[known, j], target_NM[known, j]
        if len(set(target)) == 2:
            assert auroc_M[j].item() == pytest.approx(oracle.roc_auc_score(target, score), abs=1e-12)
            assert precision_M[j].item() == pytest.approx(oracle.average_precision_score(target, score), abs=1e-12)
            assert f1_M[j].item() == pytest.approx(oracle.f1_score(target, score > 0.5, zero_division=0), abs=1e-12)
        else:
            assert auroc_M[j].isnan()
            assert precision_M[j].isnan()
            assert f1_M[j].isnan()
        if known.any():
            assert error_M[j].item() == pytest.approx(1 - oracle.accuracy_score(target, score > 0.5), abs=1e-12)
        else:
            assert error_M[j].isnan()


@settings(max_examples=30)
@given(tied_scores, st.data())
def test_auroc_counts_pairs_and_turns_around_with_the_score(score_NM: np.ndarray, data: st.DataObject) -> None:
    target_NM = with_targets(data, score_NM)
    auroc_M = concept_auroc(torch.tensor(score_NM), torch.tensor(target_NM))
    for j in range(score_NM.shape[1]):
        wins = [
            1.0 if p > n else 0.5 if p == n else 0.0 for p in score_NM[target_NM[:, j] == 1, j] for n in score_NM[target_NM[:, j] == 0, j]
        ]
        if wins:
            assert auroc_M[j].item() == pytest.approx(float(np.mean(wins)), abs=1e-12)
    turned_M = concept_auroc(-torch.tensor(score_NM), torch.tensor(target_NM))
    torch.testing.assert_close(turned_M, 1 - auroc_M, equal_nan=True)


def test_macro_figures_leave_out_concepts_that_do_not_vary() -> None:
    score = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.3, 0.5], [0.8, 0.1, 0.5]])
    target = torch.tensor([[1.0, 1.0, torch.nan], [0.0, 1.0, torch.nan], [0.0, 1.0, torch.nan]])
    assert concept_auroc(score, target).isnan().tolist() == [False, True, True]
    assert macro_auroc(score, target).item() == 1.0
    assert macro_average_precision(score, target).item() == 1.0
    assert macro_f1(score, target).item() == pytest.approx(2 / 3)
    assert macro_auroc(score[:, 1:], target[:, 1:]).isnan()
    torch.testing.assert_close(all_negative_error(target), torch.tensor([1 / 3, 1.0, torch.nan], dtype=torch.float64), equal_nan=True)


def test_half_precision_scores_are_ranked_exactly() -> None:
    score = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)).half()
    target = (torch.rand(200, 3, generator=torch.Generator().manual_seed(1)) > 0.7).half()
    expected = [oracle.roc_auc_score(target[:, j], score[:, j].float()) for j in range(3)]
    assert concept_auroc(score, target).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("score", "target", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, 3), r"\(3, 2\).*\(2, 3\)"),
        (torch.tensor([[0.1], [torch.nan]]), torch.zeros(2, 1), "picture 1, concept 0 is nan"),
        (torch.zeros(2, 1), torch.tensor([[0.0], [0.3]]), "picture 1, concept 0 is 0.3"),
    ],
)
def test_bad_concept_input_is_named(score: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concept_auroc(score, target)


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(2, 5), st.integers(0, 10_000))
def test_class_metrics_equal_scikit_learn(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score, label = torch.randn(n, k, generator=generator), torch.randint(0, k, (n,), generator=generator)
    group = torch.randint(0, 3, (n,), generator=generator)
    predicted = score.argmax(1)
    assert accuracy(score, label).item() == pytest.approx(oracle.accuracy_score(label, predicted))
    present = label.unique()
    recalls = [oracle.accuracy_score(label[label == c], predicted[label == c]) for c in present]
    assert balanced_accuracy(score, label).item() == pytest.approx(float(np.mean(recalls)))
    assert class_recall(score, label)[present].tolist() == pytest.approx(recalls)
    by_group = {int(g): oracle.accuracy_score(label[group == g], predicted[group == g]) for g in group.unique()}
    assert worst_group_accuracy(score, label, group_N=group).item() == pytest.approx(min(by_group.values()))
    per_group = group_accuracy(score, label, group_N=group, num_groups=4)
    assert per_group[3].isnan()
    for g, value in by_group.items():
        assert per_group[g].item() == pytest.approx(value)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(1, 20), st.integers(0, 10_000))
def test_calibration_error_equals_a_loop_over_bins(n: int, k: int, num_bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = (3 * torch.randn(n, k, generator=generator, dtype=torch.float64)).softmax(1)
    label = torch.randint(0, k, (n,), generator=generator)
    confidence, correct = probability.max(1).values.numpy(), (probability.argmax(1) == label).numpy()
    expected = 0.0
    for s in range(num_bins):
        inside = (confidence > s / num_bins) & (confidence <= (s + 1) / num_bins)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(probability, label, num_bins=num_bins).item() == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_honest_and_of_overconfident_predictions() -> None:
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 0])).item() == 0
    assert calibration_error(sure, torch.tensor([0, 1, 1, 1])).item() == pytest.approx(0.75)


def test_bad_class_input_is_named() -> None:
    with pytest.raises(ValueError, match="apply a softmax"):
        calibration_error(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"2 classes need \[0, 2\)"):
        accuracy(torch.zeros(1, 2), torch.tensor([2]))
    with pytest.raises(ValueError, match="no picture"):
        accuracy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="picture 1 hold NaN"):
        accuracy(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="group numbers"):
        group_accuracy(torch.zeros(2, 2), torch.tensor([0, 1]), group_N=torch.tensor([0, 4]), num_groups=4)
    with pytest.raises(ValueError, match="labels"):
        accuracy(torch.zeros(2, 2), torch.tensor([0]))
