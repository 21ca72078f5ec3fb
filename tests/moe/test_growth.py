"""Growth of stacks of expert layers: exact where it should be, and where it is not, as the plan says."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dotcbm.moe.growth import (
    Origin,
    deepen,
    depth_order,
    grow_moments,
    grow_tensors,
    reindex,
    unchanged,
    widen,
    widen_gate,
)
from dotcbm.moe.layer import MoELayer

GATES, NORMALIZE = ("softmax", "softmax_kept", "sigmoid"), ("never", "always", "detached")


class Stack(nn.Module):
    """Residual layers, a dense one with a gain before each layer of experts."""

    def __init__(self, k=(2, 2), num_experts=8, gate="softmax", normalize="detached", shared_hidden=0, depth=2) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 16))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mix": nn.Linear(16, 16),
                    "norm": nn.LayerNorm(16),
                    "mlp": MoELayer(16, 32, num_experts, k[i], gate=gate, normalize=normalize, shared_hidden=shared_hidden),
                }
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place
        for layer in self.layers:
            x = x + layer["mix"](x)
            x = x + layer["mlp"](layer["norm"](x))
        return x


OUTPUTS = ("mix.", "mlp.experts.down_", "mlp.shared.fc2.")


def stack(**settings) -> Stack:
    """With large random weights, selection biases that matter and a scale of its own."""
    torch.manual_seed(0)
    made = Stack(**settings).eval()
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith("router.scale"):
                value.fill_(1.5)
            elif name.endswith("selection_bias"):
                value.normal_(std=0.1)
            else:
                value.normal_(std=0.3)
    return made


def tokens() -> Tensor:
    return torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(1))


def widened(small: Stack, gate, *, factor=2, alpha=0.0, **settings) -> Stack:
    state = small.state_dict()
    layers = [f"layers.{i}.mlp." for i in range(len(small.layers))]
    plan = widen(unchanged(state), layers, factor=factor, scale=gate.scale, bias=gate.bias)
    experts = factor * small.layers[0]["mlp"].num_experts
    large = Stack(gate.k, experts, gate.gate, gate.normalize, depth=len(small.layers), **settings).eval()
    large.load_state_dict(grow_tensors(state, plan, alpha=alpha, seed=3))
    return large


def deepened(small: Stack, mode, **settings) -> Stack:
    state, order = small.state_dict(), depth_order(len(small.layers), mode=mode)
    plan = deepen(unchanged(state), order, mode=mode, prefix="layers.", outputs=OUTPUTS)
    k = reindex([layer["mlp"].k for layer in small.layers], order)
    large = Stack(k, depth=len(order), **settings).eval()
    large.load_state_dict(grow_tensors(state, plan))
    return large


@torch.no_grad()
def difference(small: nn.Module, large: nn.Module) -> float:
    before = small(tokens())
    return float((large(tokens()) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(("gate", "normalize", "k", "factor"), list(product(GATES, NORMALIZE, (1, 2, 3), (2, 3))))
def test_more_experts_give_the_same_without_noise(gate, normalize, k, factor):
    small = stack(gate=gate, normalize=normalize, k=(k, k), shared_hidden=8)
    gate = widen_gate(gate, normalize, (k, k), factor=factor)
    assert gate.k == (factor * k,) * 2
    assert difference(small, widened(small, gate, factor=factor, shared_hidden=8)) < 1e-5


@pytest.mark.parametrize(("gate", "normalize"), list(product(GATES, NORMALIZE)))
def test_layers_that_do_nothing_yet_change_nothing(gate, normalize):
    small = stack(gate=gate, normalize=normalize, k=(1, 3), shared_hidden=8)
    large = deepened(small, "zero", gate=gate, normalize=normalize, shared_hidden=8)
    assert len(large.layers) == 4
    assert difference(small, large) < 1e-5
    large(tokens()).square().sum().backward()
    for place in (1, 3):  # and yet they learn
        assert large.layers[place]["mlp"].experts.down_EHD.grad.abs().sum() > 0


def test_interposed_and_stacked_layers_are_those_that_they_come_from():
    small = stack(k=(1, 3))
    for mode, order in (("interpose", (0, 0, 1, 1)), ("stack", (0, 1, 0, 1))):
        large = deepened(small, mode)
        x = tokens() + small.place
        for layer in order:
            one = small.layers[layer]
            x = x + one["mix"](x)
            x = x + one["mlp"](one["norm"](x))
        assert torch.allclose(large(tokens()), x, atol=1e-4, rtol=1e-5)
        assert torch.equal(large.place, small.place)  # copied once, not per layer
        assert difference(small, large) > 0.1


def test_what_growth_changes_when_k_stays():
    small = stack(k=(2, 2))
    with pytest.warns(UserWarning, match="40 to 90 %"):
        gate = widen_gate("softmax", "detached", (2, 2), grow_k=False)
    assert gate.k == (2, 2)
    assert difference(small, widened(small, gate)) > 0.1


def test_raw_sigmoid_gates_would_double_the_output():
    gate = widen_gate("sigmoid", "never", (2, 2))
    assert gate.scale == 0.5
    small = stack(gate="sigmoid", normalize="never")
    unscaled = widened(small, gate)
    for layer in unscaled.layers:
        layer["mlp"].router.scale.mul_(2)
    x_TD = tokens().view(-1, 16)
    ratio = unscaled.layers[0]["mlp"](x_TD) / small.layers[0]["mlp"](x_TD)
    assert torch.allclose(ratio, torch.full_like(ratio, 2.0), rtol=1e-3)


def test_a_selection_bias_keeps_its_weight_against_scores():
    """Softmax scores over twice as many experts are half as large; without the same of the bias others would be chosen."""
    small = stack(k=(2, 2))
    gate = widen_gate("softmax", "detached", (2, 2))
    large = widened(small, gate)
    assert difference(small, large) < 1e-5
    for layer in large.layers:
        layer["mlp"].router.selection_bias.mul_(2)
    assert difference(small, large) > 1e-2


def test_noise_is_on_the_copies_alone_and_of_the_right_size():
    small = stack(num_experts=64, depth=1, k=(2,))
    large = widened(small, widen_gate("softmax", "detached", (2,)), alpha=0.01)
    for name, before in small.state_dict().items():
        after = large.state_dict()[name]
        if "mlp.experts" in name or name.endswith("router.weight"):
            assert torch.equal(after[:64], before)
            assert float((after[64:] - before).std()) == pytest.approx(0.01 * float(before.std()), rel=0.1)
        elif name.endswith("selection_bias"):
            assert torch.equal(after, torch.cat([before, before]) / 2)
        else:
            assert torch.equal(after, before)


def test_noise_depends_on_the_seed_and_the_name():
    tensors = {"a.router.weight": torch.randn(4, 3), "b.router.weight": torch.randn(4, 3)}
    plan = widen(unchanged(tensors), ["a.", "b."])
    first, again, other = (grow_tensors(tensors, plan, alpha=1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first["a.router.weight"], again["a.router.weight"])
    assert not torch.equal(first["a.router.weight"], other["a.router.weight"])
    noise = {name: value[4:] / tensors[name].std() - tensors[name] / tensors[name].std() for name, value in first.items()}
    assert not torch.allclose(noise["a.router.weight"], noise["b.router.weight"])


def test_growing_in_both_ways_at_once_is_growing_one_after_the_other():
    small = stack(k=(1, 3), gate="sigmoid", normalize="never")
    gate = widen_gate("sigmoid", "never", reindex((1, 3), (0, 0, 1, 1)))
    once = widened(deepened(small, "zero", gate="sigmoid", normalize="never"), gate)
    state = small.state_dict()
    plan = deepen(unchanged(state), (0, 0, 1, 1), mode="zero", prefix="layers.", outputs=OUTPUTS)
    plan = widen(plan, [f"layers.{i}.mlp." for i in range(4)], scale=gate.scale, bias=gate.bias)
    for name, value in grow_tensors(state, plan).items():
        assert torch.equal(value, once.state_dict()[name]), name
    assert difference(small, once) < 1e-5


@given(depth=st.integers(1, 12), mode=st.sampled_from(["interpose", "stack", "zero"]), first=st.integers(0, 12), last=st.integers(0, 12))
def test_orders_of_layers(depth, mode, first, last):
    if first + last >= depth:
        with pytest.raises(ValueError, match="leave one at least"):
            depth_order(depth, mode=mode, keep_first=first, keep_last=last)
        return
    order = depth_order(depth, mode=mode, keep_first=first, keep_last=last)
    counts = [order.count(layer) for layer in range(depth)]
    assert counts == [1] * first + [2] * (depth - first - last) + [1] * last
    assert order[:first] == tuple(range(first))
    assert order[len(order) - last :] == tuple(range(depth - last, depth))
    assert reindex(list(range(depth)), order) == list(order)
    if mode != "stack":
        assert list(order) == sorted(order)


def test_moments_go_with_their_weights():
    small = stack(k=(2, 2))
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    small.train()(tokens()).square().mean().backward()
    optimizer.step()
    names = [name for name, _ in small.named_parameters()]
    moments = {name: optimizer.state[parameter] for name, parameter in small.named_parameters()}
    order = depth_order(2, mode="zero")
    plan = deepen(unchanged(names), order, mode="zero", prefix="layers.", outputs=OUTPUTS)
    plan = widen(plan, [f"layers.{i}.mlp." for i in range(4)], scale=0.5)
    grown = grow_moments(moments, plan)
    assert set(grown) == set(plan)
    for place, layer in enumerate(order):
        for key in ("exp_avg", "exp_avg_sq"):
            before = moments[f"layers.{layer}.mlp.experts.down_EHD"][key]
            assert torch.equal(grown[f"layers.{place}.mlp.experts.down_EHD"][key], torch.cat([before, before]))  # not zeroed
            assert torch.equal(grown[f"layers.{place}.mix.weight"][key], moments[f"layers.{layer}.mix.weight"][key])
        assert grown[f"layers.{place}.mix.weight"]["step"] == 1
    assert grow_moments({}, plan) == {}


def test_a_plan_can_be_read():
    plan = deepen(
        unchanged(["layers.0.mlp.router.weight", "layers.0.mix.weight", "place"]), (0, 0), mode="zero", prefix="layers.", outputs=OUTPUTS
    )
    plan = widen(plan, ["layers.1.mlp."])
    told = json.loads(json.dumps({name: origin.to_dict() for name, origin in plan.items()}))
    assert told["place"] == {"from": "place"}
    assert told["layers.1.mix.weight"] == {"from": "layers.0.mix.weight", "zeroed": True}
    assert told["layers.1.mlp.router.weight"]["rows"] == "repeated 2 times"
    assert Origin("a", factor=0.5).to_dict() == {"from": "a", "multiplied_by": 0.5}


def test_what_cannot_grow_is_named():
    with pytest.raises(ValueError, match="depth mode is 'twice'"):
        depth_order(2, mode="twice")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no layer layers\.1"):
        deepen(unchanged(["layers.0.a"]), (0, 1), mode="stack", prefix="layers.", outputs=())
    with pytest.raises(ValueError, match="cannot start as the identity"):
        deepen(unchanged(["layers.0.a"]), (0, 0), mode="zero", prefix="layers.", outputs=("b",))
    with pytest.raises(ValueError, match=r"no experts at 'layers\.0\.'"):
        widen(unchanged(["layers.0.a"]), ["layers.0."])
    with pytest.raises(ValueError, match="width is 1"):
        widen_gate("softmax", "detached", (1,), factor=1)
    with pytest.raises(ValueError, match="one k for all layers"):
        widen_gate("sigmoid", "always", (1, 2))
    with pytest.raises(ValueError, match="alpha is -1"):
        grow_tensors({}, {}, alpha=-1)
    with pytest.raises(ValueError, match="has no b"):
        grow_tensors({"a": torch.zeros(1)}, unchanged(["b"]))
    with pytest.raises(ValueError, match="3 entries, and the small model 2 layers"):
        reindex([1, 2, 3], (0, 1, 1))
