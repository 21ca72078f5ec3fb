"""Launches of `triton_kernels` and `triton_sums`: tiles mapped, outputs made, operands handed over as descriptors where that applies.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from dotcbm.moe import triton_kernels as kernels
from dotcbm.moe import triton_sums as sums
from dotcbm.moe.triton_lanes import Lane
from dotcbm.moe.triton_sorting import Sorted, TileMap, tile_map
from dotcbm.moe.triton_tiles import Tiles, chunk_size, tiles_of

__all__ = [
    "Rows",
    "dispatch",
    "down_bias",
    "gate_parts",
    "hidden",
    "out",
    "up",
    "weight",
    "weight_of_rows",
]

_UP: Any = kernels.up_kernel  # called as kernel[grid](...), which no checker understands
_OUT: Any = kernels.out_kernel
_HIDDEN: Any = kernels.hidden_gradient_kernel
_BIAS: Any = sums.bias_gradient_kernel
_BIAS_GATE: Any = sums.bias_gate_kernel
_DISPATCH: Any = sums.dispatch_kernel
_WEIGHT: Any = sums.weight_gradient_kernel
_ADD_CHUNKS: Any = sums.add_chunks_kernel
_ADD_TILES: Any = sums.add_tiles_kernel
_ADD_SLOTS: Any = sums.add_slots_kernel

_H100_SMS = 132
# In float32 a weight gradient is summed in shorter chunks, for the digits: of 5,000 rows 1.2e-6 of the largest value, in place of 4e-6.
_ROUNDS_FLOAT32 = 4
# What programs of the additions take at a time.
_SUM_TILES, _SUM_COLUMNS, _SUMMED_TOKENS, _ADDED = 16, 128, 32, 1024
_DISPATCHED_TOKENS, _DISPATCHED_COLUMNS = 16, 256
_MOST_ADDING = 64  # programs for an expert's chunks
# And those of a bias's gradient: rows, of which there is a map anyway, and columns; tokens, experts and columns for K > 1.
_BIAS_ROWS, _BIAS_COLUMNS = 128, 64
_BIAS_TOKENS, _BIAS_EXPERTS, _BIAS_STEP = 64, 128, 64
_HERE = Lane(None)
_ALIGNMENT = 16  # bytes, of a descriptor's rows


@dataclass
class Rows:
    """Where the R rows are, and maps of their tiles, made once for each size of tile."""

    sorted: Sorted
    k: int
    maps: dict[int, TileMap] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.sorted.order_R)

    def tiles(self, size: int) -> TileMap:
        """Of up to `size` rows."""
        if size not in self.maps:
            self.maps[size] = tile_map(self.sorted.end_E, self.num_rows, size)
        return self.maps[size]


def dispatch(x_TD: Tensor, rows: Rows) -> Tensor:
    """(R, D) each token once for each of its experts, in the order of experts."""
    T, D = x_TD.shape
    row_RD = x_TD.new_empty(rows.num_rows, D)
    grid = (triton.cdiv(T, _DISPATCHED_TOKENS), triton.cdiv(D, _DISPATCHED_COLUMNS))
    _DISPATCH[grid](x_TD, rows.sorted.inverse_R, row_RD, T, D, SLOTS=rows.k, BT=_DISPATCHED_TOKENS, B=_DISPATCHED_COLUMNS)
    return row_RD


def up(
    x: Tensor,
    up_EDH: Tensor,
    bias_EH: Tensor | None,
    gate_TK: Tensor,
    rows: Rows,
    *,
    keep: bool,
    in_order: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(R, H) z, empty without `keep`, and (R, H) g GELU(z), of tokens (T, D) or, `in_order`, what `dispatch` made of them (R, D)."""
    _, D, H = up_EDH.shape
    tiles = tiles or tiles_of("up", x.dtype, inner=D, columns=H, in_order=in_order)
    gated_RH = x.new_empty(rows.num_rows, H)
    z_RH = x.new_empty(gated_RH.shape if keep else (0,))
    tile_L4, span_E3 = rows.tiles(tiles.rows)
    a, a_described = _described(x, (tiles.rows, tiles.inner), tiles, inner=D) if in_order else (x, False)
    b, b_described = _described(up_EDH, (tiles.inner, tiles.columns), tiles, inner=D)
    _UP[_staying(tile_L4, H, tiles)](
        a,
        b,
        bias_EH,
        gate_TK,
        rows.sorted.order_R,
        tile_L4,
        span_E3[-1],
        z_RH,
        gated_RH,
        D,
        H,
        rows.k,
        HAS_BIAS=bias_EH is not None,
        KEEP=keep,
        IN_ORDER=in_order,
        A_DESC=a_described,
        B_DESC=b_described,
        PARTS=tiles.parts,
        **_compiled(x, tiles, D, H),
    )
    return z_RH, gated_RH


