"""`dotcbm compare`: several audits side by side, with paired intervals of the differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dotcbm.cli.parser import Parser

if TYPE_CHECKING:
    from dotcbm.report.compare import Comparison

__all__ = ["find_record", "names_of", "run"]

_FILE = "audit.json"
_FEW = 10


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parser = Parser(
        command,
        "Put audits side by side: figures, findings, concepts, classes and pictures, with intervals of the differences.",
        epilog="example:\n  dotcbm compare dot=runs/birds/audit cbm=runs/cbm/audit --out compared",
    )
    parser.add_argument("audits", nargs="+", metavar="[NAME=]AUDIT", help="audit.json files, or folders that hold one")
    parser.add_argument("--against", metavar="NAME", help="the reference of the differences (default: the first)")
    parser.add_argument("--unpaired", action="store_true", help="compare audits of different pictures too, without pairing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.json, compare.md and compare.html there")
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="bootstrap draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--fdr", type=float, default=0.05, metavar="Q", help="false discovery rate of concepts and classes (default: 0.05)")
    given = parser.parse(arguments)
    if len(given.audits) < 2:
        parser.error("one audit was given; name two or more")

    named, paths = names_of(given.audits)
    from dotcbm.report.compare import compare
    from dotcbm.report.record_file import read_record

    records = [read_record(path) for path in paths]
    comparison = compare(
        records,
        named,
        against=given.against,
        unpaired=given.unpaired,
        num_draws=given.draws,
        seed=given.seed,
        false_discovery_rate=given.fdr,
    )
    written: tuple[Path, ...] = ()
    if given.out:
        from dotcbm.report.compare import write_comparison

        written = write_comparison(comparison, given.out)
    _say(comparison)
    for path in written:
        print(f"written: {path}")
    return 0


def find_record(path: Path) -> Path:
    """The record at a path: the file itself, `audit.json` in a folder, or in the one folder below it that has one.

    Raises:
        ValueError: There is none, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give what `dotcbm audit` wrote")
    if (path / _FILE).is_file():
        return path / _FILE
    below = sorted(path.glob(f"*/{_FILE}"))
    if len(below) > 1:
        raise ValueError(f"{path}: holds several audits ({', '.join(str(p.parent.name) for p in below)}); name one of them")
    if not below:
        raise ValueError(f"{path}: holds no {_FILE}; run `dotcbm audit` first, or give the file")
    return below[0]


def names_of(given: Sequence[str]) -> tuple[list[str], list[Path]]:
    """A name and a file for each audit: NAME=PATH as it says, else the parts of the paths in which they differ.

    Raises:
        ValueError: See `find_record`.
    """
    named: list[str | None] = []
    paths: list[Path] = []
    for word in given:
        name, sign, rest = word.partition("=")
        is_named = bool(sign and name) and not Path(word).exists()
        named.append(name if is_named else None)
        paths.append(find_record(Path(rest if is_named else word)))
    parts = [[part for part in path.absolute().parts if part != _FILE] for path in paths]
    shared = {part for part in parts[0] if all(part in other for other in parts)}
    names = []
    for name, path, own in zip(named, paths, parts, strict=True):
        differing = [part.removesuffix(".json") for part in own if part not in shared]
        names.append(name or "/".join(differing) or path.parent.name)
    return names, paths


def _say(c: Comparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dotcbm.report.compare.render import difference_text, value_text

    console = Console()
    first = c.names[c.against]
    others = [i for i in range(len(c.names)) if i != c.against]
    table = Table(title=f"{'Paired' if c.paired else 'Unpaired'} differences to {escape(first)}; * keeps clear of 0", title_justify="left")
    table.add_column("figure")
    for i in (c.against, *others):
        table.add_column(escape(c.names[i]), justify="right")
    for i in others:
        table.add_column(f"{escape(c.names[i])} − {escape(first)}", justify="right")
    table.add_column("how")
    for row in c.figures:
        table.add_row(
            escape(row.label),
            *(escape(value_text(row.values[i], row.unit)) for i in (c.against, *others)),
            *(escape(difference_text(row.differences[i], row.unit)) for i in others),
            row.how,
        )
    console.print(table)
    for note in c.notes:
        console.print(escape(note), highlight=False)
    if c.findings:
        found = Table(title="Findings", title_justify="left")
        for heading in ("finding", *c.names):
            found.add_column(escape(heading))
        for row in c.findings:
            cells = ("—" if s is None else escape(f"{s}: {t}") for s, t in zip(row.severities, row.titles, strict=True))
            found.add_row(escape(row.key), *cells)
        console.print(found)
    if not c.paired:
        return
    for i in others:
        name = c.names[i]
        for rows, measure, what in ((c.concepts, "auroc", "concepts in AUROC"), (c.classes, "recall", "classes in recall")):
            differing = c.different(rows, i, measure)
            shown = ", ".join(f"{row.name} {difference_text(row.differences[i], 'percent')}" for row in differing[:_FEW])
            more = f" and {len(differing) - _FEW} more" if len(differing) > _FEW else ""
            told = f"{name}: {len(differing)} of {c.tested(rows, i, measure)} {what} differ beyond chance (q <= {c.false_discovery_rate:g})"
            console.print(escape(told + (f": {shown}{more}" if shown else "")), highlight=False)
    for turned in c.turned:
        told = f"{turned.name}: {turned.gained} pictures right only here, {turned.lost} wrong only here (McNemar p = {turned.p:.2g})"
        console.print(escape(told), highlight=False)
