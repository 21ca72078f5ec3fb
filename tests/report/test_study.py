"""A study on tiny drawings: every run once, resumable, and a table that says what the records say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from dotcbm.report.study import Record, Row, Study, read_study, run_study
from dotcbm.report.table import markdown, summary

YAML = """
name: tiny
encoder: {name: timm/test_resnet, image_size: 64, pretrained: false, layer: 2}
source: {class: Synthetic, size: 64, num_train: 48, num_val: 16, num_test: 16}
data: {batch_size: 16, cache_dir: CACHE}
task: {lr: 0.01, head_l2: 0.01}
epochs: 1
seeds: [0, 1]
rows:
  - {name: linear probe, bottleneck: LinearProbe}
  - {name: DOT-CBM, bottleneck: DotCBM, settings: {dim: 8, iterations: 5}}
"""


def make_study(tmp_path: Path) -> Study:
    path = tmp_path / "tiny.yaml"
    path.write_text(YAML.replace("CACHE", str(tmp_path / "cache")))
    return read_study(path)


def test_every_run_is_made_once_and_a_stopped_study_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    study, out, said = make_study(tmp_path), tmp_path / "records", []

    def stop_after_two(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, out, say=stop_after_two)
    assert len(list(out.glob("*.json"))) == 2
    before = {path: path.read_text() for path in out.glob("*.json")}
    said.clear()
    records = run_study(study, out, say=said.append)
    assert len(said) == 2
    assert [(record.row, record.seed) for record in records] == [("linear probe", 0), ("DOT-CBM", 0), ("linear probe", 1), ("DOT-CBM", 1)]
    assert all(path.read_text() == text for path, text in before.items())
    assert records[0].figures["test/num_pictures"] == 16
    assert "test_ood/accuracy" in records[1].figures
    assert records[1].settings["dim"] == 8
    assert not run_study(study, out, say=said.append)[0].figures.keys() ^ records[0].figures.keys()
    assert len(said) == 2


def test_records_of_other_settings_are_not_taken_for_the_study(tmp_path: Path) -> None:
    study, out = make_study(tmp_path), tmp_path / "records"
    run_study(study, out, only=["DOT-CBM"], say=str)
    changed = replace(study, rows=(study.rows[0], replace(study.rows[1], settings={"dim": 4, "iterations": 5})))
    with pytest.raises(ValueError, match=r"dot-cbm-seed0.json: made with other settings than 'DOT-CBM' has now \(dim\); delete it"):
        run_study(changed, out, say=str)


def test_processes_share_the_runs_without_overlap(tmp_path: Path) -> None:
    study, said = replace(make_study(tmp_path), seeds=(0,)), []
    for number in range(2):
        run_study(study, tmp_path / f"records{number}", share=(number, 2), say=said.append)
    assert ["linear probe" in said[0], "DOT-CBM" in said[1], len(said)] == [True, True, 2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bottleneck: LinearProbe", "bottleneck: LinearProb", "LinearProb"),
        ("class: Synthetic", "class: Synthetics", "Synthetics"),
        ("name: DOT-CBM", "name: Linear Probe", "linear-probe"),
        ("epochs: 1", "epoch: 1", "epoch"),
        ("seeds: [0, 1]", "", "seeds"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ValueError, match=message) as raised:
        read_study(path)
    assert "bad.yaml" in str(raised.value)


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        run_study(make_study(tmp_path), tmp_path, only=["CBM"])


def test_shipped_studies_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "configs" / "studies"
    studies = [read_study(path) for path in sorted(folder.glob("*.yaml"))]
    assert "birds" in [study.name for study in studies]


def test_the_table_holds_the_mean_and_spread_of_the_records() -> None:
    rows = (Row("a | b", "CBM"), Row("black box", "LinearProbe"))
    study = Study("s", {}, {}, {}, {}, 1, (0, 1, 2), rows)
    values = [0.5, 0.6, 0.9]
    records = [
        Record("s", row.name, seed, {"bottleneck": row.bottleneck}, {"test/accuracy": value, "test/concept_auroc": 0.5}, 1.0, "CPU", {})
        for row in rows
        for seed, value in enumerate(values)
    ]
    table = markdown(study, records, columns=[("accuracy", "acc"), ("concept_auroc", "auroc"), ("x|accuracy", "either")], splits=["test"])
    cell = f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"
    assert table.splitlines()[2] == f"| a : b | 3 | {cell} | 50.0 ± 0.0 | {cell} |"
    assert table.splitlines()[3] == f"| black box | 3 | {cell} | — | {cell} |"
    assert json.dumps(table)


def test_summary_of_one_value_has_no_spread() -> None:
    assert summary([0.25]) == "25.0"
    assert summary([3.0, 3.0], percent=False) == "3.0 ± 0.0"
