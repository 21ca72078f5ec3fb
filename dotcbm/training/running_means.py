"""Means of scalars over an epoch, without telling Lightning of each batch: its `log` takes a processor a millisecond a name, with cached
features a fifth of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["RunningMeans"]


class RunningMeans:
    """Sums so far, on the device of the scalars; nothing waits for it."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Args:
        values: Scalars by name.
        count: Their weight, pictures in the batch.
        """
        names = tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if names in self._sums:
            self._sums[names].add_(stacked, alpha=count)
        else:
            self._sums[names] = stacked * count
        self._counts[names] = self._counts.get(names, 0) + count

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Mean and weight of each name that was added since the last call, by name."""
        sums: dict[str, tuple[Tensor, int]] = {}
        for names, stacked in self._sums.items():
            for name, value in zip(names, stacked.unbind(), strict=True):
                before, count = sums.get(name, (0.0, 0))
                sums[name] = (before + value, count + self._counts[names])
        self._sums, self._counts = {}, {}
        return {name: (value / max(count, 1), count) for name, (value, count) in sums.items()}
