"""Memory in large pages is memory like any other, and the advice stays within it."""

from __future__ import annotations

import mmap

import pytest
import torch

from dotcbm.transport import memory


@pytest.mark.parametrize("shape", [(3, 5), (64, 196, 112), (0, 4)])
def test_fresh_memory_has_the_shape_and_type_and_holds_what_is_written(shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape, dtype=torch.float64).transpose(0, 1)
    fresh = memory.fresh_like(like)
    assert fresh.shape == like.shape
    assert fresh.dtype == like.dtype
    assert fresh.is_contiguous()
    fresh.fill_(7)
    assert bool((fresh == 7).all())


def test_advice_is_of_whole_pages_inside_the_array_and_for_large_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: calls.append(call))
    memory.fresh_like(torch.empty(1000))
    assert calls == []
    fresh = memory.fresh_like(torch.empty(2**21 + 5))
    [(start, length, _)] = calls
    assert start % mmap.PAGESIZE == 0
    assert length % mmap.PAGESIZE == 0
    assert fresh.data_ptr() <= start
    assert start + length <= fresh.data_ptr() + fresh.nbytes
    assert length > fresh.nbytes - 2 * mmap.PAGESIZE


def test_a_system_without_the_advice_gives_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.fresh_like(torch.empty(2**21)).shape == (2**21,)
