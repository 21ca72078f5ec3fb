"""Memory for results of the size of a cost, on a processor: in large pages where the system has them.

The C library gives large arrays back to the system when they are freed, and to get one again costs 1.7 µs for each page of 4 kB at its
first use: 7 ms for 16 MB, a fifth of what forward and backward take at (64, 196, 312). In pages of 2 MB it costs a quarter of that.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["fresh_like"]

_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", 14)
_LARGE_BYTES = 2**22  # below, the C library mostly keeps what is freed, and there is hardly a page of 2 MB in it


def fresh_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory in the shape, type and place of `tensor`, contiguous."""
    fresh = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    advise = _madvise()
    if advise is not None and fresh.device.type == "cpu" and fresh.nbytes >= _LARGE_BYTES:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (fresh.data_ptr() + fresh.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, length, _HUGE_PAGES)  # advice: where it is not taken, nothing is lost
    return fresh


@lru_cache
def _madvise() -> Any:
    """The system's function; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
