"""Every setting of the birds' study is what its committed tuning records say, by the rules that the configs state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import pytest

from dotcbm.report.study.plan import MAIN, Record, Row, Study, read_study
from dotcbm.report.study.table import shown_rows

ROOT = Path(__file__).parents[2]
METHODS = list(dict.fromkeys(row.method for row in read_study(ROOT / "configs/studies/birds_tuning.yaml").rows))
NUM_FINALISTS = 5
HEAD_ONLY = ("linear probe", "random concepts")  # nothing else is trained, so rates do not matter


def study_of(name: str) -> Study:
    return read_study(ROOT / "configs" / "studies" / f"{name}.yaml")


def records_of(name: str) -> list[Record]:
    return [Record(**json.loads(line)) for line in (ROOT / "reports" / name / "records.jsonl").read_text().splitlines()]


def score(records: Sequence[Record]) -> float:
    return mean(r.figures[f"val/{name}"] for r in records for name in ("accuracy", "concept_auroc"))


def settings_of(study: Study, row: Row) -> dict[str, object]:
    world = study.worlds[MAIN]
    return {"bottleneck": row.bottleneck, **row.settings, **world.task, **row.task, "epochs": row.epochs_in(MAIN, world)}


@pytest.mark.parametrize("method", METHODS)
def test_the_five_that_one_split_cannot_tell_apart_go_on(method: str) -> None:
    found = {r.row: r for r in records_of("birds_tuning")}
    trials = {row.name: found[row.name] for row in study_of("birds_tuning").rows if row.method == method}

    def penalty(name: str) -> tuple[float, float]:
        settings = trials[name].settings
        return settings.get("l2", 0.0), settings.get("l1", 0.0)

    best = max(score([r]) for r in trials.values())
    near = [name for name, r in trials.items() if score([r]) >= best - 0.01 - 1e-9]
    order = sorted(near, key=lambda name: (penalty(name), score([trials[name]])), reverse=True)
    order += sorted((name for name in trials if name not in near), key=lambda name: score([trials[name]]), reverse=True)
    finals = study_of("birds_finals")
    assert {row.name for row in finals.rows if row.method == method} == set(order[:NUM_FINALISTS])
    runs = [(r.row, r.seed) for r in records_of("birds_finals") if r.row in trials]
    assert sorted(runs) == sorted((name, seed) for name in order[:NUM_FINALISTS] for seed in finals.seeds)


def test_the_finals_leave_out_other_photos_for_every_seed() -> None:
    # The linear probe depends on the photos alone: equal figures of two seeds are those of one part (so it was, for a while).
    errors = {r.figures["val/calibration_error"] for r in records_of("birds_finals") if r.row == "linear probe"}
    assert len(errors) == len(study_of("birds_finals").seeds)


@pytest.mark.parametrize("method", METHODS)
def test_the_study_has_the_settings_of_the_best_finalist(method: str) -> None:
    birds, finals = study_of("birds"), study_of("birds_finals")
    final_records = records_of("birds_finals")
    chosen = next(row for row, _ in shown_rows(finals, final_records, finals.claims[0]) if row.method == method)
    wanted = settings_of(finals, chosen)
    # A head that is fitted afterwards has the median of the strengths that the five splits found, unless its sparsity is asked for.
    found = [r.figures["head_l2"] for r in (*records_of("birds_tuning"), *final_records) if r.row == chosen.name and "head_l2" in r.figures]
    has = settings_of(birds, next(row for row in birds.rows if row.name == method))
    if found and "head_nec" not in wanted:
        assert len(found) == 1 + len(finals.seeds)
        wanted["head_l2"] = median(found)
    else:
        has.pop("head_l2")
    if method in HEAD_ONLY:
        has, wanted = ({k: v for k, v in each.items() if k not in ("lr", "lr_halve_every", "weight_decay")} for each in (has, wanted))
    assert has == wanted
