"""metadata.csv of Waterbirds: read, and checked row by row."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SPLITS", "MetadataRow", "read_metadata", "without_suffix"]

SPLITS = ("train", "val", "test")  # 0, 1, 2 in the file

_COLUMNS = ("img_id", "img_filename", "y", "split", "place")


@dataclass(frozen=True)
class MetadataRow:
    """A row of metadata.csv.

    Attributes:
        number: Its line in the file; the header is line 1.
        filename: The picture's path below the root.
        y: 0 landbird, 1 waterbird.
        split: Index into `SPLITS`.
        place: 0 land, 1 water.
    """

    number: int
    filename: str
    y: int
    split: int
    place: int

    @property
    def species(self) -> str:
        """The CUB class of the bird, by the folder it lies in."""
        return self.filename.partition("/")[0]


def read_metadata(root: Path) -> list[MetadataRow]:
    """The rows of metadata.csv.

    Raises:
        ValueError: The file or a column is missing, or a row has a value that is not allowed.
    """
    path = root / "metadata.csv"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; root is the folder of Waterbirds that holds metadata.csv and one folder for each species"
        ) from None
    reader = csv.reader(lines)
    header = next(reader, [])
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path}: row 1 lacks the columns {missing} (found {header}); expected {', '.join(_COLUMNS)}")
    at = {name: header.index(name) for name in _COLUMNS}
    rows: list[MetadataRow] = []
    seen: dict[str, int] = {}
    for number, cells in enumerate(reader, 2):
        if len(cells) != len(header):
            raise ValueError(
                f"{path}: row {number} has {len(cells)} columns, expected {len(header)}: {','.join(header)}; the file may be truncated"
            )
        values = {}
        for name, allowed in (("y", ("0", "1")), ("split", ("0", "1", "2")), ("place", ("0", "1"))):
            cell = cells[at[name]]
            if cell not in allowed:
                raise ValueError(f"{path}: row {number} has {name} {cell!r}, expected one of {', '.join(allowed)}")
            values[name] = int(cell)
        filename = cells[at["img_filename"]]
        if filename in seen:
            raise ValueError(f"{path}: row {number} repeats {filename} of row {seen[filename]}; each picture has one row")
        seen[filename] = number
        rows.append(MetadataRow(number=number, filename=filename, y=values["y"], split=values["split"], place=values["place"]))
    if not rows:
        raise ValueError(f"{path}: has no rows below its header")
    return rows


def without_suffix(name: str) -> str:
    """The path without its ending: CUB and Waterbirds name a bird alike, but may store it in other formats."""
    return name[: name.rindex(".")] if "." in name.rpartition("/")[2] else name
