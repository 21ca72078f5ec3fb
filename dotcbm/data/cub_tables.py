"""The text tables of CUB-200-2011: read, and checked row by row, so that an error can name file and row.

Shape letters: I images, A attributes, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["by_id", "read_image_attributes", "read_percentages", "read_rows"]

_CHUNK = 1 << 24  # bytes of image_attribute_labels.txt (about 90 MB) that are parsed at once


def read_rows(path: Path, *, columns: Sequence[tuple[str, type]]) -> list[tuple[Any, ...]]:
    """The rows of a table whose columns are separated by blanks; a last column of type str may hold blanks itself.

    Args:
        path: The file.
        columns: Name and type (int, float or str) of each column.

    Raises:
        ValueError: The file is missing, empty or no text, or a row has another number of columns or a value of another type.
    """
    form = " ".join(f"<{name}>" for name, _ in columns)
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; it holds rows of the form {form}. Check the root folder, or unpack the archive again"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text ({error.reason} at byte {error.start}); unpack the archive again") from error
    if not lines:
        raise ValueError(f"{path}: is empty; expected rows of the form {form}")
    types = [kind for _, kind in columns]
    max_split = len(columns) - 1 if types[-1] is str else -1
    rows: list[tuple[Any, ...]] = []
    for number, line in enumerate(lines, 1):
        cells = line.split(maxsplit=max_split)
        if len(cells) != len(columns):
            raise ValueError(
                f"{path}: row {number} has {len(cells)} columns ({line[:60]!r}), expected {len(columns)}: {form}; the file may be truncated"
            )
        try:
            rows.append(tuple(kind(cell) for kind, cell in zip(types, cells, strict=True)))
        except ValueError:
            raise ValueError(f"{path}: row {number} reads {line[:60]!r}, expected {form} with {[t.__name__ for t in types]}") from None
    return rows


def by_id(
    path: Path, rows: Sequence[tuple[Any, ...]], *, ids: Sequence[int] | None = None, ids_from: Path | None = None
) -> dict[int, tuple[Any, ...]]:
    """The rows by the id in their first column, in the order of `ids` if given.

    Raises:
        ValueError: An id appears twice, or the file's ids are not those of `ids`, read from the file `ids_from`.
    """
    found: dict[int, tuple[Any, ...]] = {}
    known = None if ids is None else set(ids)
    for number, row in enumerate(rows, 1):
        if row[0] in found:
            raise ValueError(f"{path}: row {number} repeats id {row[0]}; each id has one row")
        if known is not None and row[0] not in known:
            raise ValueError(f"{path}: row {number} has id {row[0]}, which {ids_from} does not list; the tables must belong together")
        found[row[0]] = row
    if ids is None:
        return found
    missing = [i for i in ids if i not in found]
    if missing:
        raise ValueError(
            f"{path}: no row for id {missing[0]} of {ids_from} ({len(missing)} of {len(ids)} ids lack one, {len(rows)} rows read); "
            "the file may be truncated"
        )
    return {i: found[i] for i in ids}


def read_percentages(path: Path, *, num_classes: int, num_attributes: int) -> NDArray[np.float64]:
    """(C, A) share of a class's images that show an attribute, in [0, 1], from class_attribute_labels_continuous.txt.

    Raises:
        ValueError: Another number of rows or columns, or a value that is no percentage.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it holds one row of {num_attributes} percentages for each class") from None
    share_CA = np.empty((num_classes, num_attributes))
    for number, line in enumerate(lines, 1):
        cells = line.split()
        if len(cells) != num_attributes:
            raise ValueError(f"{path}: row {number} has {len(cells)} percentages, expected {num_attributes}, one for each attribute")
        if number > num_classes:
            break
        try:
            values = np.array([float(cell) for cell in cells])
        except ValueError as error:
            raise ValueError(f"{path}: row {number} holds a word among its percentages ({error})") from None
        wrong = np.flatnonzero((values < 0) | (values > 100))  # NaN passes: nobody knows
        if wrong.size:
            raise ValueError(f"{path}: row {number}, column {wrong[0] + 1} is {values[wrong[0]]:g}, expected a percentage from 0 to 100")
        share_CA[number - 1] = values / 100
    if len(lines) != num_classes:
        raise ValueError(f"{path}: {len(lines)} rows, expected {num_classes}, one for each class of classes.txt; the file may be truncated")
    return share_CA


