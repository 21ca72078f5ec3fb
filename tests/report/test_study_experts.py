"""Studies of experts: runs on tiny drawings from end to end, and claims about records made by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dotcbm.cli import main
from dotcbm.data.source import ConceptDataset
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.report.study.experts_claims import checks, markdown
from dotcbm.report.study.experts_plan import (
    ExpertClaim,
    ExpertRow,
    ExpertStudy,
    Loop,
    is_expert_study,
    read_expert_study,
    run_settings,
    runs_of,
)
from dotcbm.report.study.experts_plot import _far_apart, plot_experts, sunk_costs
from dotcbm.report.study.experts_run import run_expert_study
from dotcbm.report.study.experts_train import read_pictures
from dotcbm.report.study.plan import Record

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("experts_*.yaml"))
TINY = {"arguments": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 32}, "hidden": 16, "blocks": "all"}


def tiny(path: Path, tmp_path: Path, **changes: Any) -> Path:
    """A shipped study with pictures, models and steps small enough for a test."""
    values = yaml.safe_load(path.read_text())
    values["source"] = {"class": "Synthetic", "size": 64, "num_train": 32, "num_val": 1, "num_test": 16, "num_classes": 2}
    values["loop"] |= {"steps": 4, "batch_size": 8, "warmup": 1}
    values["encoder"]["moe"] |= TINY
    values["seeds"] = [0]
    for row in values["rows"]:
        if "save_at" in row:
            row["save_at"] = [1, 2, 3]
        if "at" in row:
            row["at"] = {75: 1, 150: 2, 300: 3}[row["at"]]
        if "arguments" in row.get("moe", {}):
            row["moe"] = {"arguments": {**TINY["arguments"], "depth": 4}}
        if "sparsify" in row.get("experts", {}):
            row["experts"]["sparsify"] = {"start": [2, 2], "begin": 2}
    out = tmp_path / path.name
    out.write_text(yaml.safe_dump(values | changes))
    return out


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_runs_from_end_to_end_and_goes_on(path: Path, tmp_path: Path) -> None:
    assert is_expert_study(path)
    read_expert_study(path, larger=True)
    study, said = read_expert_study(tiny(path, tmp_path)), []
    records = run_expert_study(study, tmp_path / "records", say=said.append)
    assert [record.row for record in records] == [row.name for row in study.rows]
    assert len(said) == len(study.rows)
    assert all(0 <= record.figures["accuracy"] <= 1 and record.figures["train/flops"] > 0 for record in records)
    again = run_expert_study(study, tmp_path / "records", say=said.append)
    assert again == records
    assert len(said) == len(study.rows)
    assert markdown(study, records).count("\n") > len(study.rows)
    figure = plot_experts(study, records)
    figure.savefig(tmp_path / "figure.png")
    for label in [label for ax in figure.axes for label in ax.get_yticklabels() if label.get_text()]:
        assert label.get_window_extent().x0 >= 0, label.get_text()  # inside the picture


def test_arms_of_growth_spend_the_same_flops_and_begin_where_the_base_was(tmp_path: Path) -> None:
    path = next(path for path in STUDIES if "growth" in path.name)
    study = read_expert_study(tiny(path, tmp_path, loop={"steps": 40, "batch_size": 4, "warmup": 1}))
    figures = {record.row: record.figures for record in run_expert_study(study, tmp_path / "records", say=lambda _: None)}
    base = figures["base"]
    for row in study.rows[1:]:
        assert row.flops is not None
        assert figures[row.name]["train/flops"] == pytest.approx(row.flops * base["train/flops"], rel=0.06), row.name
    for name in ("deeper, zeroed outputs", "base, continued"):
        assert figures[name]["start/accuracy"] == base["accuracy"]
    assert figures["deeper, interposed"]["flops"] > base["flops"]
    errors = [value for name, value in base.items() if name.startswith("exact/")]
    assert len(errors) == 18
    assert max(errors) <= 1e-5


def test_pictures_are_those_of_their_labels_in_a_split_that_is_part_of_another(tmp_path: Path) -> None:
    whole = Synthetic(size=64, num_train=8, num_classes=2)

    class Late(Synthetic):
        def load(self, split: str) -> ConceptDataset:
            return whole.load(split).subset([5, 2])

    encoder = ImageEncoder("vit_moe/test", image_size=64, pretrained=False)
    read = partial(read_pictures, split="train", preprocessing=encoder.preprocessing, cache=tmp_path, device="cpu")
    every, late = read(whole, {"a": 1}), read(Late(), {"a": 2})
    assert torch.equal(late.image_B3HW, every.image_B3HW[[5, 2]])
    assert torch.equal(late.label_B, every.label_B[[5, 2]])
    assert torch.equal(read(Late(), {"a": 2}).image_B3HW, late.image_B3HW)  # from the file


def test_two_processes_write_the_same_pictures_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Synthetic(size=64, num_train=6, num_val=1, num_test=1, num_classes=2)
    encoder = ImageEncoder("vit_moe/test", image_size=64, pretrained=False)
    read = partial(read_pictures, source, {}, "train", preprocessing=encoder.preprocessing, cache=tmp_path, device="cpu")
    save, others = torch.save, []

    def save_while_another_process_does(pictures: Any, path: Path) -> None:
        save(pictures, path)
        if not others:
            with monkeypatch.context() as another:
                another.setattr("os.getpid", lambda: -1)
                others.append(None)
                others[0] = read()

    monkeypatch.setattr(torch, "save", save_while_another_process_does)
    assert torch.equal(read().image_B3HW, others[0].image_B3HW)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = next(path for path in STUDIES if "balance" in path.name)
    study = read_expert_study(tiny(path, tmp_path))
    only = [study.rows[0].name]
    run_expert_study(study, tmp_path / "records", only=only, say=lambda _: None)
    with pytest.raises(ValueError, match=r"made with other settings than 'Switch loss' has now \(loop\); delete it"):
        run_expert_study(replace(study, loop=replace(study.loop, lr=0.5)), tmp_path / "records", only=only, say=lambda _: None)
    with pytest.raises(ValueError, match="has no rows"):
        run_expert_study(study, tmp_path / "records", only=["none"], say=lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": "beauty"}, "claim is 'beauty'"),
        ({"rows": [{"name": "a", "of": "b"}]}, "row 'a' starts from 'b'"),
        ({"rows": [{"name": "a"}, {"name": "A"}]}, "more than once"),
        ({"rows": [{"name": "a"}, {"name": "b", "of": "a", "at": 3}]}, "starts from step 3"),
        ({"rows": [{"name": "a", "grow": {"depth": "zero"}}]}, "does not say from which row"),
        ({"rows": [{"name": "a", "colour": "red"}]}, "colour"),
    ],
)
def test_mistakes_in_the_yaml_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_expert_study(tiny(STUDIES[0], tmp_path, **change))


def hand_made(claim: ExpertClaim, rows: list[ExpertRow], figures: dict[str, list[dict[str, float]]]) -> tuple[ExpertStudy, list[Record]]:
    encoder, loop = {"moe": {"k": 1}}, Loop(steps=100)
    study = ExpertStudy("hand", claim, "?", source={}, encoder=encoder, loop=loop, experts={}, seeds=(0, 1), rows=tuple(rows))
    records = [
        Record("hand", run.row.name, run.seed, run_settings(study, run), figures[run.row.name][run.seed], 1.0, "CPU", {})
        for run in runs_of(study)
    ]
    return study, records


def layers(vio: float, loss: float, dead: float, accuracy: float) -> dict[str, float]:
    first = {"max_vio": vio, "min_vio": -0.5, "switch_loss": loss, "dead": 0.0, "entropy": 3.0, "bias_spread": 0.0}
    return {f"experts/0/{k}": v for k, v in first.items()} | {"experts/1/max_vio": 0.1, "experts/1/dead": dead, "accuracy": accuracy}


def test_balance_is_judged_by_means_and_accuracy_seed_by_seed() -> None:
    rows = [ExpertRow("plain", part="plain"), ExpertRow("good", part="remedy"), ExpertRow("bad", part="remedy")]
    study, records = hand_made(
        "balance",
        rows,
        {
            "plain": [layers(2.0, 1.00, 4, 0.50), layers(4.0, 1.04, 4, 0.60)],
            "good": [layers(1.0, 1.00, 1, 0.50), layers(1.8, 1.00, 1, 0.592)],
            "bad": [layers(1.0, 1.00, 1, 0.49), layers(2.2, 1.00, 2, 0.595)],
        },
    )
    assert [check.met for check in checks(study, records)] == [True, True, True, True, False, False, False]
    found = [check.found for check in checks(study, records)][:4]
    assert found == ["1.020 ± 0.028 and 3.00 ± 1.41", "1.40 ± 0.57, 0.47 of it", "1.0 ± 0.0", "-0.4 ± 0.6 points"]
    assert "| plain | 2 | 55.0 ± 7.1 | 1.02 ± 0.03 | 3.00 ± 1.41 |" in markdown(study, records)


def test_budgets_are_judged_by_regret_and_area() -> None:
    def at(*accuracies: float) -> list[dict[str, float]]:
        one = {"train/flops": 1e15}
        for k, accuracy in zip((1, 2, 4), accuracies):
            one |= {f"accuracy@{k}": accuracy, f"flops@{k}": 1e6 * k, f"nested@{k}": 1.0}
        return [one, one]

    budgets = (1, 2, 4)
    rows = [
        ExpertRow("ours", part="matryoshka", budgets=budgets),
        ExpertRow("one", part="specialist", budgets=budgets),
        ExpertRow("four", part="specialist", moe={"k": 4}, budgets=budgets),
    ]
    study, records = hand_made("budgets", rows, {"ours": at(0.5, 0.7, 0.692), "one": at(0.52, 0.5, 0.4), "four": at(0.3, 0.6, 0.7)})
    assert [check.met for check in checks(study, records)] == [False, True, True]
    assert "area above the best, four" not in markdown(study, records)
    line = "| ours | 2 | 50.0 ± 0.0 | 70.0 ± 0.0 | 69.2 ± 0.0 | 66.4 ± 0.0 | 1.00, 1.00, 1.00 | 1.0 ± 0.0 |"
    assert line in markdown(study, records)


def test_growth_is_judged_against_scratch_and_reported_against_the_base() -> None:
    def of(accuracy: float) -> list[dict[str, float]]:
        cost = {"train/steps": 10, "train/flops": 1e12, "flops": 1e6, "parameters": 1e6}
        return [{"accuracy": accuracy, **cost, "exact/depth/sigmoid/never": 1e-4}] * 2

    rows = [
        ExpertRow("base", part="base", save_at=(50,)),
        ExpertRow("grown", part="grown", of="base", grow={"depth": "zero"}),
        ExpertRow("nothing", part="scratch"),
        ExpertRow("on", part="continued", of="base"),
        ExpertRow("early", part="sunk", of="base", at=50, grow={"depth": "zero"}),
    ]
    study, records = hand_made("growth", rows, {"base": of(0.6), "grown": of(0.7), "nothing": of(0.68), "on": of(0.71), "early": of(0.69)})
    assert [(check.met, check.found) for check in checks(study, records)] == [
        (False, "2.0 ± 0.0 points"),
        (None, "-1.0 ± 0.0 points"),
        (False, "1.0e-04"),
    ]
    assert [(row.name, steps) for row, steps in sunk_costs(study, records)] == [("nothing", 0), ("early", 50), ("grown", 100)]


def test_the_command_writes_table_figure_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny(STUDIES[0], tmp_path)
    asked = ["study", str(path), "--out", str(tmp_path / "records"), "--report", str(tmp_path / "report"), "--only", "Switch loss"]
    assert main(asked) == 0
    assert "degenerate balance with Switch loss" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [f"experts_balance.{end}" for end in ("jsonl", "md", "png")]
    assert main([*asked, "--no-runs"]) == 0
    assert main([*asked, "--world", "main"]) == 2
    assert "has no worlds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("means", "far"), [([1.6, 0.4, 0.6, 0.7, 63.0], True), ([2.2, 0.4, 1.6], False), ([0.0, 1.0, 63.0], False), ([], False)]
)
def test_one_collapsed_row_does_not_press_the_others_into_a_point(means, far):
    assert _far_apart(means) == far
