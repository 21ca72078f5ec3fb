"""Exporting and compiling are told apart, on every torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotcbm.tracing import exporting


class Tells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if exporting() else x


def test_exporting_and_compiling_are_told_apart():
    x = torch.zeros(2)
    assert not exporting()
    assert Tells()(x)[0] == 0
    assert torch.compile(Tells(), backend="eager", fullgraph=True)(x)[0] == 0
    assert torch.export.export(Tells(), (x,), strict=False).module()(x)[0] == 1
