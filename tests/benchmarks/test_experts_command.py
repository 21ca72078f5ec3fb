"""The experts' benchmark at tiny sizes: every table comes out, on paper and as numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from . import experts
from .experts import main


def test_every_table_comes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--quick", "--tune", "--out", str(tmp_path)])
    printed, text = capsys.readouterr().out, (tmp_path / "experts_cpu.md").read_text(encoding="utf-8")
    for title in ("correctness, 20 tokens", "speed, d 32, hidden 64", "kernels, d 32, hidden 64", "tiles, d 32", "summary"):
        assert title in printed
        assert f"## {title}" in text
    raw = json.loads((tmp_path / "experts_cpu.json").read_text(encoding="utf-8"))
    assert "failed" not in raw
    assert max(error for row in raw["errors"] for error in row["errors"]) < 1e-6
    assert {row["name"] for row in raw["speed"]} == {"dense FFN", "triton", "grouped", "padded", "loop"}
    for row in raw["tiles"]:
        assert not row["error"]
        assert sum((time or 0) > 0 for time in row["milliseconds"].values()) in (2, 4)  # of weight gradients, or of the other products


def test_a_cpu_has_nothing_to_time(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match="--quick"):
        main([])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        main(["--quick"])


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(experts, "measure_speed", broken)
    main(["--quick", "--only", "d 32, hidden 64", "--out", str(tmp_path)])
    raw = json.loads((tmp_path / "experts_cpu.json").read_text(encoding="utf-8"))
    assert [failed["section"] for failed in raw["failed"]] == ["speed, d 32, hidden 64, E 4, k 2"]
    assert raw["kernels"]
    assert "no such GPU" in capsys.readouterr().out
