"""CUB in its original layout, written by a fake: the vote by hand, the geometry, the twins, and named faults."""

from __future__ import annotations

import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.cub import PARTS, attribute_names, write_fake_cub, write_fake_waterbirds
from PIL import Image
from torch.nn.functional import max_pool2d

from dotcbm.data.concepts import varying
from dotcbm.data.cub import CUB
from dotcbm.data.cub_attributes import PART_NAMES, REFERENCE_IDS, attribute_group, attribute_name, attribute_parts, chosen_ids, vote
from dotcbm.data.cub_pictures import check_same_shape, read_picture_size
from dotcbm.data.cub_tables import read_image_attributes
from dotcbm.data.source import BadPictureError, read_picture

IDS = np.array(REFERENCE_IDS) - 1
LABELS = "attributes/image_attribute_labels.txt"
PERCENT = "attributes/class_attribute_labels_continuous.txt"


def edit(path: Path, row: int, text: str | None) -> None:
    """Replace a row (numbered from 1), or remove it with None."""
    lines = path.read_text().splitlines()
    lines[row - 1 : row] = [] if text is None else [text]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return write_fake_cub(tmp_path_factory.mktemp("cub") / "CUB_200_2011", extra_classes=2)


@pytest.fixture
def small(tmp_path):
    """Class percentages only, 6 pictures: quick to write, free to break."""
    return write_fake_cub(tmp_path / "CUB_200_2011", num_classes=2, images_per_class=3, image_attributes=False)


# ---------------------------------------------------------------------- names and parts


def test_names_are_unique_readable_and_their_parts_are_those_of_cub():
    raw = attribute_names()
    names = [attribute_name(name) for name in raw]
    assert len(set(names)) == len(raw) == 312
    assert not [name for name in names if "_" in name or "::" in name or "has " in name or name != name.strip()]
    assert len({attribute_group(name) for name in raw}) == 28
    assert tuple(PARTS) == PART_NAMES
    assert {part for name in raw for part in attribute_parts(name)} == set(PART_NAMES)
    nowhere = {attribute_group(name) for name in raw if not attribute_parts(name)}
    assert nowhere == {"size", "shape", "primary color"}


@pytest.mark.parametrize(
    ("raw", "name", "group", "parts"),
    [
        ("has_bill_shape::hooked_seabird", "hooked seabird bill", "bill shape", ("beak",)),
        ("has_upper_tail_color::black", "black upper tail", "upper tail color", ("tail",)),
        ("has_underparts_color::white", "white underparts", "underparts color", ("throat", "breast", "belly")),
        ("has_head_pattern::eyebrow", "eyebrow stripe", "head pattern", ("left eye", "right eye")),
        ("has_head_pattern::plain", "plain head", "head pattern", ("crown", "forehead", "nape", "left eye", "right eye")),
        ("has_wing_shape::long-wings", "long wings", "wing shape", ("left wing", "right wing")),
        ("has_size::very_small_(3_-_5_in)", "very small size (3 - 5 in)", "size", ()),
        ("has_shape::perching-like", "perching-like shape", "shape", ()),
        ("has_back_pattern::solid", "solid back pattern", "back pattern", ("back",)),
    ],
)
def test_name_group_and_parts(raw, name, group, parts):
    assert (attribute_name(raw), attribute_group(raw), attribute_parts(raw)) == (name, group, parts)


def test_an_attribute_of_another_form_is_named():
    with pytest.raises(ValueError, match="'hooked bill' is not of the form has_<group>::<value>"):
        attribute_name("hooked bill")


def test_reference_ids_agree_with_the_literatures_list_and_the_card(shared):
    text = (shared / "data" / "CUB_200_2011_subset" / "reference_112_attribute_indices.txt").read_text()
    assert tuple(map(int, text.split())) == REFERENCE_IDS
    raw = (shared / "data" / "CUB_200_2011_subset" / "attributes.txt").read_text().splitlines()
    assert [line.split()[1] for line in raw] == attribute_names()


def test_the_card_lists_the_reference_attributes():
    lines = (Path(__file__).parents[2] / "datasets" / "cub_112.txt").read_text().splitlines()
    assert lines == [f"{i} {attribute_names()[i - 1]}" for i in REFERENCE_IDS]


