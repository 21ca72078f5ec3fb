"""A study on tiny drawings: every run once, resumable, and a table that says what the records say."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.synthetic import Synthetic
from dotcbm.report.record_file import read_record
from dotcbm.report.study import run_study
from dotcbm.report.study.experts_plan import is_expert_study
from dotcbm.report.study.plan import MAIN, Claim, Record, Row, Study, World, make_source, read_study, source_of
from dotcbm.report.study.plot import plot_claim
from dotcbm.report.study.table import markdown, summary

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
  - {name: DOT-CBM, bottleneck: PublishedDotCBM, settings: {dim: 8, iterations: 5}}
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
    assert said[0].endswith("seed 0")
    assert re.search(r"about \d+ minutes left$", said[1])
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


def test_models_that_are_there_are_measured_without_being_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    study, out = make_study(tmp_path), tmp_path / "records"
    assert run_study(study, out, stage="measure", say=str) == []
    assert run_study(study, out, stage="train", only=["DOT-CBM"], say=str) == []
    said: list[str] = []
    assert run_study(study, out, stage="train", only=["DOT-CBM"], say=said.append) == said == []
    monkeypatch.setattr("dotcbm.report.study.run.train", lambda *a, **k: pytest.fail("a model that is there was trained again"))
    first = run_study(study, out, stage="measure", say=str)
    assert [(record.row, record.seed) for record in first] == [("DOT-CBM", 0), ("DOT-CBM", 1)]
    for path in out.glob("*.json"):
        path.unlink()
    again = run_study(study, out, only=["DOT-CBM"], say=str)
    assert [record.figures for record in again] == [record.figures for record in first]


def test_a_model_of_other_settings_is_not_measured(tmp_path: Path) -> None:
    study, out = make_study(tmp_path), tmp_path / "records"
    run_study(study, out, stage="train", only=["DOT-CBM"], say=str)
    changed = replace(study, rows=(study.rows[0], replace(study.rows[1], settings={"dim": 4, "iterations": 5})))
    with pytest.raises(ValueError, match=r"models/dot-cbm-seed0.json: made with other settings than 'DOT-CBM' has now \(dim\); delete it"):
        run_study(changed, out, only=["DOT-CBM"], say=str)
    (out / "models" / "dot-cbm-seed0.json").write_text("{")
    with pytest.raises(ValueError, match=r"dot-cbm-seed0.json: says nothing of a training .* trains the model again"):
        run_study(study, out, only=["DOT-CBM"], say=str)


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
        ("seeds: [0, 1]", "seeds: [0, 1]\nclaims: [{name: c, question: q, rows: [none], columns: []}]", "none"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nclaims: [{name: c, question: q, columns: [['far:test/x', x]]}]", "far:test/x"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nclaims: [{name: c, question: q, columns: [], within: 0.1}]", "they choose near the best"),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nclaims: [{name: c, question: q, columns: [], best: [val/accuracy], prefer: [l3]}]",
            r"prefers \['l3'\]; the numbers that rows set are \['dim', 'iterations'\]",
        ),
        ("seeds: [0, 1]", "seeds: [0, 1]\nworlds: {far: {source: {class: Nowhere}}}", "Nowhere"),
        ("bottleneck: LinearProbe", "bottleneck: LinearProb", "LinearProb"),
        ("class: Synthetic", "class: Synthetics", "Synthetics"),
        ("name: DOT-CBM", "name: Linear Probe", "linear-probe"),
        ("epochs: 1", "epoch: 1", "epoch"),
        ("bottleneck: LinearProbe", "bottleneck: LinearProbe, epochs: {nowhere: 3}", "nowhere"),
        ("bottleneck: LinearProbe", "bottleneck: LinearProbe, grid: [{lr: [0.1]}]", "changes 'lr'; it can change settings.<name>"),
        ("bottleneck: LinearProbe", "bottleneck: LinearProbe, grid: [{task.lr: 0.1}]", "a list of mappings from settings to lists"),
        ("bottleneck: LinearProbe", "bottleneck: LinearProbe, grid: [{task.lr: [1, 1]}]", "trials more than once"),
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


def shipped() -> list[Path]:
    """The studies of bottlenecks; those of experts have their own tests."""
    folder = Path(__file__).parents[2] / "configs" / "studies"
    return [path for path in sorted(folder.glob("*.yaml")) if not is_expert_study(path)]


def test_shipped_studies_can_be_read() -> None:
    studies = {study.name: study for study in map(read_study, shipped())}
    trials = Counter(row.method for row in studies["birds_tuning"].rows)
    assert set(trials) <= {row.name for row in studies["birds"].rows}
    # The linear probe has the strength of its head only, which each trial searches; random concepts have six settings in all.
    assert {number for method, number in trials.items() if method not in ("linear probe", "random concepts")} == {40}


def test_the_splits_that_shipped_studies_ask_for_are_there(shared: Path) -> None:
    for path in shipped():
        for name, world in read_study(path).worlds.items():
            source = json.loads(json.dumps(source_of(world, seed=0)).replace("../shared", str(shared)))
            data = ConceptDataModule(make_source(source), **world.data)
            assert all(len(data.dataset(split)) for split in data.evaluate_splits), (path.name, name)
            assert world.audit is None or world.audit["split"] in data.evaluate_splits


def test_a_grid_is_a_row_for_each_trial_and_the_table_shows_the_best_of_each(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    grid = "grid: [{settings.dim: [4, 8], task.lr: [0.1]}, {epochs: [3]}]"
    path.write_text(
        YAML.replace("settings: {dim: 8, iterations: 5}", f"settings: {{dim: 2, iterations: 5}}, task: {{vop_weight: 0.0}}, {grid}")
    )
    study = read_study(path)
    assert [row.name for row in study.rows] == ["linear probe", "DOT-CBM (dim 4, lr 0.1)", "DOT-CBM (dim 8, lr 0.1)", "DOT-CBM (epochs 3)"]
    assert [row.method for row in study.rows] == ["linear probe", "DOT-CBM", "DOT-CBM", "DOT-CBM"]
    assert study.rows[2].settings == {"dim": 8, "iterations": 5}
    assert study.rows[2].task == {"vop_weight": 0.0, "lr": 0.1}
    assert (study.rows[3].settings["dim"], study.rows[3].epochs) == (2, 3)
    records = [
        Record("tiny", row.name, 0, {"bottleneck": row.bottleneck}, {"val/accuracy": accuracy, "val/concept_auroc": auroc}, 1.0, "CPU", {})
        for row, accuracy, auroc in zip(study.rows, (0.5, 0.6, 0.7, 0.75), (0.5, 0.9, 0.9, 0.8))
    ]
    claim = Claim("tuning", "Which?", (("val/accuracy", "accuracy"),), best=("val/accuracy", "val/concept_auroc"))
    assert markdown(study, records, claim).splitlines() == [
        "| method | trials | n | accuracy |",
        "| --- | --- | --- | --- |",
        "| linear probe | 1 | 1 | 50.0 |",
        "| DOT-CBM (dim 8, lr 0.1) | 3 | 1 | 70.0 |",
    ]
    assert len(markdown(study, records, replace(claim, best=())).splitlines()) == 6
    (ax,) = plot_claim(study, records, claim).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["linear probe", "DOT-CBM"]  # settings would not fit the margin
    # 70 and 90 have a mean of 80, 60 and 90 one of 75, 75 and 80 one of 77.5: near the best, the setting that is preferred.
    smaller = replace(study, rows=(*study.rows[:2], replace(study.rows[2], settings={"dim": 1}), study.rows[3]))
    for within, shown in ((0.024, "dim 8, lr 0.1"), (0.025, "epochs 3"), (0.049, "epochs 3"), (0.05, "dim 4, lr 0.1")):
        assert f"| DOT-CBM ({shown}) " in markdown(smaller, records, replace(claim, within=within, prefer=("dim",)))


def test_trials_are_compared_on_the_seeds_that_all_of_them_have() -> None:
    rows = (Row("CBM (l2 1)", "CBM", of="CBM"), Row("CBM (l2 2)", "CBM", of="CBM"))
    study = Study("tiny", {}, seeds=(1, 2), rows=rows)
    # Seed 2 is a hard split, and the second trial was not run on it yet.
    runs = [(0, 1, 0.9), (0, 2, 0.3), (1, 1, 0.8)]
    records = [Record("tiny", rows[i].name, seed, {"bottleneck": "CBM"}, {"val/accuracy": v}, 1.0, "CPU", {}) for i, seed, v in runs]
    claim = Claim("tuning", "Which?", (("val/accuracy", "accuracy"),), best=("val/accuracy",))
    assert markdown(study, records, claim).splitlines()[2:] == ["| CBM (l2 1) | 2 | 2 | 60.0 ± 42.4 |"]
    # With no seed in common each is judged by its own.
    assert markdown(study, [records[1], records[2]], claim).splitlines()[2:] == ["| CBM (l2 2) | 2 | 1 | 80.0 |"]


def test_the_table_holds_the_mean_and_spread_of_the_records() -> None:
    rows = (Row("a | b", "CBM"), Row("black box", "LinearProbe"))
    study = Study("s", {MAIN: World({}, {}, {}, {}, 1), "far": World({}, {}, {}, {}, 1)}, (0, 1, 2), rows)
    values = [0.5, 0.6, 0.9]
    records = [
        Record(
            "s", row.name, seed, {"bottleneck": row.bottleneck},
            {"test/accuracy": value - lower, "twin/accuracy": value / 2, "test/concept_auroc": 0.5 + 1e-6 * seed}, 1.0, "CPU", {}, world,
        )
        for row in rows
        for world, lower in ((MAIN, 0.0), ("far", 0.2))
        for seed, value in enumerate(values)
    ]  # fmt: skip
    columns = (("test,twin/accuracy", "acc"), ("test/concept_auroc", "auroc"), ("far:test/x|accuracy", "either"))
    claim = Claim("all", "Which is best?", columns)
    table = markdown(study, records, claim).splitlines()

    def cell(change: float = 0.0, factor: float = 1.0) -> str:
        shown = [100 * factor * value + change for value in values]
        return f"{mean(shown):.1f} ± {stdev(shown):.1f}"

    assert table[2] == f"| a : b | 3 | {cell()} / {cell(factor=0.5)} | 50.0 ± 0.0 | {cell(-20)} |"
    assert table[3] == f"| black box | 3 | {cell()} / {cell(factor=0.5)} | — | {cell(-20)} |"
    assert len(markdown(study, records, replace(claim, rows=("black box",))).splitlines()) == 3
    fewer = [record for record in records if record.world == MAIN or record.seed < 2]
    assert markdown(study, fewer, claim).splitlines()[2].endswith("| 35.0 ± 7.1 (n = 2) |")
    drawn = [text.get_text() for ax in plot_claim(study, records, claim).axes for text in ax.get_yticklabels()]
    assert drawn[:2] == ["a | b", "black box"]
    controlled = replace(claim, columns=(("test/accuracy", "accuracy"), ("twin/accuracy", "its control")), better=())
    (ax,) = plot_claim(study, records, controlled).axes
    strokes = [np.asarray(line.get_xdata()).item() for line in ax.lines if line.get_marker() == "|"]
    assert strokes == pytest.approx([100 * mean(values) / 2] * 2)
    flat = plot_claim(study, records, replace(claim, columns=(("test/concept_auroc", "auroc"),))).axes[0].get_xlim()
    assert flat == pytest.approx((49, 51), abs=0.2)  # no axis over differences that are none
    with pytest.raises(ValueError, match="no record yet"):
        plot_claim(study, [], claim)


def test_summary_of_one_value_has_no_spread() -> None:
    assert summary([0.25]) == "25.0"
    assert summary([3.0, 3.0], percent=False) == "3.0 ± 0.0"


def test_worlds_say_only_what_differs_and_are_run_and_recorded_apart(tmp_path: Path) -> None:
    path = tmp_path / "worlds.yaml"
    far = "worlds: {far: {source: {class: Synthetic, size: 64, num_train: 32, num_val: 16, num_test: 8, seed: 5}, task: {head_l2: 0.1}}}"
    path.write_text(YAML.replace("CACHE", str(tmp_path / "cache")).replace("seeds: [0, 1]", "seeds: [0]\n" + far))
    study = read_study(path)
    assert study.worlds["far"].epochs == 1
    assert study.worlds["far"].encoder == study.worlds[MAIN].encoder
    study = replace(study, rows=(replace(study.rows[0], worlds=("far",)), replace(study.rows[1], name="dot", worlds=(MAIN,))))
    records = run_study(study, tmp_path / "records", say=str)
    assert [(record.row, record.world, record.figures["test/num_pictures"]) for record in records] == [
        ("dot", MAIN, 16),
        ("linear probe", "far", 8),
    ]
    assert sorted(found.name for found in (tmp_path / "records").glob("*.json")) == ["dot-seed0.json", "far-linear-probe-seed0.json"]


def test_epochs_of_a_row_hold_in_the_worlds_that_they_are_given_for() -> None:
    world = World({}, {}, {}, {}, 8)
    row = Row("slow", "CBM", epochs={MAIN: 60})
    assert [row.epochs_in(name, world) for name in (MAIN, "far")] == [60, 8]
    assert [replace(row, epochs=told).epochs_in("far", world) for told in (3, None)] == [3, 8]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    study, out = make_study(tmp_path), tmp_path / "records"
    out.mkdir()
    (out / "linear-probe-seed0.json").write_text('{"study": "tiny"')
    with pytest.raises(ValueError, match=r"linear-probe-seed0.json: is no record of a run .*delete it"):
        run_study(study, out, say=str)


def test_a_source_may_take_the_seed_of_the_run_and_hold_another_source():
    described = {"class": "Backgrounds", "kind": "coloured", "source": {"class": "Synthetic", "size": 64, "seed": "{seed}"}}
    made = make_source(source_of(World({}, described, {}, {}, 1), seed=7))
    assert type(made).__name__ == "Backgrounds"
    assert made.source == Synthetic(size=64, seed=7)  # pyright: ignore
    assert described["source"]["seed"] == "{seed}"  # pyright: ignore


def test_an_audited_run_leaves_the_record_that_its_figures_come_from(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    small = "audit: {split: test, num_occluded: 2, num_swapped: 4, num_draws: 20}"
    path.write_text(YAML.replace("CACHE", str(tmp_path / "cache")).replace("seeds: [0, 1]", f"seeds: [3]\n{small}"))
    study, out = read_study(path), tmp_path / "records"
    figures = run_study(study, out, only=["DOT-CBM"], say=str)[0].figures
    audited = read_record(out / "audits" / "dot-cbm-seed3.json")
    assert figures["audit/classes/accuracy"] == audited.figure("classes/accuracy").value.value == pytest.approx(figures["test/accuracy"])
    assert dict(audited.card.audit)["seed"] == "3"
    assert figures["audit/shortcut_first"] in (0.0, 1.0)
    assert {f"audit/accused/{f.key}" for f in audited.findings if f.severity in ("critical", "warning")} == {
        key for key in figures if key.startswith("audit/accused/")
    }
