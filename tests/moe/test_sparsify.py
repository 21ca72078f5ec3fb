"""The schedule of active experts: values by hand, properties, errors before the first step, no jump of the output."""

from __future__ import annotations

import pytest
import torch
from expert_problems import distance, expert_layer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dotcbm.moe.sparsify import Sparsification

PUBLISHED = (8, 8, 6, 6, 4, 4, 2, 2)


def test_one_switch_by_hand():
    schedule = Sparsification(start=PUBLISHED, target=1, begin=100)
    for step in (0, 50, 99):
        assert tuple(schedule.k(layer, step) for layer in range(8)) == PUBLISHED
    for step in (100, 101, 10**6):
        assert [schedule.k(layer, step) for layer in range(8)] == [1] * 8


def test_gradual_by_hand():
    schedule = Sparsification(start=(5, 3, 1), target=1, begin=10, end=18)
    assert [schedule.k(0, step) for step in range(9, 20)] == [5, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [schedule.k(1, step) for step in range(9, 20)] == [3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1]
    assert {schedule.k(2, step) for step in range(30)} == {1}


@settings(max_examples=100)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.integers(1, 2), st.integers(0, 30), st.none() | st.integers(0, 30))
def test_k_only_falls_from_start_to_target(start, target, begin, length):
    schedule = Sparsification(tuple(start), target, begin, None if length is None else begin + length)
    for layer, first in enumerate(start):
        ks = [schedule.k(layer, step) for step in range(70)]
        assert all(k == first for k in ks[:begin])
        assert all(k == target for k in ks[schedule.last_change :])
        assert ks == sorted(ks, reverse=True)
        if length is not None and length >= first - target:
            assert all(before - after <= 1 for before, after in zip(ks[begin:], ks[begin + 1 :], strict=False))


def test_it_sets_the_layers():
    model = nn.Sequential(expert_layer(), nn.GELU(), expert_layer())
    schedule = Sparsification(start=(8, 4), target=2, begin=3)
    schedule.check(model, max_steps=4)
    schedule.apply(model, 2)
    assert (model[0].k, model[2].k) == (8, 4)
    schedule.apply(model, 3)
    assert (model[0].k, model[2].k) == (2, 2)


def test_errors_come_before_the_first_step():
    model = nn.Sequential(expert_layer(), expert_layer())
    with pytest.raises(ValueError, match="start has 3 entries, and the model 2 expert layers"):
        Sparsification(start=(2, 2, 2), begin=1).check(model, max_steps=10)
    with pytest.raises(ValueError, match="start asks for 9 active experts in 1, which has 8"):
        Sparsification(start=(8, 9), begin=1).check(model, max_steps=10)
    for settings_ in ({"begin": 10}, {"begin": 2, "end": 10}):
        with pytest.raises(ValueError, match=r"last change of k is at step 10, and training ends after 10 steps \(0 to 9\)"):
            Sparsification(start=(8, 8), **settings_).check(model, max_steps=10)
    with pytest.raises(ValueError, match="no expert layers"):
        Sparsification(start=(2,)).check(nn.GELU(), max_steps=10)
    with pytest.raises(ValueError, match="start is empty"):
        Sparsification(start=())
    with pytest.raises(ValueError, match=r"start is \[4, 1\] and target 2"):
        Sparsification(start=(4, 1), target=2)
    with pytest.raises(ValueError, match="target 0"):
        Sparsification(start=(4,), target=0)
    with pytest.raises(ValueError, match="begin is -1"):
        Sparsification(start=(4,), begin=-1)
    with pytest.raises(ValueError, match="begin is 5 and end 4"):
        Sparsification(start=(4,), begin=5, end=4)


@pytest.mark.parametrize("gate", ["softmax", "softmax_kept", "sigmoid"])
def test_the_output_scale_does_not_jump(gate):
    """Experts that all compute the same show the scale alone: with detached gates it is the same at every k; raw, it is not."""
    x, outputs = tokens(0, 50, 16), {}
    for normalize in ("detached", "never"):
        layer = expert_layer(k=8, gate=gate, normalize=normalize).eval()
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data[:1].expand_as(parameter).clone()
        for step in (0, 1):
            Sparsification(start=(8,), target=1, begin=1).apply(layer, step)
            outputs[normalize, step] = layer(x).detach()
    assert distance(outputs["detached", 0], outputs["detached", 1]) < 1e-5
    if gate != "softmax_kept":
        assert distance(outputs["never", 0], outputs["never", 1]) > 0.3


def test_the_router_learns_after_the_switch():
    layer = expert_layer(k=8)
    Sparsification(start=(8,), target=1, begin=1).apply(layer, 1)
    layer(tokens(1, 50, 16)).square().sum().backward()
    assert layer.k == 1
    assert torch.linalg.vector_norm(layer.router.weight.grad) > 1e-3
