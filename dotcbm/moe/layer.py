"""A sparse expert layer in the place of a transformer block's MLP.

B pictures, N tokens of each, T = B N tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from dotcbm.moe.experts import Backend, Experts
from dotcbm.moe.router import Gate, Normalize, Router, Routing, check_k

__all__ = ["MoELayer", "moe_layers"]


class MoELayer(nn.Module):
    """Each token through the K of E experts that its router chooses, and through a shared expert if there is one.

    Example:
        >>> layer = MoELayer(16, 32, 8, 2)
        >>> layer(torch.zeros(4, 10, 16)).shape
        torch.Size([4, 10, 16])
        >>> layer.routing.index_TK.shape
        torch.Size([40, 2])
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        gate: Gate = "softmax",
        normalize: Normalize = "detached",
        jitter: float = 0.0,
        shared_hidden: int = 0,
        bias: bool = True,
        backend: Backend = "auto",
        count_prefix: int = 0,
    ) -> None:
        """Args:
        width: D.
        hidden: Hidden width of each expert.
        num_experts: E.
        k: Experts per token, in [1, E]; `set_k` changes it.
        gate: See `dotcbm.moe.router`.
        normalize: See there.
        jitter: See there.
        shared_hidden: Hidden width of an expert that every token goes through, with gate 1; 0 for none.
        bias: Whether the experts have biases.
        backend: See `dotcbm.moe.experts`.
        count_prefix: The first tokens of each picture, >= 0 (class token, registers), that balance terms and statistics leave out.

        Raises:
            ValueError: A setting out of its range.
        """
        super().__init__()
        if count_prefix < 0 or shared_hidden < 0:
            raise ValueError(f"count_prefix is {count_prefix} and shared_hidden {shared_hidden}; neither can be negative")
        check_k(k, num_experts)
        self.router = Router(width, num_experts, gate=gate, normalize=normalize, jitter=jitter)
        self.experts = Experts(width, hidden, num_experts, bias=bias)
        self.shared = Mlp(width, shared_hidden, bias=bias) if shared_hidden else None
        self.k = k
        self.backend: Backend = backend
        self.count_prefix = count_prefix
        self.routing: Routing | None = None
        """Of the last forward, with its graph: for balance terms and statistics."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    def set_k(self, k: int) -> None:
        """Take `k` experts per token from now on.

        Raises:
            ValueError: k is not in [1, E].
        """
        check_k(k, self.num_experts)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D); (B, N, D) where `count_prefix` leaves tokens out.

        Raises:
            ValueError: x is not (B, N, D) and `count_prefix` is set.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, self.k)
        if self.count_prefix:
            routing = replace(routing, counted_T=self._counted(x))
        self.routing = routing
        y = self.experts(x_TD, routing.index_TK, routing.gate_TK, self.backend).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def _counted(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; with count_prefix={self.count_prefix} it must be (B, N, D)")
        B, N, _ = x.shape
        return (torch.arange(N, device=x.device) >= self.count_prefix).expand(B, N).reshape(-1)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are of the layer, not of what it last did, whose graph cannot be copied.
        return {**self.__dict__, "routing": None}

    def extra_repr(self) -> str:
        return f"k={self.k}, backend={self.backend}, count_prefix={self.count_prefix}"


def moe_layers(module: nn.Module) -> dict[str, MoELayer]:
    """The expert layers within a module, by name and in their order there, which is the order of per-layer lists of k.

    Raises:
        ValueError: There is none.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, MoELayer)}
    if not found:
        raise ValueError(f"{type(module).__name__} has no expert layers; give a model with some, such as a ViT-MoE")
    return found
