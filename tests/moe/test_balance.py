"""Balance terms against loops, their minima, and where their gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from expert_problems import DEVICE, expert_layer, routing_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.moe.balance import (
    LoadWindow,
    expert_counts,
    expert_load,
    sum_over_ranks,
    switch_loss,
    top1_loss,
    update_selection_bias,
    z_loss,
)
from dotcbm.moe.statistics import max_vio

MASKS = [None, torch.tensor([True, False, True, True, False] * 6, device=DEVICE)]


def problem(seed: int, T: int = 30, E: int = 6, k: int = 2, counted_T=None):
    logit_TE = tokens(seed, T, E, dtype=torch.float64).requires_grad_()
    return logit_TE, routing_of(logit_TE, k, counted_T=counted_T)


def rows(routing) -> list[int]:
    return [t for t in range(len(routing.index_TK)) if routing.counted_T is None or routing.counted_T[t]]


@pytest.mark.parametrize("counted_T", MASKS)
def test_counts_by_hand(counted_T):
    _, routing = problem(0, counted_T=counted_T)
    expected = [0] * 6
    for t in rows(routing):
        for e in routing.index_TK[t].tolist():
            expected[e] += 1
    assert expert_counts(routing).tolist() == expected
    assert expert_counts(routing).dtype == torch.int64
    assert expert_load(routing).tolist() == [count / 2 for count in expected]


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(1, 6))
def test_counts_sum_to_tokens_times_k_and_loads_to_tokens(seed, T, k):
    _, routing = problem(seed, T, 6, k)
    assert expert_counts(routing).sum() == T * k
    assert expert_load(routing).sum().item() == pytest.approx(T)


@pytest.mark.parametrize("counted_T", MASKS)
def test_losses_against_loops(counted_T):
    logit_TE, routing = problem(1, counted_T=counted_T)
    z, counts, kept = logit_TE.tolist(), expert_counts(routing).tolist(), rows(routing)

    def softmax(row, tau=1.0):
        total = sum(math.exp(value / tau) for value in row)
        return [math.exp(value / tau) / total for value in row]

    p = [sum(softmax(z[t])[e] for t in kept) / len(kept) for e in range(6)]
    q = [sum(softmax(z[t], 0.1)[e] for t in kept) / len(kept) for e in range(6)]
    most = sum(max(softmax(z[t], 0.1)) for t in kept) / len(kept)
    assert switch_loss(routing).item() == pytest.approx(6 * sum(c / sum(counts) * x for c, x in zip(counts, p, strict=True)), rel=1e-6)
    assert top1_loss(routing).item() == pytest.approx(6 * sum(x * x for x in q) / most, rel=1e-6)
    assert z_loss(routing).item() == pytest.approx(sum(math.log(sum(map(math.exp, z[t]))) ** 2 for t in kept) / len(kept), rel=1e-6)


@pytest.mark.parametrize("counted_T", MASKS)
def test_the_gradient_flows_through_p_alone(counted_T):
    logit_TE, routing = problem(2, counted_T=counted_T)
    load_E = tokens(3, 6).abs().requires_grad_()
    (ours,) = torch.autograd.grad(switch_loss(routing, load_E), logit_TE)
    kept = rows(routing)
    constant_E = (load_E / load_E.sum()).detach().double()
    assert torch.autograd.grad(switch_loss(routing, load_E), load_E, allow_unused=True) == (None,)
    (theirs,) = torch.autograd.grad(6 * (logit_TE[kept].softmax(-1).mean(0) * constant_E).sum(), logit_TE)
    torch.testing.assert_close(ours, theirs)
    if counted_T is not None:
        assert ours[~counted_T].abs().max() == 0
        for loss in (top1_loss(routing), z_loss(routing)):
            (gradient,) = torch.autograd.grad(loss, logit_TE)
            assert gradient[~counted_T].abs().max() == 0
            assert gradient[counted_T].abs().max() > 0


@pytest.mark.parametrize("loss", [switch_loss, top1_loss, z_loss])
def test_against_finite_differences(loss):
    logit_TE, routing = problem(4, 5, 4, 1)
    if loss is top1_loss:
        assert torch.autograd.gradcheck(lambda z: top1_loss(routing_of(z, 1), tau=1.0), logit_TE)
    elif loss is z_loss:
        assert torch.autograd.gradcheck(lambda z: z_loss(routing_of(z, 1)), logit_TE)
    else:
        load_E = expert_load(routing)
        assert torch.autograd.gradcheck(lambda z: switch_loss(routing_of(z, 1), load_E), logit_TE)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_switch_loss_is_one_where_f_or_p_is_uniform_and_more_where_they_agree(seed, E):
    logit_TE = tokens(seed, 20, E, dtype=torch.float64)
    load_E = tokens(seed + 1, E).exp()
    p_E = logit_TE.softmax(-1).mean(0)
    assert switch_loss(routing_of(logit_TE, 1), torch.ones(E, device=DEVICE)).item() == pytest.approx(1, rel=1e-6)
    # The degenerate minimum: p is uniform, and f whatever it is.
    assert switch_loss(routing_of(torch.zeros_like(logit_TE), 1), load_E).item() == pytest.approx(1, rel=1e-5)
    assert switch_loss(routing_of(logit_TE, 1), p_E).item() >= 1 - 1e-6


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_top1_loss_between_its_bounds(seed, E):
    loss = top1_loss(routing_of(tokens(seed, 20, E, dtype=torch.float64), 1)).item()
    assert loss >= 1 - 1e-9
    # Sure of one expert each, evenly; all of the same expert; all undecided.
    sure = 100 * torch.eye(E, dtype=torch.float64, device=DEVICE)
    assert top1_loss(routing_of(sure, 1)).item() == pytest.approx(1)
    assert top1_loss(routing_of(sure[:1].expand(9, E), 1)).item() == pytest.approx(E)
    assert top1_loss(routing_of(torch.zeros(9, E, dtype=torch.float64, device=DEVICE), 1)).item() == pytest.approx(E)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_the_order_of_experts_and_tokens_does_not_matter(seed, k):
    logit_TE = tokens(seed, 15, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    experts, order = (torch.randperm(n, generator=generator).to(DEVICE) for n in (5, 15))
    here, there = routing_of(logit_TE, k), routing_of(logit_TE[order][:, experts], k)
    for loss in (switch_loss, top1_loss, z_loss):
        assert loss(here).item() == pytest.approx(loss(there).item(), rel=1e-6)
    assert torch.equal(expert_counts(here)[experts], expert_counts(there))


def test_an_expert_that_no_token_comes_near_is_called_by_the_switch_loss_alone():
    logit_TE = tokens(0, 50, 6)
    logit_TE[:, 2] -= 10
    logit_TE.requires_grad_()
    routing = routing_of(logit_TE, 1)
    (by_switch,) = torch.autograd.grad(switch_loss(routing), logit_TE)
    (by_top1,) = torch.autograd.grad(top1_loss(routing), logit_TE)
    assert (by_switch[:, 2] < 0).all()  # descent raises its logits
    assert by_top1[:, 2].abs().max() < 1e-12 * by_top1.abs().max()
    assert by_switch[:, 2].abs().max() > 1e-6 * by_switch.abs().max()


def test_top1_loss_does_balance_what_the_switch_loss_leaves():
    """Logits that differ little favour one expert always: p is uniform, f is not."""
    logit_TE = 1e-3 * tokens(5, 400, 8)
    logit_TE[:, 2] += 4e-3
    routing = routing_of(logit_TE, 1)
    assert max_vio(expert_counts(routing)) > 5
    assert switch_loss(routing).item() < 1.01
    assert top1_loss(routing).item() > 5


def test_no_counted_tokens_cost_nothing():
    for T, counted_T in ((0, None), (4, torch.zeros(4, dtype=torch.bool, device=DEVICE))):
        logit_TE, routing = problem(6, T, counted_T=counted_T)
        for loss in (switch_loss(routing), top1_loss(routing), z_loss(routing)):
            (gradient,) = torch.autograd.grad(loss, logit_TE)
            assert loss.item() == 0
            assert not gradient.numel() or gradient.abs().max() == 0


def test_autocast_leaves_them_in_full_precision():
    logit_TE = tokens(7, 30, 6)
    routing = routing_of(logit_TE, 2)
    for loss in (switch_loss, top1_loss, z_loss):
        exact = loss(routing)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert torch.equal(loss(routing), exact)


def test_micro_batches_add_up():
    window = LoadWindow()
    parts = [routing_of(tokens(seed, 10, 6), 2) for seed in range(3)]
    whole = routing_of(torch.cat([part.logit_TE for part in parts]), 2)
    for part in parts:
        total = window.add({"a": expert_load(part), "b": torch.ones(3, device=DEVICE)})
    assert torch.equal(total["a"], expert_load(whole))
    assert torch.equal(total["b"], torch.full((3,), 3.0, device=DEVICE))
    assert switch_loss(whole, total["a"]).item() == pytest.approx(switch_loss(whole).item())
    window.reset()
    assert torch.equal(window.add({"a": expert_load(parts[0])})["a"], expert_load(parts[0]))
    assert window.add({}) == {}


def test_draws_of_k_weigh_the_same():
    """With counts, a micro-batch at k = 6 would outvote five at k = 1."""
    window = LoadWindow()
    one, six = torch.zeros(10, 8), torch.zeros(10, 8)
    one[:, 7] = 9.0
    window.add({"a": expert_load(routing_of(one, 1))})
    total_E = window.add({"a": expert_load(routing_of(six, 6))})["a"]
    assert float(total_E.sum()) == pytest.approx(20)
    assert float(total_E[7]) >= 10


def test_the_bias_moves_against_the_count():
    bias_E = torch.zeros(4, device=DEVICE)
    update_selection_bias(bias_E, torch.tensor([10, 2, 4, 4], device=DEVICE), u=0.5)
    assert bias_E.tolist() == [-0.5, 0.5, 0.5, 0.5]
    update_selection_bias(bias_E, torch.tensor([5, 5, 5, 5], device=DEVICE), u=0.5)
    assert bias_E.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_the_bias_balances_a_router_that_prefers_some():
    layer, x = expert_layer(k=2, gate="sigmoid"), tokens(8, 500, 16)
    x[:, 0] += 3.0
    layer(x)
    before = max_vio(expert_counts(layer.routing))
    for _ in range(500):
        update_selection_bias(layer.router.selection_bias, expert_counts(layer.router(x, 2)), u=2e-3)
    layer(x)
    assert before > 0.5
    assert max_vio(expert_counts(layer.routing)) < 0.15


def test_one_process_sums_alone():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(sum_over_ranks(x), x)
    assert not sum_over_ranks(x).requires_grad


def test_a_temperature_that_is_none():
    with pytest.raises(ValueError, match=r"tau is 0; it must be positive \(the paper takes 0.1\)"):
        top1_loss(problem(0)[1], tau=0)
