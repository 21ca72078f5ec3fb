"""Folder: what the CSV says against hand-computed tensors, and each bad input against the message it must give."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dotcbm.data.annotations import hash_split, picture_size
from dotcbm.data.folder import Folder
from tests.fakes import folder as fake

NAN = float("nan")


def same(seen: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(seen, torch.tensor(expected), equal_nan=True)


def test_image_level_reads_what_the_table_says(tmp_path: Path) -> None:
    source = Folder(str(fake.image_level(tmp_path)))
    concepts = source.concepts
    assert concepts.names == ("has tail", "shape: long", "shape: round", "fur colour: brown", "fur colour: red")
    assert concepts.groups == ("has tail", "shape", "shape", "fur colour", "fur colour")
    assert concepts.class_names == ("cat", "dog")
    assert source.splits == ("train", "val", "test")
    # training rows only: cat = one, two; dog = four, five
    same(concepts.class_concept_KM, [[0.5, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.5, 0.5]])
    train = source.load("train")
    assert train.names == ("a/one.png", "a/two.png", "b/four.png", "b/five.png")
    assert train.label_N.tolist() == [0, 0, 1, 1]
    same(
        train.concept_NM,
        [[1.0, 0, 1, 0, 1], [0.0, 0, 1, NAN, NAN], [1.0, 1, 0, 1, 0], [NAN, 1.0, 0, 0, 1]],
    )
    same(source.load("val").concept_NM, [[0.0, 0, 1, NAN, NAN]])


def test_samples_carry_the_picture_and_nothing_unknown(tmp_path: Path) -> None:
    test = Folder(str(fake.image_level(tmp_path))).load("test")
    sample = pickle.loads(pickle.dumps(test))[1]  # a worker process gets it this way
    assert sample.name == "b/seven.png"
    assert sample.size == (10, 20)
    assert sample.image is not None
    assert sample.image.shape == (3, 10, 20)
    assert sample.image[0, 0, 0] == 120  # the seventh picture
    assert sample.points_P3 is None
    assert sample.foreground_HW is None
    assert test.sample(1, image=False).size == (10, 20)


def test_class_without_known_training_label_is_nan(tmp_path: Path) -> None:
    rows = "image,class,split,tail\na/one.png,cat,train,1\na/two.png,cat,test,0\nb/four.png,dog,train,\nb/five.png,dog,test,1\n"
    with pytest.warns(UserWarning, match=r"3 pictures have no row and are left out, the first is 'a/three.png'"):
        concepts = Folder(str(fake.image_level(tmp_path, rows=rows))).concepts
    same(concepts.class_concept_KM, [[1.0], [NAN]])


def test_names_and_separators_of_spreadsheets(tmp_path: Path) -> None:
    rows = "\ufefffile;kind;bill_shape::hooked;bill shape: flat\nimages/a/one.png;cat;1;0\nimages\\a\\two.png;cat;0;1\n"
    fake.image_level(tmp_path, rows=rows)
    with pytest.warns(UserWarning, match="5 pictures have no row"):
        concepts = Folder(str(tmp_path), image_column="file", class_column="kind").concepts
    assert concepts.names == ("bill shape: hooked", "bill shape: flat")
    assert concepts.groups == ("bill shape", "bill shape")


def test_grades_become_concepts_when_asked(tmp_path: Path) -> None:
    rows = fake.IMAGE_ROWS.replace("fur_colour", "grade").replace("red", "10").replace("brown", "2")
    fake.image_level(tmp_path, rows=rows)
    assert Folder(str(tmp_path), categorical_columns=["grade"]).concepts.names[-2:] == ("grade: 2", "grade: 10")
    with pytest.raises(
        ValueError, match=r"concepts.csv, row 2, column 'grade': the value '10' is neither 0/1 nor a word.*categorical_columns"
    ):
        _ = Folder(str(tmp_path)).concepts


def test_class_level_with_class_folders(tmp_path: Path) -> None:
    source = Folder(str(fake.class_level(tmp_path)), level="class", test_fraction=0.3, val_fraction=0.1)
    assert source.concepts.names == ("striped", "size: big", "size: small")
    assert source.concepts.class_names == ("zebra", "ant")
    same(source.concepts.class_concept_KM, [[1.0, 1, 0], [0.25, 0, 1]])
    assert [(s, len(source.load(s))) for s in source.splits] == [("train", 12), ("val", 2), ("test", 6)]
    train, test = source.load("train"), source.load("test")
    assert train.label_N.bincount().tolist() == [6, 6]
    assert not set(train.names) & set(test.names)
    row = train.label_N.tolist().index(1)
    same(train.concept_NM[row], [0.0, 0, 1])  # a share of 0.25 is no concept of the class's pictures


def test_class_level_with_a_listing(tmp_path: Path) -> None:
    fake.class_level(tmp_path, per_class=2)
    listing = "image,class,split\nzebra/00.png,zebra,train\nzebra/01.png,ant,train\nant/00.png,ant,test\nant/01.png,zebra,test\n"
    (tmp_path / "list.csv").write_text(listing)
    train = Folder(str(tmp_path), level="class", listing_file="list.csv").load("train")
    assert train.names == ("zebra/00.png", "zebra/01.png")
    assert train.label_N.tolist() == [0, 1]  # the listing decides, not the folder


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    test=st.floats(0, 0.5),
    val=st.floats(0, 0.4),
    seed=st.integers(0, 5),
)
def test_hash_split_is_stratified_and_blind_to_order(labels: list[int], test: float, val: float, seed: int) -> None:
    names = [f"picture {i}" for i in range(len(labels))]
    splits = hash_split(names, labels=labels, fractions={"test": test, "val": val}, seed=seed)
    for label in set(labels):
        rows = [i for i, of in enumerate(labels) if of == label]
        count = {s: sum(splits[i] == s for i in rows) for s in ("train", "val", "test")}
        assert count["train"] >= 1
        assert count["test"] == min(max(round(test * len(rows)), int(test > 0)), len(rows) - 1)
    backwards = hash_split(names[::-1], labels=labels[::-1], fractions={"test": test, "val": val}, seed=seed)
    assert backwards[::-1] == splits


def test_hash_split_follows_the_seed() -> None:
    names = [f"{i}" for i in range(100)]
    one, two = (hash_split(names, labels=[0] * 100, fractions={"test": 0.5}, seed=seed) for seed in (0, 1))
    assert one != two
    with pytest.raises(ValueError, match="leave something for train"):
        hash_split(names, labels=[0] * 100, fractions={"test": 0.5, "val": 0.5}, seed=0)


def test_part_points_become_fractions(tmp_path: Path) -> None:
    fake.image_level(tmp_path)
    (tmp_path / "parts.csv").write_text(
        "image,part,x,y,visible\na/one.png,tail,5,10,1\na/one.png,head,-1,-1,0\nimages/b/seven.png,head,20,0,1\n"
    )
    (tmp_path / "concept_parts.csv").write_text("concept,part\nhas_tail,tail\nfur colour,tail\nfur colour,head\nshape: round,head\n")
    source = Folder(str(tmp_path))
    assert source.concepts.part_names == ("tail", "head")
    assert source.concepts.parts == (("tail",), (), ("head",), ("tail", "head"), ("tail", "head"))
    points = source.load("train").points_NP3
    assert points is not None
    same(points[0], [[0.25, 1.0, 1.0], [0.0, 0.0, 0.0]])
    same(points[1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    same(source.load("test")[1].points_P3, [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])


def test_part_boxes_are_points_and_masks(tmp_path: Path) -> None:
    fake.image_level(tmp_path)
    (tmp_path / "parts.csv").write_text("image,part,x0,y0,x1,y1\na/two.png,tail,4,2,8,6\n")
    sample = Folder(str(tmp_path)).load("train")[1]
    same(sample.points_P3, [[0.3, 0.4, 1.0]])
    assert sample.part_masks_PHW is not None
    assert sample.part_masks_PHW.shape == (1, 10, 20)
    expected = torch.zeros(10, 20, dtype=torch.bool)
    expected[2:6, 4:8] = True
    assert torch.equal(sample.part_masks_PHW[0], expected)
    assert not Folder(str(tmp_path)).load("train")[0].part_masks_PHW.any()


@pytest.mark.parametrize("value", [255, 1])
def test_masks_of_the_object_and_its_parts(tmp_path: Path, value: int) -> None:
    fake.image_level(tmp_path)
    fake.mask(tmp_path / "masks/a/one.png", box=(0, 0, 10, 10), value=value)
    fake.mask(tmp_path / "part_masks/tail/a/one.png", box=(0, 0, 2, 2), value=value)
    fake.mask(tmp_path / "part_masks/head/b/seven.png", box=(3, 3, 5, 5), value=value)
    (tmp_path / "parts.csv").write_text("image,part,x,y\na/one.png,wing,5,5\n")
    (tmp_path / "boxes.csv").write_text(
        "image,x0,y0,x1,y1\n" + "".join(f"{line.split(',')[0]},0,0,10,5\n" for line in fake.IMAGE_ROWS.splitlines()[1:])
    )
    source = Folder(str(tmp_path))
    train = source.load("train")
    assert source.concepts.part_names == ("wing", "head", "tail")
    first, second = train[0], train[1]
    assert first.foreground_HW is not None
    assert first.foreground_HW.sum() == 100
    assert first.foreground_HW[:, :10].all()
    assert first.part_masks_PHW is not None
    assert first.part_masks_PHW.sum((1, 2)).tolist() == [0, 0, 4]
    assert first.points_P3 is not None
    assert first.points_P3[:, 2].tolist() == [1, 0, 0]
    same(first.box_4, [0.0, 0.0, 0.5, 0.5])
    assert second.foreground_HW is None
    assert train.sample(0, masks=False).foreground_HW is None


def test_turned_pictures_have_the_size_that_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == (20, 10)


def test_the_cache_key_notices_a_replaced_picture(tmp_path: Path) -> None:
    fake.image_level(tmp_path)
    before = Folder(str(tmp_path)).load("train").fingerprint()
    assert Folder(str(tmp_path)).load("train").fingerprint() == before
    fake.picture(tmp_path / "images/a/one.png", width=200)
    assert Folder(str(tmp_path)).load("train").fingerprint() != before


BAD_ROWS = {
    "value": (
        ("a/one.png,cat,train,1", "a/one.png,cat,train,yse"),
        r"row 2, column 'has_tail': the value 'yse' is none of.*did you mean 'yes'",
    ),
    "number": (("a/one.png,cat,train,1", "a/one.png,cat,train,2"), r"row 2, column 'has_tail': the value '2' is none of 0, 1"),
    "missing picture": (
        ("b/four.png", "b/four.jpg"),
        r"row 5: the picture 'b/four.jpg' is not below .*there is 'b/four.png'.*1 of 7 listed",
    ),
    "twice": (("b/four.png", "a/one.png"), r"row 5: the picture 'a/one.png' is already in .*row 2; keep one"),
    "split": (("six.png,dog,val", "six.png,dog,vall"), r"row 7, column 'split': the split 'vall' is unknown.*did you mean 'val'"),
    "no class": (("one.png,cat", "one.png,"), r"row 2: the class is empty"),
    "cells": (("one.png,cat", "one.png,cat,cat"), r"row 2: 7 cells, but the header has 6 columns"),
    "class column": (("image,class", "image,clas"), r"no column 'class' .*did you mean 'clas'.*class_column="),
    "image column": (("image,class", "imgae,class"), r"no column 'image' .*did you mean 'imgae'.*image_column="),
    "doubled column": (("split,has_tail", "split,split"), r"the column 'split' appears twice"),
    "unnamed column": (("split,has_tail", "split,"), r"column 4 has no name .*index=False"),
    "same name": (("shape,fur_colour", "shape,has tail"), None),
    "empty test": ((",test,", ",train,"), r"the split 'test' is empty; the pictures by split are .*'train': 6"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, what: str) -> None:
    (old, new), message = BAD_ROWS[what]
    assert old in fake.IMAGE_ROWS
    fake.image_level(tmp_path, rows=fake.IMAGE_ROWS.replace(old, new))
    if message is None:  # 'has_tail' is yes-or-no, 'has tail' categorical: different concepts, nothing to complain of
        assert len(set(Folder(str(tmp_path)).concepts.names)) == 5
        return
    with pytest.raises(ValueError, match=message):
        _ = Folder(str(tmp_path)).concepts


def test_values_that_differ_in_letter_case_only(tmp_path: Path) -> None:
    fake.image_level(tmp_path, rows=fake.IMAGE_ROWS.replace("five.png,dog,train,,long", "five.png,dog,train,,Long"))
    with pytest.raises(ValueError, match=r"several columns or values give the concepts \['shape: Long', 'shape: long'\]"):
        _ = Folder(str(tmp_path)).concepts


def test_a_class_without_training_picture(tmp_path: Path) -> None:
    fake.image_level(tmp_path, rows=fake.IMAGE_ROWS.replace("cat,train", "cat,test"))
    with pytest.raises(ValueError, match=r"the classes \['cat'\] \(1 in all\) have no training picture"):
        _ = Folder(str(tmp_path)).splits


def test_renamed_splits(tmp_path: Path) -> None:
    fake.image_level(tmp_path, rows=fake.IMAGE_ROWS.replace(",test,", ",holdout,"))
    source = Folder(str(tmp_path), split_names={"test": "holdout"})
    assert source.splits == ("train", "val", "test")
    assert source.load("test").names == ("a/three.png", "b/seven.png")
    with pytest.raises(ValueError, match=r"no split 'tset'; the splits are \['train', 'val', 'test'\]; did you mean 'test'"):
        source.load("tset")
    outdoors = Folder(str(fake.image_level(tmp_path, rows=fake.IMAGE_ROWS.replace(",val,", ",snow,"))), split_names={"snow": "snow"})
    assert outdoors.splits == ("train", "test", "snow")


def test_no_split_column_splits_by_hash_and_says_when_it_cannot(tmp_path: Path) -> None:
    fake.image_level(tmp_path)
    source = Folder(str(tmp_path), split_column=None)
    assert "split" not in " ".join(source.concepts.names)
    assert source.splits == ("train", "test")
    with pytest.raises(ValueError, match=r"no column 'fold'.*split_column="):
        _ = Folder(str(tmp_path), split_column="fold").splits
    with pytest.raises(ValueError, match="test_fraction is 0"):
        _ = Folder(str(tmp_path), split_column=None, test_fraction=0).splits


def test_missing_files_and_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder; expected one with images/ and concepts.csv"):
        _ = Folder(str(tmp_path / "nowhere")).concepts
    fake.image_level(tmp_path)
    with pytest.raises(ValueError, match=r"concept.csv: no such file; .*did you mean 'concepts.csv'"):
        _ = Folder(str(tmp_path), concepts_file="concept.csv").concepts
    with pytest.raises(ValueError, match=r"pictures: no such folder; expected the pictures there"):
        _ = Folder(str(tmp_path), image_folder="pictures").concepts
    with pytest.raises(ValueError, match=r"no column 'shapes' .*did you mean 'shape'"):
        _ = Folder(str(tmp_path), ignore_columns=["shapes"]).concepts
    with pytest.raises(ValueError, match=r"'shape' has 2 different values .*max_values=1.*ignore_columns"):
        _ = Folder(str(tmp_path), max_values=1).concepts
    with pytest.raises(ValueError, match=r"expected a list of column names: ignore_columns=\['shape'\]"):
        Folder(str(tmp_path), ignore_columns="shape")
    (tmp_path / "concepts.csv").write_text("image,class\n")
    with pytest.raises(ValueError, match="a header and no rows"):
        _ = Folder(str(tmp_path)).concepts
    (tmp_path / "concepts.csv").write_text("\n".join(",".join(line.split(",")[:3]) for line in fake.IMAGE_ROWS.splitlines()))
    with pytest.raises(ValueError, match="no concept column is left"):
        _ = Folder(str(tmp_path)).concepts
    (tmp_path / "concepts.csv").write_bytes("image,class,größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        _ = Folder(str(tmp_path)).concepts


def test_class_level_complaints(tmp_path: Path) -> None:
    fake.class_level(tmp_path)
    with pytest.raises(ValueError, match="if its rows are classes, set level='class'"):
        _ = Folder(str(tmp_path)).concepts
    for rows, message in (
        (fake.CLASS_ROWS + "zebra,1,big\n", r"row 4: the class 'zebra' is already in row 2"),
        (fake.CLASS_ROWS.replace("zebra", "zebar"), r"the class 'zebra' has no row in .*did you mean 'zebar'"),
        (fake.CLASS_ROWS + "fox,1,big\n", r"the class 'fox' has no picture \(1 such classes\); expected .*fox"),
        (fake.CLASS_ROWS.replace("0.25", "25"), r"row 3, column 'striped': the value '25' is none of .*a share between 0 and 1"),
    ):
        (tmp_path / "concepts.csv").write_text(rows)
        with pytest.raises(ValueError, match=message):
            _ = Folder(str(tmp_path), level="class").concepts
    (tmp_path / "concepts.csv").write_text(fake.CLASS_ROWS)
    fake.picture(tmp_path / "images/loose.png")
    with pytest.raises(ValueError, match=r"loose.png: lies in no class folder"):
        _ = Folder(str(tmp_path), level="class").concepts


BAD_PARTS = {
    "outside": (
        "image,part,x,y\na/one.png,tail,20.5,3\n",
        r"row 2, column 'x': 'tail' of 'a/one.png' is at 20.5, outside the picture of 20 x 10",
    ),
    "below": ("image,part,x,y\na/one.png,tail,2,3\na/two.png,tail,2,11\n", r"row 3, column 'y': .* is at 11, outside"),
    "nan": ("image,part,x,y\na/one.png,tail,nan,3\n", r"row 2, column 'x': .* is at nan, outside"),
    "word": ("image,part,x,y\na/one.png,tail,left,3\n", r"row 2, column 'x': 'left' is no number; expected pixels from 0 to 20"),
    "picture": ("image,part,x,y\na/ten.png,tail,2,3\n", r"row 2: the picture 'a/ten.png' is not in the data set"),
    "twice": ("image,part,x,y\na/one.png,tail,2,3\na/one.png,tail,2,4\n", r"row 3: 'tail' of 'a/one.png' is already in row 2"),
    "visible": ("image,part,x,y,visible\na/one.png,tail,2,3,maybe\n", r"row 2, column 'visible': 'maybe' is neither 0 nor 1"),
    "column": ("image,part,x,z\na/one.png,tail,2,3\n", r"parts.csv: no column 'y'"),
    "box": ("image,part,x0,y0,x1,y1\na/one.png,tail,4,2,4,6\n", r"row 2: 'tail' of 'a/one.png' is empty: expected x0 < x1"),
}


@pytest.mark.parametrize("what", BAD_PARTS)
def test_bad_parts_are_named(tmp_path: Path, what: str) -> None:
    rows, message = BAD_PARTS[what]
    fake.image_level(tmp_path)
    (tmp_path / "parts.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        _ = Folder(str(tmp_path)).concepts


def test_bad_masks_boxes_and_concept_parts(tmp_path: Path) -> None:
    fake.image_level(tmp_path)
    fake.mask(tmp_path / "masks/a/one.png", box=(0, 0, 1, 1), width=10)
    with pytest.raises(ValueError, match=r"masks/a/one.png: the mask is 10 x 10 pixels, its picture .*images/a/one.png is 20 x 10"):
        Folder(str(tmp_path)).load("test")
    (tmp_path / "masks/a/one.png").rename(tmp_path / "masks/other.png")
    with pytest.raises(ValueError, match=r"no mask belongs to a picture; expected .*masks/a/one.png"):
        Folder(str(tmp_path)).load("test")
    (tmp_path / "masks/other.png").unlink()
    (tmp_path / "masks/a").rmdir()
    (tmp_path / "masks").rmdir()
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\na/one.png,0,0,1,1\n")
    with pytest.raises(ValueError, match=r"boxes.csv: 6 of 7 pictures have no box, the first is 'a/two.png'"):
        Folder(str(tmp_path)).load("test")
    (tmp_path / "boxes.csv").unlink()
    (tmp_path / "parts.csv").write_text("image,part,x,y\na/one.png,tail,2,3\n")
    (tmp_path / "concept_parts.csv").write_text("concept,part\nhas tail,tial\n")
    with pytest.raises(ValueError, match=r"row 2: the part 'tial' is unknown; .*did you mean 'tail'"):
        Folder(str(tmp_path)).load("test")
    (tmp_path / "concept_parts.csv").write_text("concept,part\nhas tale,tail\n")
    with pytest.raises(ValueError, match=r"row 2: the concept 'has tale' is unknown; did you mean 'has tail'"):
        Folder(str(tmp_path)).load("test")


def test_a_picture_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path: Path) -> None:
    fake.image_level(tmp_path)
    (tmp_path / "images/a/one.png").write_bytes(b"no picture")
    train = Folder(str(tmp_path)).load("train")
    with pytest.raises(ValueError, match=r"a/one.png: cannot be decoded as a picture"):
        train[0]


def test_blood_cells(shared: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = Folder(
            str(shared / "data" / "blood_cells"),
            concepts_file="attributes.csv",
            image_column="file",
            class_column="label",
            ignore_columns=["img_name"],
            split_names={"test": "val"},
        )
        train, test = source.load("train"), source.load("test")
    assert (len(train), len(test), source.splits) == (6169, 1030, ("train", "test"))
    assert source.concepts.class_names == ("Basophil", "Eosinophil", "Lymphocyte", "Monocyte", "Neutrophil")
    assert source.concepts.num_concepts == 29  # 2+2+6+2+2+1+2+3+4+4+1 values of the 11 attributes
    j = source.concepts.names.index("nucleus shape: segmented-bilobed")
    everything = torch.cat([train.concept_NM, test.concept_NM])
    assert everything[:, j].sum() == 2212  # counted in the file by other means
    # an attribute with several values has exactly one in each picture
    group = [i for i, name in enumerate(source.concepts.groups or ()) if name == "nucleus shape"]
    assert everything[:, group].sum(1).eq(1).all()
    assert test[0].image is not None
    assert test[0].image.shape == (3, 160, 160)