# ---------------------------------------------------------------------- the vote, by hand


def by_hand():
    """One class, 4 images. Columns: certain majority, tie, not visible decides, present but not visible, nobody saw it."""
    present = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0]], dtype=np.int8)
    certainty = np.array([[4, 4, 1, 1, 1], [3, 2, 4, 3, 1], [4, 3, 4, 1, 1], [2, 2, 3, 4, 1]], dtype=np.int8)
    return present, certainty


def test_vote_by_hand():
    present, certainty = by_hand()
    class_i = np.zeros(4, dtype=np.int64)
    votes = vote(present, certainty_IA=certainty, class_I=class_i, num_classes=1)
    # 3:1, 2:2 (a tie is present), 2:1 (the unseen one does not count), 2:1 (present but unseen counts, absent unseen does not), 0:0
    assert votes.present_CA.tolist() == [[True, True, True, True, True]]
    np.testing.assert_allclose(votes.share_CA, [[3 / 4, 2 / 4, 2 / 3, 2 / 3, math.nan]])
    strict = vote(present, certainty_IA=certainty, class_I=class_i, num_classes=1, ties="absent")
    assert strict.present_CA.tolist() == [[True, False, True, True, False]]


def test_each_pitfall_changes_the_answer():
    present, certainty = by_hand()
    seen = np.full_like(certainty, 4)
    class_i = np.zeros(4, dtype=np.int64)
    naive = vote(present, certainty_IA=seen, class_I=class_i, num_classes=1, ties="absent")  # "not visible" counted as absent
    assert naive.present_CA.tolist() == [[True, False, False, False, False]]
    fewer = vote(present[:3], certainty_IA=certainty[:3], class_I=class_i[:3], num_classes=1, ties="absent")  # one image set aside
    assert fewer.present_CA.tolist() == [[True, True, False, True, False]]


def test_vote_keeps_classes_apart_and_selection_counts_them():
    present = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=np.int8)
    votes = vote(present, certainty_IA=np.full((3, 3), 4, dtype=np.int8), class_I=np.array([0, 1, 2]), num_classes=3)
    assert votes.present_CA.astype(int).tolist() == present.tolist()
    assert chosen_ids("majority", present_CA=votes.present_CA, min_classes=2) == (1, 2)
    with pytest.raises(ValueError, match=r"no attribute is present in 3 of the 3 classes .the most common one is in 2.; lower min_classes"):
        chosen_ids("majority", present_CA=votes.present_CA, min_classes=3)


def majority_by_loop(fake, voters) -> list[list[bool]]:
    """(classes with images, 312) by the rule's words."""
    out = []
    for c in sorted(set(fake.class_I.tolist())):
        row = []
        for a in range(312):
            yes = no = 0
            for i in voters:
                if fake.class_I[i] != c:
                    continue
                if fake.present_IA[i, a]:
                    yes += 1
                elif fake.certainty_IA[i, a] != 1:
                    no += 1
            row.append(yes >= no)
        out.append(row)
    return out


def test_majority_selects_and_labels_by_the_training_images_alone(fake, tmp_path):
    training = np.flatnonzero(fake.train_I)
    expected = np.array(majority_by_loop(fake, training))
    cub = CUB(str(fake.root), attributes="majority", min_classes=3)
    chosen = np.flatnonzero(expected.sum(0) >= 3)
    assert list(cub.concepts.names) == [attribute_name(attribute_names()[a]) for a in chosen]
    data = cub.load("test")
    np.testing.assert_array_equal(data.concept_NM.numpy(), expected[:, chosen][data.label_N.numpy()])
    # leaving out a validation picture of each class gives another list: the vote listens to `voters`
    voters = np.delete(training, np.arange(0, len(training), 4))
    (tmp_path / "voters.txt").write_text("".join(f"{i + 1}\n" for i in voters))
    fewer = np.array(majority_by_loop(fake, voters))
    restricted = CUB(str(fake.root), attributes="majority", min_classes=3, voters=str(tmp_path / "voters.txt"))
    assert list(restricted.concepts.names) == [attribute_name(attribute_names()[a]) for a in np.flatnonzero(fewer.sum(0) >= 3)]
    assert restricted.concepts.names != cub.concepts.names


