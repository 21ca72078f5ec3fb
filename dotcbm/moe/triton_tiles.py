"""What one program of a Triton kernel of sparse experts computes: tiles by product, type and size, and how many rows a sum takes.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows sorted by expert.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton

__all__ = ["PRODUCTS", "Product", "Tiles", "chunk_size", "tiles_of"]

Product = Literal["up", "down", "hidden", "token", "up_weight", "down_weight"]
PRODUCTS: tuple[Product, ...] = ("up", "down", "hidden", "token", "up_weight", "down_weight")

# Sums and sides up to this length are short (see `tiles_of`).
_FEW_STEPS = 512


class Tiles(NamedTuple):
    """What one program computes and how.

    A program makes `rows` by `columns` of a product in steps of `inner`. Descriptors (Hopper's copy engine) serve weights and what is in
    the order of experts; what is in that of tokens is read through pointers.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    descriptors: bool
    parts: int = 4
    """Pieces of the columns, 1, 2, 4 or 8, that are finished one after another; more need fewer registers. Of a weight gradient, 1 or 3,
    that are summed beside each other: tiles of Triton have a power of two of columns."""
    max_registers: int | None = None
    """Per thread; 128 let two programs of 8 warps share a multiprocessor."""
    programs: int = 1
    """Started for each multiprocessor where they take one tile after another: as many as it runs at once, or so many that each has few."""


def tiles_of(product: Product, dtype: torch.dtype, *, inner: int, columns: int, in_order: bool = False) -> Tiles:
    """Few shapes, so that a kernel is compiled a few times at most for each type, K = 1 and sizes that divide; chosen by measurement.

    Two small programs on a multiprocessor serve each other: while one waits for its first operands or finishes what it has multiplied, the
    other multiplies. Long sums are bound by what has to be read from the cache, of which wide tiles need less; but "hidden" has too much
    to finish, and so has "up" unless its operand is slow to come, one row at a time.

    Args:
        product: Which.
        dtype: Of its operands.
        inner: Length of its sums; of a weight gradient, whose sums are over rows, the side that belongs to tokens (D).
        columns: N.
        in_order: Whether what belongs to tokens lies in the order of experts.
    """
    of_weight = product in ("up_weight", "down_weight")
    if dtype == torch.float32:  # no tensor cores in full precision
        return Tiles(64, 64, 32, 4, 4 if of_weight else 2, descriptors=False, parts=1, programs=64)
    if of_weight:
        if columns % 384 == 0:
            return Tiles(128, 384, 64, 8, 5, descriptors=True, parts=3)
        if inner > _FEW_STEPS and columns % 256 == 0:
            return Tiles(128, 256, 64, 8, 5, descriptors=True, parts=1)
        return Tiles(128, 128, 64, 8, 5, descriptors=True, parts=1, max_registers=128, programs=2)
    if product != "hidden" and not (product == "up" and in_order) and inner > _FEW_STEPS and columns % 256 == 0:
        return Tiles(128, 256, 64, 8, 4, descriptors=True)
    return Tiles(128, 128, 64, 8, 3, descriptors=True, max_registers=128, programs=2)


def chunk_size(num_rows: int, num_experts: int, per_chunk: int, num_programs: int) -> int:
    """Rows of an expert that a program sums: all of them unless much of the GPU had nothing to do, or the expert has twice its share.

    To add up chunks costs as much as a third of the GPU that idles.

    Args:
        num_rows: R.
        num_experts: E.
        per_chunk: Programs that share a chunk.
        num_programs: Programs that there should be at least: as many as run at once, or a few times that.
    """
    wanted = triton.cdiv(num_programs, per_chunk)
    rows = triton.cdiv(2 * num_rows, num_experts) if wanted <= 1.5 * num_experts else triton.cdiv(num_rows, wanted)
    return max(256, triton.cdiv(rows, 64) * 64)
