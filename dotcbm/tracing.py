"""What a function that PyTorch traces is being traced for."""

from __future__ import annotations

import torch

__all__ = ["exporting"]


def exporting() -> bool:
    """Whether a program is being exported, in which Python may not look at values; False under torch.compile.

    In torch 2.11 Dynamo takes `torch.compiler.is_exporting` for the constant True.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