def test_only_training_images_may_vote(fake, tmp_path):
    outsider = int(np.flatnonzero(~fake.train_I)[0]) + 1
    (tmp_path / "voters.txt").write_text(f"1\n{outsider}\n")
    with pytest.raises(ValueError, match=rf"voters\.txt: row 2 has image {outsider}, which is no training image"):
        CUB(str(fake.root), voters=str(tmp_path / "voters.txt")).load("train")


# ---------------------------------------------------------------------- concepts and labels


def test_reference_with_image_labels_is_the_vote_and_without_them_the_percentages(fake, tmp_path):
    voted = CUB(str(fake.root))
    expected = np.array(majority_by_loop(fake, np.flatnonzero(fake.train_I)))[:, IDS]
    data = voted.load("train")
    np.testing.assert_array_equal(data.concept_NM.numpy(), expected[data.label_N.numpy()])
    percent = write_fake_cub(tmp_path / "CUB", extra_classes=2, image_attributes=False)
    data = CUB(str(percent.root)).load("train")
    np.testing.assert_array_equal(data.concept_NM.numpy(), percent.profile_CA[:, IDS][data.label_N.numpy()])
    text = np.loadtxt(percent.root / PERCENT) / 100
    np.testing.assert_allclose(data.concepts.class_concept_KM.numpy(), text[:4, IDS], atol=1e-6)
    assert data.concepts.class_names == tuple(f"Fake bird {c}" for c in range(1, 5))  # the two classes without pictures are left out


def test_the_percentage_rule_counts_over_all_classes_of_the_file(tmp_path):
    made = write_fake_cub(tmp_path / "CUB", num_classes=2, images_per_class=3, extra_classes=4, image_attributes=False)
    cub = CUB(str(made.root), attributes="percentage", min_classes=3)
    chosen = np.flatnonzero(made.profile_CA.sum(0) >= 3)  # 3 classes cannot be had among the 2 with pictures
    assert list(cub.concepts.names) == [attribute_name(attribute_names()[a]) for a in chosen]
    assert cub.concepts.num_classes == 2


def test_what_nobody_saw_is_unknown_in_the_matrix_and_follows_the_tie_rule_in_the_labels(tmp_path):
    made = write_fake_cub(tmp_path / "CUB", num_classes=2, images_per_class=3)
    for image in (1, 2):  # the training images of class 1; attribute 2 is the first of the reference list
        edit(made.root / LABELS, (image - 1) * 312 + 2, f"{image} 2 0 1 1.0")
    for ties, label in (("present", 1.0), ("absent", math.nan)):
        data = CUB(str(made.root), ties=ties).load("test")  # pyright: ignore
        assert math.isnan(data.concepts.class_concept_KM[0, 0])
        np.testing.assert_array_equal(data.concept_NM[data.label_N == 0, 0], [label])


def test_a_percentage_must_be_above_the_threshold(small):
    values = ["0"] * 312
    values[1], values[4], values[6] = "50", "50.1", "49.9"  # the first three of the reference list
    edit(small.root / PERCENT, 1, " ".join(values))
    assert CUB(str(small.root)).load("test").concept_NM[0, :4].tolist() == [0, 1, 0, 0]
    assert CUB(str(small.root), threshold=0.495).load("test").concept_NM[0, :4].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("not_visible", ["unknown", "absent"])
def test_image_labels_keep_what_is_not_visible_apart(fake, not_visible):
    data = CUB(str(fake.root), labels="image", not_visible=not_visible).load("train")
    rows = np.flatnonzero(fake.train_I)
    expected = fake.present_IA[rows][:, IDS].astype(float)
    expected[fake.certainty_IA[rows][:, IDS] == 1] = math.nan if not_visible == "unknown" else 0
    np.testing.assert_array_equal(data.concept_NM.numpy(), expected)
    assert (fake.certainty_IA[rows][:, IDS] == 1).any()


