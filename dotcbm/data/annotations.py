"""Pictures on disk and what was drawn onto them: sizes, masks, parts; and a split by hash where nobody chose one.

Shape letters: N pictures, P parts, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dotcbm.data.source import BadPictureError, read_picture
from dotcbm.data.tables import Table, near_match, read_table

__all__ = [
    "PICTURE_SUFFIXES",
    "Parts",
    "PictureFiles",
    "hash_split",
    "picture_size",
    "read_boxes",
    "read_concept_parts",
    "read_mask",
    "read_parts",
]

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 turn the picture by 90 degrees
_CORNERS = ("x0", "y0", "x1", "y1")


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, from the file's header alone.

    Raises:
        BadPictureError: The file is missing or no picture.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise BadPictureError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"{path}: cannot be decoded as a picture ({error}); replace or remove the file") from error
    return (width, height) if turned else (height, width)


def read_mask(path: Path, *, size: tuple[int, int], picture: Path) -> Tensor:
    """A mask file as (H, W) bool: above the middle of an 8-bit range, or above 0 for masks of 0 and 1 and index colours.

    Raises:
        ValueError: The file cannot be decoded, or differs in size from its picture.
    """
    try:
        with Image.open(path) as opened:
            index = opened.mode == "P"
            mask = np.array(opened if index or opened.mode.startswith("I") else opened.convert("L"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"{path}: cannot be decoded as a mask ({error}); replace or remove the file") from error
    if mask.shape != size:
        raise ValueError(_differs(path, seen=mask.shape, picture=picture, expected=size))
    return torch.from_numpy(mask > (127 if not index and mask.max(initial=0) > 1 else 0))


def _differs(path: Path, *, seen: tuple[int, ...], picture: Path, expected: tuple[int, int]) -> str:
    return (
        f"{path}: the mask is {seen[1]} x {seen[0]} pixels, its picture {picture} is {expected[1]} x {expected[0]}; "
        "save the mask at the picture's size"
    )


@dataclass(frozen=True)
class PictureFiles:
    """The files of N pictures; its methods are the `read_*` functions of a `ConceptDataset`.

    Attributes:
        paths: The pictures.
        masks: For each picture its foreground mask, or None.
        part_masks: For each picture and part a mask, or None; empty if there are none at all.
        part_boxes_NP4: Part boxes as fractions, NaN where unknown: a part without a mask file is its box.
    """

    paths: tuple[Path, ...]
    masks: tuple[Path | None, ...] = ()
    part_masks: tuple[tuple[Path | None, ...], ...] = ()
    part_boxes_NP4: Tensor | None = None

    def image(self, row: int) -> Tensor:
        """(3, H, W) uint8."""
        return read_picture(self.paths[row])

    def size(self, row: int) -> tuple[int, int]:
        """(height, width)."""
        return picture_size(self.paths[row])

    def foreground(self, row: int) -> Tensor | None:
        """(H, W) bool, or None for a picture without a mask."""
        path = self.masks[row]
        return None if path is None else read_mask(path, size=self.size(row), picture=self.paths[row])

    def parts(self, row: int) -> Tensor:
        """(P, H, W) bool: False everywhere for a part that has neither mask nor box here."""
        height, width = self.size(row)
        files = self.part_masks[row] if self.part_masks else ()
        boxes_P4 = None if self.part_boxes_NP4 is None else self.part_boxes_NP4[row]
        num_parts = len(files) if boxes_P4 is None else len(boxes_P4)
        masks = torch.zeros(num_parts, height, width, dtype=torch.bool)
        for p in range(num_parts):
            path = files[p] if files else None
            if path is not None:
                masks[p] = read_mask(path, size=(height, width), picture=self.paths[row])
            elif boxes_P4 is not None and not boxes_P4[p].isnan().any():
                x0, y0, x1, y1 = (boxes_P4[p] * torch.tensor([width, height, width, height])).round().int().tolist()
                masks[p, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
        return masks

    def check_masks(self) -> None:
        """Compare the size of every mask with its picture's, from the headers.

        Raises:
            ValueError: The first mask that differs.
        """
        for row, picture in enumerate(self.paths):
            masks = [*(self.masks[row : row + 1]), *(self.part_masks[row] if self.part_masks else ())]
            found = [path for path in masks if path is not None]
            expected = self.size(row) if found else (0, 0)
            for path in found:
                seen = picture_size(path)
                if seen != expected:
                    raise ValueError(_differs(path, seen=seen, picture=picture, expected=expected))


@dataclass(frozen=True)
class Parts:
    """Where parts are. `names` has P entries; see `ConceptDataset` for `points_NP3`, `PictureFiles` for `boxes_NP4`."""

    names: tuple[str, ...] = ()
    points_NP3: Tensor | None = None
    boxes_NP4: Tensor | None = None


def read_parts(path: Path, *, row_of: Callable[[str], int | None], size: Callable[[int], tuple[int, int]], num_pictures: int) -> Parts:
    """Part points (columns image, part, x, y) or part boxes (image, part, x0, y0, x1, y1), in pixels; optionally visible (0/1).

    A box is also a point, its centre. A part that has no row for a picture is not visible there.

    Args:
        path: The CSV file.
        row_of: Image as written -> row in 0 ... N-1, or None for a picture that is not in the data set.
        size: Row -> (height, width) of the picture.
        num_pictures: N.

    Raises:
        ValueError: A missing column, an unknown picture, a point outside its picture, a doubled row: file and row are named.
    """
    table = read_table(path, what="columns image, part and x, y (points) or x0, y0, x1, y1 (boxes), in pixels")
    images = table.column("image", what="the picture")
    parts = table.column("part", what="the part's name")
    boxed = "x0" in table.columns
    axes = _CORNERS if boxed else ("x", "y")
    cells = [table.column(axis, what="pixels from the left or top of the picture") for axis in axes]
    visible = table.column("visible", what="0 or 1") if "visible" in table.columns else ["1"] * len(images)
    names = tuple(dict.fromkeys(parts))
    points_NP3 = torch.zeros(num_pictures, len(names), 3)
    boxes_NP4 = torch.full((num_pictures, len(names), 4), torch.nan) if boxed else None
    seen: dict[tuple[int, str], int] = {}
    for i, (image, part) in enumerate(zip(images, parts, strict=True)):
        row = _row(table, i, image=image, row_of=row_of)
        if not part:
            raise ValueError(f"{table.where(i)}: the part has no name")
        if (row, part) in seen:
            raise ValueError(f"{table.where(i)}: '{part}' of '{image}' is already in row {table.lines[seen[row, part]]}; keep one of them")
        seen[row, part] = i
        if visible[i].casefold() not in ("0", "1", "true", "false", "yes", "no"):
            raise ValueError(f"{table.where(i)}, column 'visible': '{visible[i]}' is neither 0 nor 1")
        if visible[i].casefold() in ("0", "false", "no"):
            continue
        place = _fractions(table, i, axes=axes, cells=[column[i] for column in cells], size=size(row), what=f"'{part}' of '{image}'")
        p = names.index(part)
        if boxes_NP4 is not None:
            boxes_NP4[row, p] = torch.tensor(place)
            place = [(place[0] + place[2]) / 2, (place[1] + place[3]) / 2]
        points_NP3[row, p] = torch.tensor([*place, 1.0])
    return Parts(names=names, points_NP3=points_NP3, boxes_NP4=boxes_NP4)


def read_boxes(path: Path, *, row_of: Callable[[str], int | None], size: Callable[[int], tuple[int, int]], names: Sequence[str]) -> Tensor:
    """(N, 4) boxes of the objects as fractions, from the columns image, x0, y0, x1, y1 in pixels; every picture needs one.

    Raises:
        ValueError: As `read_parts`, and a picture without a box.
    """
    table = read_table(path, what="columns image, x0, y0, x1, y1 in pixels")
    images = table.column("image", what="the picture")
    cells = [table.column(axis, what="pixels") for axis in _CORNERS]
    boxes_N4 = torch.full((len(names), 4), torch.nan)
    for i, image in enumerate(images):
        row = _row(table, i, image=image, row_of=row_of)
        if not boxes_N4[row].isnan().all():
            raise ValueError(f"{table.where(i)}: '{image}' has a box already; keep one of them")
        place = _fractions(table, i, axes=_CORNERS, cells=[column[i] for column in cells], size=size(row), what=f"the box of '{image}'")
        boxes_N4[row] = torch.tensor(place)
    without = [name for name, box in zip(names, boxes_N4, strict=True) if box.isnan().any()]
    if without:
        raise ValueError(
            f"{path}: {len(without)} of {len(names)} pictures have no box, the first is '{without[0]}'; give each one or remove the file"
        )
    return boxes_N4


def _row(table: Table, i: int, *, image: str, row_of: Callable[[str], int | None]) -> int:
    row = row_of(image)
    if row is None:
        raise ValueError(f"{table.where(i)}: the picture '{image}' is not in the data set; expected a picture that has concepts")
    return row


def _fractions(table: Table, i: int, *, axes: Sequence[str], cells: Sequence[str], size: tuple[int, int], what: str) -> list[float]:
    """Pixels to fractions of the picture; axes that begin with x are measured against its width."""
    place: list[float] = []
    for axis, cell in zip(axes, cells, strict=True):
        side = size[1] if axis.startswith("x") else size[0]
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"{table.where(i)}, column '{axis}': '{cell}' is no number; expected pixels from 0 to {side}") from None
        if not 0 <= value <= side:
            raise ValueError(
                f"{table.where(i)}, column '{axis}': {what} is at {value:g}, outside the picture of {size[1]} x {size[0]} pixels "
                "(width x height); a part that cannot be seen has visible = 0"
            )
        place.append(value / side)
    if len(place) == 4 and (place[0] >= place[2] or place[1] >= place[3]):
        raise ValueError(f"{table.where(i)}: {what} is empty: expected x0 < x1 and y0 < y1, found {', '.join(cells)}")
    return place


def read_concept_parts(
    path: Path, *, concepts: Sequence[str], groups: Sequence[str], part_names: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """For each concept its parts, from the columns concept and part, one pair a row.

    Args:
        path: The CSV file.
        concepts: M concept names; a row may also name a group and then speaks of all its concepts.
        groups: M group names.
        part_names: The parts there are; if empty, any name is a part.

    Raises:
        ValueError: An unknown concept or part: file and row are named.
    """
    table = read_table(path, what="columns concept and part")
    found: list[list[str]] = [[] for _ in concepts]
    pairs = zip(table.column("concept", what="concept or group"), table.column("part", what="the part's name"), strict=True)
    for i, (concept, part) in enumerate(pairs):
        if part_names and part not in part_names:
            raise ValueError(
                f"{table.where(i)}: the part '{part}' is unknown; the parts are {list(part_names)}{near_match(part, part_names)}"
            )
        wanted = " ".join(concept.replace("::", ": ").replace("_", " ").split()).casefold()
        rows = [j for j, name in enumerate(concepts) if wanted in (name.casefold(), groups[j].casefold())]
        if not rows:
            known = [*concepts, *groups]
            raise ValueError(
                f"{table.where(i)}: the concept '{concept}' is unknown{near_match(wanted, known) or f'; some that exist: {known[:5]}'}"
            )
        for j in rows:
            if part not in found[j]:
                found[j].append(part)
    return tuple(tuple(row) for row in found)


def hash_split(names: Sequence[str], *, labels: Sequence[int], fractions: Mapping[str, float], seed: int) -> list[str]:
    """A split for each picture: the same on every machine, stratified by class, without a stored list.

    The pictures of a class are ordered by SHA-256 of "<seed>:<name>"; each split of `fractions` takes
    round(fraction * n) of the n pictures in turn, at least one where n allows, and "train" takes the rest, at least one.

    Raises:
        ValueError: Fractions outside [0, 1) or of 1 and more together.
    """
    if any(not 0 <= f < 1 for f in fractions.values()) or sum(fractions.values()) >= 1:
        raise ValueError(f"the fractions {dict(fractions)} must each be in [0, 1) and leave something for train (a sum below 1)")
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    splits = ["train"] * len(names)
    for rows in by_class.values():
        rows.sort(key=lambda i: hashlib.sha256(f"{seed}:{names[i]}".encode()).digest())
        left = rows
        for split, fraction in fractions.items():
            count = min(max(round(fraction * len(rows)), int(fraction > 0)), len(left) - 1)
            for i in left[:count]:
                splits[i] = split
            left = left[count:]
    return splits
