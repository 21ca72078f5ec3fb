"""A file of predictions: one row a picture, Parquet or CSV by its suffix, written whole or not at all."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dotcbm.structures import ConceptOutput, ConceptSet

__all__ = ["Predictions", "check_out"]


def check_out(path: Path) -> None:
    """Complain of a suffix that is not written, before any work is done.

    Raises:
        ValueError: Neither .parquet nor .csv.
        ModuleNotFoundError: .parquet without pyarrow.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out is {path}; its suffix must be .parquet or .csv")
    if path.suffix == ".parquet":
        import pyarrow  # noqa: F401 - only whether it is there


class Predictions:
    """Takes outputs batch by batch; keeps the probabilities and drops the maps."""

    def __init__(self, concepts: ConceptSet) -> None:
        self.concepts = concepts
        self.names: list[str] = []
        self._concept: list[Tensor] = []
        self._class: list[Tensor] = []

    def add(self, names: Sequence[str], output: ConceptOutput) -> None:
        """The pictures of a batch and what was said of them."""
        self.names += names
        self._concept.append(output.concept_BM.float().cpu())
        self._class.append(output.class_BK.float().cpu())

    def write(self, path: Path) -> None:
        """Write `picture`, `predicted_class`, `predicted_probability`, `concept: <name>`... and `class: <name>`...

        Raises:
            ValueError: There is no prediction to write.
        """
        if not self.names:
            raise ValueError("there is no prediction to write: no picture could be decoded")
        import torch

        concept_NM, class_NK = torch.cat(self._concept), torch.cat(self._class)
        best_N = class_NK.argmax(1)
        columns: dict[str, list[str] | list[float]] = {
            "picture": self.names,
            "predicted_class": [self.concepts.class_names[k] for k in best_N.tolist()],
            "predicted_probability": class_NK.amax(1).tolist(),
        }
        for prefix, names, value_NX in (("concept", self.concepts.names, concept_NM), ("class", self.concepts.class_names, class_NK)):
            columns |= {f"{prefix}: {name}": value_NX[:, j].tolist() for j, name in enumerate(names)}
        _whole(path, lambda temporary: _write(columns, temporary))


def _write(columns: dict[str, list[str] | list[float]], path: Path) -> None:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = [(name, pa.array(values, pa.string() if isinstance(values[0], str) else pa.float32())) for name, values in columns.items()]
        pq.write_table(pa.table(dict(fields)), path)
        return
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