def test_shared_figures(shared):
    root = str(shared / "data" / "CUB_200_2011_subset")
    reference = CUB(root).concepts
    ruled = CUB(root, attributes="percentage").concepts
    assert reference.num_concepts == 112
    assert reference.num_classes == 50
    assert int(varying(reference).sum()) == 106
    assert ruled.num_concepts == 108
    assert len(set(reference.names) & set(ruled.names)) == 104


# ---------------------------------------------------------------------- pictures, points, masks


def test_a_sample_by_hand(fake):
    data = pickle.loads(pickle.dumps(CUB(str(fake.root)))).load("test")
    row = int(np.flatnonzero(~fake.train_I)[3])
    sample = pickle.loads(pickle.dumps(data))[3]  # workers receive the data set by pickle
    h, w = fake.size
    x, y, bw, bh = (float(v) for v in (fake.root / "bounding_boxes.txt").read_text().splitlines()[row].split()[1:])
    assert sample.name == fake.paths[row]
    assert sample.label == fake.class_I[row]
    assert sample.size == (h, w)
    assert sample.image is not None
    assert torch.equal(sample.image, read_picture(fake.root / "images" / fake.paths[row]))
    np.testing.assert_allclose(sample.box_4, [x / w, y / h, (x + bw) / w, (y + bh) / h], atol=1e-6)
    assert sample.points_P3 is not None
    cells = [line.split() for line in (fake.root / "parts" / "part_locs.txt").read_text().splitlines()]
    for cell in cells[15 * row : 15 * row + 15]:
        fx, fy, visible = sample.points_P3[int(cell[1]) - 1].tolist()
        assert visible == float(cell[4])
        if visible:
            assert (fx, fy) == pytest.approx((float(cell[2]) / w, float(cell[3]) / h), abs=1e-6)
    mask = sample.foreground_HW
    assert mask is not None
    assert mask.shape == (h, w)
    belly = sample.points_P3[PARTS.index("belly")]
    assert bool(mask[int(belly[1] * h), int(belly[0] * w)])
    assert not mask[0, 0]
    assert sample.group is None


def test_attributes_txt_is_found_beside_the_root_and_masks_too(tmp_path):
    made = write_fake_cub(tmp_path / "CUB_200_2011", num_classes=2, images_per_class=3, image_attributes=False, attributes_beside=True)
    (made.root / "segmentations").rename(tmp_path / "segmentations")
    assert CUB(str(made.root)).load("train")[0].foreground_HW is not None
    (tmp_path / "attributes.txt").rename(made.root / "attributes" / "attributes.txt")
    assert CUB(str(made.root)).concepts.num_concepts == 112
    (made.root / "attributes" / "attributes.txt").unlink()
    with pytest.raises(ValueError, match=r"no attributes\.txt among"):
        CUB(str(made.root)).load("train")


def test_bad_and_missing_masks_are_none(small):
    (small.root / "mask_quality.csv").write_text("image_id,visible_parts_in_mask,mask_over_bbox\n1,0.79,0.3\n2,0.8,0.2\n4,nan,0.2\n")
    (small.root / "segmentations" / small.paths[4]).with_suffix(".png").unlink()
    data = CUB(str(small.root)).load("train")
    assert [data[n].foreground_HW is None for n in range(4)] == [True, False, True, True]  # images 1, 2, 4, 5
    (small.root / "mask_quality.csv").write_text("image_id,visible_parts_in_mask\n1,good\n")
    with pytest.raises(ValueError, match=r"mask_quality\.csv: row 2 reads '1,good'"):
        CUB(str(small.root)).load("train")


def test_without_parts_boxes_and_masks_it_still_loads(tmp_path):
    made = write_fake_cub(tmp_path / "CUB", num_classes=2, images_per_class=3, image_attributes=False, masks=False)
    for name in ("parts/parts.txt", "parts/part_locs.txt", "bounding_boxes.txt"):
        (made.root / name).unlink()
    (made.root / "parts").rmdir()
    sample = CUB(str(made.root)).load("train")[0]
    assert sample.points_P3 is sample.box_4 is sample.foreground_HW is None
    assert CUB(str(made.root)).concepts.parts is None


