"""A data set in memory: coloured squares on noise, with concepts that say where and which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dotcbm.data.source import BadPictureError, ConceptDataset, ConceptSource
from dotcbm.structures import ConceptSet

CONCEPTS = ("red", "green", "left", "right", "unknown")


@dataclass(frozen=True)
class TinySource(ConceptSource):
    """Class 2 * colour + side; every fifth label of "unknown" is NaN."""

    counts: tuple[tuple[str, int], ...] = (("train", 40), ("test", 16))
    size: tuple[int, int] = (64, 64)
    missing_class: int | None = None
    bad_rows: tuple[int, ...] = ()
    names: tuple[str, ...] = CONCEPTS

    @property
    def concepts(self) -> ConceptSet:
        rows = [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]
        table = torch.tensor([[*row, torch.nan] for row in rows], dtype=torch.float32)
        return ConceptSet(
            self.names,
            ("red left", "red right", "green left", "green right"),
            table[:, : len(self.names)],
            part_names=("square",),
            parts=(("square",),) * len(self.names),
        )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.counts)

    def load(self, split: str) -> ConceptDataset:
        num = dict(self.counts)[split]
        label_N = torch.arange(num) % 4
        if self.missing_class is not None:
            label_N[label_N == self.missing_class] = (self.missing_class + 1) % 4
        concept_NM = torch.zeros(num, 5)
        concept_NM[:, 0], concept_NM[:, 2] = (label_N < 2).float(), (label_N % 2 == 0).float()
        concept_NM[:, 1], concept_NM[:, 3] = 1 - concept_NM[:, 0], 1 - concept_NM[:, 2]
        concept_NM[:, 4] = (torch.arange(num) % 3 == 0).float()
        concept_NM[::5, 4] = torch.nan
        labels = label_N.tolist()
        points = torch.stack([torch.tensor([[0.25 + 0.5 * (k % 2), 0.5, 1.0]]) for k in labels]) if num else torch.zeros(0, 1, 3)
        seed = sum(map(ord, split))
        return ConceptDataset(
            concepts=self.concepts,
            split=split,
            names=tuple(f"{split}/{i:03d}.png" for i in range(num)),
            label_N=label_N,
            concept_NM=concept_NM[:, : len(self.names)],
            read_image=partial(_picture, labels, self.size, seed, self.bad_rows, split),
            read_size=_constant(self.size),
            points_NP3=points,
            read_foreground=partial(_square, labels, self.size),
            source_key=f"tiny {self.size} {self.missing_class}",
        )


def _square(labels: list[int], size: tuple[int, int], row: int) -> Tensor:
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    x = round(width * (0.25 + 0.5 * (labels[row] % 2)))
    mask[height * 3 // 8 : height * 5 // 8, x - width // 8 : x + width // 8] = True
    return mask


def _picture(labels: list[int], size: tuple[int, int], seed: int, bad: tuple[int, ...], split: str, row: int) -> Tensor:
    if row in bad:
        raise BadPictureError(f"{split}/{row:03d}.png: cannot be decoded as a picture")
    drawn = torch.Generator().manual_seed(1000 * seed + row)
    picture = torch.randint(90, 160, (3, *size), generator=drawn, dtype=torch.uint8)
    picture[:, _square(labels, size, row)] = torch.tensor([[20], [20], [20]], dtype=torch.uint8)
    picture[labels[row] // 2, _square(labels, size, row)] = 250
    return picture


def _constant(value: tuple[int, int]) -> Callable[[int], tuple[int, int]]:
    return partial(_second, value)


def _second(value: tuple[int, int], row: int) -> tuple[int, int]:
    del row
    return value
