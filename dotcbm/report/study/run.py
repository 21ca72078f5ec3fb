"""The runs of a study: train, measure, and leave a model and a record of each. A study that was stopped goes on with what is missing.

Several processes can share the runs of one study; each run leaves its model and its record whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.report.study.measure import measure
from dotcbm.report.study.plan import Record, Run, Study, make_source, read_records, runs_of, source_of
from dotcbm.report.study.train import is_trained, read_trained, train

__all__ = ["Stage", "run_study"]

Stage = Literal["all", "train", "measure"]
"""train: leave models, on a machine with a GPU for instance; measure: test and audit the models that are there; all: both."""


def run_study(
    study: Study,
    directory: Path,
    *,
    only: Sequence[str] = (),
    worlds: Sequence[str] = (),
    share: tuple[int, int] = (0, 1),
    stage: Stage = "all",
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Make the runs that have no record in `directory` yet. A run whose model is there is not trained again.

    Args:
        study: What to run.
        directory: Where the records lie, one JSON file a run; those of audits in its folder `audits`, the models in `models`.
        only: Names of rows, for a grid that of all its trials; all by default.
        worlds: Names of worlds; all by default.
        share: (i, n): every n-th of the missing runs, from the i-th, for n processes side by side.
        stage: Which half of the runs.
        say: Told of each run.

    Returns:
        All records of the study that are there afterwards.

    Raises:
        ValueError: A row or world that does not exist, or a record or a model of other settings than the study's.
    """
    for what, asked, known in (
        ("rows", only, list(dict.fromkeys(row.method for row in study.rows))),
        ("worlds", worlds, list(study.worlds)),
    ):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise ValueError(f"the study {study.name} has no {what} {unknown}; it has {known}")
    directory.mkdir(parents=True, exist_ok=True)
    read_records(study, directory)

    def is_missing(run: Run) -> bool:
        if (directory / f"{run.stem}.json").exists():
            return False
        return stage == "all" or is_trained(directory, run) == (stage == "measure")

    chosen = [run for run in runs_of(study, only) if not worlds or run.world in worlds]
    made: dict[str, tuple[ImageEncoder | None, ConceptDataModule]] = {}  # by the source as it is described
    mine = [run for run in chosen if is_missing(run)][share[0] :: share[1]]
    start = time.monotonic()
    for number, run in enumerate(mine):
        if not is_missing(run):  # another process has made it meanwhile
            continue
        left = f"; {_told((time.monotonic() - start) / number * (len(mine) - number))} left" if number else ""
        say(f"{study.name}: run {number + 1} of {len(mine)}: {run.row.name}, {run.world}, seed {run.seed}{left}")
        world = study.worlds[run.world]
        source = source_of(world, seed=run.seed)
        key = f"{run.world} {json.dumps(source)}"
        if key not in made:
            made.clear()  # one world's features in memory at a time
            frozen = None if world.encoder.get("trainable") else ImageEncoder(**world.encoder)
            made[key] = frozen, ConceptDataModule(make_source(source), **world.data)
        encoder, data = made[key]
        if not is_trained(directory, run):
            train(study, run, encoder=encoder, data=data, directory=directory)
        if stage != "train":
            model, training = read_trained(study, run, encoder=encoder, directory=directory)
            record = measure(study, run, model=model, training=training, data=data, directory=directory)
            path = directory / f"{run.stem}.json"
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(asdict(record), indent=1) + "\n")
            aside.replace(path)
    return read_records(study, directory)


def _told(seconds: float) -> str:
    """A time for people, as good as the guess that it is: the mean of the runs made so far."""
    return f"about {seconds / 3600:.1f} hours" if seconds > 5400 else f"about {max(round(seconds / 60), 1)} minutes"
