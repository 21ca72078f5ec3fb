"""AwA2: the matrices against the files, the split, and each way in which the files can contradict each other."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from dotcbm.data.awa2 import GROUPS, SPELLING, AwA2
from tests.fakes.awa2 import BINARY, PERCENT, awa2


def test_concepts_are_the_matrix_of_the_classes(tmp_path: Path) -> None:
    source = AwA2(str(awa2(tmp_path)))
    concepts = source.concepts
    assert concepts.names == ("black", "long legs", "flippers", "new world")
    assert concepts.groups == ("colour", "limbs", "limbs", "world")
    assert concepts.class_names == ("antelope", "killer whale", "persian cat")
    assert concepts.class_concept_KM.tolist() == [list(map(float, row)) for row in BINARY]
    train = source.load("train")
    assert torch.equal(train.concept_NM, torch.tensor(BINARY, dtype=torch.float32)[train.label_N])


def test_percentages_become_shares(tmp_path: Path) -> None:
    source = AwA2(str(awa2(tmp_path)), class_values="continuous")
    expected = torch.tensor(PERCENT) / 100
    expected[0, 0] = torch.nan  # -1 in the file
    torch.testing.assert_close(source.concepts.class_concept_KM, expected, equal_nan=True)
    assert set(source.load("test").concept_NM.unique().tolist()) == {0.0, 1.0}


def test_split_by_class_and_hash(tmp_path: Path) -> None:
    source = AwA2(str(awa2(tmp_path)))
    loaded = {split: source.load(split) for split in source.splits}
    assert {split: d.label_N.bincount().tolist() for split, d in loaded.items()} == {"train": [6] * 3, "val": [2] * 3, "test": [2] * 3}
    names = [name for d in loaded.values() for name in d.names]
    assert len(set(names)) == len(names) == 30
    assert all(
        d.names[i].split("/")[0] == ("antelope", "killer+whale", "persian+cat")[d.label_N[i]]
        for d in loaded.values()
        for i in range(len(d))
    )
    moved = AwA2(str(shutil.copytree(tmp_path, tmp_path.parent / "moved", dirs_exist_ok=True)))
    assert moved.load("test").names == loaded["test"].names
    assert AwA2(str(tmp_path), seed=1).load("test").names != loaded["test"].names
    halves = AwA2(str(tmp_path), test_fraction=0.5, val_fraction=0)
    assert halves.splits == ("train", "test")
    assert len(halves.load("test")) == 15


def test_samples_are_the_pictures(tmp_path: Path) -> None:
    test = pickle.loads(pickle.dumps(AwA2(str(awa2(tmp_path))).load("test")))
    for i in range(len(test)):
        sample = test[i]
        assert sample.size == (10, 20)
        assert sample.image is not None
        assert abs(int(sample.image[0, 5, 2]) - 80 * sample.label) < 5  # JPEG
    assert test.sample(0, image=False).size == (10, 20)


def test_every_original_predicate_has_a_group_and_a_name() -> None:
    known = [name for names in GROUPS.values() for name in names.split()]
    assert len(known) == len(set(known)) == 85
    assert set(SPELLING) <= set(known)
    assert len({SPELLING.get(name, name) for name in known}) == 85


BAD_FILES = {
    "numbers": ("classes.txt", "     2\t", "     3\t", r"classes.txt, line 2: found '3\\tkiller\+whale', expected '2'"),
    "blank": ("predicates.txt", "longleg", "long leg", r"predicates.txt, line 2: .*a name without blanks"),
    "twice": ("predicates.txt", "longleg", "black", r"predicates.txt, line 2: the name 'black' is already in line 1"),
    "short line": ("predicate-matrix-binary.txt", "1 0 1 1", "1 0 1", r"binary.txt, line 2: 3 numbers, but predicates.txt has 4 names"),
    "truncated": ("predicate-matrix-binary.txt", "1 0 0 0\n", "", r"binary.txt: 2 lines, but classes.txt has 3 names"),
    "value": ("predicate-matrix-binary.txt", "1 0 1 1", "1 0 2 1", r"binary.txt, line 2, column 3: 2 is not between 0 and 1"),
    "fraction": ("predicate-matrix-binary.txt", "1 0 1 1", "1 0 .5 1", r"binary.txt, line 2, column 3: 0.5 is neither 0 nor 1"),
    "word": ("predicate-matrix-binary.txt", "1 0 1 1", "1 0 x 1", r"binary.txt, line 2, column 3: 'x' is no number"),
    "percent": (
        "predicate-matrix-continuous.txt",
        "100.00",
        "101.00",
        r"continuous.txt, line 2, column 3: 101.00 is not between -1 and 100",
    ),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_files_that_contradict_each_other(tmp_path: Path, what: str) -> None:
    file, old, new, message = BAD_FILES[what]
    path = awa2(tmp_path, per_class=1) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        _ = AwA2(str(tmp_path), class_values="continuous" if "continuous" in file else "binary").concepts


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder; expected Animals_with_Attributes2"):
        _ = AwA2(str(tmp_path / "nowhere")).concepts
    awa2(tmp_path, per_class=2)
    with pytest.raises(ValueError, match=r"no split 'tests'; .*did you mean 'test'"):
        AwA2(str(tmp_path)).load("tests")
    (tmp_path / "JPEGImages/antelop").mkdir()
    with pytest.raises(ValueError, match=r"antelop: no such class in .*classes.txt; did you mean 'antelope'"):
        AwA2(str(tmp_path)).load("test")
    (tmp_path / "JPEGImages/antelop").rmdir()
    shutil.rmtree(tmp_path / "JPEGImages/killer+whale")
    with pytest.raises(ValueError, match=r"no pictures of the class 'killer\+whale' \(line 2 of classes.txt\); 2 of 3 class folders"):
        AwA2(str(tmp_path)).load("test")
    shutil.rmtree(tmp_path / "JPEGImages")
    with pytest.raises(ValueError, match=r"JPEGImages: no such folder"):
        AwA2(str(tmp_path)).load("test")
    (tmp_path / "predicates.txt").rename(tmp_path / "predicate.txt")
    with pytest.raises(ValueError, match=r"predicates.txt: no such file; .*did you mean 'predicate.txt'"):
        _ = AwA2(str(tmp_path)).concepts


def test_settings_and_tiny_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave some for train"):
        AwA2(str(tmp_path), test_fraction=0.7, val_fraction=0.3)
    with pytest.raises(ValueError, match="class_values='percent'"):
        AwA2(str(tmp_path), class_values="percent")  # type: ignore[arg-type]
    awa2(tmp_path, per_class=1)
    with pytest.raises(ValueError, match=r"the split 'test' is empty, with 3 pictures in all"):
        AwA2(str(tmp_path)).load("test")
