"""Pictures that belong to no data set: files and folders given by name, of which nothing is known."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dotcbm.data.source import ConceptDataset, read_picture
from dotcbm.structures import ConceptSet

__all__ = ["loose_pictures"]


def loose_pictures(given: Iterable[str], *, concepts: ConceptSet) -> ConceptDataset:
    """A split "predict" of the pictures, in the order given; those of a folder by name. Labels are -1 and concepts unknown.

    Args:
        given: Picture files, and folders that are searched with all that is below them.
        concepts: The vocabulary.

    Raises:
        ValueError: There is no picture.
    """
    paths = tuple(_picture_paths(given))
    if not paths:
        raise ValueError(f"no pictures in {list(given)}; give picture files, or folders that hold some")
    return ConceptDataset(
        concepts=concepts,
        split="predict",
        names=tuple(str(path) for path in paths),
        label_N=torch.full((len(paths),), -1),
        concept_NM=torch.full((len(paths), concepts.num_concepts), torch.nan),
        read_image=partial(_read_nth, paths),
        read_size=partial(_size_of_nth, paths),
    )


def _picture_paths(given: Iterable[str]) -> Iterable[Path]:
    known = Image.registered_extensions()
    for path in map(Path, given):
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
        else:
            yield path


def _read_nth(paths: tuple[Path, ...], row: int) -> Tensor:
    return read_picture(paths[row])


def _size_of_nth(paths: tuple[Path, ...], row: int) -> tuple[int, int]:
    picture = _read_nth(paths, row)
    return int(picture.shape[1]), int(picture.shape[2])
