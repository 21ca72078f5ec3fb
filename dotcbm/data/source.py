"""What every data set offers: a vocabulary, named splits, and rows that are read when they are asked for.

A source (`CUB`, `Folder`, `Synthetic`, ...) is settings and no open file: it can be printed, compared and sent to another
process. `load(split)` reads the tables and gives a `ConceptDataset`, whose columns (labels, concepts, names) are in
memory and whose pictures and masks are read row by row.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from dotcbm.structures import ConceptSample, ConceptSet

__all__ = ["BadPictureError", "ConceptDataset", "ConceptSource", "read_picture"]


class BadPictureError(ValueError):
    """A picture that is missing or cannot be decoded; the message names the file."""


def read_picture(path: Path) -> Tensor:
    """The picture at `path` as (3, H, W) uint8 RGB, with EXIF rotation applied.

    Raises:
        BadPictureError: The file is missing, truncated or no picture.
    """
    from PIL import ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise BadPictureError(f"{path}: no such picture; check the data set's root folder and the row that names it") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"{path}: cannot be decoded as a picture ({error}); replace or remove the file") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ConceptDataset(Dataset[ConceptSample]):
    """One split: columns in memory, pictures and masks read when asked for.

    Attributes:
        concepts: The vocabulary.
        split: Its name, for messages.
        names: N unique names.
        label_N: (N,) long.
        concept_NM: (N, M) float in {0, 1}, NaN where unknown: what training and metrics take for the truth.
        read_image: Row -> (3, H, W) uint8. Raises BadPictureError.
        read_size: Row -> (height, width) without decoding the picture.
        points_NP3: (N, P, 3) x, y as fractions of the picture, and visible.
        box_N4: (N, 4) x0, y0, x1, y1 as fractions.
        group_N: (N,) long.
        read_foreground: Row -> (H, W) bool at the picture's size, or None for a row without a mask.
        read_part_masks: Row -> (P, H, W) bool at the picture's size.
        source_key: What identifies the pictures beyond their names (root and settings of the source); goes into cache keys.
    """

    concepts: ConceptSet
    split: str
    names: tuple[str, ...]
    label_N: Tensor
    concept_NM: Tensor
    read_image: Callable[[int], Tensor]
    read_size: Callable[[int], tuple[int, int]]
    points_NP3: Tensor | None = None
    box_N4: Tensor | None = None
    group_N: Tensor | None = None
    read_foreground: Callable[[int], Tensor | None] | None = None
    read_part_masks: Callable[[int], Tensor] | None = None
    source_key: str = ""
    rows: tuple[int, ...] | None = None  # rows of the split this is a subset of: what the read_* functions are called with

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ConceptSample:
        return self.sample(index)

    def sample(self, index: int, *, image: bool = True, masks: bool = True) -> ConceptSample:
        """Row `index`; without `image` the picture is not decoded, without `masks` no mask is read."""
        row = self.rows[index] if self.rows is not None else index
        picture = self.read_image(row) if image else None
        return ConceptSample(
            image=picture,
            label=int(self.label_N[index]),
            concepts_M=self.concept_NM[index],
            index=index,
            name=self.names[index],
            size=(int(picture.shape[1]), int(picture.shape[2])) if picture is not None else self.read_size(row),
            points_P3=None if self.points_NP3 is None else self.points_NP3[index],
            box_4=None if self.box_N4 is None else self.box_N4[index],
            foreground_HW=self.read_foreground(row) if masks and self.read_foreground else None,
            part_masks_PHW=self.read_part_masks(row) if masks and self.read_part_masks else None,
            group=None if self.group_N is None else int(self.group_N[index]),
        )

    def subset(self, indices: Sequence[int], *, split: str | None = None) -> ConceptDataset:
        """The rows `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.long)

        def of(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[chosen]

        rows = self.rows if self.rows is not None else tuple(range(len(self)))
        return replace(
            self,
            split=split or self.split,
            names=tuple(self.names[i] for i in chosen.tolist()),
            label_N=self.label_N[chosen],
            concept_NM=self.concept_NM[chosen],
            points_NP3=of(self.points_NP3),
            box_N4=of(self.box_N4),
            group_N=of(self.group_N),
            rows=tuple(rows[i] for i in chosen.tolist()),
        )

    def fingerprint(self) -> str:
        """A hash of which pictures these are, in which order; not of their labels."""
        return hashlib.sha256("\n".join((self.source_key, *self.names)).encode()).hexdigest()


class ConceptSource(ABC):
    """A data set and the settings it is read with. Subclasses are one file each in `dotcbm/data/`."""

    @property
    @abstractmethod
    def concepts(self) -> ConceptSet:
        """The vocabulary, the same for all splits."""

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The names of the splits; "train" and "test" at least. Out-of-distribution splits carry their own names."""

    @abstractmethod
    def load(self, split: str) -> ConceptDataset:
        """Read one split.

        Raises:
            ValueError: An unknown split, or a file that is missing, truncated or mislabelled: file and row are named.
        """
