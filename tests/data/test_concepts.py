"""Concept sets survive the disk, and every broken file is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dotcbm.data import concepts as module
from dotcbm.data.concepts import compare_concepts, concepts_from_dict, concepts_to_dict, load_concepts, restrict, save_concepts, varying
from dotcbm.structures import ConceptSet

NAN = math.nan


def birds() -> ConceptSet:
    return ConceptSet(
        names=("hooked bill", "weiße Brust", "red wing"),
        class_names=("gull", "finch"),
        class_concept_KM=torch.tensor([[0.9, NAN, 0.1], [0.2, 0.6, 0.3]]),
        groups=("bill shape", "breast color", "wing color"),
        part_names=("beak", "breast", "left wing", "right wing"),
        parts=(("beak",), ("breast",), ("left wing", "right wing")),
    )


def same(a: ConceptSet, b: ConceptSet) -> bool:
    return (
        (a.names, a.class_names, a.groups, a.part_names, a.parts) == (b.names, b.class_names, b.groups, b.part_names, b.parts)
        and a.class_concept_KM.dtype == b.class_concept_KM.dtype
        and torch.equal(a.class_concept_KM.nan_to_num(-1), b.class_concept_KM.nan_to_num(-1))
    )


def test_round_trip_keeps_unknowns_and_is_strict_json(tmp_path):
    save_concepts(birds(), tmp_path / "new" / "concepts.json")
    text = (tmp_path / "new" / "concepts.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["class_concept_KM"][0][1] is None
    assert same(load_concepts(tmp_path / "new" / "concepts.json"), birds())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["concepts.json"]


@given(
    st.lists(st.text(min_size=1).filter(lambda s: s.strip()), min_size=1, max_size=6, unique=True),
    st.integers(1, 4),
    st.data(),
)
def test_round_trip_of_any_concept_set(names, num_classes, data):
    value = st.one_of(st.just(NAN), st.floats(0, 1, width=32))
    matrix = data.draw(st.lists(st.lists(value, min_size=len(names), max_size=len(names)), min_size=num_classes, max_size=num_classes))
    concepts = ConceptSet(tuple(names), tuple(f"c{k}" for k in range(num_classes)), torch.tensor(matrix))
    again = concepts_from_dict(json.loads(json.dumps(concepts_to_dict(concepts), allow_nan=False)))
    assert same(again, concepts)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "concepts.json"
    save_concepts(birds(), path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_concepts(restrict(birds(), [0]), path)
    assert same(load_concepts(path), birds())
    assert [p.name for p in tmp_path.iterdir()] == ["concepts.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": None}, "names is a NoneType, expected a list"),
        ({"names": ["a", "", "c"]}, "names number 2 is ''"),
        ({"class_concept_KM": [[0.1, 0.2, 0.3]]}, "has 1 rows, expected 2"),
        ({"class_concept_KM": [[0.1, 0.2, 0.3], [0.1]]}, "row 2 has 1 values, expected 3"),
        ({"class_concept_KM": [[0.1, 0.2, 0.3], [0.1, "x", 0]]}, "row 2, column 2 is 'x'"),
        ({"class_concept_KM": [[0.1, 0.2, 0.3], [0.1, 20, 0]]}, r"must lie in \[0, 1\]"),
        ({"names": ["a", "a", "c"]}, "appear more than once"),
        ({"parts": "beak"}, "parts is no list of lists"),
        ({"parts": [["fin"], [], []]}, r"\['fin'\], which are not among part_names"),
        ({"groups": ["one"]}, "1 groups for 3 concepts"),
        ({"format": 9}, "has format 9, this version reads format 1"),
    ],
)
def test_a_broken_file_is_named(tmp_path, change, message):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(concepts_to_dict(birds()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_concepts(path)
    assert str(path) in str(caught.value)


def test_missing_truncated_or_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json: no such file"):
        load_concepts(tmp_path / "gone.json")
    save_concepts(birds(), tmp_path / "cut.json")
    (tmp_path / "cut.json").write_text((tmp_path / "cut.json").read_text()[:-30])
    with pytest.raises(ValueError, match=r"cut\.json: is no JSON.*truncated"):
        load_concepts(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load_concepts(tmp_path / "list.json")
    with pytest.raises(ValueError, match=r"lacks \['class_names', 'class_concept_KM'\]"):
        concepts_from_dict({"names": ["a"]})


def test_compare_accepts_the_same_and_names_what_differs():
    compare_concepts(birds(), birds())
    other = ConceptSet(("hooked bill", "blue wing", "weiße Brust"), ("gull", "finch"), torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match="missing: 'red wing'; added: 'blue wing'; first difference at number 2: expected 'weiße Brust'"
    ) as caught:
        compare_concepts(birds(), other)
    assert "classes" not in str(caught.value)
    swapped = restrict(birds(), [1, 0, 2])
    with pytest.raises(ValueError, match="first difference at number 1: expected 'hooked bill', found 'weiße Brust'") as caught:
        compare_concepts(birds(), swapped)
    assert "missing" not in str(caught.value)
    with pytest.raises(ValueError, match="missing: 'red wing'"):
        compare_concepts(birds(), restrict(birds(), [0, 1]))
    classes = ConceptSet(birds().names, ("gull", "tern"), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"the classes of the data .* missing: 'finch'; added: 'tern'"):
        compare_concepts(birds(), classes)


def test_restrict_takes_columns_in_the_given_order():
    two = restrict(birds(), [2, 0])
    assert two.names == ("red wing", "hooked bill")
    assert two.groups == ("wing color", "bill shape")
    assert two.parts == (("left wing", "right wing"), ("beak",))
    assert torch.allclose(two.class_concept_KM, torch.tensor([[0.1, 0.9], [0.3, 0.2]]))
    assert same(restrict(birds(), torch.tensor([True, False, True])), restrict(birds(), [0, 2]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [([], "no concept is left"), ([3], "index 3 is not among the 3"), ([-1], "index -1"), ([1, 1], "index 1 is chosen more than once")],
)
def test_restrict_rejects(indices, message):
    with pytest.raises(ValueError, match=message):
        restrict(birds(), indices)
    with pytest.raises(ValueError, match=r"shape \(2,\); 3 concepts need \(3,\)"):
        restrict(birds(), torch.tensor([True, False]))


def test_varying_wants_both_answers():
    matrix = torch.tensor([[0.9, NAN, 0.1, 0.5], [0.2, 0.6, 0.3, 0.51], [0.7, 0.7, 0.3, 0.9]])
    concepts = ConceptSet(("a", "b", "c", "d"), ("x", "y", "z"), matrix)
    assert varying(concepts).tolist() == [True, False, False, True]  # b: nobody is known not to have it; d: 0.5 is not above 0.5
    assert varying(concepts, threshold=0.25).tolist() == [True, False, True, False]
