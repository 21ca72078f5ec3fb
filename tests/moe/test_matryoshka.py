"""Draws of k that need no state, budgets, greedy allocation and the numbers that judge them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from expert_problems import DEVICE, expert_layer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dotcbm.moe.matryoshka import (
    BudgetDraws,
    area_under_flops,
    at_budget,
    greedy_allocation,
    monotonicity_violations,
    nestedness,
    regret,
    set_budget,
)


def model() -> nn.Sequential:
    return nn.Sequential(expert_layer(1), nn.GELU(), expert_layer(2, num_experts=6), expert_layer(3))


def test_draws_depend_on_seed_step_and_layer_alone():
    draws = BudgetDraws(k_max=6, seed=3)
    grid = [[draws.k(layer, step) for layer in range(4)] for step in range(50)]
    shuffled = BudgetDraws(k_max=6, seed=3)
    for step, layer in [(49, 3), (0, 0), (7, 2), (49, 3)]:
        np.random.seed(step)
        torch.manual_seed(layer)
        assert shuffled.k(layer, step) == grid[step][layer]
    assert grid != [[BudgetDraws(k_max=6, seed=4).k(layer, step) for layer in range(4)] for step in range(50)]
    columns = list(zip(*grid, strict=True))
    assert len(set(columns)) == 4  # layers differ


def test_another_process_draws_the_same():
    code = "from dotcbm.moe.matryoshka import BudgetDraws; print([BudgetDraws(k_max=6, seed=5).k(i % 3, i) for i in range(20)])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([BudgetDraws(k_max=6, seed=5).k(i % 3, i) for i in range(20)])


def test_one_draw_a_batch():
    draws = BudgetDraws(k_max=6, scope="batch")
    for step in range(30):
        assert len({draws.k(layer, step) for layer in range(5)}) == 1
    assert len({draws.k(0, step) for step in range(30)}) > 3


@pytest.mark.parametrize("tau", [None, 2.0, 0.5])
def test_how_often_each_k_is_drawn(tau):
    draws = BudgetDraws(k_min=2, k_max=5, tau=tau)
    weight = [k ** (1 / tau) if tau else 1.0 for k in range(2, 6)]
    assert draws.probabilities.tolist() == pytest.approx([w / sum(weight) for w in weight])
    counts = Counter(draws.k(layer, step) for layer in range(4) for step in range(1000))
    for k, w in zip(range(2, 6), weight, strict=True):
        assert abs(counts[k] / 4000 - w / sum(weight)) < 4 * 0.5 / 4000**0.5
    # Neighbouring layers are independent.
    together = Counter((draws.k(0, step), draws.k(1, step)) for step in range(2000))
    for a, b in itertools.product(range(4), repeat=2):
        assert abs(together[a + 2, b + 2] / 2000 - weight[a] * weight[b] / sum(weight) ** 2) < 0.03


@settings(max_examples=100)
@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.integers(0, 2**40), st.integers(1, 5), st.integers(0, 5))
def test_draws_stay_within_their_bounds(seed, layer, step, k_min, extra):
    assert k_min <= BudgetDraws(k_min=k_min, k_max=k_min + extra, seed=seed, tau=2.0).k(layer, step) <= k_min + extra


def test_draws_set_the_layers():
    net, draws = model(), BudgetDraws(k_max=6, seed=1)
    draws.check(net, max_steps=10)
    for step in range(5):
        draws.apply(net, step)
        assert [net[i].k for i in (0, 2, 3)] == [draws.k(layer, step) for layer in range(3)]


def test_bad_draws():
    with pytest.raises(ValueError, match="k_max is 7, and 2 has 6 experts"):
        BudgetDraws(k_max=7).check(model())
    with pytest.raises(ValueError, match="k_min is 3 and k_max 2"):
        BudgetDraws(k_min=3, k_max=2)
    with pytest.raises(ValueError, match="k_min is 0"):
        BudgetDraws(k_min=0, k_max=2)
    with pytest.raises(ValueError, match="scope is 'token'; choose one of"):
        BudgetDraws(k_max=2, scope="token")  # pyright: ignore
    with pytest.raises(ValueError, match="tau is 0"):
        BudgetDraws(k_max=2, tau=0)
    with pytest.raises(ValueError, match="seed is -1"):
        BudgetDraws(k_max=2, seed=-1)


def test_set_budget():
    net = model()
    set_budget(net, 4)
    assert [net[i].k for i in (0, 2, 3)] == [4, 4, 4]
    set_budget(net, [1, 6, 8])
    assert [net[i].k for i in (0, 2, 3)] == [1, 6, 8]
    for bad, said in ((7, "k is 7, with 6"), ([1, 0, 1], "k is 0"), ([1, 2], "the budget has 2 entries, and the model 3 expert layers")):
        with pytest.raises(ValueError, match=said):
            set_budget(net, bad)
    assert [net[i].k for i in (0, 2, 3)] == [1, 6, 8]  # nothing has changed
    with pytest.raises(ValueError, match="no expert layers"):
        set_budget(nn.GELU(), 1)


def test_a_budget_for_a_while():
    net, x = model(), tokens(0, 10, 16)
    set_budget(net, [1, 2, 3])
    before = net(x)
    with at_budget(net, 5):
        assert not torch.equal(net(x), before)
    assert torch.equal(net(x), before)
    with pytest.raises(ValueError, match="x has shape"), at_budget(net, 5):
        expert_layer(count_prefix=1)(x)
    assert torch.equal(net(x), before)


def test_greedy_allocation_where_it_is_optimal():
    """Losses that add up over layers and gain less with each expert: the best budget of every cost on the path is greedy's."""
    weights = (3.0, 1.0, 2.5)

    def loss(budget: tuple[int, ...]) -> float:
        return sum(weight / (k + 0.1 * i) for i, (weight, k) in enumerate(zip(weights, budget, strict=True)))

    path = greedy_allocation(loss, 3, k_min=1, k_max=4)
    assert len(path) == 10
    assert path[0].budget == (1, 1, 1)
    assert path[-1].budget == (4, 4, 4)
    for point in path:
        assert point.loss == loss(point.budget)
        assert point.cost == sum(point.budget)
        rivals = [loss(budget) for budget in itertools.product(range(1, 5), repeat=3) if sum(budget) == sum(point.budget)]
        assert point.loss == pytest.approx(min(rivals))


