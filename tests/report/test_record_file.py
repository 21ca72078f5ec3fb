"""Records as files: what is written is read, and whatever else is refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fakes.audit_record import bare, make_record
from hypothesis import given
from hypothesis import strategies as st

from dotcbm.report import record_file
from dotcbm.report.record import FORMAT, AuditRecord, Interval
from dotcbm.report.record_file import read_record, record_from_dict, record_from_json, record_to_dict, record_to_json, schema, write_record

SCHEMA = Path(record_file.__file__).with_name("audit.schema.json")
FORMAT_1 = Path(__file__).parent / "fixtures" / "audit_format_1.json"


@cache
def record() -> AuditRecord:
    return make_record(num_pictures=18, num_cards=2, num_grid=6, size=64)


def values() -> dict[str, Any]:
    return json.loads(record_to_json(record()))


def test_a_record_is_read_as_it_was_written_and_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path / "deep" / "audit.json")
    read = read_record(path)
    assert write_record(read, tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert read == record_from_dict(record_to_dict(record()))
    assert read.findings == record().findings
    assert read.concepts[3].parts == record().concepts[3].parts
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_hostile_names_survive_and_no_tag_can_end_a_script_element() -> None:
    hostile = make_record(num_pictures=8, num_cards=1, num_grid=2, size=64, hostile=True)
    text = record_to_json(hostile)
    assert "<" not in text
    assert record_from_json(text).class_names == hostile.class_names


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_six_digits_and_whole_numbers_are_exact(value: float) -> None:
    for held in (record_file._encoded(value, float, "here"), record_file._encoded((value, None), tuple[float | None, ...], "here")[0]):
        assert held == value if value.is_integer() else abs(held - value) <= 5.01e-6 * abs(value) + 1e-320


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    concepts = list(record().concepts)
    concepts[3] = replace(concepts[3], auroc=Interval(0.5, value, 0.6))
    path = tmp_path / "audit.json"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"concepts\[3\]\.auroc\.low is (nan|inf), which JSON cannot hold"):
        write_record(replace(record(), concepts=tuple(concepts)), path)
    assert path.read_text() == "old"


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(record(), tmp_path / "audit.json")
    old = path.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(replace(record(), title="new"), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("made", [record, lambda: bare(record())], ids=["whole", "bare"])
def test_records_validate_against_the_schema(made: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads(record_to_json(made())), schema(), cls=jsonschema.Draft202012Validator)


def test_the_schema_refuses_what_reading_refuses() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    for change in ({"format": 99}, {"strange": 1}, {"title": 3}, {"cards": [{}]}):
        assert not validator.is_valid(values() | change)
        with pytest.raises(ValueError, match=r"format|strange|title|cards"):
            record_from_dict(values() | change)


def test_the_committed_schema_is_current() -> None:
    written = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    assert SCHEMA.read_text(encoding="utf-8") == written, f"write json.dumps(schema(), indent=1, ensure_ascii=False) to {SCHEMA.name}"


def test_format_1_is_migrated() -> None:
    held = json.loads(FORMAT_1.read_text(encoding="utf-8"))
    assert held["format"] == 1
    assert "num_pictures" not in held["interventions"][0]
    read = read_record(FORMAT_1)
    assert read.format == FORMAT
    assert [curve.num_pictures for curve in read.interventions] == [None] * len(held["interventions"])
    assert [sweep.num_boxes for sweep in read.sweeps] == [None] * len(held["sweeps"])
    assert {row.num_mapped for row in read.concepts} == {row.num_covered for row in read.concepts} == {None}
    assert read.title == held["title"]


def test_every_older_format_has_a_migration() -> None:
    assert sorted(record_file._MIGRATIONS) == list(range(1, FORMAT))


def test_a_newer_format_names_both_versions_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=rf"format {FORMAT + 1}, .* up to {FORMAT}; upgrade dotcbm"):
        record_from_dict(values() | {"format": FORMAT + 1})


def _set(place: str, value: object) -> dict[str, Any]:
    """The values with one of them changed; the place is a path as errors print it."""
    changed = values()
    at: Any = changed
    *way, last = place.replace("[", ".").replace("]", "").split(".")
    for step in way:
        at = at[int(step)] if step.isdigit() else at[step]
    if value is ...:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return changed


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("concepts[3].auroc.low", ..., r"it lacks \['concepts\[3\]\.auroc\.low'\]"),
        ("concepts[3].auroc.strange", 1, r"unknown \['concepts\[3\]\.auroc\.strange'\]"),
        ("concepts[3].auroc.low", "0.5", r"concepts\[3\]\.auroc\.low is '0\.5'; expected a number"),
        ("concepts[3].auroc", None, r"concepts\[3\]\.auroc is None; expected the keys"),
        ("concepts[0].num_known", 1.5, r"concepts\[0\]\.num_known is 1\.5; expected a whole number"),
        ("concepts[0].num_known", True, r"concepts\[0\]\.num_known is True; expected a whole number"),
        ("findings[0].severity", "fatal", r"findings\[0\]\.severity is 'fatal'; expected one of \['critical'"),
        ("findings", 3, r"findings is 3; expected a list"),
        ("cards[0].grid", [14], r"cards\[0\]\.grid has 1 entries; expected 2"),
        ("cards[0].row", 99, r"cards\[0\]\.row speaks of number 99, and there are 18 pictures"),
        ("cards[0].concepts[1].concept", 99, r"cards\[0\]\.concepts speaks of number 99"),
        ("cards[0].concepts[1].heat", [1, 2], r"cards\[0\]\.concepts\[1\]\.heat has 2 entries; expected 196"),
        ("cards[0].concepts[1].heat[0]", 256, r"cards\[0\]\.concepts\[1\]\.heat leaves 0"),
        ("cards[0].class_logits", [1.0], r"cards\[0\]\.class_logits has 1 entries"),
        ("pictures.label", [0], r"pictures\.label has 1 entries for 18 pictures"),
        ("pictures.label[2]", -1, r"pictures\.label speaks of number -1"),
        ("pictures.concept_truth[2]", [1], r"pictures\.concept_truth\[2\] has 1 entries for 32 concepts"),
        ("confusion.count_KK", [[1]], r"confusion\.count_KK has 1 rows for 6 classes"),
        ("format", 0, r"formats are numbered from 1"),
        ("format", "2", r"is no record of an audit"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(place: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_from_dict(_set(place, value))


def test_a_record_that_only_claims_to_be_old_is_refused() -> None:
    with pytest.raises(ValueError, match="says format 1 but is not"):
        record_from_dict({"format": 1})


def test_files_that_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    with pytest.raises(ValueError, match=r"audit\.json is no file"):
        read_record(path)
    path.write_text(record_to_json(record())[:5000])
    with pytest.raises(ValueError, match=r"audit\.json is damaged or cut short: .* line \d+"):
        read_record(path)
    path.write_bytes(b'{"format": \xff\xfe')
    with pytest.raises(ValueError, match=r"byte 11 is no UTF-8"):
        read_record(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"no record of an audit"):
        read_record(path)
