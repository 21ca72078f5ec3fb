"""The pictures that a command line names: files and folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dotcbm.data.source import BadPictureError, read_picture
from dotcbm.models.concept_model import ConceptModel

__all__ = ["find_pictures", "prepared_batches"]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def find_pictures(places: Sequence[str | Path]) -> list[Path]:
    """Files as they are named, and the pictures in and below folders, sorted by path.

    Raises:
        ValueError: A place that does not exist, or a folder without pictures.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
            if not inside:
                raise ValueError(f"{place}: no picture in this folder or below it; looked for {', '.join(sorted(_SUFFIXES))}")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place}: no such picture or folder")
    return list(dict.fromkeys(found))


def prepared_batches(
    model: ConceptModel, paths: Sequence[Path], *, batch_size: int, skipped: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of (paths, prepared pictures). Pictures that cannot be decoded are left out; why goes to `skipped`."""
    kept: list[Path] = []
    prepared: list[Tensor] = []
    for path in paths:
        try:
            prepared.append(model.prepare([read_picture(path)])[0])
        except BadPictureError as error:
            skipped.append(str(error))
            continue
        kept.append(path)
        if len(kept) == batch_size:
            yield kept, torch.stack(prepared)
            kept, prepared = [], []
    if kept:
        yield kept, torch.stack(prepared)
