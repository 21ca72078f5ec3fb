"""Scores, choices and gates; what gradient reaches the router; what changes with k."""

from __future__ import annotations

import warnings
from typing import get_args

import pytest
import torch
from expert_problems import DEVICE, distance, expert_layer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.moe.router import Gate, Normalize, Router

GATES, NORMALIZE = get_args(Gate), get_args(Normalize)
PROMISING = [(gate, normalize) for gate in GATES for normalize in NORMALIZE if (gate, normalize) != ("softmax_kept", "never")]


def router(gate="softmax", normalize="detached", *, E=6, D=5, **settings) -> Router:
    made = Router(D, E, gate=gate, normalize=normalize, **settings).to(DEVICE)
    made.weight.data = tokens(1, E, D)
    return made


def expected_gates(logits: list[float], gate: str, normalize: str, k: int) -> dict[int, float]:
    """By hand, for one token: expert to gate."""
    z = torch.tensor(logits, dtype=torch.float64)
    score = z.sigmoid() if gate == "sigmoid" else z.exp() / z.exp().sum()
    kept = sorted(range(len(z)), key=lambda i: -float(score[i]))[:k]
    total = float(score[kept].sum())
    divide = normalize == "detached" or (normalize == "always" and k > 1) or (normalize == "never" and gate == "softmax_kept")
    return {i: float(score[i]) / (total if divide else 1) for i in kept}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("gate", GATES)
def test_against_gates_by_hand(gate, normalize, k):
    made = Router(5, 5, gate=gate, normalize=normalize).eval()
    made.weight.data = torch.eye(5)
    logit_TE = tokens(2, 7, 5).cpu()
    routing = made(logit_TE, k)
    assert torch.equal(routing.logit_TE, logit_TE)
    for t in range(7):
        expected = expected_gates(logit_TE[t].tolist(), gate, normalize, k)
        assert routing.index_TK[t].tolist() == list(expected)  # the highest score first
        assert routing.gate_TK[t].tolist() == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("gate", GATES)
def test_the_gradient_with_the_sum_held(gate, k):
    made = router(gate, "detached").double()
    x = tokens(3, 9, 5, dtype=torch.float64)
    weight = tokens(4, 9, k, dtype=torch.float64)
    routing = made(x, k)
    (ours,) = torch.autograd.grad((routing.gate_TK * weight).sum(), made.weight)
    logit = x @ made.weight.T
    score = (logit.sigmoid() if gate == "sigmoid" else logit.softmax(-1)).gather(1, routing.index_TK)
    held = score / score.sum(1, keepdim=True).detach()
    (theirs,) = torch.autograd.grad((held * weight).sum(), made.weight)
    torch.testing.assert_close(routing.gate_TK, held)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize(("gate", "normalize"), PROMISING)
def test_the_task_reaches_the_router(gate, normalize, k):
    layer = expert_layer(num_experts=6, k=k, gate=gate, normalize=normalize)
    layer(tokens(5, 12, 16)).square().sum().backward()
    gradient = layer.router.weight.grad
    assert gradient.norm() > 1e-3
    assert gradient.isfinite().all()


def test_a_constant_gate_is_said_once():
    layer = expert_layer(k=1, gate="softmax_kept", normalize="never")
    with pytest.warns(UserWarning, match=r"constantly 1 at k = 1.*choose normalize"):
        layer(tokens(5, 12, 16)).square().sum().backward()
    assert layer.router.weight.grad.abs().max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(tokens(5, 12, 16))


