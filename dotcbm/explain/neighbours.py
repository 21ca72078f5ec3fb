"""Pictures that the model sees like this one: the nearest by their concepts, and those that show one concept most surely.

A decision is easier to believe, or to doubt, beside the pictures that it was learned from.

N pictures of a split, M concepts, H W pixels.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dotcbm.explain.explanation import Explanation
from dotcbm.explain.naming import evaluating, index_of
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dotcbm.data.datamodule import ConceptDataModule
    from dotcbm.data.source import ConceptDataset

__all__ = ["Neighbour", "Neighbours", "PredictionTable", "nearest_pictures", "predict_table", "read_table", "surest_pictures"]


@dataclass(frozen=True, eq=False)
class PredictionTable:
    """What a model said of many pictures.

    Attributes:
        names: N names of pictures.
        concept_names: M names.
        concept_NM: (N, M) concept probabilities.
        classes: N names of classes: the true ones where they are known (`predict_table`), else the predicted ones.
        read: Gives the (3, H, W) uint8 picture of a row; None where the pictures are not at hand.
    """

    names: tuple[str, ...]
    concept_names: tuple[str, ...]
    concept_NM: Tensor
    classes: tuple[str, ...]
    read: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class Neighbour:
    """One picture of a table.

    Attributes:
        row: In the table.
        name: Of the picture.
        class_name: See `PredictionTable.classes`.
        value: Distance in [0, 1] for `nearest_pictures`, probability for `surest_pictures`.
        shared: For `nearest_pictures`: concepts that both show (50 % and more), those first that contribute most to the class in question.
    """

    row: int
    name: str
    class_name: str
    value: float
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Neighbours:
    """An answer: pictures, best first.

    Attributes:
        explanation: Of the picture that was asked about.
        concept: None for the nearest by all concepts; else the concept that the pictures show.
        found: Best first.
        table: That they are from.
    """

    explanation: Explanation
    concept: str | None
    found: tuple[Neighbour, ...]
    table: PredictionTable

    def plot(self) -> Figure:
        """The picture beside those found; see `dotcbm.explain.answers.plot_neighbours`."""
        from dotcbm.explain.answers import plot_neighbours

        return plot_neighbours(self)


@torch.no_grad()
def predict_table(model: ConceptModel, data: ConceptDataModule, *, split: str = "train") -> PredictionTable:
    """Predict every picture of a split, from cached features where there are any.

    Args:
        model: Its mode is restored.
        data: Of the pictures; is told the model's encoder.
        split: Its name.

    Raises:
        ValueError: The data has other concepts than the model.
    """
    if data.concepts.names != model.concepts.names:
        raise ValueError(
            f"the data names {len(data.concepts.names)} concepts ({', '.join(data.concepts.names[:3])}, ...), the model "
            f"{len(model.concepts.names)} ({', '.join(model.concepts.names[:3])}, ...); give the data that the model was trained on"
        )
    data.use_encoder(model.encoder)
    dataset = data.dataset(split)
    device = next(model.bottleneck.parameters()).device
    with evaluating(model):
        parts = [model.forward_batch(batch.to(device)).concept_BM.float().cpu() for batch in data.plain_loader(split)]
    class_names = data.concepts.class_names
    return PredictionTable(
        names=tuple(dataset.names),
        concept_names=model.concepts.names,
        concept_NM=torch.cat(parts),
        classes=tuple(class_names[k] for k in dataset.label_N.tolist()),
        read=partial(_read, dataset),
    )


def _read(dataset: ConceptDataset, row: int) -> Tensor:
    """Row `row` of a split, which may be a subset of what the source reads."""
    picture = dataset.sample(row, masks=False).image
    assert picture is not None
    return picture


def read_table(path: Path, *, concepts: ConceptSet, pictures: Path | None = None) -> PredictionTable:
    """What `dotcbm predict` wrote.

    Args:
        path: A .csv or .parquet file with the columns "picture", "predicted_class" and "concept: <name>" for every concept.
        concepts: Of the model.
        pictures: The folder that the names of the pictures are relative to; None leaves them unread.

    Raises:
        ValueError: Another suffix, a missing column, an empty table, or a value that is no probability.
        ModuleNotFoundError: .parquet without pyarrow.
    """
    columns = _columns(path)
    wanted = ["picture", "predicted_class", *(f"concept: {name}" for name in concepts.names)]
    if missing := [name for name in wanted if name not in columns]:
        raise ValueError(f"{path}: no column {missing[0]!r} ({len(missing)} are missing); write it with dotcbm predict and this model")
    names = tuple(str(name) for name in columns["picture"])
    if not names:
        raise ValueError(f"{path}: the table has no row")
    values = []
    for name in wanted[2:]:
        for row, value in enumerate(columns[name]):
            number = _number(value)
            if not 0 <= number <= 1:
                raise ValueError(f"{path}, row {row + 1}, column {name!r}: {value!r} is no probability in [0, 1]")
            values.append(number)

    def read(row: int) -> Tensor:
        from dotcbm.data.source import read_picture

        assert pictures is not None
        return read_picture(pictures / names[row])

    return PredictionTable(
        names=names,
        concept_names=concepts.names,
        concept_NM=torch.tensor(values).view(len(concepts.names), len(names)).T.contiguous(),
        classes=tuple(str(name) for name in columns["predicted_class"]),
        read=None if pictures is None else read,
    )


def nearest_pictures(explanation: Explanation, table: PredictionTable, *, n: int = 5, weight_M: Tensor | None = None) -> Neighbours:
    """The pictures whose concepts are most like this one's.

    The distance is the root of the (weighted) mean square of the differences in probability: 0 for the same concepts, 1 for the opposite.

    Args:
        explanation: Of a picture; one that is itself in the table is found first, at distance 0.
        table: To look in.
        n: How many at most.
        weight_M: (M,) not negative: how much each concept counts; all the same by default.

    Raises:
        ValueError: A table of other concepts, or weights that are negative or all zero.
    """
    _check(explanation, table)
    weight_M = torch.ones(len(table.concept_names)) if weight_M is None else weight_M.float()
    if weight_M.shape != (len(table.concept_names),) or bool((weight_M < 0).any()) or not float(weight_M.sum()) > 0:
        raise ValueError(f"weight_M must be {len(table.concept_names)} numbers, none negative and not all zero")
    distance_N = ((table.concept_NM - explanation.concept_M).square() @ weight_M / weight_M.sum()).sqrt()
    rows = distance_N.argsort(stable=True)[:n].tolist()
    order = explanation.contribution_M.argsort(descending=True, stable=True).tolist()
    found = tuple(
        Neighbour(
            row=row,
            name=table.names[row],
            class_name=table.classes[row],
            value=float(distance_N[row]),
            shared=tuple(
                explanation.concept_names[j] for j in order if explanation.concept_M[j] >= 0.5 and table.concept_NM[row, j] >= 0.5
            ),
        )
        for row in rows
    )
    return Neighbours(explanation, None, found, table)


def surest_pictures(explanation: Explanation, table: PredictionTable, *, concept: str, n: int = 5) -> Neighbours:
    """The pictures of a table that show a concept with the highest probability.

    Raises:
        ValueError: There is no such concept, or a table of other concepts.
    """
    _check(explanation, table)
    j = index_of(concept, table.concept_names, what="concept")
    rows = table.concept_NM[:, j].argsort(descending=True, stable=True)[:n].tolist()
    found = tuple(Neighbour(row, table.names[row], table.classes[row], float(table.concept_NM[row, j])) for row in rows)
    return Neighbours(explanation, concept, found, table)


def _check(explanation: Explanation, table: PredictionTable) -> None:
    if explanation.concept_names != table.concept_names:
        raise ValueError(
            f"the table has {len(table.concept_names)} concepts, the explanation {len(explanation.concept_names)}, or in another order; "
            "make it with the same model"
        )


def _columns(path: Path) -> dict[str, Sequence[Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pydict()
    if path.suffix != ".csv":
        raise ValueError(f"{path}: a table of predictions ends in .csv or .parquet")
    with path.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
        return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
