"""Tokens sorted by expert, and back.

T tokens, K experts per token, E experts, R = T K rows: one for each token and expert that meet. Gradients are permutations and sums
over K, not scattered additions, so they are the same in every run and wait for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Order", "add_bias", "collect", "dispatch", "grouped_applies"]

# Rows of a matrix must start at multiples of 16 bytes.
_ALIGNMENT = 16
_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Order:
    """Where each of the R rows goes."""

    order_R: Tensor
    """(R,) int64: row r in the order of experts is assignment order_R[r] = token * K + slot."""
    inverse_R: Tensor
    """(R,) int64, its inverse."""
    expert_R: Tensor
    """(R,) int32, the expert of each row, ascending."""
    end_E: Tensor
    """(E,) int32, where the rows of each expert end."""
    k: int

    @staticmethod
    def of(index_TK: Tensor, num_experts: int) -> Order:
        """The order of a routing; ties keep the order of tokens."""
        expert_R, order_R = index_TK.reshape(-1).to(torch.int32).sort(stable=True)
        row_R = torch.arange(len(order_R), device=order_R.device)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, row_R)
        expert_E = torch.arange(num_experts, device=order_R.device, dtype=torch.int32)
        end_E = torch.searchsorted(expert_R, expert_E, right=True, out_int32=True)
        return Order(order_R, inverse_R, expert_R, end_E, index_TK.shape[1])


def dispatch(x_TD: Tensor, order: Order) -> Tensor:
    """(R, D) each token once for each of its experts, in the order of experts."""
    return _Dispatch.apply(x_TD, order.order_R, order.inverse_R, order.k)


def collect(y_RD: Tensor, gate_TK: Tensor, order: Order) -> Tensor:
    """(T, D) the sum over each token's experts of gate times row, in the type of the rows."""
    y_RD = _Permute.apply(y_RD, order.inverse_R, order.order_R)
    gated_TKD = y_RD.view(*gate_TK.shape, y_RD.shape[1]) * gate_TK.to(y_RD.dtype)[..., None]
    # On CUDA autocast makes sums in float32.
    return gated_TKD.squeeze(1) if order.k == 1 else gated_TKD.sum(1).to(y_RD.dtype)


def add_bias(y_RH: Tensor, bias_EH: Tensor, order: Order) -> Tensor:
    """(R, H) rows plus the bias of their expert."""
    return _AddBias.apply(y_RH, bias_EH, order.expert_R, order.end_E)


def grouped_applies(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `grouped_mm` takes matrices of this type with rows of these sizes."""
    return dtype in _GROUPED_TYPES and all(size * dtype.itemsize % _ALIGNMENT == 0 for size in sizes)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R, inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        order_R, inverse_R = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse_R, order_R), None, None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_R, inverse_R)
        ctx.shape_TKD = (x_TD.shape[0], k, x_TD.shape[1])
        return x_TD.index_select(0, order_R if k == 1 else order_R // k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        order_R, inverse_R = ctx.saved_tensors
        grad_TKD = _Permute.apply(grads[0], inverse_R, order_R).view(ctx.shape_TKD)
        return grad_TKD.squeeze(1) if ctx.shape_TKD[1] == 1 else grad_TKD.sum(1), None, None, None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, bias_EH: Tensor, expert_R: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(expert_R, end_E)
        return y_RH + bias_EH.index_select(0, expert_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        expert_R, end_E = ctx.saved_tensors
        return grads[0], _sum_by_expert(grads[0], expert_R, end_E), None, None


def _sum_by_expert(x_RH: Tensor, expert_R: Tensor, end_E: Tensor) -> Tensor:
    # On a GPU, additions into E rows would queue behind each other.
    if x_RH.is_cuda and grouped_applies(x_RH.dtype, x_RH.shape[1]):
        return _sum_by_product(x_RH, end_E)
    # One after another, thousands of rows in float32 end up with a few times the error that products have.
    dtype = torch.float32 if x_RH.dtype in (torch.bfloat16, torch.float16) else torch.float64
    return x_RH.new_zeros(len(end_E), x_RH.shape[1], dtype=dtype).index_add_(0, expert_R, x_RH.to(dtype)).to(x_RH.dtype)


def _sum_by_product(x_RH: Tensor, end_E: Tensor) -> Tensor:
    """With the fewest columns of ones that the kernel takes: below a per cent of the layer's FLOPs from D = 384 on, added up in float32."""
    # Rows lie one after another in both, so that those of an expert may begin anywhere: CUDA wants the starts of groups aligned.
    ones_RX = x_RH.new_ones(len(x_RH), _ALIGNMENT // x_RH.dtype.itemsize)
    return F.grouped_mm(ones_RX.T, x_RH.contiguous(), offs=end_E)[:, 0]
