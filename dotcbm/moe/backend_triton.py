"""Sparse experts on CUDA by the kernels of `triton_kernels`, with gradients, for eager code, torch.compile and CUDA graphs.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert. Nothing waits for the device: how many
rows an expert has is known there alone. What is kept for backward is z and g GELU(z), both (R, H), and the order of the rows. Rows are
read where tokens have them, or for layers of many FLOPs a row put in order once (`puts_in_order`): then x is kept so, (R, D). torch's
counter knows the FLOPs (see `flops`); this file imports no Triton, so that they are known before the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dotcbm.moe import flops
from dotcbm.moe.dispatch import grouped_applies

__all__ = ["experts_triton", "puts_in_order"]

# Sizes from which it pays to put rows in order, by measurement: their copy takes the same time whatever is made of them, and where
# a gradient of weights has few columns our own kernel makes it as fast of rows that are not.
_WIDE, _LONG = 768, 1024
_MOST_GROUPS = 1023  # of PyTorch's grouped products


def experts_triton(
    x_TD: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    up_EDH: Tensor,
    up_bias_EH: Tensor | None,
    down_EHD: Tensor,
    down_bias_ED: Tensor | None,
) -> Tensor:
    """(T, D), see `dotcbm.moe.experts`; x and weights have one type, of float32, bfloat16 and float16."""
    inputs = (x_TD, gate_TK, up_EDH, up_bias_EH, down_EHD, down_bias_ED)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    x_TD, gate_TK, up_EDH, down_EHD = (tensor.contiguous() for tensor in (x_TD, gate_TK.float(), up_EDH, down_EHD))
    up_bias_EH, down_bias_ED = (None if bias is None else bias.contiguous() for bias in (up_bias_EH, down_bias_ED))
    return torch.ops.dotcbm.experts(x_TD, index_TK.long().contiguous(), gate_TK, up_EDH, up_bias_EH, down_EHD, down_bias_ED, keep)[0]


def puts_in_order(dtype: torch.dtype, device: torch.device, *, width: int, hidden: int, num_experts: int) -> bool:
    """Whether training copies rows into the order of experts, for which PyTorch's grouped products make the gradients of weights.

    They do so in bfloat16 on Hopper.
    """
    if dtype != torch.bfloat16 or device.type != "cuda" or width < _WIDE or hidden < _LONG or num_experts > _MOST_GROUPS:
        return False
    return grouped_applies(dtype, width, hidden) and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 9


def _forward(
    x_TD: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    up_EDH: Tensor,
    up_bias_EH: Tensor | None,
    down_EHD: Tensor,
    down_bias_ED: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dotcbm.moe import triton_launch as launch
    from dotcbm.moe.triton_sorting import sort_by_expert

    T, D, (E, _, H) = len(x_TD), x_TD.shape[1], up_EDH.shape
    order = sort_by_expert(index_TK, E)
    in_order = keep and puts_in_order(x_TD.dtype, x_TD.device, width=D, hidden=H, num_experts=E)
    y_TD, row_RD, z_RH, gated_RH = (x_TD.new_empty(0, size) for size in (D, D, H, H))
    if T:
        rows = launch.Rows(order, index_TK.shape[1])
        row_RD = launch.dispatch(x_TD, rows) if in_order else row_RD
        z_RH, gated_RH = launch.up(row_RD if in_order else x_TD, up_EDH, up_bias_EH, gate_TK, rows, keep=keep, in_order=in_order)
        y_TD = launch.out("down", gated_RH, down_EHD, down_bias_ED, gate_TK, rows)
    none = x_TD.new_empty(0)
    saved = (row_RD if in_order else none, z_RH, gated_RH, *order)
    return y_TD, *(saved if keep else (tensor.new_empty(0) for tensor in saved))  # pyright: ignore[reportReturnType]


def _fake_forward(
    x_TD: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    up_EDH: Tensor,
    up_bias_EH: Tensor | None,
    down_EHD: Tensor,
    down_bias_ED: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del gate_TK, up_bias_EH, down_EHD, down_bias_ED
    (T, K), (E, D, H) = index_TK.shape, up_EDH.shape
    hidden, rows, experts = ((T * K, H), (T * K,), (E,)) if keep else ((0,),) * 3
    in_order = keep and puts_in_order(x_TD.dtype, x_TD.device, width=D, hidden=H, num_experts=E)
    row_RD = x_TD.new_empty((T * K, D) if in_order else (0,))
    z_RH, gated_RH = (x_TD.new_empty(hidden) for _ in range(2))
    order_R, inverse_R, end_E = (index_TK.new_empty(size, dtype=torch.int32) for size in (rows, rows, experts))
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), row_RD, z_RH, gated_RH, order_R, inverse_R, end_E


def _backward(
    dy_TD: Tensor,
    x: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    up_EDH: Tensor,
    down_EHD: Tensor,
    down_bias_ED: Tensor | None,
    z_RH: Tensor,
    gated_RH: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    end_E: Tensor,
    in_order: bool,
    has_up_bias: bool,
    of_tokens: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x` is (T, D), or (R, D) where it is in order."""
    from dotcbm.moe import triton_launch as launch
    from dotcbm.moe.triton_lanes import lanes
    from dotcbm.moe.triton_sorting import Sorted

    made_by_torch = in_order and len(dy_TD) > 0  # the gradients of weights, in memory of their own
    biases = of_weights and has_up_bias, of_weights and down_bias_ED is not None
    found = _empty_gradients(dy_TD, gate_TK, up_EDH, down_EHD, of_tokens, of_weights and not made_by_torch, *biases)
    if not len(dy_TD):
        return tuple(gradient.zero_() for gradient in found)  # pyright: ignore[reportReturnType]
    dx_TD, _, d_up_EDH, d_up_bias_EH, d_down_EHD, d_down_bias_ED = found
    dy_TD = dy_TD.contiguous()
    rows = launch.Rows(Sorted(order_R, inverse_R, end_E), index_TK.shape[1])
    dgate_PR = gate_TK.new_empty(launch.gate_parts(down_EHD) + (down_bias_ED is not None), rows.num_rows)
    with lanes(z_RH.numel(), dy_TD.device, 2) as (first, second):
        if of_weights and not in_order:
            launch.weight("down_weight", dy_TD, gated_RH, rows, d_down_EHD, lane=first)
        if down_bias_ED is not None:
            sums = d_down_bias_ED if of_weights else None
            launch.down_bias(dy_TD, down_bias_ED, gate_TK, index_TK, rows, dgate_PR[-1], sums, lane=second)
        dy = launch.dispatch(dy_TD, rows) if in_order else dy_TD
        sums = d_up_bias_EH if has_up_bias and of_weights else None
        dz_RH = launch.hidden(dy, down_EHD, z_RH, gate_TK, rows, dgate_PR, d_bias_EH=sums, in_order=in_order)
        if of_tokens:
            dx_TD = launch.out("token", dz_RH, up_EDH, None, gate_TK, rows, lane=second)
        if of_weights and in_order:
            d_down_EHD, d_up_EDH = launch.weight_of_rows(gated_RH, dy, rows), launch.weight_of_rows(x, dz_RH, rows)
        elif of_weights:
            launch.weight("up_weight", x, dz_RH, rows, d_up_EDH)
    return dx_TD, dgate_PR.sum(0).view_as(gate_TK), d_up_EDH, d_up_bias_EH, d_down_EHD, d_down_bias_ED


