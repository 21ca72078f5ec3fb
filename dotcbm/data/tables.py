"""Tables that people write by hand: CSV files whose every complaint names the row, the column and the value.

Shape letters: N rows, M concepts.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ConceptColumns", "Table", "near_match", "read_concept_columns", "read_lines", "read_table", "readable"]

BINARY = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
UNKNOWN = frozenset({"", "nan", "na", "n/a", "?", "unknown"})


def near_match(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' when something in `known` is spelt like `name` (letter case apart), else an empty string."""
    folded = {str(k).casefold(): str(k) for k in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f"; did you mean '{folded[close[0]]}'?" if close else ""


def readable(name: str) -> str:
    """'bill_shape' -> 'bill shape'; runs of blanks become one."""
    return " ".join(name.replace("_", " ").split())


def read_lines(path: Path, *, what: str) -> list[str]:
    """The lines of a UTF-8 text file.

    Raises:
        ValueError: The file is missing or no UTF-8 text; the message says `what` was expected in it.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        here = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        found = f"the folder {path.parent} does not exist" if here is None else f"its folder holds {here[:8]}{near_match(path.name, here)}"
        raise ValueError(f"{path}: no such file; expected {what}; {found}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; expected {what}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; expected {what}, saved as UTF-8 text") from error


@dataclass(frozen=True)
class Table:
    """A CSV file in memory.

    Attributes:
        path: Where it was read.
        columns: Column names, unique.
        rows: Cells as text, blanks at the ends removed.
        lines: For each row its line in the file (the header is line 1), as an editor or spreadsheet numbers it.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def column(self, name: str, *, what: str, option: str | None = None) -> list[str]:
        """The cells of a column; `what` it holds and the constructor's `option` that names it go into the message.

        Raises:
            ValueError: There is no such column.
        """
        if name not in self.columns:
            hint = f"; name another column with {option}=..." if option else ""
            raise ValueError(
                f"{self.path}: no column '{name}' ({what}); the columns are {list(self.columns)}{near_match(name, self.columns)}{hint}"
            )
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def where(self, i: int) -> str:
        """'FILE, row 7' for row i."""
        return f"{self.path}, row {self.lines[i]}"


def read_table(path: Path, *, what: str) -> Table:
    """A CSV file with a header, separated by commas, semicolons or tabs (whichever the header has most of).

    Raises:
        ValueError: Missing file, no rows, an unnamed or doubled column, or a row with more or fewer cells than the header.
    """
    lines = read_lines(path, what=what)
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}: the first line is empty; expected a header with the column names ({what})")
    separator = max(",;\t", key=lines[0].count)
    reader = csv.reader((line + "\n" for line in lines), delimiter=separator, skipinitialspace=True)
    columns = tuple(name.strip() for name in next(reader))
    for i, name in enumerate(columns):
        if not name:
            raise ValueError(f"{path}: column {i + 1} has no name (pandas writes its index so: use to_csv(index=False)); name or remove it")
        if name in columns[:i]:
            raise ValueError(f"{path}: the column '{name}' appears twice; rename or remove one")
    rows: list[tuple[str, ...]] = []
    numbers: list[int] = []
    for cells in reader:
        if not cells or not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise ValueError(f"{path}, row {reader.line_num}: {len(cells)} cells, but the header has {len(columns)} columns")
        rows.append(tuple(cell.strip() for cell in cells))
        numbers.append(reader.line_num)
    if not rows:
        raise ValueError(f"{path}: a header and no rows; expected {what}")
    return Table(path=path, columns=columns, rows=tuple(rows), lines=tuple(numbers))


