"""Tests on real pictures must not be skipped unnoticed where the pictures are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def test_where_shared_data_is_required_it_is_there(shared: Path) -> None:
    assert (shared / "data" / "CUB_200_2011_subset" / "images.txt").is_file()
    assert (shared / "weights" / "tf_efficientnet_lite2" / "model.safetensors").is_file()


@pytest.mark.parametrize(("required", "outcome"), [("", "skipped"), ("1", "errors")])
def test_missing_data_skips_with_a_reason_or_fails_where_it_is_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, outcome: str
) -> None:
    monkeypatch.setenv("DOTCBM_SHARED", str(pytester.path / "nowhere"))
    monkeypatch.setenv("DOTCBM_REQUIRE_SHARED", required)
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile("def test_it(shared): pass")
    result = pytester.runpytest_inprocess("-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(["*no shared data at*nowhere*"])
    assert os.environ["DOTCBM_SHARED"]
