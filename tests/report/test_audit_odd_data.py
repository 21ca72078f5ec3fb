"""Audits of data as people have them: odd names, unknown labels, pictures of all shapes, scores of a teacher for labels."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fakes.folder import picture
from fakes.source import TinySource
from torch import Tensor

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.folder import Folder
from dotcbm.data.teacher import TaughtConcepts, Teacher
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.label_free import LabelFreeCBM
from dotcbm.report.audit import AuditSettings, audit
from dotcbm.report.record_file import read_record, write_record
from dotcbm.report.render import markdown
from dotcbm.structures import Preprocessing, Problem

NAMES = ("has <b>tail</b>", "line\nbreak", 'Größe "x" & 中文', "never in test", "known once")
FEW = AuditSettings(num_draws=20, num_strengths=5, num_occluded=3, num_errors=3, num_unsure=2, num_drawn=2, num_thumbnails=4, chunk=5)


class Brightness(Teacher):
    """Finds every concept in bright places, each in another."""

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def similarities(self, image_B3HW: Tensor, names: Sequence[str]) -> Tensor:
        return image_B3HW.flatten(1)[:, : 9 * len(names) : 9]

    def fingerprint(self) -> str:
        return "brightness"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    rows = []
    for i in range(48):
        split = "test" if i % 3 == 0 else "train"
        name = f"{('a', 'b b', 'ü<i>')[i % 3]}/{i // 3}.png"  # the same names in several folders
        width, height = ((40, 30), (7, 90), (120, 9))[i % 3]
        picture(root / "images" / name, width=width, height=height, value=5 * i)
        labels = [("0", "1", "1", "?")[(i // 3 + j * i) % 4] for j in range(3)]
        never = "0" if split == "test" else "01"[i % 2]
        rows.append([name, ("kät<script>", "dog's", "lone")[i // 3 % 3], split, *labels, never, "1" if i == 1 else ""])
    with (root / "concepts.csv").open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([["image", "class", "split", *NAMES], *rows])
    return root


def test_odd_names_unknown_labels_and_all_shapes(folder, tmp_path):
    source = Folder(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64, resize="crop")
        problem = Problem(encoder.width, encoder.global_width, encoder.grid, source.concepts)
        model = ConceptModel(encoder, CBM(problem))
    data = ConceptDataModule(source, batch_size=8, cache_dir=None, evaluate_splits=["test"])  # pictures, no cached features
    found = audit(model, data, settings=FEW)
    assert read_record(write_record(found, tmp_path / "audit.json")) == found  # every figure as the file has it, thirds too
    assert len(found.pictures.name) == len(set(found.pictures.name)) == 16
    rows = {row.name: row for row in found.concepts}
    never, unknown = (next(row for name, row in rows.items() if name.startswith(start)) for start in ("never", "known once"))
    assert (never.num_positive, never.num_known) == (0, 16)
    assert (unknown.num_known, unknown.prevalence, unknown.auroc.value) == (0, None, None)
    assert {"concepts/never_present", "concepts/unknown"} <= {finding.key for finding in found.findings}
    told = markdown(found)
    assert "<b>tail" not in told
    assert "<script>" not in told


def test_a_model_that_a_teacher_taught_is_audited_on_its_labels():
    """Training labels are then scores between 0 and 1: there is no training picture of which a concept is known to be there."""
    source = TaughtConcepts(TinySource(), teacher=Brightness(), cache_dir=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
        model = ConceptModel(encoder, LabelFreeCBM(Problem(encoder.width, encoder.global_width, encoder.grid, source.concepts)))
    data = ConceptDataModule(source, batch_size=8, cache_dir=None, evaluate_splits=["test"])
    scores_NM = data.dataset("train").concept_NM
    assert ((scores_NM > 0) & (scores_NM < 1)).any()
    found = audit(model, data, settings=FEW)
    assert {curve.policy for curve in found.interventions} == {"random", "uncertainty", "coop", "greedy"}
    assert found.figure("concepts/auroc").value.value is not None
