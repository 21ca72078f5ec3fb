"""A study: many bottlenecks, several seeds, one encoder, one data set, one table.

Every run goes through the same trainer, features and evaluation, and leaves one JSON record. A study that was stopped goes
on with the runs that have no record yet; several processes can share the runs of one study.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from dotcbm.data.cub import CUB
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.folder import Folder
from dotcbm.data.source import ConceptSource
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.dot_product import DotProduct
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.training.task import ConceptTask

__all__ = ["Record", "Row", "Study", "read_records", "read_study", "run_study"]

_BOTTLENECKS: dict[str, type[Bottleneck]] = {kind.__name__: kind for kind in (CBM, DotCBM, DotProduct, LinearProbe)}
_SOURCES: dict[str, type[ConceptSource]] = {kind.__name__: kind for kind in (CUB, Folder, Synthetic)}


@dataclass(frozen=True)
class Row:
    """One method of a study.

    Attributes:
        name: Unique; names the records and the line of the table.
        bottleneck: Class name.
        settings: Its settings.
        task: Settings of `ConceptTask` on top of the study's.
        epochs: Instead of the study's.
    """

    name: str
    bottleneck: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Study:
    """What a study's YAML says; see `configs/studies/`.

    Attributes:
        name: Of the study.
        encoder: Arguments of `ImageEncoder`.
        source: {"class": a source's class name, and its arguments}.
        data: Arguments of `ConceptDataModule`.
        task: Arguments of `ConceptTask` shared by all rows.
        epochs: Passes over the training pictures.
        seeds: Of weights, orders and dropout.
        rows: The methods.
    """

    name: str
    encoder: Mapping[str, Any]
    source: Mapping[str, Any]
    data: Mapping[str, Any]
    task: Mapping[str, Any]
    epochs: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]


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


def read_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises:
        ValueError: A key that is unknown or missing, a class that does not exist, or a row name that appears twice.
    """
    values = yaml.safe_load(path.read_text())
    try:
        rows = tuple(Row(**row) for row in values.pop("rows"))
        study = Study(**values | {"seeds": tuple(values["seeds"]), "rows": rows})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}; a study has the keys {', '.join(Study.__annotations__)}") from error
    names = [row.slug for row in rows]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{path}: the row names {doubled} appear more than once; they name the records")
    for row in rows:
        if row.bottleneck not in _BOTTLENECKS:
            raise ValueError(f"{path}: row {row.name!r} has the bottleneck {row.bottleneck!r}; choose from {sorted(_BOTTLENECKS)}")
    if study.source.get("class") not in _SOURCES:
        raise ValueError(f"{path}: the source's class is {study.source.get('class')!r}; choose from {sorted(_SOURCES)}")
    return study


def run_study(
    study: Study,
    directory: Path,
    *,
    only: Sequence[str] = (),
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Make the runs that have no record in `directory` yet.

    Args:
        study: What to run.
        directory: Where the records lie, one JSON file a run.
        only: Names of rows; all by default.
        share: (i, n): every n-th of the missing runs, from the i-th, for n processes side by side.
        say: Told of each run.

    Returns:
        All records of the study that are there afterwards.

    Raises:
        ValueError: A row that does not exist, or a record of other settings than the study's.
    """
    unknown = sorted(set(only) - {row.name for row in study.rows})
    if unknown:
        raise ValueError(f"the study {study.name} has no rows {unknown}; it has {[row.name for row in study.rows]}")
    directory.mkdir(parents=True, exist_ok=True)
    read_records(study, directory)
    missing = [(row, seed) for row, seed in _runs(study, only) if not _path(directory, row, seed).exists()]
    mine = missing[share[0] :: share[1]]
    if mine:
        source = {key: value for key, value in study.source.items() if key != "class"}
        data = ConceptDataModule(_SOURCES[study.source["class"]](**source), **study.data)
        frozen = None if study.encoder.get("trainable") else ImageEncoder(**study.encoder)
        for number, (row, seed) in enumerate(mine):
            path = _path(directory, row, seed)
            if path.exists():  # another process has made it meanwhile
                continue
            say(f"{study.name}: run {number + 1} of {len(mine)}: {row.name}, seed {seed}")
            record = _run(study, row, seed, encoder=frozen, data=data)
            partial_path = path.with_suffix(".partial")
            partial_path.write_text(json.dumps(asdict(record), indent=1) + "\n")
            partial_path.replace(path)
    return read_records(study, directory)


def read_records(study: Study, directory: Path) -> list[Record]:
    """The records of a study that are there, in the order of its rows and seeds.

    Raises:
        ValueError: A record was made with other settings than the study gives its row now.
    """
    records: list[Record] = []
    for row, seed in _runs(study, ()):
        path = _path(directory, row, seed)
        if not path.exists():
            continue
        record = Record(**json.loads(path.read_text()))
        now = json.loads(json.dumps(_settings(study, row)))
        if record.settings != now:
            changed = sorted(key for key in record.settings.keys() | now if record.settings.get(key) != now.get(key))
            raise ValueError(
                f"{path}: made with other settings than {row.name!r} has now ({', '.join(changed)}); delete it, or choose another --out"
            )
        records.append(record)
    return records


def _settings(study: Study, row: Row) -> dict[str, Any]:
    return {"bottleneck": row.bottleneck, **row.settings, **study.task, **row.task, "epochs": row.epochs or study.epochs}


def _runs(study: Study, only: Sequence[str]) -> Iterator[tuple[Row, int]]:
    # Seeds outside: a study that is stopped early has every row at least once.
    for seed in study.seeds:
        for row in study.rows:
            if not only or row.name in only:
                yield row, seed


def _path(directory: Path, row: Row, seed: int) -> Path:
    return directory / f"{row.slug}-seed{seed}.json"


def _run(study: Study, row: Row, seed: int, *, encoder: ImageEncoder | None, data: ConceptDataModule) -> Record:
    import lightning.pytorch as pl

    from dotcbm import __version__

    start = time.monotonic()
    data.seed = seed
    if encoder is None:
        torch.manual_seed(seed)
        encoder = ImageEncoder(**study.encoder)
    task = ConceptTask(encoder, partial(_BOTTLENECKS[row.bottleneck], **row.settings), **{**study.task, **row.task, "seed": seed})
    trainer = pl.Trainer(
        max_epochs=row.epochs or study.epochs,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data)
    trained = time.monotonic()
    figures = {name: float(value) for name, value in trainer.test(task, datamodule=data, verbose=False)[0].items()}
    figures["train_seconds"] = trained - start
    if task.head_fit is not None:
        figures["head_l2"] = task.head_fit.l2
        figures["val/accuracy"] = task.head_fit.val_accuracy
    device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "CPU"
    return Record(
        study=study.name,
        row=row.name,
        seed=seed,
        settings=_settings(study, row),
        figures=figures,
        seconds=time.monotonic() - start,
        device=device,
        versions={"dotcbm": __version__, "torch": torch.__version__, "lightning": version("lightning")},
    )
