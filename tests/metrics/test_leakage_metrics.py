"""Leakage: estimators against scikit-learn and closed forms, scores against models whose leakage is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dotcbm.metrics.information import discrete_entropy, discrete_information, ksg_information, ross_information, separate_ties
from dotcbm.metrics.leakage import (
    concept_task_leakage,
    interconcept_leakage,
    measure_leakage,
    niche_impurity,
    oracle_impurity,
    shuffle_within_truth,
)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ties", [False, True])
def test_ross_is_that_of_scikit_learn(ties):
    selection = pytest.importorskip("sklearn.feature_selection._mutual_info")
    g = drawn()
    label = torch.randint(0, 12, (300,), generator=g)
    value = torch.randn(len(label), 7, generator=g) + label[:, None] * torch.linspace(0, 1, 7)
    value = separate_ties(value.round(decimals=1) if ties else value)
    ours = ross_information(value, label)
    theirs = [selection._compute_mi_cd(column.numpy(), label.numpy(), 3) for column in value.T]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_ross_is_the_loop_over_pictures_with_rare_labels_too():
    """scikit-learn's distances in classes of 6 pictures or fewer are rounded, so this is written out."""
    g = drawn()
    label = torch.cat([torch.randint(0, 4, (60,), generator=g), torch.tensor([12, 13, 13, 14, 14, 14])])
    value = torch.randn(66, 1, generator=g, dtype=torch.float64) + label[:, None] / 10
    psi = torch.special.digamma
    parts = []
    for n in range(66):
        distance = (value[:, 0] - value[n, 0]).abs()
        own = distance[(label == label[n]) & (torch.arange(66) != n)].sort().values
        if len(own):
            k = min(3, len(own))
            inside = (distance[label != 12] < own[k - 1]).sum()  # label 12 is seen once and left out
            parts.append(
                psi(torch.tensor([65.0, k, len(own) + 1.0, float(inside)], dtype=torch.float64)) @ torch.tensor([1.0, 1, -1, -1]).double()
            )
    assert float(ross_information(value, label)) == pytest.approx(float(torch.stack(parts).mean()), abs=1e-12)


def test_ksg_is_that_of_scikit_learn():
    selection = pytest.importorskip("sklearn.feature_selection._mutual_info")
    x, y = separate_ties(torch.randn(400, 2, generator=drawn()).round(decimals=2)).T
    for slope in (0.0, 0.5, 3.0):
        theirs = selection._compute_mi_cc(x.numpy(), (y + slope * x).numpy(), 3)
        assert ksg_information(x, y + slope * x) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_ksg_finds_the_information_of_a_normal_pair(rho):
    pytest.importorskip("scipy")
    x, e = torch.randn(2, 4000, generator=drawn(1), dtype=torch.float64)
    assert ksg_information(x, rho * x + math.sqrt(1 - rho**2) * e) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.05)


def test_discrete_information_has_its_closed_forms():
    same, apart = torch.tensor([[[5, 0], [0, 5]], [[3, 3], [3, 3]]])
    assert discrete_information(torch.stack([same, apart])).tolist() == pytest.approx([math.log(2), 0])
    assert float(discrete_entropy(torch.tensor([1, 1, 2]))) == pytest.approx(1.5 * math.log(2))
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = torch.randint(0, 3, (2, 50), generator=drawn())
    table = torch.zeros(3, 3).index_put((a, b), torch.ones(50), accumulate=True)
    assert float(discrete_information(table[None])) == pytest.approx(metrics.mutual_info_score(a, b))