def _empty_gradients(
    dy_TD: Tensor,
    gate_TK: Tensor,
    up_EDH: Tensor,
    down_EHD: Tensor,
    of_tokens: bool,
    of_weights: bool,
    of_up_bias: bool,
    of_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, gates, and weights and biases in their order; empty where none is asked for."""
    E, D, H = up_EDH.shape
    return (
        dy_TD.new_empty(dy_TD.shape if of_tokens else (0,)),
        gate_TK.new_empty(gate_TK.shape),
        up_EDH.new_empty((E, D, H) if of_weights else (0,)),
        up_EDH.new_empty((E, H) if of_up_bias else (0,)),
        down_EHD.new_empty((E, H, D) if of_weights else (0,)),
        down_EHD.new_empty((E, D) if of_down_bias else (0,)),
    )


def _fake_backward(
    dy_TD: Tensor,
    x: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    up_EDH: Tensor,
    down_EHD: Tensor,
    down_bias_ED: Tensor | None,
    z_RH: Tensor,
    gated_RH: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    end_E: Tensor,
    in_order: bool,
    has_up_bias: bool,
    of_tokens: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del x, index_TK, z_RH, gated_RH, order_R, inverse_R, end_E, in_order
    biases = of_weights and has_up_bias, of_weights and down_bias_ED is not None
    return _empty_gradients(dy_TD, gate_TK, up_EDH, down_EHD, of_tokens, of_weights, *biases)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, index_TK, gate_TK, up_EDH, up_bias_EH, down_EHD, down_bias_ED, _ = inputs
    _, row_RD, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.in_order = row_RD.ndim == 2
    ctx.save_for_backward(row_RD if ctx.in_order else x_TD, index_TK, gate_TK, up_EDH, down_EHD, down_bias_ED, *kept)
    ctx.has_up_bias = up_bias_EH is not None


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 8
    x, _, gate, up, up_bias, down, down_bias, _ = ctx.needs_input_grad
    wanted = (ctx.in_order, ctx.has_up_bias, x, up or up_bias or down or down_bias)
    found = torch.ops.dotcbm.experts_backward(grads[0], *ctx.saved_tensors, *wanted)
    dx, dgate, *weights = (g if needed else None for g, needed in zip(found, (x, gate, up, up_bias, down, down_bias), strict=True))
    return dx, None, dgate, *weights, None


_operator = torch.library.custom_op("dotcbm::experts", _forward, mutates_args=())
_gradient_operator = torch.library.custom_op("dotcbm::experts_backward", _backward, mutates_args=())
_operator.register_fake(_fake_forward)
_gradient_operator.register_fake(_fake_backward)
_operator.register_autograd(_differentiate, setup_context=_remember)
flops.register_operators(torch.ops.dotcbm.experts, torch.ops.dotcbm.experts_backward)