def read_image_attributes(path: Path, *, image_ids: Sequence[int], num_attributes: int) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """(I, A) is_present in {0, 1} and (I, A) certainty in {1, 2, 3, 4}, from image_attribute_labels.txt.

    Rows are `<image id> <attribute id> <is present> <certainty> <seconds>`. A few rows of the original file carry extra
    columns after the certainty; their first four are read and the rest is ignored.

    Raises:
        ValueError: A row with fewer than four columns, an id or value out of range, a pair of image and attribute without a
            row or with two.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; without image-level labels take attributes='reference' or 'percentage' and labels='class'")
    row_of = np.full(max(image_ids) + 1, -1, dtype=np.int64)
    row_of[np.asarray(image_ids)] = np.arange(len(image_ids))
    present_IA = np.full((len(image_ids), num_attributes), -1, dtype=np.int8)
    certainty_IA = np.zeros_like(present_IA)
    done, rest = 0, b""
    with path.open("rb") as opened:
        while True:
            chunk = opened.read(_CHUNK)
            text = rest + chunk
            if chunk:
                cut = text.rfind(b"\n") + 1
                text, rest = text[:cut], text[cut:]
            if text.strip():
                values_R4 = _parse(text, path, first=done)
                _store(values_R4, path, first=done, row_of=row_of, present_IA=present_IA, certainty_IA=certainty_IA)
                done += len(values_R4)
            if not chunk:
                break
    missing = np.argwhere(present_IA < 0)
    if len(missing):
        i, a = missing[0]
        raise ValueError(
            f"{path}: no row for image {image_ids[i]} and attribute {a + 1} ({len(missing)} such pairs, {done} rows read); "
            "the file may be truncated"
        )
    return present_IA, certainty_IA


def _parse(text: bytes, path: Path, *, first: int) -> NDArray[np.int64]:
    """(R, 4) the first four columns of the rows in `text`, whose first row is number `first` + 1 of the file."""
    lines = text.rstrip(b"\n").split(b"\n")
    if all(line.count(b" ") == 4 for line in lines):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # numpy < 2.3 warns of words among the numbers, later ones raise
            try:
                flat = np.fromstring(text.decode("latin-1"), sep=" ")
            except ValueError:
                flat = np.empty(0)
        if flat.size == 5 * len(lines):
            values_R4 = flat.reshape(-1, 5)[:, :4]
            if (values_R4 == np.trunc(values_R4)).all():
                return values_R4.astype(np.int64)
    rows = np.empty((len(lines), 4), dtype=np.int64)
    for r, line in enumerate(lines):
        cells = line.split()
        try:
            if len(cells) < 5:
                raise ValueError
            rows[r] = [int(cell) for cell in cells[:4]]
        except ValueError:
            shown = line[:60].decode("latin-1")
            raise ValueError(
                f"{path}: row {first + r + 1} reads {shown!r}, expected <image id> <attribute id> <is present> <certainty> <seconds>; "
                "the file may be truncated"
            ) from None
    return rows


def _store(
    values_R4: NDArray[np.int64],
    path: Path,
    *,
    first: int,
    row_of: NDArray[np.int64],
    present_IA: NDArray[np.int8],
    certainty_IA: NDArray[np.int8],
) -> None:
    """Check one chunk of rows and write it into the matrices."""
    image, attribute, present, certainty = values_R4.T
    in_range = (image >= 0) & (image < len(row_of))
    row = np.where(in_range, row_of[np.where(in_range, image, 0)], -1)
    checks = (
        (row < 0, image, "image id", "an id that images.txt lists"),
        (
            (attribute < 1) | (attribute > present_IA.shape[1]),
            attribute,
            "attribute id",
            f"an id from 1 to {present_IA.shape[1]} (attributes.txt)",
        ),
        ((present != 0) & (present != 1), present, "is_present", "0 or 1"),
        ((certainty < 1) | (certainty > 4), certainty, "certainty", "1 (not visible), 2, 3 or 4"),
    )
    for wrong, column, what, expected in checks:
        if wrong.any():
            r = int(wrong.argmax())
            raise ValueError(f"{path}: row {first + r + 1} has {what} {column[r]}, expected {expected}")
    pair = row * present_IA.shape[1] + attribute - 1
    repeated = np.ones(len(pair), dtype=bool)
    repeated[np.unique(pair, return_index=True)[1]] = False
    repeated |= present_IA.reshape(-1)[pair] >= 0
    if repeated.any():
        r = int(repeated.argmax())
        raise ValueError(f"{path}: row {first + r + 1} repeats image {image[r]}, attribute {attribute[r]}; each pair has one row")
    present_IA.reshape(-1)[pair] = present
    certainty_IA.reshape(-1)[pair] = certainty
