"""What experts are used for, against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from expert_problems import DEVICE, expert_layer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.moe.statistics import RoutingStatistics, lift, max_vio, min_vio


def test_violations_by_hand():
    count_E = torch.tensor([10, 0, 4, 2])
    assert max_vio(count_E) == 1.5
    assert min_vio(count_E) == -1
    assert math.isnan(max_vio(torch.zeros(3, dtype=torch.int64)))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any))
def test_bounds_of_violations(counts):
    count_E = torch.tensor(counts)
    assert max_vio(count_E) + 1e-12 >= 0
    assert max_vio(count_E) <= len(counts) - 1 + 1e-12
    assert -1 <= min_vio(count_E) <= 1e-12
    assert (min_vio(count_E) == -1) == (0 in counts)


@pytest.mark.parametrize("count_prefix", [0, 1])
def test_against_loops(count_prefix):
    layer = expert_layer(k=2, count_prefix=count_prefix)
    layer.router.selection_bias[1] = 0.3
    statistics = RoutingStatistics(num_classes=3)
    B, N, M = 4, 5, 3
    count, p, entropy, n = [0] * 8, [0.0] * 8, 0.0, 0
    per_class, per_concept, per_place = (torch.zeros(3, 8, dtype=torch.float64) for _ in range(3))
    places = RoutingStatistics()
    for batch in range(3):
        x, class_B = tokens(batch, B, N, 16), torch.tensor([0, 2, 2, 0])  # class 1 never occurs
        concept_BM = (tokens(batch + 10, B, M) > 0).float().cpu()
        concept_BM[0, 0] = torch.nan
        weight_BPM = tokens(batch + 20, B, N - count_prefix, M).abs().cpu()
        layer(x)
        statistics.update({"a": layer}, class_B=class_B.to(DEVICE), concept=concept_BM.to(DEVICE))
        places.update({"a": layer}, concept=weight_BPM)
        for b in range(B):
            for i in range(count_prefix, N):
                t = b * N + i
                probability = layer.routing.logit_TE[t].double().softmax(-1).tolist()
                n += 1
                entropy -= sum(x * math.log(x) for x in probability)
                for e in range(8):
                    p[e] += probability[e]
                for e in layer.routing.index_TK[t].tolist():
                    count[e] += 1
                    per_class[class_B[b], e] += 1
                    per_concept[:, e] += concept_BM[b].nan_to_num(0.0)
                    per_place[:, e] += weight_BPM[b, i - count_prefix]
    seen = statistics.compute()["a"]
    assert seen.count_E.tolist() == count
    assert seen.num_tokens == n == 3 * B * (N - count_prefix)
    assert seen.p_E.tolist() == pytest.approx([x / n for x in p], rel=1e-5)
    assert seen.f_E.tolist() == pytest.approx([x / sum(count) for x in count])
    assert seen.entropy == pytest.approx(entropy / n, rel=1e-5)
    assert seen.switch_loss == pytest.approx(8 * sum(c / sum(count) * x / n for c, x in zip(count, p, strict=True)), rel=1e-5)
    assert seen.max_vio == pytest.approx(max(count) / (sum(count) / 8) - 1)
    assert seen.num_dead == count.count(0)
    assert seen.bias_spread == pytest.approx(0.3)
    assert torch.equal(seen.class_KE, per_class)
    assert torch.equal(seen.concept_ME, per_concept)
    torch.testing.assert_close(places.compute()["a"].concept_ME, per_place)
    assert places.compute()["a"].class_KE is None


def test_lift_by_hand():
    table = torch.tensor([[6.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = lift(table, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    assert found[0, :2].tolist() == [1.5, 0.5]
    assert found[0, 2].isnan()
    assert found[1].isnan().all()


def test_batches_without_labels_and_without_tokens():
    layer, statistics = expert_layer(), RoutingStatistics(num_classes=2)
    layer(tokens(0, 0, 5, 16))
    statistics.update({"a": layer}, class_B=torch.zeros(0, dtype=torch.int64), concept=torch.zeros(0, 4))
    empty = statistics.compute()["a"]
    assert empty.num_tokens == 0
    assert all(math.isnan(value) for value in (empty.max_vio, empty.min_vio, empty.entropy, empty.switch_loss))
    layer(tokens(0, 2, 5, 16))
    statistics.update({"a": layer})
    seen = statistics.compute()["a"]
    assert seen.num_tokens == 10
    assert seen.class_KE.shape == (2, 8)
    assert seen.class_KE.sum() == seen.concept_ME.sum() == 0
    assert not statistics.compute()["a"].p_E.requires_grad
    statistics.gather()  # one process
    assert statistics.compute()["a"].num_tokens == 10
    assert RoutingStatistics().compute() == {}


def test_errors_say_what_is_wrong():
    layer = expert_layer()
    with pytest.raises(ValueError, match=r"expert layer blocks\.3 has not run yet"):
        RoutingStatistics().update({"blocks.3": layer})
    layer(tokens(0, 3, 5, 16))
    with pytest.raises(ValueError, match="num_classes is 0"):
        RoutingStatistics().update({"a": layer}, class_B=torch.zeros(3, dtype=torch.int64))
    for shape in ((4, 2), (3, 4, 2), (3,)):
        with pytest.raises(ValueError, match=r"concept has shape .*does not fit the 15 tokens counted"):
            RoutingStatistics().update({"a": layer}, concept=torch.zeros(shape))
