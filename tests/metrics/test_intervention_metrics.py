"""Interventions: closed forms, properties, and greedy orders against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.metrics.intervention import coop_score, corrected, group_uncertainty, intervention_curve, logit_bounds

POLICIES = ("random", "uncertainty", "coop", "greedy")
N, M, K, G = 40, 9, 4, 4


def world(seed=0, noise=1.5, groups=G):
    """Classes with their own concepts, predictions with errors, and a head that is perfect on true concepts."""
    drawn = torch.Generator().manual_seed(seed)
    code = torch.cat([torch.eye(K), torch.randint(0, 2, (K, M - K), generator=drawn).float()], 1)
    label = torch.randint(0, K, (N,), generator=drawn)
    truth = code[label]
    logit = 4 * (truth - 0.5) + noise * 2 * torch.randn(N, M, generator=drawn)
    group = torch.randint(0, groups, (M,), generator=drawn)
    group[:groups] = torch.arange(groups)
    bounds = (torch.full((M,), -6.0), torch.full((M,), 6.0))

    def classify(logit_nM, rows_n):
        assert len(logit_nM) == len(rows_n)
        return -20 * (logit_nM.sigmoid()[:, None] - code).square().sum(2)

    return classify, logit, truth, label, group, bounds


@pytest.mark.parametrize("policy", POLICIES)
def test_a_perfect_head_on_true_concepts_ends_at_every_picture_right(policy):
    curve = intervention_curve(*world(), policy=policy)
    assert curve.accuracy_S[0] < 0.9
    assert curve.accuracy_S[-1] == 1
    assert curve.correct_NS.shape == (N, G + 1)
    torch.testing.assert_close(curve.correct_NS.mean(0), curve.accuracy_S)
    assert curve.area == pytest.approx(float(curve.accuracy_S.mean()))
    falls = [float(a - b) for s, a in enumerate(curve.accuracy_S) for b in curve.accuracy_S[s:]]
    assert curve.steps_down == pytest.approx(max(falls))
    assert (curve.spread_S is not None) == (policy == "random")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_that_ignores_its_concepts_stays_flat(policy):
    _, logit, truth, label, group, bounds = world()
    fixed = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    curve = intervention_curve(lambda _, rows: fixed[rows], logit, truth, label, group, bounds, policy=policy)
    assert (curve.accuracy_S == (fixed.argmax(1) == label).double().mean()).all()
    assert curve.steps_down == 0


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_all_policies_share_their_ends_and_rows_may_be_permuted(seed):
    classify, logit, truth, label, group, bounds = world(seed)
    curves = {p: intervention_curve(classify, logit, truth, label, group, bounds, policy=p) for p in POLICIES}
    for curve in curves.values():
        assert curve.accuracy_S[0] == curves["greedy"].accuracy_S[0]
        assert curve.accuracy_S[-1] == curves["greedy"].accuracy_S[-1]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    for policy, curve in curves.items():
        again = intervention_curve(classify, logit[order], truth[order], label[order], group, bounds, policy=policy)
        assert torch.equal(again.correct_NS, curve.correct_NS[order])


@pytest.mark.parametrize("policy", ["uncertainty", "coop", "greedy"])
def test_names_of_groups_do_not_matter(policy):
    classify, logit, truth, label, group, bounds = world()
    renamed = torch.tensor([70, -3, 12, 5])[group]
    a, b = (intervention_curve(classify, logit, truth, label, g, bounds, policy=policy) for g in (group, renamed))
    assert torch.equal(a.correct_NS, b.correct_NS)


def test_greedy_is_the_loop_over_pictures_and_groups():
    classify, logit, truth, label, group, bounds = world(seed=3)
    curve = intervention_curve(classify, logit, truth, label, group, bounds, policy="greedy")
    for n in range(N):
        row, now, left = torch.tensor([n]), logit[n : n + 1], list(range(G))
        hits = [classify(now, row).argmax(1).item() == label[n].item()]
        while left:
            tried = {g: corrected(now, truth[n : n + 1], group == g, bounds) for g in left}
            best = max(left, key=lambda g: float(classify(tried[g], row).double().log_softmax(1)[0, label[n]]))
            now, left = tried[best], [g for g in left if g != best]
            hits.append(classify(now, row).argmax(1).item() == label[n].item())
        assert curve.correct_NS[n].tolist() == [float(hit) for hit in hits]


def test_greedy_is_ahead_of_the_others_after_one_group():
    arguments = world(seed=5)
    after = {policy: intervention_curve(*arguments, policy=policy, num_orders=20).accuracy_S[1] for policy in POLICIES}
    assert after["greedy"] == max(after.values())
    assert after["greedy"] > after["random"]


def test_uncertainty_starts_with_the_group_nearest_to_a_half():
    logit = torch.tensor([[0.0, 9.0, -9.0], [9.0, 9.0, 0.1]])
    group = torch.tensor([0, 0, 1])
    score = group_uncertainty(logit, group)
    assert score[0, 0] == pytest.approx(0.5, abs=2e-3)
    assert score.argmax(1).tolist() == [0, 1]
    seen = []

    def classify(now, rows):
        seen.append(now.clone())
        return torch.zeros(len(now), 2)

    bounds = (torch.full((3,), -1.0), torch.full((3,), 1.0))
    intervention_curve(classify, logit, torch.ones(2, 3), torch.zeros(2).long(), group, bounds, policy="uncertainty")
    torch.testing.assert_close(seen[1], torch.tensor([[1.0, 1.0, -9.0], [9.0, 9.0, 1.0]]))
    torch.testing.assert_close(seen[2], torch.ones(2, 3))


def test_coop_is_entropy_plus_the_expected_change_of_the_predicted_class():
    logit = torch.tensor([[0.4, -1.0]])
    bounds = (torch.tensor([-3.0, -3.0]), torch.tensor([3.0, 3.0]))
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]])  # only the first concept matters
    score = coop_score(lambda x, _: x.sigmoid() @ weight.T, logit, torch.tensor([0, 1]), bounds)
    p = logit.sigmoid()[0]
    before, high, low = ((2 * torch.tensor(v).sigmoid()).sigmoid() for v in (0.4, 3.0, -3.0))
    importance = p[0] * (high - before).abs() + (1 - p[0]) * (low - before).abs()
    entropy = -(p * p.log2() + (1 - p) * (1 - p).log2())
    torch.testing.assert_close(score[0].float(), entropy + torch.tensor([float(importance), 0.0]))


def test_unknown_truth_stays_as_predicted():
    classify, logit, truth, label, group, bounds = world()
    truth = torch.full_like(truth, torch.nan)
    curve = intervention_curve(classify, logit, truth, label, group, bounds, policy="greedy")
    assert (curve.accuracy_S == curve.accuracy_S[0]).all()
    mixed = torch.tensor([[1.0, torch.nan, 0.0]])
    got = corrected(torch.tensor([[0.1, 0.2, 0.3]]), mixed, torch.tensor([True, True, False]), (torch.zeros(3), torch.ones(3)))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.2, 0.3]]))


def test_random_orders_depend_on_the_seed_alone_and_spread():
    arguments = world()
    a, b, c = (intervention_curve(*arguments, policy="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.correct_NS, b.correct_NS)
    assert not torch.equal(a.correct_NS, c.correct_NS)
    assert a.spread_S is not None
    assert a.spread_S[0] == a.spread_S[-1] == 0
    assert a.spread_S[1:-1].max() > 0


def test_bounds_are_percentiles_and_rare_concepts_do_not_take_those_of_others():
    drawn = torch.Generator().manual_seed(0)
    truth = torch.zeros(1000, 2)
    truth[:400, 0] = 1
    truth[:10, 1] = 1  # 1 %: the 95th percentile is a negative's
    logit = 6 * (truth - 0.5) + torch.randn(1000, 2, generator=drawn)
    low, high = logit_bounds(logit)
    for j in range(2):
        ordered = logit[:, j].sort().values
        assert ordered[49] <= low[j] <= ordered[50]
        assert ordered[949] <= high[j] <= ordered[950]
    assert high[1] < 0
    low_known, high_known = logit_bounds(logit, truth)
    assert high_known[1] == pytest.approx(float(logit[:10, 1].quantile(0.5)))
    assert (low_known[0], high_known[0], low_known[1]) == (low[0], high[0], low[1])
    truth[:, 0] = torch.nan
    torch.testing.assert_close(torch.stack(logit_bounds(logit, truth))[:, 0], torch.stack((low, high))[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "best"}, "policy is 'best'"),
        ({"num_orders": 0}, "num_orders is 0"),
        ({"label_N": torch.zeros(3).long()}, "3 labels and 9 groups"),
        ({"truth_NM": torch.full((N, M), 0.5)}, "picture 0, concept 0 is 0.5"),
        ({"truth_NM": torch.zeros(N, 2)}, r"truth has shape \(40, 2\)"),
        ({"concept_logit_NM": torch.full((N, M), torch.inf)}, "logit of picture 0, concept 0 is inf"),
        ({"concept_logit_NM": torch.zeros(0, M)}, r"shape \(0, 9\)"),
    ],
)
def test_bad_input_is_named(change, message):
    names = ("classify", "concept_logit_NM", "truth_NM", "label_N", "group_M", "bounds")
    with pytest.raises(ValueError, match=message):
        intervention_curve(**{**dict(zip(names, world())), "policy": "random", **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_have_bounds(dtype):
    classify, logit, truth, label, group, _ = world()
    low, high = logit_bounds(logit.to(dtype), truth)
    rough = logit.to(dtype).float()
    assert torch.equal(low, logit_bounds(rough, truth)[0])
    assert torch.equal(high, logit_bounds(rough, truth)[1])
    curve = intervention_curve(
        lambda x, rows: classify(x.float(), rows), logit.to(dtype), truth, label, group, (low, high), policy="random"
    )
    assert curve.accuracy_S[-1] > curve.accuracy_S[0]