def test_the_key_follows_the_pictures_and_not_the_folder(small, tmp_path):
    before = CUB(str(small.root)).load("train")
    small.root.rename(tmp_path / "moved")
    moved = CUB(str(tmp_path / "moved")).load("train")
    assert moved.fingerprint() == before.fingerprint()
    Image.new("RGB", (64, 48), (1, 2, 3)).save(tmp_path / "moved" / "images" / small.paths[0])
    assert CUB(str(tmp_path / "moved")).load("train").fingerprint() != before.fingerprint()


def test_size_is_that_of_the_turned_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture_size(tmp_path / "a.jpg") == tuple(read_picture(tmp_path / "a.jpg").shape[1:]) == (20, 10)
    (tmp_path / "b.jpg").write_text("no picture")
    with pytest.raises(BadPictureError, match=r"b\.jpg: cannot be decoded"):
        read_picture_size(tmp_path / "b.jpg")


# ---------------------------------------------------------------------- twins


def test_twins_are_the_test_pictures_elsewhere(fake, tmp_path):
    write_fake_waterbirds(tmp_path / "water", cub=fake, scale=0.5)
    cub = CUB(str(fake.root), twins=str(tmp_path / "water"))
    assert cub.splits == ("train", "test", "test_twins")
    test, twins = cub.load("test"), cub.load("test_twins")
    assert twins.names == test.names
    assert torch.equal(twins.label_N, test.label_N)
    assert torch.equal(twins.concept_NM, test.concept_NM)
    assert twins.points_NP3 is not None
    assert test.points_NP3 is not None
    assert torch.equal(twins.points_NP3, test.points_NP3)
    assert twins.fingerprint() != test.fingerprint()
    sample = twins[1]
    assert sample.size == (24, 32)
    assert sample.image is not None
    assert torch.equal(sample.image, read_picture(tmp_path / "water" / twins.names[1]))
    assert sample.foreground_HW is not None
    assert sample.foreground_HW.shape == (24, 32)
    assert abs(sample.foreground_HW.float().mean() - test[1].foreground_HW.float().mean()) < 0.02


def test_twins_of_another_format_match_and_missing_ones_are_said_once(small, tmp_path):
    water = tmp_path / "water"
    rows = write_fake_waterbirds(water, cub=small, leave_out=1)
    text = (water / "metadata.csv").read_text()
    for row in rows:
        path = water / row["img_filename"]
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    (water / "metadata.csv").write_text(text.replace("_1002.jpg", "_1002.png"))
    cub = CUB(str(small.root), twins=str(water))
    with pytest.warns(UserWarning, match="1 of the 2 test pictures have no twin") as caught:
        data = cub.load("test_twins")
    assert len([w for w in caught if "twin" in str(w.message)]) == 1
    assert data.names == (small.paths[2],)


def test_wrong_twins_are_named(small, tmp_path):
    water = tmp_path / "water"
    write_fake_waterbirds(water, cub=small)
    Image.new("RGB", (48, 48)).save(water / small.paths[5])
    with pytest.raises(ValueError, match=r"Fake_bird_2_0005_1005\.jpg: 48 x 48 pixels do not have the shape of 64 x 48"):
        CUB(str(small.root), twins=str(water)).load("test_twins")
    (water / small.paths[5]).unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 pictures that .*metadata\.csv lists are missing: .*Fake_bird_2_0005_1005\.jpg"):
        CUB(str(small.root), twins=str(water)).load("test_twins")
    (water / "metadata.csv").write_text((water / "metadata.csv").read_text().replace("Fake_bird", "Other_bird"))
    with pytest.raises(ValueError, match="lists no twin of a test picture"):
        CUB(str(small.root), twins=str(water)).load("test_twins")
    with pytest.raises(ValueError, match="no split 'test_twins', only train, test; give twins="):
        CUB(str(small.root)).load("test_twins")


def test_any_rounding_of_the_sides_is_the_same_shape():
    for h, w in ((320, 214), (213, 320), (320, 320), (97, 320)):
        for longest in (32, 97, 192, 500):
            scale = longest / max(h, w)
            for rounded in (math.floor, math.ceil):
                check_same_shape(Path("x"), (rounded(h * scale), rounded(w * scale)), of=(h, w))
    with pytest.raises(ValueError, match="shape"):
        check_same_shape(Path("x"), (192, 180), of=(320, 320))


