"""A study of sparse experts: small ViT-MoEs trained from nothing, grown or trained on, as its YAML says; each run leaves a JSON record.

Other studies compare bottlenecks on features of one encoder; here the encoder is what is compared. It is trained with a linear head on its
mean patch, by a loop without files and loaders: pictures of 64 pixels take less time to learn from than to read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from dotcbm.encoders.vit_moe_growth import Growth
from dotcbm.moe.matryoshka import BudgetDraws
from dotcbm.moe.sparsify import Sparsification
from dotcbm.report.study.plan import Record, read_run
from dotcbm.training.experts import ExpertTraining

__all__ = ["ExpertClaim", "ExpertRow", "ExpertRun", "ExpertStudy", "Loop", "is_expert_study", "read_expert_records", "read_expert_study"]

ExpertClaim = Literal["balance", "budgets", "growth"]


@dataclass(frozen=True)
class Loop:
    """How every row is trained: AdamW.

    Attributes:
        steps: Optimizer steps.
        batch_size: Pictures of a step.
        lr: After the warm-up.
        weight_decay: Of AdamW.
        warmup: Steps in which the rate rises to `lr`.
        schedule: "cosine" to zero at the last step, or "constant".
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 50
    schedule: Literal["cosine", "constant"] = "cosine"


@dataclass(frozen=True)
class ExpertRow:
    """One arm.

    Attributes:
        name: Unique; names the records and the line of the table.
        moe: Settings of the ViT-MoE on top of the study's.
        experts: Of `ExpertTraining`, on top of the study's; `sparsify` and `draws` as mappings.
        loop: Of `Loop`, on top of the study's.
        budgets: Active experts that it is evaluated at besides its own.
        of: Name of the row whose model it starts from; that row stands before this one. None for fresh weights.
        at: The step of that row's training, one that it saves; None for its end.
        grow: Settings of `Growth` that its model goes through first.
        flops: Train for as many FLOPs as this many trainings of the study's `loop` and model cost, instead of `loop.steps`.
        save_at: Steps whose weights are kept for other rows, besides the last.
        part: What the row is to the claim, see `dotcbm.report.study.experts_claims`.
    """

    name: str
    moe: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    loop: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    of: str | None = None
    at: int | None = None
    grow: Mapping[str, Any] | None = None
    flops: float | None = None
    save_at: tuple[int, ...] = ()
    part: str = ""

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def training(self, study: ExpertStudy, *, seed: int) -> ExpertTraining:
        """How its experts are trained; draws take the run's seed."""
        given = {**study.experts, **self.experts}
        if given.get("sparsify") is not None:
            given["sparsify"] = Sparsification(**{**given["sparsify"], "start": tuple(given["sparsify"]["start"])})
        if given.get("draws") is not None:
            given["draws"] = BudgetDraws(**{**given["draws"], "seed": seed})
        return ExpertTraining(**given)