def test_greedy_allocation_minds_the_cost():
    gains = {0: 1.0, 1: 1.5}
    path = greedy_allocation(lambda budget: -sum(gains[i] * k for i, k in enumerate(budget)), 2, k_min=1, k_max=2, cost=[1.0, 2.0])
    assert [point.budget for point in path] == [(1, 1), (2, 1), (2, 2)]
    assert [point.cost for point in path] == [3.0, 4.0, 6.0]
    with pytest.raises(ValueError, match="a positive cost for each"):
        greedy_allocation(lambda _: 0.0, 2, k_min=1, k_max=2, cost=[1.0])
    with pytest.raises(ValueError, match="k_min is 2 and k_max 1"):
        greedy_allocation(lambda _: 0.0, 2, k_min=2, k_max=1)


def test_greedy_allocation_of_a_model():
    net, x = model(), tokens(1, 40, 16)
    target = net(x).detach()
    set_budget(net, 1)

    def loss(budget: tuple[int, ...]) -> float:
        with at_budget(net, budget), torch.no_grad():
            return float((net(x) - target).square().mean())

    path = greedy_allocation(loss, 3, k_min=1, k_max=2)
    assert path[-1].loss == 0  # the budget of the target
    assert path[0].loss > 0


def test_figures_by_hand():
    assert regret({1: 0.8, 4: 0.9}, {1: 0.79, 2: 0.7, 4: 0.92}) == pytest.approx({1: 0.01, 4: -0.02})
    with pytest.raises(ValueError, match=r"specialists for k = \[6\]"):
        regret({1: 0.8, 6: 0.9}, {1: 0.79})
    assert area_under_flops([1, 2, 4], [0.5, 0.7, 0.9]) == pytest.approx((0.6 * 1 + 0.8 * 2) / 3)
    assert area_under_flops([4, 1, 2], [0.9, 0.5, 0.7]) == pytest.approx((0.6 * 1 + 0.8 * 2) / 3)
    for flops, accuracy in (([1], [0.5]), ([1, 1], [0.5, 0.6]), ([1, 2], [0.5])):
        with pytest.raises(ValueError, match="at least two points, with different FLOPs"):
            area_under_flops(flops, accuracy)
    assert monotonicity_violations({4: 0.9, 1: 0.5, 2: 0.4, 6: 0.89}) == 2
    assert monotonicity_violations({4: 0.9, 1: 0.5, 2: 0.4, 6: 0.89}, tolerance=0.05) == 1
    index, full = torch.tensor([[0, 1], [2, 5]]), torch.tensor([[1, 0, 3], [2, 0, 1]])
    assert nestedness(index, full) == 0.75


def test_one_router_is_nested():
    layer, x = expert_layer(k=8), tokens(2, 50, 16)
    chosen = {k: layer.router(x, k).index_TK for k in (1, 3, 6)}
    assert nestedness(chosen[3], chosen[6]) == nestedness(chosen[1], chosen[6]) == 1
    other = torch.randint(8, (50, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert nestedness(other, chosen[1]) < 0.5
