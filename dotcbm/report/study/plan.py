"""A study: many bottlenecks and seeds, in one or several worlds, as its YAML says; and the records that its runs leave.

A world is a data set with an encoder and settings. Each run trains one method with one seed in one world, by the trainer, the
features and the evaluation that all share, and leaves one JSON record and, where the study asks for it, the record of an audit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dotcbm.catalog import subclasses
from dotcbm.data.source import ConceptSource
from dotcbm.models.base import Bottleneck
from dotcbm.report.study.grid import expand

__all__ = [
    "MAIN",
    "Claim",
    "Record",
    "Row",
    "Run",
    "Study",
    "World",
    "check_settings",
    "make_source",
    "read_records",
    "read_run",
    "read_study",
    "run_settings",
    "runs_of",
    "source_of",
]

MAIN = "main"
"""Name of the world that the study's own keys describe."""


@dataclass(frozen=True)
class World:
    """Where methods are trained and measured.

    Attributes:
        encoder: Arguments of `ImageEncoder`.
        source: {"class": a source's class name, and its arguments}; an argument that is such a mapping is a source too, and an
            argument "{seed}" is the seed of the run.
        data: Arguments of `ConceptDataModule`.
        task: Arguments of `ConceptTask` shared by all rows.
        epochs: Passes over the training pictures.
        audit: {"split": what to audit after each run, and arguments of `AuditSettings`}, figures only by default; None for no audit.
        places: Whether the tests measure where the maps point.
    """

    encoder: Mapping[str, Any]
    source: Mapping[str, Any]
    data: Mapping[str, Any]
    task: Mapping[str, Any]
    epochs: int
    audit: Mapping[str, Any] | None = None
    places: bool = True


@dataclass(frozen=True)
class Row:
    """One method of a study.

    Attributes:
        name: Unique; names the records and the line of the table.
        bottleneck: Class name.
        settings: Its settings.
        task: Settings of `ConceptTask` on top of the world's.
        epochs: Instead of the worlds', or {world: epochs} for some of them.
        worlds: Where it is run; everywhere by default.
        of: Name of the row of whose grid this is a trial (`dotcbm.report.study.grid`); its own name without one.
    """

    name: str
    bottleneck: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | Mapping[str, int] | None = None
    worlds: Sequence[str] | None = None
    of: str = ""

    @property
    def method(self) -> str:
        """The name that all trials of a grid share."""
        return self.of or self.name

    def epochs_in(self, name: str, world: World) -> int:
        """Passes over the training pictures of a world."""
        told = self.epochs.get(name) if isinstance(self.epochs, Mapping) else self.epochs
        return told or world.epochs

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Claim:
    """A question that the study answers by one table and one figure.

    Attributes:
        name: Names the files.
        question: Heads the table.
        columns: Pairs of a figure and a heading. A figure is "[world:]split/name"; "a,b/name" or "a/x,b/y" puts two into a cell;
            alternative names, of which the first that a record has is taken, are separated by "|". A column headed "its control"
            belongs to the one before it, and is drawn there.
        rows: Names of the rows shown; all by default.
        better: Which way is good, for each column "higher", "lower" or "none"; all "higher" by default.
        best: Of each method show only the trial with the highest mean of these figures, over the seeds that all its trials have, and how
            many there were; all rows by default.
        within: A trial whose mean is this much lower counts as good as the best.
        prefer: Settings. Of the trials that count as good as the best the one with the largest value is taken, of the first setting
            in which they differ: the strongest penalty, for instance, as in the one-standard-error rule (Breiman et al., 1984).
    """

    name: str
    question: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[str, ...] = ()
    better: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    within: float = 0.0
    prefer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What a study's YAML says; see `configs/studies/`.

    Attributes:
        name: Of the study.
        worlds: By name; the first is `MAIN`, the others say only what differs from it.
        seeds: Of weights, orders and dropout.
        rows: The methods.
        claims: What the records are put together for.
    """

    name: str
    worlds: Mapping[str, World]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Run:
    """One method with one seed in one world."""

    world: str
    row: Row
    seed: int

    @property
    def stem(self) -> str:
        """File name of its records, without suffix."""
        where = "" if self.world == MAIN else f"{self.world}-"
        return f"{where}{self.row.slug}-seed{self.seed}"


@dataclass(frozen=True)
class Record:
    """One run: what was asked, what came out, and what it ran on."""

    study: str
    row: str
    seed: int
    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    seconds: float
    device: str
    versions: Mapping[str, str]
    world: str = MAIN


def read_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        ValueError: A key that is unknown or missing, a class that does not exist, or a name that appears twice.
    """
    values = dict(yaml.safe_load(path.read_text()))
    of_world = {name: values.pop(name) for name in (entry.name for entry in fields(World)) if name in values}
    others = values.pop("worlds", {}) or {}
    try:
        worlds = {MAIN: World(**of_world)} | {name: World(**of_world | differs) for name, differs in others.items()}
        rows = tuple(Row(**trial) for row in values.pop("rows") for trial in expand(row))
        claims = tuple(_claim(claim) for claim in values.pop("claims", []))
        study = Study(**values | {"seeds": tuple(values["seeds"]), "rows": rows, "worlds": worlds, "claims": claims})
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: {error}; a study has the keys name, seeds, rows, claims, worlds, and for its own world "
            f"{', '.join(entry.name for entry in fields(World))}"
        ) from error
    _check(study, path)
    return study


