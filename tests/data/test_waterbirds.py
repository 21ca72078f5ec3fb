"""Waterbirds: groups, concepts by species, and named faults."""

from __future__ import annotations

import pickle

import pytest
import torch
from fakes.cub import write_fake_cub, write_fake_waterbirds

from dotcbm.data.waterbirds import GROUP_NAMES, Waterbirds


@pytest.fixture
def made(tmp_path):
    cub = write_fake_cub(tmp_path / "cub", images_per_class=10, extra_classes=1)
    rows = write_fake_waterbirds(tmp_path / "water", cub=cub)
    return cub, rows, tmp_path


def source(tmp_path, **changes) -> Waterbirds:
    return Waterbirds(
        str(tmp_path / "water"), **({"cub_root": str(tmp_path / "cub"), "attributes": "percentage", "min_classes": 1} | changes)
    )


def edit(path, row, before, after):
    lines = path.read_text().splitlines()
    assert before in lines[row - 1]
    lines[row - 1] = lines[row - 1].replace(before, after)
    path.write_text("\n".join(lines) + "\n")


def test_splits_groups_and_labels_are_those_of_the_table(made):
    _, rows, tmp_path = made
    birds = pickle.loads(pickle.dumps(source(tmp_path)))
    assert birds.splits == ("train", "val", "test")
    for number, split in enumerate(birds.splits):
        data = birds.load(split)
        own = [row for row in rows if row["split"] == str(number)]
        assert data.names == tuple(row["img_filename"] for row in own)
        assert data.label_N.tolist() == [int(row["y"]) for row in own]
        assert data.group_N is not None
        assert data.group_N.tolist() == [2 * int(row["y"]) + int(row["place"]) for row in own]
        sample = pickle.loads(pickle.dumps(data))[0]
        assert sample.image is not None
        assert sample.image.shape == (3, 36, 48)
        assert data.sample(0, image=False).size == sample.size == (36, 48)
    assert GROUP_NAMES[2 * 1 + 0] == "waterbird on land"


def test_concepts_are_those_of_the_species(made):
    cub, rows, tmp_path = made
    rows = [row for row in rows if not (row["img_filename"].startswith("001") and row["img_id"] in "1247")]  # species of unequal size
    text = (tmp_path / "water" / "metadata.csv").read_text().splitlines()
    (tmp_path / "water" / "metadata.csv").write_text("\n".join([text[0], *(",".join(row.values()) for row in rows)]))
    birds = source(tmp_path, attributes="reference")
    data = birds.load("train")
    from dotcbm.data.cub_attributes import REFERENCE_IDS

    chosen = torch.tensor(REFERENCE_IDS) - 1
    for n in (0, len(data) // 2, len(data) - 1):
        species = int(data.names[n][:3]) - 1
        assert torch.equal(data.concept_NM[n].bool(), torch.as_tensor(cub.profile_CA[species])[chosen])
    # class shares by a plain loop over the training pictures
    text = (tmp_path / "cub" / "attributes" / "class_attribute_labels_continuous.txt").read_text().splitlines()
    shares = [[float(v) / 100 for v in line.split()] for line in text]
    for k, name in enumerate(birds.concepts.class_names):
        own = [row for row in rows if row["split"] == "0" and row["y"] == str(k)]
        assert name == ("landbird", "waterbird")[k]
        for m, attribute in enumerate(REFERENCE_IDS[:20]):
            mean = sum(shares[int(row["img_filename"][:3]) - 1][attribute - 1] for row in own) / len(own)
            assert birds.concepts.class_concept_KM[k, m].item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "before", "after", "message"),
    [
        (1, "place,", "ground,", r"metadata\.csv: row 1 lacks the columns \['place'\]"),
        (3, ",1,0,", ",7,0,", r"metadata\.csv: row 3 has y '7', expected one of 0, 1"),
        (3, ",1,0,", ",1,3,", r"metadata\.csv: row 3 has split '3'"),
        (4, "/f/forest/00000002.jpg", "", None),
        (2, "001.Fake_bird_1/", "900.Dodo/", r"metadata\.csv: row 2 has species '900\.Dodo'"),
    ],
)
def test_a_bad_row_is_named(made, row, before, after, message):
    _, _, tmp_path = made
    path = tmp_path / "water" / "metadata.csv"
    if message is None:
        path.write_text(path.read_text()[:-40])
        message = r"metadata\.csv: row \d+ has \d columns, expected 6: img_id.*truncated"
    else:
        edit(path, row, before, after)
    with pytest.raises(ValueError, match=message):
        source(tmp_path).load("train")


def test_missing_things_are_named(made):
    _, rows, tmp_path = made
    with pytest.raises(ValueError, match="no split 'ood', only train, val, test"):
        source(tmp_path).load("ood")
    with pytest.raises(TypeError, match="cub_root"):
        Waterbirds(str(tmp_path / "water"))  # pyright: ignore
    with pytest.raises(ValueError, match="attributes is 'majority'"):
        source(tmp_path, attributes="majority")
    with pytest.raises(ValueError, match=r"no attributes\.txt among"):
        source(tmp_path, cub_root=str(tmp_path / "nowhere")).load("train")
    (tmp_path / "water" / rows[0]["img_filename"]).unlink()
    with pytest.raises(ValueError, match=f"1 of the .* pictures that .*metadata.csv lists are missing: .*{rows[0]['img_filename']}"):
        source(tmp_path).check()
    (tmp_path / "water" / "metadata.csv").unlink()
    with pytest.raises(ValueError, match=r"metadata\.csv: no such file"):
        source(tmp_path).load("train")


def test_an_empty_split_and_a_class_without_training_pictures_are_named(made):
    _, _, tmp_path = made
    path = tmp_path / "water" / "metadata.csv"
    whole = path.read_text().splitlines()
    path.write_text("\n".join(line for line in whole if line.split(",")[3] != "1"))
    with pytest.raises(ValueError, match="no picture is in the val split"):
        source(tmp_path).load("val")
    path.write_text("\n".join(line for line in whole if line.split(",")[2:4] != ["1", "0"]))
    with pytest.raises(ValueError, match=r"no waterbird \(y = 1\) is in the train split"):
        source(tmp_path).load("train")
    path.write_text("\n".join([whole[0], whole[1], whole[1]]))
    with pytest.raises(ValueError, match="row 3 repeats 001"):
        source(tmp_path).load("train")


def test_shared_waterbirds(shared):
    data = shared / "data"
    birds = Waterbirds(str(data / "waterbird_complete95_forest2water2"), cub_root=str(data / "CUB_200_2011_subset"))
    train = birds.load("train")
    assert train.group_N is not None
    assert torch.bincount(train.group_N).tolist() == [3498, 184, 56, 1057]  # the figures that Sagawa et al. print
    assert birds.concepts.num_concepts == 112
    assert len(birds.load("val")) == 1199
