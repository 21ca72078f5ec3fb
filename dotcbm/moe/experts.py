"""E small MLPs of which each token sees K: down(GELU(up(x))), weighted by gates and added up.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert, C rows of the fullest expert. There is
no capacity: every token reaches all its experts, however many others do. The backends compute the same:

    grouped  one `torch.nn.functional.grouped_mm` for each of the two products; in bfloat16 nothing waits for the device
    padded   batched products over experts padded to the fullest; memory grows to E C, and the host waits for C
    loop     one expert after another, the reference
    dense    every expert on every token, then a mask: E / K times the work, the reference that sorts nothing
    triton   our kernels on CUDA, see `dotcbm.moe.triton_kernels`: gather, bias, GELU, gate and scatter within the products
    auto     triton on a GPU whose multiprocessors have room for its tiles (H100 and newer of its class), where it was measured to be 1.4 to
             2.6 times as fast as grouped in bfloat16 (reports/benchmarks/experts_cuda.md); else grouped where it applies (see
             `dotcbm.moe.dispatch.grouped_applies`), else padded on a GPU and the loop on a CPU; dense in an exported program, in which
             no shape can depend on values
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dotcbm.moe import flops
from dotcbm.moe.backend_triton import experts_triton
from dotcbm.moe.dispatch import Order, add_bias, collect, dispatch, grouped_applies
from dotcbm.moe.router import autocast_enabled
from dotcbm.tracing import exporting

__all__ = ["Backend", "Experts"]

Backend = Literal["auto", "grouped", "triton", "padded", "loop", "dense"]
_HAS_TRITON = find_spec("triton") is not None
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of shared memory: four steps of the largest tiles, a quarter of one that is finished, and barriers (`dotcbm.moe.triton_tiles.tiles_of`).
_TILE_BYTES = (4 * 64 * (128 + 256) + 128 * 256 // 4) * 2 + 1024

flops.register()  # so that counters and Lightning's MFU see the grouped products


class _Weights(NamedTuple):
    """In the type to compute in."""

    up_EDH: Tensor
    up_bias_EH: Tensor | None
    down_EHD: Tensor
    down_bias_ED: Tensor | None


class Experts(nn.Module):
    """The weights of E MLPs, stacked."""

    up_bias_EH: nn.Parameter | None
    down_bias_ED: nn.Parameter | None

    def __init__(self, width: int, hidden: int, num_experts: int, *, bias: bool = True) -> None:
        """Args:
        width: D.
        hidden: H.
        num_experts: E.
        bias: Whether both layers have one, as timm's MLPs do.

        Raises:
            ValueError: A size below 1.
        """
        super().__init__()
        if min(width, hidden, num_experts) < 1:
            raise ValueError(f"width is {width}, hidden {hidden} and num_experts {num_experts}; each must be at least 1")
        self.up_EDH = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_EHD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.register_parameter("up_bias_EH", nn.Parameter(torch.empty(num_experts, hidden)) if bias else None)
        self.register_parameter("down_bias_ED", nn.Parameter(torch.empty(num_experts, width)) if bias else None)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up_EDH.shape[0]

    def reset_parameters(self) -> None:
        """Fresh weights, as timm draws a ViT's: normal with deviation 0.02, biases zero."""
        for weight in (self.up_EDH, self.down_EHD):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.up_bias_EH, self.down_bias_ED):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, backend: Backend = "auto") -> Tensor:
        """(T, D) the sum over a token's experts of gate times output.

        Under autocast in its type, else in that of x and the weights.

        Args:
            x_TD: (T, D); T may be 0.
            index_TK: (T, K) integers in [0, E), distinct within a token.
            gate_TK: (T, K).
            backend: See the head of this file.

        Raises:
            ValueError: No such backend, "grouped" for a type or sizes that it does not take, or "triton" for a type or where it does
                not run.
        """
        device = x_TD.device
        dtype = torch.get_autocast_dtype(device.type) if autocast_enabled(device.type) else x_TD.dtype
        raw = (self.up_EDH, self.up_bias_EH, self.down_EHD, self.down_bias_ED)
        weights = _Weights(*(None if weight is None else weight.to(dtype) for weight in raw))  # pyright: ignore[reportArgumentType]
        return self._chosen(backend, dtype, device)(x_TD.to(dtype), index_TK, gate_TK, weights)

    def _chosen(self, backend: Backend, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, _Weights], Tensor]:
        if backend not in get_args(Backend):
            raise ValueError(f"backend is {backend!r}; choose one of {list(get_args(Backend))}")
        _, width, hidden = self.up_EDH.shape
        applies = grouped_applies(dtype, width, hidden)
        if backend == "auto" and exporting():
            backend = "dense"
        elif backend == "auto" and _HAS_TRITON and dtype in _TRITON_TYPES and device.type == "cuda" and _has_room(device):
            backend = "triton"
        elif backend == "auto":
            # PyTorch 2.14 refuses to trace grouped products in float32.
            applies = applies and device.type in ("cpu", "cuda", "meta") and not (torch.compiler.is_compiling() and dtype == torch.float32)
            backend = "grouped" if applies else "padded" if device.type == "cuda" else "loop"
        if backend == "grouped" and not applies:
            raise ValueError(
                f'backend is "grouped", with {dtype}, width {width} and hidden {hidden}; it takes float32, bfloat16 and float16, and rows '
                'of a multiple of 16 bytes; choose "auto"'
            )
        if backend == "triton":
            _check_triton(dtype, device.type)
        return _BACKENDS[backend]

    def extra_repr(self) -> str:
        experts, width, hidden = self.up_EDH.shape
        return f"width={width}, hidden={hidden}, num_experts={experts}, bias={self.up_bias_EH is not None}"


