"""Streams beside the current one, for kernels that do not wait for each other.

A product ends with fewer and fewer programs, and the next one begins when the last is done. Products that need nothing of each other fill
these gaps when they are launched in streams of their own; and sums, which memory bounds, run while something else multiplies.

Memory is always taken in the current stream, so that the allocator knows one stream only: a lane holds what its kernels use until the
current stream has waited for it. That holds for CUDA graphs too, where a lane becomes a branch of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Lane", "lanes"]

# Elements of the largest operand below which launching is taken to cost more than is gained: an estimate from wall times of larger layers.
_LARGE = 2**25


class Lane:
    """A stream to launch in; None for the current one."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        """Args:
        stream: Beside the current one, of the same device.
        """
        self._stream = stream
        self._held: list[Tensor] = []
        self._used = False

    @contextmanager
    def using(self, *scratch: Tensor) -> Iterator[None]:
        """Launch here what is launched inside: after everything that was launched in the current stream before.

        Args:
            scratch: What nobody else holds until `join`.
        """
        if self._stream is None:
            yield
            return
        self._held += scratch
        self._used = True
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what is launched in the current stream from now on wait for this lane.

        A lane that nothing was launched in is let be: to wait for a stream that is no part of a CUDA graph breaks its capture.
        """
        if self._stream is not None and self._used:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._held.clear()
        self._used = False


@contextmanager
def lanes(largest: int, device: torch.device, count: int) -> Iterator[list[Lane]]:
    """Lanes that are joined at the end; all of them the current stream where there is too little to do, or no CUDA.

    Args:
        largest: Elements of the largest operand.
        device: Of the operands.
        count: How many.
    """
    apart = device.type == "cuda" and largest >= _LARGE
    found = [Lane(_stream(device, i) if apart else None) for i in range(count)]
    try:
        yield found
    finally:
        for lane in found:
            lane.join()


@lru_cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    del number
    return torch.cuda.Stream(device)