@dataclass(frozen=True)
class ConceptColumns:
    """Concepts that a table's columns spell out.

    Attributes:
        names: M concept names.
        groups: For each concept the column it came from, or its own name.
        value_NM: (N, M) in [0, 1], NaN where unknown.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    value_NM: Tensor


def read_concept_columns(
    table: Table, *, columns: Sequence[str], categorical: Sequence[str] = (), max_values: int = 50, fractions: bool = False
) -> ConceptColumns:
    """Read columns as concepts: yes-or-no columns as they are, columns of words as one concept a value.

    A column with at least one of 0, 1, true, false, yes, no is a yes-or-no column, and then each of its cells must be one
    of these or unknown (empty, ?, nan, na, n/a, unknown). Any other column is categorical: `cell_shape` with the values round and
    irregular gives "cell shape: irregular" and "cell shape: round" in the group "cell shape". A yes-or-no column whose
    own name is "bill shape: hooked" (or "bill_shape::hooked") belongs to the group "bill shape".

    Args:
        table: Where the columns are.
        columns: Their names, in the order the concepts shall have.
        categorical: Columns to take as categorical whatever they hold (grades 0, 1, 2).
        max_values: A categorical column with more values is refused, being most likely an identifier.
        fractions: Allow numbers between 0 and 1 in yes-or-no columns.

    Raises:
        ValueError: A cell that fits neither reading, or a column with too many values or none.
    """
    names: list[str] = []
    groups: list[str] = []
    values: list[list[float]] = []
    for column in columns:
        cells = table.column(column, what="concept")
        known = {cell for cell in cells if cell.casefold() not in UNKNOWN}
        if not known:
            raise ValueError(f"{table.path}: the concept column '{column}' knows no value; fill it in or name it in ignore_columns")
        binary = column not in categorical and any(cell.casefold() in BINARY or (fractions and _number(cell) is not None) for cell in known)
        if binary:
            names.append(readable(column.replace("::", ": ")))
            groups.append(names[-1].split(":")[0].strip())
            values.append([_binary(cell, table=table, row=i, column=column, fractions=fractions) for i, cell in enumerate(cells)])
            continue
        if len(known) > max_values:
            raise ValueError(
                f"{table.path}: the column '{column}' has {len(known)} different values ({sorted(known)[:3]}, ...), more than "
                f"max_values={max_values}; if it is no concept, name it in ignore_columns"
            )
        if column not in categorical:
            for i, cell in enumerate(cells):
                if cell in known and _number(cell) is not None:
                    raise ValueError(
                        f"{table.where(i)}, column '{column}': the value '{cell}' is neither 0/1 nor a word; name the column in "
                        "ignore_columns, or in categorical_columns to make each number a concept"
                    )
        for value in sorted(known, key=lambda v: (_number(v) if _number(v) is not None else math.inf, v)):
            names.append(f"{readable(column)}: {readable(value)}")
            groups.append(readable(column))
            values.append([math.nan if cell.casefold() in UNKNOWN else float(cell == value) for cell in cells])
    if not names:
        raise ValueError(f"{table.path}: no concept column is left; the columns are {list(table.columns)}")
    folded = [name.casefold() for name in names]
    doubled = sorted({name for name in names if folded.count(name.casefold()) > 1})
    if doubled:
        raise ValueError(
            f"{table.path}: several columns or values give the concepts {doubled[:5]} "
            "('_', blanks and letter case make no difference); rename them"
        )
    return ConceptColumns(names=tuple(names), groups=tuple(groups), value_NM=torch.tensor(values, dtype=torch.float32).T.contiguous())


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _binary(cell: str, *, table: Table, row: int, column: str, fractions: bool) -> float:
    folded = cell.casefold()
    if folded in UNKNOWN:
        return math.nan
    if folded in BINARY:
        return BINARY[folded]
    value = _number(cell) if fractions else None
    if value is not None and 0 <= value <= 1:
        return value
    allowed = "0, 1, true, false, yes, no, a share between 0 and 1" if fractions else "0, 1, true, false, yes, no"
    raise ValueError(
        f"{table.where(row)}, column '{column}': the value '{cell}' is none of {allowed} or empty (unknown)"
        f"{near_match(cell, ('true', 'false', 'yes', 'no'))}"
    )
