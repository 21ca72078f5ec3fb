"""Grids: one row of a study's YAML that stands for many trials, so that the budget of a search is written down where it is spent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["expand"]

_PLACES = ("settings", "task")


def expand(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a grid, or the row itself where it has none.

    A row with `grid: [{settings.l2: [0.1, 1.0], task.lr: [0.002, 0.005]}, {epochs: [40]}]` becomes five: the product of the lists of each
    mapping, on top of what the row says itself. A trial is named after the row and what it changes: "CBM (l2 0.1, lr 0.002)".

    Args:
        row: As in the YAML; its keys are not checked here but for those of the grid.

    Raises:
        TypeError: A grid that is no list of mappings from "settings.<name>", "task.<name>" or "epochs" to lists; or one with the same
            trial twice.
    """
    plain = {name: value for name, value in row.items() if name != "grid"}
    if "grid" not in row:
        return [plain]
    trials: list[dict[str, Any]] = []
    for part in row["grid"]:
        if not isinstance(part, Mapping) or not all(isinstance(v, Sequence) and not isinstance(v, str) for v in part.values()):
            raise TypeError(f"the grid of {row.get('name')!r} holds {part!r}; it is a list of mappings from settings to lists of values")
        trials += [_trial(plain, dict(zip(part, values))) for values in itertools.product(*part.values())]
    names = [trial["name"] for trial in trials]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise TypeError(f"the grid of {row.get('name')!r} has trials more than once: {doubled}")
    return trials


def _trial(row: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    trial: dict[str, Any] = {**row, "of": row["name"]}
    told: list[str] = []
    for key, value in changes.items():
        place, _, name = key.partition(".")
        if place in _PLACES and name:
            trial[place] = {**trial.get(place, {}), name: value}
        elif key == "epochs":
            trial[key] = value
        else:
            raise TypeError(f"the grid of {row['name']!r} changes {key!r}; it can change settings.<name>, task.<name> and epochs")
        told.append(f"{name or key} {value}")
    return {**trial, "name": f"{row['name']} ({', '.join(told)})"}
