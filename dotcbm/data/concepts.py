"""Concept sets on disk: read, check, save, compare, restrict.

Shape letters: M concepts, K classes.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotcbm.structures import ConceptSet

__all__ = ["compare_concepts", "concepts_from_dict", "concepts_to_dict", "load_concepts", "restrict", "save_concepts", "varying"]

_FORMAT = 1
_KEYS = ("names", "class_names", "class_concept_KM")


def concepts_to_dict(concepts: ConceptSet) -> dict[str, Any]:
    """Plain JSON values; unknown entries (NaN) become None, because JSON has no NaN."""
    matrix = [[None if math.isnan(value) else value for value in row] for row in concepts.class_concept_KM.tolist()]
    return {
        "format": _FORMAT,
        "names": list(concepts.names),
        "class_names": list(concepts.class_names),
        "class_concept_KM": matrix,
        "groups": None if concepts.groups is None else list(concepts.groups),
        "part_names": list(concepts.part_names),
        "parts": None if concepts.parts is None else [list(row) for row in concepts.parts],
    }


def concepts_from_dict(values: Mapping[str, Any], *, where: str = "the concept set") -> ConceptSet:
    """The inverse of `concepts_to_dict`.

    Args:
        values: What `concepts_to_dict` gave.
        where: What the values were read from, for messages.

    Raises:
        ValueError: A key is missing, a value has another type, or the values contradict each other.
    """
    if values.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"{where}: has format {values['format']!r}, this version reads format {_FORMAT}; install a newer dotcbm")
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise ValueError(f"{where}: lacks {missing} (found {sorted(values)}); expected what save_concepts writes")
    names, class_names = _strings(values, "names", where), _strings(values, "class_names", where)
    groups = None if values.get("groups") is None else _strings(values, "groups", where)
    part_names = _strings(values, "part_names", where) if values.get("part_names") else ()
    rows = values["class_concept_KM"]
    if not isinstance(rows, list) or len(rows) != len(class_names):
        found = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"{where}: class_concept_KM has {found}, expected {len(class_names)}, one for each class")
    matrix_KM = torch.empty(len(class_names), len(names))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(names):
            found = f"{len(row)} values" if isinstance(row, list) else type(row).__name__
            raise ValueError(f"{where}: class_concept_KM row {number} has {found}, expected {len(names)}, one for each concept")
        for column, value in enumerate(row, 1):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{where}: class_concept_KM row {number}, column {column} is {value!r}, expected a number or null")
        matrix_KM[number - 1] = torch.tensor([math.nan if value is None else float(value) for value in row])
    parts = values.get("parts")
    if parts is not None and not (isinstance(parts, list) and all(isinstance(row, list) for row in parts)):
        raise ValueError(f"{where}: parts is no list of lists; expected the parts of each concept")
    try:
        return ConceptSet(
            names=names,
            class_names=class_names,
            class_concept_KM=matrix_KM,
            groups=groups,
            part_names=part_names,
            parts=None if parts is None else tuple(tuple(map(str, row)) for row in parts),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def save_concepts(concepts: ConceptSet, path: Path | str) -> None:
    """Write a concept set as JSON. The file appears whole or not at all."""
    path = Path(path)
    text = json.dumps(concepts_to_dict(concepts), ensure_ascii=False, allow_nan=False, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        os.chmod(temporary, 0o644)  # noqa: PTH101 - mkstemp makes files that only their owner can read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_concepts(path: Path | str) -> ConceptSet:
    """Read what `save_concepts` wrote.

    Raises:
        ValueError: The file is missing, no JSON, or no concept set.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a concept set as save_concepts writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no JSON ({error}); the file may be truncated") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, expected an object with {', '.join(_KEYS)}")
    return concepts_from_dict(values, where=str(path))


def compare_concepts(expected: ConceptSet, found: ConceptSet, *, what: str = "the data", of: str = "the model") -> None:
    """Check that two concept sets name the same concepts and classes in the same order.

    Args:
        expected: The concepts that a checkpoint was trained on.
        found: The concepts that it meets.
        what: Where `found` comes from, for the message.
        of: Where `expected` comes from, for the message.

    Raises:
        ValueError: They differ; the message lists what is missing, what was added, and the first place where the order differs.
    """
    complaints = []
    for kind, old, new in (("concepts", expected.names, found.names), ("classes", expected.class_names, found.class_names)):
        if old == new:
            continue
        missing = [name for name in old if name not in set(new)]
        added = [name for name in new if name not in set(old)]
        said = [f"the {kind} of {what} ({len(new)}) are not those of {of} ({len(old)})"]
        if missing:
            said.append(f"missing: {_some(missing)}")
        if added:
            said.append(f"added: {_some(added)}")
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        if first is not None:
            said.append(f"first difference at number {first + 1}: expected {old[first]!r}, found {new[first]!r}")
        complaints.append("; ".join(said))
    if complaints:
        raise ValueError(". ".join(complaints) + ". Load the data with the settings of the training run, or train again")


def restrict(concepts: ConceptSet, indices: Sequence[int] | Tensor) -> ConceptSet:
    """The concepts `indices` (or those where a (M,) bool mask is true), in that order.

    Raises:
        ValueError: An index is out of range or repeated, or none is left.
    """
    m = concepts.num_concepts
    if isinstance(indices, Tensor):
        if indices.dtype == torch.bool:
            if tuple(indices.shape) != (m,):
                raise ValueError(f"the mask has shape {tuple(indices.shape)}; {m} concepts need ({m},)")
            indices = indices.nonzero()[:, 0]
        chosen = [int(i) for i in indices.tolist()]
    else:
        chosen = [int(i) for i in indices]
    if not chosen:
        raise ValueError(f"no concept is left of {m}; choose at least one")
    wrong = [i for i in chosen if not 0 <= i < m]
    if wrong:
        raise ValueError(f"concept index {wrong[0]} is not among the {m} concepts (0 to {m - 1})")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"concept index {next(i for i in chosen if chosen.count(i) > 1)} is chosen more than once")
    return ConceptSet(
        names=tuple(concepts.names[i] for i in chosen),
        class_names=concepts.class_names,
        class_concept_KM=concepts.class_concept_KM[:, torch.tensor(chosen)],
        groups=None if concepts.groups is None else tuple(concepts.groups[i] for i in chosen),
        part_names=concepts.part_names,
        parts=None if concepts.parts is None else tuple(concepts.parts[i] for i in chosen),
    )


def varying(concepts: ConceptSet, *, threshold: float = 0.5) -> Tensor:
    """(M,) bool: some class has the concept (share above `threshold`) and some class has it not. NaN counts for neither.

    Figures on concepts that do not vary over the classes say nothing of a model: report over these.
    """
    known_KM = ~concepts.class_concept_KM.isnan()
    present_KM = concepts.class_concept_KM > threshold
    return (known_KM & present_KM).any(0) & (known_KM & ~present_KM).any(0)


def _strings(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = values[key]
    if not isinstance(found, list):
        raise ValueError(f"{where}: {key} is a {type(found).__name__}, expected a list of names")
    for number, name in enumerate(found, 1):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: {key} number {number} is {name!r}, expected a name")
    return tuple(found)


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