def test_shared_twins(shared):
    data = shared / "data"
    root = data / "CUB_200_2011_subset"
    cub = CUB(str(root), twins=str(data / "waterbird_complete95_forest2water2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*1 of 703 pictures have coordinates outside.*")
        test, twins = cub.load("test"), cub.load("test_twins")
    assert len(cub.load("train")) == 1500
    assert len(test) == len(twins) == 703
    quality = {row[0]: float(row[1]) for row in (line.split(",") for line in (root / "mask_quality.csv").read_text().splitlines()[1:])}
    image_of = {path: image for image, path in (line.split() for line in (root / "images.txt").read_text().splitlines())}
    compared = 0
    for n in range(0, 703, 20):
        sample = test.sample(n, image=False)
        assert sample.points_P3 is not None
        expected = quality[image_of[sample.name]]
        assert (sample.foreground_HW is None) == (expected < 0.8)
        if sample.foreground_HW is None:
            continue
        h, w = sample.size
        near = max_pool2d(sample.foreground_HW[None, None].float(), 5, 1, 2)[0, 0] > 0  # the file's figures allow 2 pixels
        inside = [bool(near[min(int(y * h), h - 1), min(int(x * w), w - 1)]) for x, y, visible in sample.points_P3.tolist() if visible]
        assert sum(inside) / len(inside) == pytest.approx(expected, abs=1e-3)
        compared += 1
    assert compared > 25


# ---------------------------------------------------------------------- faults, each with its file and row


@pytest.mark.parametrize(
    ("name", "row", "text", "message"),
    [
        ("images.txt", 2, "2", r"images\.txt: row 2 has 1 columns \('2'\), expected 2: <image id> <path>.*truncated"),
        ("images.txt", 2, "x a.jpg", r"images\.txt: row 2 reads 'x a\.jpg', expected <image id> <path>"),
        ("images.txt", 2, "1 a.jpg", r"images\.txt: row 2 repeats id 1"),
        ("images.txt", 2, "77 a.jpg", r"image_class_labels\.txt: row 2 has id 2, which .*images\.txt does not list"),
        ("images.txt", 2, "2 001.Fake_bird_1/gone.jpg", r"1 of the 4 pictures that .*images\.txt lists are missing: .*gone\.jpg"),
        ("image_class_labels.txt", 3, "3 9", r"image_class_labels\.txt: row 3 \(image 3\) has class id 9, expected an id of classes\.txt"),
        ("image_class_labels.txt", 6, None, r"image_class_labels\.txt: no row for id 6 of .*images\.txt \(1 of 6.*truncated"),
        ("train_test_split.txt", 4, "4 2", r"train_test_split\.txt: row 4 \(image 4\) has is training image 2, expected 0 .test. or 1"),
        ("train_test_split.txt", 4, "4 1 1", r"train_test_split\.txt: row 4 has 3 columns"),
        ("classes.txt", 2, "2", r"classes\.txt: row 2 has 1 columns"),
        ("bounding_boxes.txt", 6, "6 1.0 2.0", r"bounding_boxes\.txt: row 6 has 3 columns"),
        ("bounding_boxes.txt", 6, "8 1 1 9 9", r"bounding_boxes\.txt: row 6 has id 8, which"),
        ("parts/part_locs.txt", 20, "2 50 1 1 1", r"part_locs\.txt: row 20 has part 50"),
        ("parts/part_locs.txt", 20, "9 5 1 1 1", r"part_locs\.txt: row 20 has image 9"),
        ("parts/part_locs.txt", 20, "2 5 1 1 2", r"part_locs\.txt: row 20 has visible 2, expected 0 or 1"),
        ("parts/part_locs.txt", 20, "2 4 1 1 1", r"part_locs\.txt: row 20 repeats image 2, part 4"),
        ("parts/part_locs.txt", 90, None, r"part_locs\.txt: no row for image 6 and part 15 \(1 such pairs\)"),
        ("attributes.txt", 3, "400 has_a::b", r"attributes\.txt: row 3 has id 400, expected 3"),
        ("attributes.txt", 312, None, rf"{PERCENT}: row 1 has 312 percentages, expected 311"),
        (PERCENT, 2, " ".join(["50"] * 311), rf"{PERCENT}: row 2 has 311 percentages, expected 312"),
        (PERCENT, 2, " ".join(["50"] * 311 + ["100.5"]), rf"{PERCENT}: row 2, column 312 is 100.5, expected a percentage"),
        (PERCENT, 2, " ".join(["50"] * 311 + ["many"]), rf"{PERCENT}: row 2 holds a word"),
        (PERCENT, 2, None, rf"{PERCENT}: 1 rows, expected 2"),
    ],
)
def test_a_bad_row_is_named(small, name, row, text, message):
    edit(small.root / name, row, text)
    with pytest.raises(ValueError, match=message):
        CUB(str(small.root)).load("train")


@pytest.mark.parametrize(
    "name", ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "parts/part_locs.txt", PERCENT]
)
def test_a_missing_or_empty_table_is_named(small, name):
    (small.root / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name}: (is empty|0 rows)"):
        CUB(str(small.root)).load("train")
    (small.root / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file"):
        CUB(str(small.root)).load("train")


def test_a_table_that_is_no_text_is_named(small):
    (small.root / "images.txt").write_bytes(b"1 \xff\xfe\n")
    with pytest.raises(ValueError, match=r"images\.txt: is no text"):
        CUB(str(small.root)).load("train")


def test_settings_folders_and_splits_that_are_not_there(small, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder; root is the folder that holds images\.txt"):
        CUB(str(tmp_path / "nowhere")).load("train")
    with pytest.raises(ValueError, match="attributes is 'all', expected one of reference, majority, percentage"):
        CUB(str(small.root), attributes="all")  # pyright: ignore
    with pytest.raises(ValueError, match="threshold is 50"):
        CUB(str(small.root), threshold=50)
    with pytest.raises(ValueError, match="voters is given, but attributes='percentage' holds no vote"):
        CUB(str(small.root), attributes="percentage", voters="ids.txt")
    with pytest.raises(ValueError, match="no split 'val', only train, test"):
        CUB(str(small.root)).load("val")
    with pytest.raises(ValueError, match=r"image_attribute_labels\.txt: no such file; without image-level labels take"):
        CUB(str(small.root), labels="image").load("train")
    (small.root / "train_test_split.txt").write_text("".join(f"{i} 1\n" for i in range(1, 7)))
    with pytest.raises(ValueError, match=r"train_test_split\.txt: no image is in the test split"):
        CUB(str(small.root)).load("test")


def test_check_lists_five_missing_pictures(small):
    CUB(str(small.root)).check()
    for path in small.paths:
        (small.root / "images" / path).unlink()
    with pytest.raises(ValueError, match=r"6 of the 6 pictures that .*images\.txt lists are missing: ") as caught:
        CUB(str(small.root)).check()
    assert str(caught.value).count(".jpg") == 5


def test_a_picture_that_breaks_later_is_an_error_when_read(small):
    path = small.root / "images" / small.paths[0]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(BadPictureError, match=r"Fake_bird_1_0000_1000\.jpg"):
        CUB(str(small.root)).load("train")[0]


def test_annotations_of_larger_pictures_are_refused_and_a_stray_box_is_moved(small, tmp_path):
    rows = (small.root / "parts" / "part_locs.txt").read_text().splitlines()
    larger = [" ".join([i, p, str(float(x) * 5), str(float(y) * 5), v]) for i, p, x, y, v in map(str.split, rows)]
    (small.root / "parts" / "part_locs.txt").write_text("\n".join(larger))
    with pytest.raises(ValueError, match=r"part_locs\.txt: 4 of 4 pictures have coordinates outside.*another size"):
        CUB(str(small.root)).load("train")
    many = write_fake_cub(tmp_path / "many", num_classes=2, images_per_class=18, image_attributes=False)
    edit(many.root / "bounding_boxes.txt", 1, "1 10.0 10.0 90.0 20.0")
    with pytest.warns(UserWarning, match=r"bounding_boxes\.txt: 1 of 24 pictures have coordinates outside .*_0000_1000\.jpg \(64 x 48"):
        data = CUB(str(many.root)).load("train")
    assert data.box_N4 is not None
    assert data.box_N4[0, 2] == 1
    assert data.box_N4[0, 0] == pytest.approx(10 / 64)


# ---------------------------------------------------------------------- image_attribute_labels.txt


def labels_file(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


GOOD = ["5 1 0 1 2.5", "5 2 1 4 1.0", "7 1 1 3 0.2", "7 2 0 2 12.07"]


def test_image_attributes_by_hand_with_rows_that_carry_more_columns(tmp_path):
    for rows in (
        GOOD,
        [*GOOD[:2], "7 1 1 3 0 0.2", "7 2 0 2 0 0 12.07"],
        GOOD[::-1],
        [row + "\r" for row in GOOD],
        [row.replace(" ", "\t") for row in GOOD],
    ):
        present, certainty = read_image_attributes(labels_file(tmp_path / "l.txt", rows), image_ids=(5, 7), num_attributes=2)
        assert present.tolist() == [[0, 1], [1, 0]]
        assert certainty.tolist() == [[1, 4], [3, 2]]


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_chunks_do_not_change_what_is_read(tmp_path, monkeypatch, chunk):
    from dotcbm.data import cub_tables

    monkeypatch.setattr(cub_tables, "_CHUNK", chunk)
    present, certainty = read_image_attributes(labels_file(tmp_path / "l.txt", GOOD), image_ids=(5, 7), num_attributes=2)
    assert present.tolist() == [[0, 1], [1, 0]]
    assert certainty.tolist() == [[1, 4], [3, 2]]
    with pytest.raises(ValueError, match=r"l\.txt: row 4 has is_present 3, expected 0 or 1"):
        read_image_attributes(labels_file(tmp_path / "l.txt", [*GOOD[:3], "7 2 3 2 1.0"]), image_ids=(5, 7), num_attributes=2)


@pytest.mark.parametrize(
    ("row", "text", "message"),
    [
        (3, "7 1 1", r"row 3 reads '7 1 1', expected <image id> <attribute id> <is present> <certainty> <seconds>.*truncated"),
        (3, "7 1 1 yes 0.2", "row 3 reads '7 1 1 yes 0.2'"),
        (3, "7 1 0.5 3 0.2", "row 3 reads '7 1 0.5 3 0.2'"),
        (3, "6 1 1 3 0.2", r"row 3 has image id 6, expected an id that images\.txt lists"),
        (3, "900 1 1 3 0.2", "row 3 has image id 900"),
        (3, "-1 1 1 3 0.2", "row 3 has image id -1"),
        (3, "7 3 1 3 0.2", r"row 3 has attribute id 3, expected an id from 1 to 2 .attributes\.txt."),
        (3, "7 0 1 3 0.2", "row 3 has attribute id 0"),
        (4, "7 2 2 3 0.2", "row 4 has is_present 2, expected 0 or 1"),
        (4, "7 2 1 5 0.2", r"row 4 has certainty 5, expected 1 .not visible., 2, 3 or 4"),
        (4, "7 1 1 3 0.2", "row 4 repeats image 7, attribute 1"),
        (2, None, r"no row for image 5 and attribute 2 .1 such pairs, 3 rows read.; the file may be truncated"),
        (4, "7 2 1 ", "row 4 reads '7 2 1 '"),
    ],
)
def test_a_bad_row_of_image_attributes_is_named(tmp_path, row, text, message):
    path = labels_file(tmp_path / "image_attribute_labels.txt", GOOD)
    edit(path, row, text)
    with pytest.raises(ValueError, match=rf"image_attribute_labels\.txt: {message}"):
        read_image_attributes(path, image_ids=(5, 7), num_attributes=2)


def test_the_reference_list_needs_all_attributes(small):
    lines = (small.root / "attributes.txt").read_text().splitlines()[:300]
    (small.root / "attributes.txt").write_text("\n".join(lines))
    rows = [" ".join(line.split()[:300]) for line in (small.root / PERCENT).read_text().splitlines()]
    (small.root / PERCENT).write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"attributes\.txt lists 300 attributes, but the reference list asks for id 312"):
        CUB(str(small.root)).load("train")
    assert CUB(str(small.root), attributes="percentage", min_classes=1).concepts.num_concepts > 0
