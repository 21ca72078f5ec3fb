"""Adapters: from an encoder's space into the one that patches and concepts share."""

from __future__ import annotations

from typing import Literal

from torch import nn

__all__ = ["AdapterKind", "make_adapter"]

AdapterKind = Literal["mlp", "linear", "identity"]


def make_adapter(kind: AdapterKind, *, width_in: int, width_out: int, dropout: float) -> nn.Module:
    """A map (..., width_in) -> (..., width_out).

    Args:
        kind: "mlp" is the paper's: three layers with ReLU and dropout between them. "linear" is one layer. "identity"
            changes nothing, for encoders whose patches already lie in the space of the text.
        width_in: Width of the encoder's features.
        width_out: Width of the shared space.
        dropout: Share of hidden units dropped in training (paper: 0.4).

    Raises:
        ValueError: "identity" between different widths.
    """
    if kind == "identity":
        if width_in != width_out:
            raise ValueError(
                f"an identity adapter cannot map width {width_in} to {width_out}; use adapter 'linear' or set dim to {width_in}"
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    return nn.Sequential(
        nn.Linear(width_in, width_out),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width_out, width_out),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width_out, width_out),
    )
