"""Similar pictures: distances by a loop, tables from a split and from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes.source import CONCEPTS, TinySource
from torch import Tensor

from dotcbm.cli.predictions import Predictions
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.explain.explanation import Explanation, explain
from dotcbm.explain.neighbours import PredictionTable, nearest_pictures, predict_table, read_table, surest_pictures
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import ConceptOutput, ConceptSet, Problem


@pytest.fixture
def explanation(build: Callable[..., ConceptModel], picture: Tensor) -> Explanation:
    return explain(build(PublishedDotCBM), picture)


@pytest.fixture
def table(explanation: Explanation) -> PredictionTable:
    concept_NM = torch.rand(20, 6, generator=torch.Generator().manual_seed(2))
    concept_NM[7] = explanation.concept_M
    return PredictionTable(tuple(f"{i}.png" for i in range(20)), explanation.concept_names, concept_NM, ("Alvin", "Bramble") * 10)


def test_nearest_are_those_of_a_loop(explanation: Explanation, table: PredictionTable) -> None:
    weight_M = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 3.0])
    for weight in (None, weight_M):
        found = nearest_pictures(explanation, table, n=4, weight_M=weight).found
        w = [1.0] * 6 if weight is None else weight.tolist()
        distances = []
        for row in table.concept_NM.tolist():
            total = sum(w[j] * (row[j] - float(explanation.concept_M[j])) ** 2 for j in range(6))
            distances.append((total / sum(w)) ** 0.5)
        order = sorted(range(20), key=lambda i: distances[i])[:4]
        assert [row.row for row in found] == order
        assert [row.value for row in found] == pytest.approx([distances[i] for i in order], abs=1e-6)
        assert (found[0].row, found[0].value, found[0].name, found[0].class_name) == (7, 0.0, "7.png", "Bramble")
    shared = set(found[1].shared)
    both = (explanation.concept_M >= 0.5) & (table.concept_NM[found[1].row] >= 0.5)
    assert shared == {name for name, yes in zip(explanation.concept_names, both.tolist(), strict=True) if yes}


def test_the_surest_pictures_of_a_concept(explanation: Explanation, table: PredictionTable) -> None:
    found = surest_pictures(explanation, table, concept="crest", n=30).found
    assert [row.value for row in found] == table.concept_NM[:, 5].sort(descending=True).values.tolist()
    with pytest.raises(ValueError, match="did you mean"):
        surest_pictures(explanation, table, concept="crests")


def test_a_split_is_predicted_in_order_and_its_pictures_can_be_read() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder("timm/test_vit", image_size=64, pretrained=False)
    source = TinySource()
    model = ConceptModel(encoder, CBM(Problem(encoder.width, encoder.global_width, encoder.grid, source.concepts))).train()
    data = ConceptDataModule(source, batch_size=7, val_fraction=0.0, cache_dir=None)
    table = predict_table(model, data, split="train")
    assert model.bottleneck.training
    dataset = data.dataset("train")
    assert table.names == tuple(dataset.names)
    assert table.classes == tuple(source.concepts.class_names[k] for k in dataset.label_N.tolist())
    assert table.read is not None
    torch.testing.assert_close(table.concept_NM[11], model.predict(table.read(11)).concept_BM[0], atol=1e-5, rtol=1e-4)
    own = nearest_pictures(explain(model, table.read(11)), table, n=1).found[0]
    assert own.value < 1e-4
    # With a validation part carved out, the rows of the training split are no longer those of the source.
    carved = predict_table(model, ConceptDataModule(source, batch_size=7, val_fraction=0.3, cache_dir=None), split="val")
    assert carved.read is not None
    torch.testing.assert_close(carved.concept_NM[3], model.predict(carved.read(3)).concept_BM[0], atol=1e-5, rtol=1e-4)
    other = ConceptDataModule(TinySource(names=CONCEPTS[:3]), val_fraction=0.0, cache_dir=None)
    with pytest.raises(ValueError, match="give the data that the model was trained on"):
        predict_table(model, other)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_of_dotcbm_predict_is_read(
    explanation: Explanation, table: PredictionTable, problem: Problem, tmp_path: Path, suffix: str
) -> None:
    concepts = problem.concepts
    written = Predictions(concepts)
    class_logit = torch.nn.functional.one_hot(torch.arange(20) % 2, 4).float()
    written.add(table.names, ConceptOutput(table.concept_NM.logit(), class_logit, (4, 4)))
    path = tmp_path / f"table{suffix}"
    written.write(path)
    read = read_table(path, concepts=concepts)
    assert (read.names, read.classes, read.read) == (table.names, table.classes, None)
    torch.testing.assert_close(read.concept_NM, table.concept_NM, atol=1e-5, rtol=1e-4)
    assert [row.row for row in nearest_pictures(explanation, read).found] == [row.row for row in nearest_pictures(explanation, table).found]


def test_bad_tables_are_refused(explanation: Explanation, table: PredictionTable, problem: Problem, tmp_path: Path) -> None:
    concepts: ConceptSet = problem.concepts
    with pytest.raises(ValueError, match="another order"):
        nearest_pictures(explanation, replace(table, concept_names=table.concept_names[::-1]))
    for weight in (torch.zeros(6), torch.ones(5), -torch.ones(6)):
        with pytest.raises(ValueError, match="weight_M must be 6 numbers"):
            nearest_pictures(explanation, table, weight_M=weight)
    with pytest.raises(ValueError, match=r"ends in \.csv or \.parquet"):
        read_table(tmp_path / "table.txt", concepts=concepts)
    path = tmp_path / "table.csv"
    path.write_text("picture,predicted_class,concept: red wing\na.png,Alvin,0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no column 'concept: blue head' \(5 are missing\)"):
        read_table(path, concepts=concepts)
    head = ",".join(["picture", "predicted_class", *(f"concept: {name}" for name in concepts.names)])
    path.write_text(f"{head}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the table has no row"):
        read_table(path, concepts=concepts)
    path.write_text(f"{head}\na.png,Alvin,0.5,0.5,0.5,0.5,0.5,0.5\nb.png,Alvin,0.5,1.5,0.5,0.5,0.5,0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 2, column 'concept: blue head': '1.5' is no probability"):
        read_table(path, concepts=concepts)
    path.write_text(f"{head}\na.png,Alvin,0.5,much,0.5,0.5,0.5,0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'much' is no probability"):
        read_table(path, concepts=concepts)
