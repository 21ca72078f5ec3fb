"""Pictures, masks, key points and boxes of CUB and Waterbirds.

Shape letters: N pictures of a split, I images of the tables, P parts.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dotcbm.data.cub_tables import by_id, read_rows
from dotcbm.data.source import BadPictureError, read_picture

__all__ = [
    "MaskReader",
    "PictureReader",
    "check_files",
    "check_same_shape",
    "in_picture",
    "pictures_key",
    "read_bad_masks",
    "read_part_locations",
    "read_picture_size",
]

Size = tuple[int, int]  # height, width

_OUTSIDE = 0.02  # a coordinate this far outside (share of the side) is wrong; nearer ones are clicks on the edge
_FEW = 0.05  # the original has some such pictures (a box of class 22); more than this share means pictures of another size
_MIN_MASK_QUALITY = 0.8  # share of the visible key points inside the mask, from mask_quality.csv


@dataclass(frozen=True)
class PictureReader:
    """Row -> (3, H, W) uint8. A class and no closure, so that worker processes can receive it."""

    paths: Sequence[Path]

    def __call__(self, row: int) -> Tensor:
        return read_picture(self.paths[row])


@dataclass(frozen=True)
class MaskReader:
    """Row -> (H, W) bool at the size of the row's picture (of the twin, where the picture is one), or None without a mask."""

    paths: Sequence[Path | None]
    sizes: Sequence[Size]

    def __call__(self, row: int) -> Tensor | None:
        path = self.paths[row]
        if path is None:
            return None
        h, w = self.sizes[row]
        try:
            with Image.open(path) as opened:
                grey = opened.convert("L")
        except (OSError, SyntaxError, ValueError) as error:
            raise BadPictureError(f"{path}: cannot be decoded as a mask ({error}); replace or remove the file") from error
        if grey.size != (w, h):
            check_same_shape(path, (grey.height, grey.width), of=(h, w))
            grey = grey.resize((w, h), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(grey) >= 128)  # the official masks are grey where their annotators disagree


def read_picture_size(path: Path) -> Size:
    """(height, width) as `read_picture` will give it, from the file's head only.

    Raises:
        BadPictureError: The file is missing or no picture.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
    except FileNotFoundError:
        raise BadPictureError(f"{path}: no such picture; check the data set's root folder and the row that names it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"{path}: cannot be decoded as a picture ({error}); replace or remove the file") from error
    return (width, height) if turned else (height, width)


def check_files(paths: Sequence[Path], *, table: Path) -> None:
    """Look for files without opening one.

    Raises:
        ValueError: Some are missing; the first five are named.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(str(path) for path in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of the {len(paths)} pictures that {table} lists are missing: {shown}; unpack the archive again")


def check_same_shape(path: Path, size: Size, *, of: Size) -> None:
    """Two pictures must have the same aspect ratio, up to the rounding of their sides to whole pixels.

    Raises:
        ValueError: They have not: one was cropped or shows something else.
    """
    (h, w), (h0, w0) = size, of
    if abs(w * h0 - w0 * h) > max(w, h) + max(w0, h0):  # d(w h0) <= h0 dw + w dh0 with errors of a pixel on either side
        raise ValueError(f"{path}: {w} x {h} pixels do not have the shape of {w0} x {h0}; expected the same picture, uncropped")


def pictures_key(paths: Sequence[Path]) -> str:
    """A hash of the files' lengths: it changes when pictures are exchanged and stays when the folder moves."""
    lengths = ",".join(str(path.stat().st_size) for path in paths)
    return hashlib.sha256(lengths.encode()).hexdigest()[:16]


def in_picture(
    xy_NX2: NDArray[np.float64], sizes: Sequence[Size], *, known_NX: NDArray[np.bool_], path: Path, names: Sequence[str]
) -> NDArray[np.float64]:
    """(N, X, 2) pixel coordinates as fractions of the pictures, clipped to [0, 1]; 0 where not `known_NX`.

    Raises:
        ValueError: More than 5 % of the pictures have coordinates well outside. Fewer are clipped, with a warning.
    """
    width_height_N12 = np.array([[(w, h)] for h, w in sizes], dtype=float)
    xy = np.where(known_NX[..., None], xy_NX2, 0) / width_height_N12
    far_N = ((xy < -_OUTSIDE) | (xy > 1 + _OUTSIDE)).any((1, 2))
    if far_N.any():
        n = int(far_N.argmax())
        h, w = sizes[n]
        first = f"the first {names[n]} ({w} x {h} pixels)"
        what = f"{path}: {int(far_N.sum())} of {len(names)} pictures have coordinates outside the picture, {first}"
        if far_N.mean() > _FEW:
            raise ValueError(f"{what}; the annotations belong to pictures of another size")
        warnings.warn(f"{what}; they are moved to its edge", stacklevel=2)
    return xy.clip(0, 1)


def read_part_locations(folder: Path, *, image_ids: Sequence[int]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The part names, and (I, P, 3) x and y in pixels and visible, from parts/.

    Raises:
        ValueError: A row that names an unknown image or part, or a pair of image and part without a row or with two.
    """
    parts = by_id(folder / "parts.txt", read_rows(folder / "parts.txt", columns=(("part id", int), ("name", str))))
    path = folder / "part_locs.txt"
    columns = (("image id", int), ("part id", int), ("x", float), ("y", float), ("visible", int))
    row_of = {image: i for i, image in enumerate(image_ids)}
    column_of = {part: p for p, part in enumerate(parts)}
    points_IP3 = np.full((len(row_of), len(parts), 3), np.nan)
    for number, (image, part, x, y, visible) in enumerate(read_rows(path, columns=columns), 1):
        if image not in row_of:
            raise ValueError(f"{path}: row {number} has image {image}, which images.txt does not list; the tables must belong together")
        if part not in column_of:
            raise ValueError(f"{path}: row {number} has part {part}, which parts.txt does not list (it lists {list(parts)})")
        if visible not in (0, 1):
            raise ValueError(f"{path}: row {number} has visible {visible}, expected 0 or 1")
        if not np.isnan(points_IP3[row_of[image], column_of[part], 2]):
            raise ValueError(f"{path}: row {number} repeats image {image}, part {part}; each pair has one row")
        points_IP3[row_of[image], column_of[part]] = (x, y, visible)
    missing = np.argwhere(np.isnan(points_IP3[..., 2]))
    if len(missing):
        i, p = missing[0]
        pair = f"image {image_ids[i]} and part {list(parts)[p]}"
        raise ValueError(f"{path}: no row for {pair} ({len(missing)} such pairs); the file may be truncated")
    return tuple(str(row[1]) for row in parts.values()), points_IP3


def read_bad_masks(path: Path) -> frozenset[int]:
    """The ids of the images whose mask misses more than a fifth of the visible key points; none without the file.

    Raises:
        ValueError: A row that is not `image_id,visible_parts_in_mask,...`.
    """
    if not path.is_file():
        return frozenset()
    bad = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
        cells = line.split(",")
        try:
            image, quality = int(cells[0]), float(cells[1])
        except (ValueError, IndexError):
            raise ValueError(f"{path}: row {number} reads {line[:60]!r}, expected image_id,visible_parts_in_mask,...") from None
        if not quality >= _MIN_MASK_QUALITY:  # NaN too: no visible part to judge by
            bad.add(image)
    return frozenset(bad)