def _grouped(x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, weights: _Weights) -> Tensor:
    order = Order.of(index_TK, len(weights.up_EDH))
    hidden_RH = _product(dispatch(x_TD, order), weights.up_EDH, order)
    if weights.up_bias_EH is not None:
        hidden_RH = add_bias(hidden_RH, weights.up_bias_EH, order)
    y_RD = _product(F.gelu(hidden_RH), weights.down_EHD, order)
    if weights.down_bias_ED is not None:
        y_RD = add_bias(y_RD, weights.down_bias_ED, order)
    return collect(y_RD, gate_TK, order)


def _product(x_RX: Tensor, weight_EXY: Tensor, order: Order) -> Tensor:
    if x_RX.is_meta:  # where FLOPs are counted; PyTorch 2.14 knows the shapes of half precision alone
        return F.grouped_mm(x_RX.bfloat16(), weight_EXY.bfloat16(), offs=order.end_E).to(x_RX.dtype)
    return F.grouped_mm(x_RX, weight_EXY, offs=order.end_E)


@torch.compiler.assume_constant_result  # a GPU's properties are nothing that torch.compile can trace
def _has_room(device: torch.device) -> bool:
    """Whether the GPU runs the tiles that were measured."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= _TILE_BYTES


def _check_triton(dtype: torch.dtype, device: str) -> None:
    if not _HAS_TRITON:
        raise ValueError('backend is "triton", which is not installed; choose "auto"')
    if device not in ("cuda", "meta") and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(f'backend is "triton", which runs on CUDA, and the tokens are on {device}; choose "auto"')
    if dtype not in _TRITON_TYPES:
        raise ValueError(f'backend is "triton", which takes float32, bfloat16 and float16, and the type is {dtype}; choose "auto"')


def _triton(x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, weights: _Weights) -> Tensor:
    return experts_triton(x_TD, index_TK, gate_TK, *weights)


def _padded(x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, weights: _Weights) -> Tensor:
    E, D, _ = weights.up_EDH.shape
    order = Order.of(index_TK, E)
    size_E = order.end_E.diff(prepend=order.end_E.new_zeros(1))
    C = int(size_E.max())
    begin_R = (order.end_E - size_E).index_select(0, order.expert_R)
    row_R = torch.arange(len(begin_R), device=begin_R.device) - begin_R
    place_R = order.expert_R * C + row_R
    x_ECD = x_TD.new_zeros(E * C, D).index_copy(0, place_R, dispatch(x_TD, order)).view(E, C, D)
    y_RD = _all(x_ECD, weights).view(E * C, D).index_select(0, place_R)
    return collect(y_RD, gate_TK, order)


def _loop(x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, weights: _Weights) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    # An expert without tokens is not left out: its weights get a gradient of zero, as with other backends.
    experts = zip(*(unbound(weight, len(weights.up_EDH)) for weight in weights), strict=True)
    for expert, (up_DH, up_bias_H, down_HD, down_bias_D) in enumerate(experts):
        token_R, slot_R = (index_TK == expert).nonzero(as_tuple=True)
        hidden_RH = x_TD[token_R] @ up_DH
        hidden_RH = hidden_RH if up_bias_H is None else hidden_RH + up_bias_H
        y_RD = F.gelu(hidden_RH) @ down_HD
        y_RD = y_RD if down_bias_D is None else y_RD + down_bias_D
        y_TD = y_TD.index_add(0, token_R, y_RD * gate_TK[token_R, slot_R, None].to(y_RD.dtype))
    return y_TD


def _dense(x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, weights: _Weights) -> Tensor:
    E, D, _ = weights.up_EDH.shape
    gate_TE = gate_TK.new_zeros(x_TD.shape[0], E).scatter(1, index_TK, gate_TK).to(x_TD.dtype)
    y_ETD = _all(x_TD.expand(E, x_TD.shape[0], D), weights)
    return (y_ETD * gate_TE.T[..., None]).sum(0).to(y_ETD.dtype)


def _all(x_ECD: Tensor, weights: _Weights) -> Tensor:
    hidden_ECH = x_ECD @ weights.up_EDH
    if weights.up_bias_EH is not None:
        hidden_ECH = hidden_ECH + weights.up_bias_EH[:, None]
    y_ECD = F.gelu(hidden_ECH) @ weights.down_EHD
    return y_ECD if weights.down_bias_ED is None else y_ECD + weights.down_bias_ED[:, None]


def unbound(weight: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    """The slices of a stacked weight, whose gradients are stacked once and not one by one into zeros."""
    return (None,) * count if weight is None else weight.unbind(0)


_BACKENDS = {"grouped": _grouped, "triton": _triton, "padded": _padded, "loop": _loop, "dense": _dense}