@pytest.mark.parametrize("gate", GATES)
def test_the_scale_does_not_jump_between_k(gate):
    x = tokens(6, 50, 5)
    sums = {
        normalize: {k: router(gate, normalize)(x, k).gate_TK.sum(1).detach() for k in (1, 2, 3, 6)} for normalize in ("detached", "always")
    }
    for k in (1, 2, 3, 6):
        torch.testing.assert_close(sums["detached"][k], torch.ones_like(sums["detached"][k]))
        if k > 1:
            torch.testing.assert_close(sums["always"][k], torch.ones_like(sums["always"][k]))
    # As documented: the raw score stays at k = 1.
    assert sums["always"][1].max() < 1
    torch.testing.assert_close(sums["always"][1], router(gate)(x, 1).score_TE.amax(1).detach())


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(GATES), st.sampled_from(NORMALIZE), st.integers(1, 6))
def test_permuting_experts_permutes_choices_and_lower_k_are_nested(seed, gate, normalize, k):
    made, x = router(gate, normalize).eval(), tokens(seed, 11, 5)
    here = made(x, k)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    made.weight.data = made.weight.data[order]
    there = made(x, k)
    assert torch.equal(order[there.index_TK], here.index_TK)
    torch.testing.assert_close(there.gate_TK, here.gate_TK)
    assert all(len(set(row)) == k for row in here.index_TK.tolist())
    assert torch.equal(made(x, 6).index_TK[:, :k], there.index_TK)


def test_the_bias_enters_the_choice_alone():
    made, x = router("sigmoid", "never"), tokens(7, 20, 5)
    made.selection_bias[3] = 10.0
    made.selection_bias[0] = -10.0
    routing = made(x, 2)
    assert (routing.index_TK[:, 0] == 3).all()
    assert (routing.index_TK != 0).all()
    assert torch.equal(routing.gate_TK, routing.score_TE.gather(1, routing.index_TK))
    assert "selection_bias" in made.state_dict()


def test_scale_multiplies_the_gates():
    made, x = router("sigmoid", "never"), tokens(7, 20, 5)
    before = made(x, 2).gate_TK
    made.scale.fill_(0.5)
    assert torch.equal(made(x, 2).gate_TK, before / 2)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [100.0, -100.0, 1e4])
def test_extreme_logits_leave_everything_finite(gate, size):
    for normalize in NORMALIZE:
        made = router(gate, normalize)
        routing = made(size * tokens(8, 10, 5).abs(), 3)
        (routing.gate_TK.sum() + routing.score_TE.sum()).backward()
        assert routing.gate_TK.isfinite().all()
        assert made.weight.grad.isfinite().all()
        if normalize == "detached":
            torch.testing.assert_close(routing.gate_TK.sum(1), torch.ones(10, device=DEVICE))


def test_half_precision_routes_in_float32():
    made, x = router(), tokens(9, 200, 5).bfloat16()
    expected = made(x.float(), 2)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        under = made(x, 2)
    made.to(torch.bfloat16)
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float32}
    for routing in (under, made(x, 2), made.half()(x, 2)):
        assert torch.equal(routing.logit_TE, expected.logit_TE)
        assert torch.equal(routing.gate_TK, expected.gate_TK)
        assert routing.gate_TK.dtype == torch.float32


def test_jitter_is_for_training():
    made, x = router(jitter=0.3), tokens(10, 30, 5)
    assert not torch.equal(made(x, 2).logit_TE, made(x, 2).logit_TE)
    assert torch.equal(made.eval()(x, 2).logit_TE, router()(x, 2).logit_TE)
    made.train()
    product = (made.weight.double()[:, None] * x.double()).abs().sum(-1).T
    assert ((made(x, 2).logit_TE - x @ made.weight.T).abs() <= 0.3 * product + 1e-5).all()


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"gate is 'tanh'; choose one of"):
        Router(4, 4, gate="tanh")  # pyright: ignore
    with pytest.raises(ValueError, match=r"normalize is 'yes'"):
        Router(4, 4, normalize="yes")  # pyright: ignore
    with pytest.raises(ValueError, match=r"jitter is 1\.5; it must be in \[0, 1\)"):
        Router(4, 4, jitter=1.5)
    with pytest.raises(ValueError, match="num_experts 0"):
        Router(4, 0)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k is {k}, with 6 experts; k must be between 1 and 6"):
            router()(tokens(0, 3, 5), k)


def test_no_tokens():
    routing = router()(tokens(0, 0, 5), 2)
    assert routing.index_TK.shape == routing.gate_TK.shape == (0, 2)
    assert distance(routing.logit_TE.sum()[None], torch.zeros(1, device=DEVICE)) == 0