def out(
    product: Literal["down", "token"],
    a_RX: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_TK: Tensor,
    rows: Rows,
    *,
    tiles: Tiles | None = None,
    lane: Lane = _HERE,
) -> Tensor:
    """(T, D) the sum over a token's experts of rows times `weight` (E, H, D), or for "token" the transpose of `weight` (E, D, H)."""
    transposed = product == "token"
    _, *sizes = weight.shape
    inner, columns = sizes[::-1] if transposed else sizes
    tiles = tiles or tiles_of(product, a_RX.dtype, inner=inner, columns=columns)
    row_RN = a_RX.new_empty(rows.num_rows, columns)
    result = row_RN if rows.k == 1 else a_RX.new_empty(rows.num_rows // rows.k, columns)
    tile_L4, span_E3 = rows.tiles(tiles.rows)
    a, a_described = _described(a_RX, (tiles.rows, tiles.inner), tiles, inner=inner)
    block = (tiles.columns, tiles.inner) if transposed else (tiles.inner, tiles.columns)
    b, b_described = _described(weight, block, tiles, inner=inner)
    with lane.using(row_RN):
        _OUT[_staying(tile_L4, columns, tiles)](
            a,
            b,
            bias,
            gate_TK,
            rows.sorted.order_R,
            tile_L4,
            span_E3[-1],
            row_RN,
            inner,
            columns,
            HAS_BIAS=bias is not None,
            TRANSPOSED=transposed,
            SCATTER=rows.k == 1,
            A_DESC=a_described,
            B_DESC=b_described,
            PARTS=tiles.parts,
            **_compiled(a_RX, tiles, inner, columns),
        )
        if rows.k > 1:
            _add_slots(row_RN, rows, result)
    return result


def _add_slots(row_RD: Tensor, rows: Rows, result_TD: Tensor) -> None:
    """Sums over each token's K rows."""
    T, D = result_TD.shape
    grid = (triton.cdiv(T, _SUMMED_TOKENS), triton.cdiv(D, _SUM_COLUMNS))
    _ADD_SLOTS[grid](row_RD, rows.sorted.inverse_R, result_TD, T, D, SLOTS=rows.k, BT=_SUMMED_TOKENS, B=_SUM_COLUMNS)


def hidden(
    dy: Tensor,
    down_EHD: Tensor,
    z_RH: Tensor,
    gate_TK: Tensor,
    rows: Rows,
    dgate_PR: Tensor,
    *,
    d_bias_EH: Tensor | None = None,
    in_order: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """(R, H) dz; writes parts of d(gate), whose sum it is, to `dgate_PR` (see `gate_parts`), and the up bias's gradient to `d_bias_EH`.

    The gradient is (T, D) or, `in_order`, what `dispatch` made of it (R, D).
    """
    E, H, D = down_EHD.shape
    tiles = tiles or tiles_of("hidden", dy.dtype, inner=D, columns=H)
    tile_L4, span_E3 = rows.tiles(tiles.rows)
    dz_RH = torch.empty_like(z_RH)
    sum_LH = gate_TK.new_empty((len(tile_L4), H) if d_bias_EH is not None else (0,))
    a, a_described = _described(dy, (tiles.rows, tiles.inner), tiles, inner=D) if in_order else (dy, False)
    b, b_described = _described(down_EHD, (tiles.columns, tiles.inner), tiles, inner=D)
    _HIDDEN[_grid(tile_L4, H, tiles)](
        a,
        b,
        z_RH,
        gate_TK,
        rows.sorted.order_R,
        tile_L4,
        dz_RH,
        dgate_PR,
        sum_LH,
        D,
        H,
        rows.num_rows,
        rows.k,
        HAS_BIAS=d_bias_EH is not None,
        IN_ORDER=in_order,
        A_DESC=a_described,
        B_DESC=b_described,
        PARTS=tiles.parts,
        **_compiled(dy, tiles, D, H),
    )
    if d_bias_EH is not None:
        _ADD_TILES[(triton.cdiv(H, _SUM_COLUMNS), E)](sum_LH, span_E3, d_bias_EH, H, L=_SUM_TILES, B=_SUM_COLUMNS)
    return dz_RH


def gate_parts(down_EHD: Tensor, tiles: Tiles | None = None) -> int:
    """How many parts of d(gate) `hidden` writes."""
    _, H, D = down_EHD.shape
    return triton.cdiv(H, (tiles or tiles_of("hidden", down_EHD.dtype, inner=D, columns=H)).columns)


def down_bias(
    dy_TD: Tensor,
    bias_ED: Tensor,
    gate_TK: Tensor,
    index_TK: Tensor,
    rows: Rows,
    dgate_R: Tensor,
    d_bias_ED: Tensor | None,
    *,
    lane: Lane = _HERE,
) -> None:
    """Write the bias's part of d(gate), by assignment, to `dgate_R`, and its gradient to `d_bias_ED`."""
    (T, D), E = dy_TD.shape, len(bias_ED)
    if rows.k > 1:
        table_TE = dy_TD.new_empty((T, E) if d_bias_ED is not None else (0,))
        experts = min(_BIAS_EXPERTS, max(16, triton.next_power_of_2(E)))
        sizes = {"BT": _BIAS_TOKENS, "BE": experts, "BK": _BIAS_STEP, "WIDEN": _widened(dy_TD)}
        with lane.using(table_TE):
            grid = (triton.cdiv(T, _BIAS_TOKENS), triton.cdiv(E, experts))
            operands = (dy_TD, bias_ED, gate_TK, index_TK, dgate_R, table_TE)
            _BIAS_GATE[grid](*operands, T, D, E, SLOTS=rows.k, TABLE=d_bias_ED is not None, **sizes)
            if d_bias_ED is not None:
                torch.mm(table_TE.T, dy_TD, out=d_bias_ED)
        return
    tile_L4, span_E3 = rows.tiles(_BIAS_ROWS)
    sum_LD = gate_TK.new_empty((len(tile_L4), D) if d_bias_ED is not None else (0,))
    operands = (dy_TD, bias_ED, gate_TK, rows.sorted.order_R, tile_L4, dgate_R, sum_LD)
    with lane.using(sum_LD):
        _BIAS[(len(tile_L4),)](*operands, D, SUM=d_bias_ED is not None, BM=_BIAS_ROWS, BN=_BIAS_COLUMNS, num_warps=8)
        if d_bias_ED is not None:
            _ADD_TILES[(triton.cdiv(D, _SUM_COLUMNS), E)](sum_LD, span_E3, d_bias_ED, D, L=_SUM_TILES, B=_SUM_COLUMNS)


def weight(
    product: Literal["up_weight", "down_weight"],
    token_TD: Tensor,
    row_RH: Tensor,
    rows: Rows,
    result: Tensor,
    *,
    chunk: int | None = None,
    tiles: Tiles | None = None,
    lane: Lane = _HERE,
) -> None:
    """Write each expert's x^T dz for "up_weight", (E, D, H), or gated^T dy for "down_weight", (E, H, D).

    Args:
        product: Which.
        token_TD: (T, D) x or dy, in the order of tokens.
        row_RH: (R, H) dz or gated, in that of experts.
        rows: Their order.
        result: Where to.
        chunk: Rows that one program sums at most; None for `chunk_size`.
        tiles: None for `tiles_of`.
        lane: Where to launch.
    """
    E, D, H = len(result), token_TD.shape[1], row_RH.shape[1]
    tiles = tiles or tiles_of(product, token_TD.dtype, inner=D, columns=H)
    per_chunk = triton.cdiv(D, tiles.rows) * triton.cdiv(H, tiles.columns)
    rounds = _ROUNDS_FLOAT32 if token_TD.dtype == torch.float32 else 1
    chunk = chunk or chunk_size(rows.num_rows, E, per_chunk, rounds * _num_sms(token_TD.device))
    tile_L4, span_E3 = rows.tiles(chunk)
    # Experts with several chunks have more than `chunk` rows, so 2 R / chunk chunks at most.
    work = token_TD.new_empty((2 * rows.num_rows // chunk, D, H), dtype=torch.float32)
    piece = tiles.columns // tiles.parts
    row, described = _described(row_RH, (tiles.inner, piece), tiles)
    with lane.using(work):
        _WEIGHT[(len(tile_L4) * per_chunk,)](
            token_TD,
            row,
            rows.sorted.order_R,
            tile_L4,
            result,
            work,
            D,
            H,
            D * H,
            rows.k,
            TRANSPOSED=product == "down_weight",
            B_DESC=described,
            EVEN_M=D % tiles.rows == 0,
            EVEN_N=H % tiles.columns == 0,
            PARTS=tiles.parts,
            **_blocks(result, tiles._replace(columns=piece)),
        )
        _ADD_CHUNKS[(min(_MOST_ADDING, triton.cdiv(D * H, _ADDED)), E)](work, span_E3, result, D * H, B=_ADDED)


def weight_of_rows(a_RX: Tensor, b_RY: Tensor, rows: Rows) -> Tensor:
    """(E, X, Y) each expert's a^T b, of what both lie in the order of experts, by PyTorch.

    Its kernel (CUTLASS's) has two multiprocessors share what one of them has read, which Triton does not do.
    """
    return F.grouped_mm(a_RX.T, b_RY, offs=rows.sorted.end_E)


def _grid(tile_L4: Tensor, columns: int, tiles: Tiles) -> tuple[int]:
    return (len(tile_L4) * triton.cdiv(columns, tiles.columns),)


def _staying(tile_L4: Tensor, columns: int, tiles: Tiles) -> tuple[int]:
    """As many programs as run at once."""
    return (min(_grid(tile_L4, columns, tiles)[0], tiles.programs * _num_sms(tile_L4.device)),)


def _compiled(tensor: Tensor, tiles: Tiles, inner: int, columns: int) -> dict[str, Any]:
    return {"EVEN_K": inner % tiles.inner == 0, "EVEN_N": columns % tiles.columns == 0, **_blocks(tensor, tiles)}


def _blocks(tensor: Tensor, tiles: Tiles) -> dict[str, Any]:
    sizes = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.inner}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.max_registers}
    return {"WIDEN": _widened(tensor), **sizes, **options}


def _widened(tensor: Tensor) -> bool:
    """Triton's interpreter, on a CPU, knows bfloat16 as integers alone."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def _described(tensor: Tensor, block: tuple[int, int], tiles: Tiles, *, inner: int | None = None) -> tuple[Any, bool]:
    """The tensor's rows as a descriptor that reads blocks, where that applies: no step of a sum may reach into the next matrix."""
    fits = tensor.shape[-1] * tensor.element_size() % _ALIGNMENT == 0 and tensor.data_ptr() % _ALIGNMENT == 0
    if not (tiles.descriptors and fits and (inner is None or inner % tiles.inner == 0)):
        return tensor, False
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), list(block)), True


@lru_cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _H100_SMS