@dataclass(frozen=True)
class ExpertStudy:
    """What the YAML says; see `configs/studies/experts_*.yaml`.

    Attributes:
        name: Of the study.
        claim: Which tables and figures are made of its records.
        question: Heads the tables.
        source: As in `dotcbm.report.study.plan.World`; rows learn its split "train".
        evaluate: The split that all figures are of.
        encoder: Size and `image_size` of the ViT-MoE: {"size", "image_size", "moe"}.
        loop: For all rows.
        experts: Of `ExpertTraining`, for all rows.
        seeds: Of weights and orders.
        rows: The arms.
    """

    name: str
    claim: ExpertClaim
    question: str
    source: Mapping[str, Any]
    encoder: Mapping[str, Any]
    loop: Loop
    experts: Mapping[str, Any]
    seeds: tuple[int, ...]
    rows: tuple[ExpertRow, ...]
    evaluate: str = "test"

    def row(self, name: str) -> ExpertRow:
        """By its name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class ExpertRun:
    """One arm with one seed."""

    row: ExpertRow
    seed: int

    @property
    def stem(self) -> str:
        """File name of its record and its model, without suffix."""
        return f"{self.row.slug}-seed{self.seed}"


def is_expert_study(path: Path) -> bool:
    """Whether a YAML is of this kind: it has a `claim`."""
    return "claim" in yaml.safe_load(path.read_text())


def read_expert_study(path: Path, *, larger: bool = False) -> ExpertStudy:
    """Read the YAML.

    Args:
        path: Of the file.
        larger: Put in what its key `larger` says, the variant for a GPU; its rows replace those of the same name setting by setting.

    Raises:
        ValueError: A key that is unknown or missing, a setting out of range, or a row that starts from one that is not before it.
    """
    values = dict(yaml.safe_load(path.read_text()))
    more = dict(values.pop("larger", None) or {})
    if larger and not more:
        raise ValueError(f"{path} has no variant `larger`; leave --larger out")
    if larger:
        changed = {row["name"]: row for row in more.pop("rows", [])}
        values["rows"] = [{**row, **changed.get(row["name"], {})} for row in values["rows"]]
        values |= {key: {**values[key], **value} if isinstance(value, Mapping) else value for key, value in more.items()}
        values["name"] = f"{values['name']}_larger"
    try:
        rows = tuple(_row(row) for row in values.pop("rows"))
        loop = Loop(**values.pop("loop"))
        study = ExpertStudy(
            **values | {"seeds": tuple(values["seeds"]), "rows": rows, "loop": loop, "experts": values.get("experts") or {}}
        )
        for row in rows:
            row.training(study, seed=0)
            replace(loop, **row.loop)
            if row.grow is not None:
                Growth(**row.grow)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}; a study of experts has the keys {', '.join(f.name for f in fields(ExpertStudy))}") from error
    _check(study, path)
    return study


def runs_of(study: ExpertStudy) -> Iterator[ExpertRun]:
    """All of them; seeds outside, so that a study that is stopped early has every arm once."""
    for seed in study.seeds:
        for row in study.rows:
            yield ExpertRun(row, seed)


def run_settings(study: ExpertStudy, run: ExpertRun) -> dict[str, Any]:
    """What a record is compared by, as JSON values: all that decides its figures, those of the rows that it starts from too."""
    shared = {"source": study.source, "evaluate": study.evaluate, "encoder": study.encoder, "loop": asdict(study.loop)}
    row = {name: value for name, value in asdict(run.row).items() if name not in ("name", "part")}
    told = {**shared, "experts": study.experts, "row": row}
    if run.row.of is not None:
        told["from"] = run_settings(study, ExpertRun(study.row(run.row.of), run.seed))["row"]
    return json.loads(json.dumps(told))


def read_expert_records(study: ExpertStudy, directory: Path) -> list[Record]:
    """The records that are there.

    Raises:
        ValueError: One is damaged or of other settings.
    """
    found: list[Record] = []
    for run in runs_of(study):
        path = directory / f"{run.stem}.json"
        if not path.exists():
            continue
        record = read_run(path)
        now = run_settings(study, run)
        changed = sorted(key for key in record.settings.keys() | now if record.settings.get(key) != now.get(key))
        if changed:
            raise ValueError(
                f"{path}: made with other settings than {run.row.name!r} has now ({', '.join(changed)}); delete it, or choose another --out"
            )
        found.append(record)
    return found


def _row(values: Mapping[str, Any]) -> ExpertRow:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ExpertRow(**given)


def _check(study: ExpertStudy, path: Path) -> None:
    if study.claim not in get_args(ExpertClaim):
        raise ValueError(f"{path}: claim is {study.claim!r}; choose one of {list(get_args(ExpertClaim))}")
    seen: dict[str, ExpertRow] = {}
    for row in study.rows:
        if row.slug in {other.slug for other in seen.values()}:
            raise ValueError(f"{path}: the row name {row.name!r} appears more than once; it names the records")
        if row.of is not None and row.of not in seen:
            raise ValueError(f"{path}: row {row.name!r} starts from {row.of!r}; the rows before it are {list(seen)}")
        if row.at is not None and (row.of is None or row.at not in seen[row.of].save_at):
            raise ValueError(f"{path}: row {row.name!r} starts from step {row.at}, which {row.of!r} does not save (save_at)")
        if row.grow is not None and row.of is None:
            raise ValueError(f"{path}: row {row.name!r} grows, and does not say from which row (of)")
        seen[row.name] = row
