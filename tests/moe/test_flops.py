"""PyTorch's counter sees grouped products, and the formulas say what it counts."""

from __future__ import annotations

import pytest
import torch
from expert_problems import DEVICE, expert_layer, tokens
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dotcbm.moe import flops


@pytest.mark.parametrize("shared_hidden", [0, 20])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_counted_as_by_formula(backend, k, shared_hidden):
    layer, x = expert_layer(k=k, backend=backend, shared_hidden=shared_hidden), tokens(0, 3, 50, 16).requires_grad_()
    expected = flops.layer_flops(150, width=16, hidden=24, num_experts=8, k=k, shared_hidden=shared_hidden)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert forward.get_flop_counts()["MoELayer.experts"]
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # On a GPU gradients of biases are sums by a product with four columns of ones: much here, nothing where layers are wide.
    sums = 2 * 150 * k * 4 * (16 + 24) if backend == "grouped" and DEVICE.type == "cuda" else 0
    assert forward.get_total_flops() + backward.get_total_flops() - sums == pytest.approx(3 * expected, rel=0.01)


def test_counted_without_computing():
    """As Lightning's measure_flops does it."""
    layer, x = expert_layer(k=2, shared_hidden=20).to("meta"), torch.empty(3, 50, 16, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == pytest.approx(
        3 * flops.layer_flops(150, width=16, hidden=24, num_experts=8, k=2, shared_hidden=20), rel=0.01
    )


def test_by_hand():
    # Two products of 10 x 4 x 6 a token's expert, each multiplication one and addition one.
    assert flops.experts_flops(5, width=4, hidden=6, k=3) == 2 * (5 * 3) * (4 * 6 + 6 * 4)
    assert flops.layer_flops(5, width=4, hidden=6, num_experts=7, k=3, shared_hidden=2) == 1440 + 2 * 5 * 4 * 7 + 2 * 5 * (4 * 2 + 2 * 4)


def test_each_form_of_a_grouped_product():
    offs = torch.tensor([3, 3, 8], dtype=torch.int32)
    a, b, w = torch.randn(8, 4), torch.randn(8, 12), torch.randn(3, 4, 12)
    with FlopCounterMode(display=False) as counter:
        F.grouped_mm(a, w, offs=offs)
    assert counter.get_total_flops() == 2 * 8 * 4 * 12
    assert flops.grouped_flops(a.T.shape, b.shape, offs.shape) == 2 * 8 * 4 * 12  # type: ignore[arg-type]
    assert flops.grouped_flops(torch.Size([3, 4, 12]), torch.Size([12, 8]), offs.shape) == 2 * 4 * 12 * 8
    assert flops.grouped_flops(torch.Size([3, 5, 4]), torch.Size([3, 4, 12])) == 3 * 2 * 5 * 4 * 12


def test_registering_again_changes_nothing():
    flops.register()
    flops.register()