def runs_of(study: Study, only: Sequence[str] = ()) -> Iterator[Run]:
    """All runs, or those of some methods. Seeds outside: a study that is stopped early has every row at least once."""
    for seed in study.seeds:
        for world in study.worlds:
            for row in study.rows:
                if (not only or row.method in only) and (row.worlds is None or world in row.worlds):
                    yield Run(world, row, seed)


def run_settings(study: Study, run: Run) -> dict[str, Any]:
    """What a record is compared by: the bottleneck with all settings that are not the world's data."""
    world, row = study.worlds[run.world], run.row
    return {"bottleneck": row.bottleneck, **row.settings, **world.task, **row.task, "epochs": row.epochs_in(run.world, world)}


def read_records(study: Study, directory: Path) -> list[Record]:
    """The records of a study that are there, in the order of its runs.

    Raises:
        ValueError: A record is damaged, or was made with other settings than the study gives its row now.
    """
    records: list[Record] = []
    for run in runs_of(study):
        path = directory / f"{run.stem}.json"
        if not path.exists():
            continue
        record = read_run(path)
        check_settings(record.settings, study=study, run=run, path=path)
        records.append(record)
    return records


def read_run(path: Path) -> Record:
    """The record of one run.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return Record(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: is no record of a run ({error}); delete it, and the study makes it again") from error


def check_settings(settings: Mapping[str, Any], *, study: Study, run: Run, path: Path) -> None:
    """Check that what lies at `path` was made with the settings that a run has now.

    Raises:
        ValueError: It was not; the settings that differ are named.
    """
    now = json.loads(json.dumps(run_settings(study, run)))
    changed = sorted(key for key in settings.keys() | now if settings.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"{path}: made with other settings than {run.row.name!r} has now ({', '.join(changed)}); delete it, or choose another --out"
        )


def make_source(described: Mapping[str, Any]) -> ConceptSource:
    """A source from {"class": name, and its arguments}; see `World.source`."""
    known: dict[str, Callable[..., ConceptSource]] = {**subclasses(ConceptSource, package="dotcbm.data")}
    arguments = {
        name: make_source(value) if isinstance(value, Mapping) and "class" in value else value
        for name, value in described.items()
        if name != "class"
    }
    return known[described["class"]](**arguments)


def source_of(world: World, *, seed: int) -> dict[str, Any]:
    """The source of a run: that of its world, with the run's seed in place of "{seed}"."""

    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: told(entry) for name, entry in value.items()}
        return seed if value == "{seed}" else value

    return told(world.source)


def _claim(values: Mapping[str, Any]) -> Claim:
    columns = tuple((str(figure), str(heading)) for figure, heading in values["columns"])
    return Claim(**{**values, "columns": columns, **{name: tuple(values.get(name, ())) for name in ("rows", "better", "best", "prefer")}})


def _check(study: Study, path: Path) -> None:
    names = [row.slug for row in study.rows]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{path}: the row names {doubled} appear more than once; they name the records")
    bottlenecks = subclasses(Bottleneck, package="dotcbm.models")
    for row in study.rows:
        if row.bottleneck not in bottlenecks:
            raise ValueError(f"{path}: row {row.name!r} has the bottleneck {row.bottleneck!r}; choose from {sorted(bottlenecks)}")
        named = {*(row.worlds or ()), *(row.epochs if isinstance(row.epochs, Mapping) else ())}
        strange = sorted(named - set(study.worlds))
        if strange:
            raise ValueError(f"{path}: row {row.name!r} names the worlds {strange}; the study has {list(study.worlds)}")
    for world in study.worlds.values():
        _check_source(world.source, path)
    for claim in study.claims:
        strange = sorted(set(claim.rows) - {row.method for row in study.rows})
        if strange:
            raise ValueError(f"{path}: claim {claim.name!r} names the rows {strange}, which the study does not have")
        for figure in (*(figure for figure, _ in claim.columns), *claim.best):
            world, colon, _ = figure.partition(":")
            if colon and world not in study.worlds:
                raise ValueError(f"{path}: claim {claim.name!r} asks for {figure!r}; the study has the worlds {list(study.worlds)}")
        if claim.within < 0 or ((claim.within or claim.prefer) and not claim.best):
            raise ValueError(f"{path}: claim {claim.name!r} has within {claim.within} and prefer; they choose near the best, by `best`")
        numbers = {name for row in study.rows for name, v in {**row.settings, **row.task}.items() if isinstance(v, int | float)}
        strange = sorted(set(claim.prefer) - numbers)
        if strange:
            raise ValueError(f"{path}: claim {claim.name!r} prefers {strange}; the numbers that rows set are {sorted(numbers)}")
        if claim.better and len(claim.better) != len(claim.columns):
            raise ValueError(f"{path}: claim {claim.name!r} has {len(claim.columns)} columns and {len(claim.better)} entries of better")


def _check_source(described: Mapping[str, Any], path: Path) -> None:
    known = subclasses(ConceptSource, package="dotcbm.data")
    if described.get("class") not in known:
        raise ValueError(f"{path}: the source's class is {described.get('class')!r}; choose from {sorted(known)}")
    for value in described.values():
        if isinstance(value, Mapping) and "class" in value:
            _check_source(value, path)
