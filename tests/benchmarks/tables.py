"""A table once, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from .timing import Samples

__all__ = ["Table", "milliseconds", "number"]


@dataclass(frozen=True)
class Table:
    """What one measurement found, as text.

    Attributes:
        title: Says what was measured.
        columns: Headings.
        rows: One text a column.
        note: How to read it; empty for none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a report."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else []), ""])


def milliseconds(samples: Samples) -> str:
    """Median and spread."""
    low, high = samples.spread
    return f"{number(samples.median)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three digits that count, without an exponent where the size allows."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
