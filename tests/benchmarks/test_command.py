"""The benchmark command at tiny sizes: every table comes out, on paper and as numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .transport import main

pytest.importorskip("ot", reason="the benchmark measures against POT")


def numbers(record: Any) -> Iterator[float]:
    """Every number in it, however deep."""
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, list):
        for part in record:
            yield from numbers(part)
    elif isinstance(record, int | float):
        yield record


def test_every_table_comes_out_with_finite_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--quick", "--repeats", "2", "--out", str(tmp_path)])
    printed, text = capsys.readouterr().out, (tmp_path / "transport_cpu.md").read_text(encoding="utf-8")
    for title in (
        "Correctness",
        "equal residual (4, 16, 6)",
        "50 passes (3, 9, 20)",
        "scores without the plan",
        "training step",
        "cached epoch",
    ):
        assert title in printed
        assert f"## {title}" in text

    raw = json.loads((tmp_path / "transport_cpu.json").read_text(encoding="utf-8"))
    assert raw["about"]["command"].startswith("python -m tests.benchmarks.transport --quick")
    for kind in ("correctness", "solvers", "readout", "training_step", "cached_epoch"):
        assert raw[kind], kind
        for row in raw[kind]:
            assert all(math.isfinite(x) for x in numbers(row)), row
    for row in raw["solvers"]:
        assert len(row["forward"]["device"]) == len(row["forward"]["wall"]) == 2
        if row["mode"] == "equal residual":
            assert row["residual"] <= 1.1e-3, row  # a solver's own float32 sum may differ in the last digits
    # Whoever is left out says why.
    assert all(record["reason"] for record in raw["left_out"])


def test_only_picks_sections(tmp_path: Path):
    main(["--quick", "--repeats", "1", "--only", "equal residual (4", "--out", str(tmp_path)])
    raw = json.loads((tmp_path / "transport_cpu.json").read_text(encoding="utf-8"))
    assert set(raw) == {"about", "solvers", "left_out"}
    assert {tuple(row["size"]) for row in raw["solvers"]} == {(4, 16, 6)}
