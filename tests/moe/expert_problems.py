"""Layers and tokens for the tests of sparse experts."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from dotcbm.moe.layer import MoELayer
from dotcbm.moe.router import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def expert_layer(seed: int = 0, *, width: int = 16, hidden: int = 24, num_experts: int = 8, k: int = 2, **settings) -> MoELayer:
    """A layer whose weights are large enough for routing and outputs to differ between tokens."""
    torch.manual_seed(seed)
    layer = MoELayer(width, hidden, num_experts, k, **settings)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "bias" not in name else 0.1)
    return layer.to(DEVICE)


def tokens(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def routing_of(logit_TE: Tensor, k: int, *, counted_T: Tensor | None = None) -> Routing:
    """What a softmax router with these logits would decide."""
    score_TE = logit_TE.softmax(-1)
    gate_TK, index_TK = score_TE.topk(k, dim=-1)
    return Routing(index_TK, gate_TK, logit_TE, score_TE, counted_T)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def triton_runs() -> bool:
    """On a GPU, or in an interpreter that works: Triton before 3.7 makes numbers of arrays, which NumPy refuses from 2.4 on."""

    def number(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version(package).split(".")[:2])

    if find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or number("triton") >= (3, 7) or number("numpy") < (2, 4)
