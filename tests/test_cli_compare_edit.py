"""`dotcbm compare` and `dotcbm edit` as a user runs them: on a run in a folder, and on records in files."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from dotcbm.cli import compare, edit
from dotcbm.cli.train import FitCli, launch
from dotcbm.hub import from_pretrained
from dotcbm.report.record import FORMAT, AuditRecord, Confusion, Figure, Interval, ModelCard, PictureColumns, Reliability
from dotcbm.report.record_file import write_record

TINY = str(Path(__file__).parent / "conf" / "tiny.yaml")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run in `runs/tiny`."""
    folder = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert launch(FitCli, ["--config", TINY]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "240")  # tables wrap at the width of the terminal
    return home


def asked(out: str, *more: str) -> list[str]:
    return ["--config", "runs/tiny/config.yaml", "--by", "An Auditor", "--reason", "a test", "--out", out, *more]


def test_edit_then_edit_again(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = from_pretrained("runs/tiny/model").concepts.names
    assert edit.run("edit", asked("runs/edited", "--remove", names[0], "--scale", f"{names[5]}=0.5")) == 0
    said = capsys.readouterr().out
    assert "silently zeroed" in said
    assert f"removed '{names[0]}'" in said
    assert "test_ood" in said
    model = from_pretrained("runs/edited/model")
    assert model.removed_concepts == (names[0],)
    assert model.edits[0].scaled == ((names[5], 0.5),)
    assert not from_pretrained("runs/tiny/model").edits
    config = Path("runs/edited/config.yaml").read_text()
    assert "run_dir" not in config
    again = asked("runs/twice", "--remove", names[1], "--reweight")
    again[1] = "runs/edited/config.yaml"
    assert edit.run("edit", again) == 0
    assert from_pretrained("runs/twice/model").removed_concepts == names[:2]
    assert [row["removed"] for row in json.loads(Path("runs/twice/model/edits.json").read_text())["edits"]] == [[names[0]], [names[1]]]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([], "nothing to edit"),
        (["--scale", "wing"], "--scale is 'wing'; write it as \"CONCEPT=FACTOR\""),
        (["--scale", "wing=much"], "--scale is 'wing=much'"),
        (["--remov", "wing"], "did you mean --remove"),
    ],
)
def test_bad_command_lines(inside: Path, capsys: pytest.CaptureFixture[str], more: list[str], match: str) -> None:
    with pytest.raises(SystemExit) as left:
        edit.run("edit", asked("new", *more))
    assert left.value.code == 2
    assert match in capsys.readouterr().err
    assert not Path("new").exists()


def test_an_existing_folder_and_an_unknown_concept_change_nothing(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edit.run("edit", asked("runs", "--remove", "x"))
    assert "never replaces anything" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no concept 'striped bodyy'; did you mean 'striped body'"):
        edit.run("edit", asked("new", "--remove", "striped bodyy"))
    assert not Path("new").exists()


def test_bad_configs(inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "config.yaml"
    for text, match in (
        ("model: {}\n", "says nothing of the data"),
        ("data:\n  source:\n    class_path: Synthetik\n", "line 3: data.source: there is no class 'Synthetik'; did you mean Synthetic"),
        ("data: {source: {class_path: Synthetic}}\n", None),
    ):
        bad.write_text(text)
        words = ["--config", str(bad), *asked("new", "--remove", "x")[2:]]
        if match is None:
            with pytest.raises(ValueError, match="holds no finished model"):
                edit.run("edit", words)
        else:
            assert edit.run("edit", words) == 2
            assert match in capsys.readouterr().err


def make_record(title: str, predicted: tuple[int, ...], *, split: str = "test") -> AuditRecord:
    label = (0, 1) * 10
    right = sum(p == k for p, k in zip(predicted, label, strict=True)) / 20
    card = ModelCard("CBM", (), "tiny", "e", "w", "probability", "birds", "f", split, 20, 0, 2)
    pictures = PictureColumns(tuple(f"{i}.png" for i in range(20)), label, predicted, (0.9,) * 20, (0.6,) * 20)
    return AuditRecord(
        format=FORMAT,
        title=title,
        class_names=("a", "b"),
        summary="",
        card=card,
        findings=(),
        figures=(Figure("classes/accuracy", "Accuracy", Interval(right, n=20)),),
        absent=(),
        classes=(),
        confusion=Confusion(()),
        reliability=Reliability((), (), ()),
        concepts=(),
        parts=(),
        sweeps=(),
        suspects=(),
        interventions=(),
        groups=(),
        errors=(),
        cards=(),
        grid=(),
        pictures=pictures,
    )


def test_compare_reads_files_and_folders_and_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, predicted in (("good", (0, 1) * 10), ("bad", (0,) * 20)):
        (tmp_path / name).mkdir()
        write_record(make_record(name, predicted), tmp_path / name / "audit.json")
    words = [str(tmp_path / "good"), f"worse={tmp_path / 'bad' / 'audit.json'}"]
    assert compare.run("compare", [*words, "--out", str(tmp_path / "out"), "--draws", "50"]) == 0
    said = capsys.readouterr().out
    assert "worse: 0 pictures right only here, 10 wrong only here" in said
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored["names"] == ["good", "worse"]
    assert stored["figures"][0]["differences"][1]["value"] == -0.5
    assert (tmp_path / "out" / "compare.html").is_file()


def test_compare_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.run("compare", ["one"])
    assert "name two or more" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such file or folder"):
        compare.run("compare", ["one", "two"])
    with pytest.raises(ValueError, match=r"holds no audit\.json"):
        compare.run("compare", [str(tmp_path), str(tmp_path)])
    for name, split in (("x", "test"), ("y", "test_ood")):
        (tmp_path / name).mkdir()
        write_record(make_record(name, (0, 1) * 10, split=split), tmp_path / name / "audit.json")
    with pytest.raises(ValueError, match="holds several audits"):
        compare.run("compare", [str(tmp_path), str(tmp_path / "x")])
    words = [str(tmp_path / "x"), str(tmp_path / "y")]
    with pytest.raises(ValueError, match=r"y was audited on the split 'test_ood', x on 'test'.*--unpaired"):
        compare.run("compare", words)
    assert compare.run("compare", [*words, "--unpaired", "--out", str(tmp_path / "out")]) == 0
    assert "Unpaired" in capsys.readouterr().out
