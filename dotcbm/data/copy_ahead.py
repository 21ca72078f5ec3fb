"""Batches that are copied to a GPU while it computes on the ones before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self, TypeVar

import torch
from torch.utils.data import DataLoader

from dotcbm.structures import ConceptBatch

__all__ = ["CopyAheadLoader", "copied_ahead"]


class Movable(Protocol):
    """A tensor, or a record of tensors."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Self:
        """The same on another device."""
        ...


Batch = TypeVar("Batch", bound=Movable)


def copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device, each copied while the one before is in use. Only copies from pinned memory overlap.

    On CUDA copies run in a stream of their own. A copy waits for the work that was queued before the batch in use, so that it never
    lands in memory which that work still reads. Elsewhere batches are moved one by one.
    """
    if device.type != "cuda":
        yield from (batch.to(device, non_blocking=False) for batch in batches)
        return
    stream, iterator = torch.cuda.Stream(device), iter(batches)

    def copy() -> Batch | None:
        if (batch := next(iterator, None)) is None:
            return None
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            return batch.to(device, non_blocking=True)

    moved = copy()
    while moved is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        following = copy()
        yield moved
        moved = following


class CopyAheadLoader(DataLoader[ConceptBatch]):
    """A loader of batches on a GPU: its workers read, a thread pins, and a stream of its own copies ahead."""

    def __init__(self, *args: Any, device: torch.device, **settings: Any) -> None:
        super().__init__(*args, pin_memory=True, **settings)
        self.device = device

    def __iter__(self) -> Iterator[ConceptBatch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Batches on the device."""
        return copied_ahead(super().__iter__(), self.device)