def classes_with_concepts(num=1200, concepts=4, seed=0):
    """2^concepts equally frequent classes, whose concepts are the bits of their number."""
    label = torch.arange(num) % 2**concepts
    truth = (label[:, None] // 2 ** torch.arange(concepts) % 2).float()
    return label, truth, drawn(seed)


def test_ctl_is_nothing_for_true_concepts_and_all_that_is_left_of_the_class_for_class_numbers():
    label, truth, g = classes_with_concepts()
    clean = truth + 0.1 * torch.randn(truth.shape, generator=g)
    assert concept_task_leakage(clean, truth, label).max() < 0.02
    leaking = (label[:, None] + 0.01 * torch.rand(truth.shape, generator=g)).expand_as(truth)
    # All of H(y), less the bit that the concept itself is. The estimator gives psi(1200) - psi(75) for ln 16, and no more.
    said = float(torch.special.digamma(torch.tensor([75.0, 1200.0], dtype=torch.float64)).diff())
    assert said == pytest.approx(math.log(16), abs=0.01)
    expected = (said - math.log(2)) / math.log(16)
    assert concept_task_leakage(leaking, truth, label).tolist() == pytest.approx([expected] * 4, abs=1e-6)


def test_ctl_leaves_out_unknown_truth_and_classes_seen_once():
    label, truth, g = classes_with_concepts(400)
    soft = truth + label[:, None] / 30 + 0.05 * torch.randn(truth.shape, generator=g)
    plain = concept_task_leakage(soft, truth, label)
    holes = truth.clone()
    holes[::3, 1] = torch.nan
    holes[:, 2] = torch.nan
    found = concept_task_leakage(soft, holes, label)
    keep = torch.arange(400) % 3 != 0
    torch.testing.assert_close(found[[0, 3]], plain[[0, 3]])
    assert found[1] == pytest.approx(float(concept_task_leakage(soft[keep], truth[keep], label[keep])[1]), abs=0.01)
    assert found[2].isnan()
    lone = (torch.cat([soft, soft[:1]]), torch.cat([truth, truth[:1]]), torch.cat([label, torch.tensor([99])]))
    assert concept_task_leakage(*lone)[0] == pytest.approx(float(plain[0]), abs=1e-3)
    assert concept_task_leakage(soft[:16], truth[:16], label[:16]).isnan().all()  # every class once
    assert concept_task_leakage(soft, truth, torch.zeros(400).long()).isnan().all()  # one class


def test_icl_is_nothing_for_independent_concepts_and_one_for_copies():
    pytest.importorskip("scipy")
    label, truth, g = classes_with_concepts()
    del label
    clean = truth + 0.1 * torch.randn(truth.shape, generator=g)
    found = interconcept_leakage(clean, truth)
    off = ~torch.eye(4, dtype=torch.bool)
    assert found[off].max() < 0.02
    assert found.diagonal().isnan().all()
    assert torch.equal(found[off], found.T[off])
    copies = torch.randn(1200, 1, generator=g).expand(-1, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert interconcept_leakage(copies, truth)[off].tolist() == pytest.approx([1.0] * 12, abs=1e-6)


def test_icl_draws_its_pairs_by_the_seed_and_skips_constant_concepts():
    pytest.importorskip("scipy")
    _, truth, g = classes_with_concepts(200, concepts=6)
    truth = truth[:200]
    soft = truth + 0.2 * torch.randn(truth.shape, generator=g)
    all_pairs = interconcept_leakage(soft, truth, num_pairs=None)
    a, b, c = (interconcept_leakage(soft, truth, num_pairs=5, seed=seed) for seed in (0, 0, 4))
    assert (~a.isnan()).sum() == 10
    torch.testing.assert_close(a, b, equal_nan=True)
    assert not torch.equal(a.isnan(), c.isnan())
    torch.testing.assert_close(a[~a.isnan()], all_pairs[~a.isnan()])
    truth[:, 0] = 1
    assert interconcept_leakage(soft, truth)[0].isnan().all()


def test_ois_is_nothing_for_true_concepts_and_known_for_swapped_ones():
    _, truth, g = classes_with_concepts(2000, concepts=2)
    assert oracle_impurity(truth, truth) == 0
    assert oracle_impurity(truth + 0.05 * torch.randn(truth.shape, generator=g), truth) < 0.1
    # Concept 0 is predicted by concept 1's truth and the other way round: every AUC is off by a half.
    assert oracle_impurity(truth.flip(1), truth) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("unknown", [0.1, 0.5])
def test_ois_is_nothing_for_true_concepts_of_which_some_are_unknown(unknown):
    _, truth, g = classes_with_concepts(600, concepts=5)
    truth[:, 1] = truth[:, 0]  # what is known of one concept tells of another
    seen = torch.where(torch.rand(truth.shape, generator=g) < unknown, torch.nan, truth)
    assert oracle_impurity(4 * truth - 2, seen) == 0
    seen[:, 2] = torch.nan
    assert oracle_impurity(4 * truth - 2, seen) == 0


def test_nis_is_chance_for_true_concepts_and_known_for_scattered_ones():
    _, truth, g = classes_with_concepts(1000, concepts=3)
    clean = truth + 0.1 * torch.randn(truth.shape, generator=g)
    assert niche_impurity(clean, truth) == pytest.approx(0.5, abs=0.06)
    # Each input is the sum of two concepts: corr = 1 / sqrt(2) with both, 0 with the third. Above b = 0.707 nothing is in a niche and
    # all are predicted; below it a concept is left with the one input that says nothing of it.
    mixed = truth + truth.roll(1, 1)
    expected = (0.725 * 0.5 + 0.225 * 1.0) / 0.95
    assert niche_impurity(mixed, truth) == pytest.approx(expected, abs=0.05)


def test_shuffling_keeps_what_a_concept_says_of_itself_and_nothing_else():
    label, truth, g = classes_with_concepts()
    truth[::7, 1] = torch.nan
    leaking = truth.nan_to_num(0.5) + 0.3 * label[:, None] / 16 + 0.02 * torch.randn(truth.shape, generator=g)
    shuffled = shuffle_within_truth(leaking, truth, seed=3)
    assert torch.equal(shuffled, shuffle_within_truth(leaking, truth, seed=3))
    assert not torch.equal(shuffled, leaking)
    for j in range(4):
        for rows in (truth[:, j] == 0, truth[:, j] == 1, truth[:, j].isnan()):
            assert torch.equal(shuffled[rows, j].sort().values, leaking[rows, j].sort().values)
    assert concept_task_leakage(leaking, truth, label).mean() > 0.1
    assert concept_task_leakage(shuffled, truth, label).mean() < 0.02


def test_all_scores_stand_beside_their_controls():
    pytest.importorskip("scipy")
    label, truth, g = classes_with_concepts(600)
    leaking = truth + 0.4 * truth.roll(1, 1) + 0.02 * torch.randn(truth.shape, generator=g)
    figures = measure_leakage(leaking, truth, label, num_pairs=4)
    assert figures.num_pairs == 4
    assert figures.num_pictures == 600
    assert figures.ctl_M.mean() > figures.ctl_control_M.mean() + 0.1
    assert figures.icl > figures.icl_control + 0.01
    assert figures.ois > figures.ois_control + 0.2
    assert figures.nis > figures.nis_control
    again = measure_leakage(leaking, truth, label, num_pairs=4)
    assert (again.ois, again.nis, again.icl) == (figures.ois, figures.nis, figures.icl)
    # A model without leakage is not told from its control.
    clean = measure_leakage(truth + 0.1 * torch.randn(truth.shape, generator=g), truth, label)
    assert abs(clean.ois - clean.ois_control) < 0.05
    assert abs(clean.nis - clean.nis_control) < 0.05


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_impurities_take_unknown_truth(unknown):
    _, truth, g = classes_with_concepts(600, concepts=5)
    soft = truth + 0.3 * torch.randn(truth.shape, generator=g)
    truth[torch.rand(truth.shape, generator=g) < unknown] = torch.nan
    assert 0 <= oracle_impurity(soft, truth) < 0.3
    assert niche_impurity(soft, truth) == pytest.approx(0.5, abs=0.12)


def test_bad_input_is_named():
    p, a, y = torch.rand(8, 3), torch.ones(8, 3), torch.zeros(8).long()
    with pytest.raises(ValueError, match="7 labels for 8 pictures"):
        concept_task_leakage(p, a, y[:7])
    with pytest.raises(ValueError, match=r"shape \(8, 3\) and truth \(8, 2\)"):
        interconcept_leakage(p, a[:, :2])
    with pytest.raises(ValueError, match=r"picture 0, concept 0 is 0\.5"):
        oracle_impurity(p, a / 2)
    with pytest.raises(ValueError, match="3 pictures leave none"):
        niche_impurity(p[:3], a[:3])
    with pytest.raises(ValueError, match="3 samples have no 3 neighbours"):
        ksg_information(torch.rand(3), torch.rand(3))
    p[2, 1] = torch.nan
    with pytest.raises(ValueError, match="picture 2, concept 1 is nan"):
        concept_task_leakage(p, a, y)
