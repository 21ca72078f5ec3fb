"""Floating point operations of expert layers: for PyTorch's counter, and by formula.

T tokens, D width, H hidden width, E experts, K experts per token. As `torch.utils.flop_counter` counts: a multiplication and an
addition are two operations, and only matrix products count. PyTorch 2.14's counter does not know grouped products and takes them for
nothing; once `register` has been called, every `FlopCounterMode` made afterwards knows them, and so does Lightning's `measure_flops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__ = ["experts_flops", "grouped_flops", "layer_flops", "register", "register_operators"]


def register() -> None:
    """Tell the counter about grouped products; without effect where it knows them."""
    if torch.ops.aten._grouped_mm not in flop_registry:
        register_flop_formula(torch.ops.aten._grouped_mm)(grouped_flops)


def register_operators(forward: Any, backward: Any) -> None:
    """Tell the counter about the operators of `dotcbm.moe.backend_triton`, which hide the products inside."""
    register_flop_formula(forward)(_forward_flops)
    register_flop_formula(backward)(_backward_flops)


def _forward_flops(x_shape: torch.Size, index_shape: torch.Size, gate_shape: torch.Size, up_shape: torch.Size, *_: Any, **__: Any) -> int:
    return experts_flops(x_shape[0], width=up_shape[1], hidden=up_shape[2], k=index_shape[1])


def _backward_flops(
    dy_shape: torch.Size, x_shape: torch.Size, index_shape: torch.Size, gate_shape: torch.Size, up_shape: torch.Size, *rest: Any, **__: Any
) -> int:
    # Four products, of which the hidden layer's gradient is always made; the last two arguments say which of the others are. Rows of x may
    # be in the order of experts.
    del x_shape
    *_, of_tokens, of_weights = rest
    half = experts_flops(dy_shape[0], width=up_shape[1], hidden=up_shape[2], k=index_shape[1]) // 2
    return half * (1 + of_tokens + 2 * of_weights)


def grouped_flops(a_shape: torch.Size, b_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Of one grouped product, every row of which belongs to a group.

    The groups are slices of the rows of a (2D x 3D), of the inner dimension (2D x 2D, the gradient of weights), of the columns of b
    (3D x 2D), or matrices of their own (3D x 3D); each multiplication is done once in all but the last.
    """
    product = 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]
    return product * (a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1)


def experts_flops(num_tokens: int, *, width: int, hidden: int, k: int) -> int:
    """Forward, of K experts for each token: 4 T K D H. Forward and backward together are three times that."""
    return 4 * num_tokens * k * width * hidden


def layer_flops(num_tokens: int, *, width: int, hidden: int, num_experts: int, k: int, shared_hidden: int = 0) -> int:
    """Forward, of router, experts and shared expert: 2 T D (E + 2 K H + 2 H_shared). Forward and backward: three times that."""
    router = 2 * num_tokens * width * num_experts
    return router + experts_flops(num_tokens, width=width, hidden=hidden, k=k) + 4 * num_tokens * width * shared_hidden
