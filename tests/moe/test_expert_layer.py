"""The layer in a block's place: shapes, shared expert, tokens left out of the counts, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from expert_problems import DEVICE, distance, expert_layer, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from dotcbm.moe.layer import MoELayer, moe_layers


def test_router_and_experts_together():
    layer, x = expert_layer(k=3), tokens(0, 4, 7, 16)
    y = layer(x)
    assert y.shape == x.shape
    routing = layer.routing
    expected = torch.zeros(28, 16, device=DEVICE)
    for t, token in enumerate(x.flatten(0, 1)):
        for e, gate in zip(routing.index_TK[t], routing.gate_TK[t], strict=True):
            hidden = nn.functional.gelu(token @ layer.experts.up_EDH[e] + layer.experts.up_bias_EH[e])
            expected[t] += gate * (hidden @ layer.experts.down_EHD[e] + layer.experts.down_bias_ED[e])
    assert distance(y.flatten(0, 1), expected) < 1e-5
    assert torch.equal(layer(x.flatten(0, 1)), y.flatten(0, 1))


def test_a_shared_expert_sees_every_token():
    layer, x = expert_layer(shared_hidden=20), tokens(1, 4, 7, 16)
    together = layer(x)
    shared, layer.shared = layer.shared, None
    torch.testing.assert_close(together, layer(x) + shared(x))
    assert shared.fc1.weight.shape == (20, 16)
    assert expert_layer(shared_hidden=20, bias=False).shared.fc1.bias is None


def test_prefix_tokens_are_routed_and_not_counted():
    x = tokens(2, 3, 5, 16)
    layer = expert_layer(count_prefix=2)
    assert distance(layer(x), expert_layer()(x)) == 0
    assert layer.routing.counted_T.tolist() == [False, False, True, True, True] * 3
    with pytest.raises(ValueError, match=r"x has shape \(15, 16\); with count_prefix=2 it must be \(B, N, D\)"):
        layer(x.flatten(0, 1))


def test_k_changes_and_is_checked():
    layer, x = expert_layer(k=2), tokens(3, 10, 16)
    layer.set_k(5)
    layer(x)
    assert layer.routing.index_TK.shape == (10, 5)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k is {k}, with 8 experts; k must be between 1 and 8"):
            layer.set_k(k)
        with pytest.raises(ValueError, match=f"k is {k}"):
            MoELayer(16, 8, 8, k)
    assert layer.k == 5
    with pytest.raises(ValueError, match="neither can be negative"):
        MoELayer(16, 8, 8, 1, count_prefix=-1)


def test_copies_leave_the_last_routing_behind():
    layer, x = expert_layer(), tokens(4, 10, 16)
    y = layer(x)
    for copied in (copy.deepcopy(layer), torch.load(_saved(layer), weights_only=False)):
        assert copied.routing is None
        assert torch.equal(copied(x), y)
    assert layer.routing is not None
    assert set(layer.state_dict()) == {
        *(f"router.{name}" for name in ("weight", "selection_bias", "scale")),
        *(f"experts.{name}" for name in ("up_EDH", "up_bias_EH", "down_EHD", "down_bias_ED")),
    }


def _saved(layer: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_no_pictures_and_half_precision():
    layer = expert_layer(shared_hidden=8)
    assert layer(tokens(0, 0, 5, 16)).shape == (0, 5, 16)
    x = tokens(5, 2, 5, 16)
    y = layer(x).detach()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        under = layer(x)
    assert under.dtype == torch.bfloat16
    assert distance(under.float(), y) < 0.03
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_it_learns():
    layer, x = expert_layer(k=1, num_experts=4), tokens(6, 64, 16)
    target = torch.where(x[:, :1] > 0, x.roll(1, 1), -x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_layers_are_found_in_order():
    model = nn.Sequential(nn.Linear(16, 16), expert_layer(), nn.Sequential(nn.GELU(), expert_layer(k=1)))
    assert {name: layer.k for name, layer in moe_layers(model).items()} == {"1": 2, "2.1": 1}
    with pytest.raises(ValueError, match="Linear has no expert layers"):
        moe_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    layer, x = expert_layer().to(dtype), tokens(7, 3, 5, 16).to(dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=dtype == torch.bfloat16)
    outputs = [each(x) for each in (layer, compiled)]
    gradients = [torch.autograd.grad(y.float().square().sum(), list(layer.parameters())) for y in outputs]
    for ours, theirs in zip((outputs[1], *gradients[1]), (outputs[0], *gradients[0]), strict=True):
        assert distance(ours.float(), theirs.float()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_exported():
    layer = expert_layer().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (tokens(8, 3, 5, 16),), dynamic_shapes=({0: batch},))
    x = tokens(9, 6, 5, 16)
    assert distance(program.module()(x), layer(x)) < 1e-5


def test_recomputed_in_backward():
    layer, x = expert_layer(), tokens(10, 3, 5, 16)
    gradients = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(forward(x).square().sum(), list(layer.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
