"""Changed backgrounds leave the object alone, and are drawn as they are said to be."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.source import TinySource

from dotcbm.data.backgrounds import Backgrounds, blurred_background, class_colours, coloured_background, swap_background
from dotcbm.data.backgrounds_paint import paint_out
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.synthetic import Synthetic

SOURCE = Synthetic(size=64, num_train=24, num_val=8, num_test=16, num_classes=4)


class Damaged(ConceptSource):
    """`SOURCE`, where some test pictures have no usable mask."""

    def __init__(self, **masks: str) -> None:
        self.masks = {int(row.removeprefix("row")): what for row, what in masks.items()}

    concepts = SOURCE.concepts
    splits = ("train", "test")

    def load(self, split: str) -> ConceptDataset:
        dataset = SOURCE.load(split)
        read = dataset.read_foreground
        assert read is not None

        def damaged(row: int) -> torch.Tensor | None:
            mask = read(row)
            assert mask is not None
            what = self.masks.get(row) if split == "test" else None
            return {None: mask, "none": None, "empty": torch.zeros_like(mask), "full": torch.ones_like(mask)}[what]

        return replace(dataset, read_foreground=damaged)


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A red disc on noise."""
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    mask = (x - 40) ** 2 + (y - 30) ** 2 < 15**2
    picture = torch.randint(60, 120, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture[:, mask] = torch.tensor([[230], [10], [10]], dtype=torch.uint8)
    return picture, mask


def far_from(mask: torch.Tensor) -> torch.Tensor:
    """(H, W) pixels more than the rim of two away."""
    return torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] == 0


def test_the_object_stays_and_the_rest_changes() -> None:
    picture, mask = scene()
    donor = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    results = {
        "colour": coloured_background(picture, mask, (10, 200, 30)),
        "swap": swap_background(picture, mask, donor),
        "blur": blurred_background(picture, mask),
    }
    for name, result in results.items():
        assert result.dtype == torch.uint8, name
        assert torch.equal(result[:, mask], picture[:, mask]), name
        assert not torch.equal(result[:, ~mask], picture[:, ~mask]), name
    away = far_from(mask)
    assert (results["colour"][:, away] == torch.tensor([[10], [200], [30]])).all()
    assert (results["swap"][:, away] == 200).all()
    # Nothing red bleeds into the blurred background, and little is left of the noise.
    assert int(results["blur"][0][away].max()) < 120
    assert results["blur"][:, away].float().std() < 0.3 * picture[:, away].float().std()


def test_the_rim_lies_between_old_and_new() -> None:
    picture, mask = scene()
    picture[:, ~mask] = 100
    result = coloured_background(picture, mask, (200, 200, 200))
    rim = result[0][~mask & ~far_from(mask)].unique().tolist()
    assert rim == [100 + round(100 * (1 - share)) for share in (0.6, 0.25)]


def test_a_donors_object_is_painted_out_by_its_own_background() -> None:
    donor, hole = scene()
    painted = paint_out(donor, hole)
    away = torch.nn.functional.max_pool2d(hole[None].float(), 5, 1, 2)[0] == 0
    assert torch.equal(painted[:, away], donor[:, away])
    filled, around = painted[:, hole].float(), donor[:, away].float()
    assert (filled.mean(1) - around.mean(1)).abs().max() < 6
    assert 0.3 < float(filled.std() / around.std()) < 1.2  # it has texture, and is no flat blob
    result = swap_background(*scene(), donor, hole)
    assert int(result[0][far_from(hole)].max()) < 125  # nothing of the donor's red disc


def test_a_flat_background_is_painted_exactly() -> None:
    picture, mask = scene()
    picture[:, ~mask] = 77
    assert (paint_out(picture, mask) == 77).all()


def test_an_object_in_a_corner_or_all_but_everywhere_is_painted_out() -> None:
    for size, rows in (((33, 47), 30), ((3, 3), 2), ((64, 5), 60)):
        picture = torch.full((3, *size), 90, dtype=torch.uint8)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[:rows] = True
        picture[:, mask] = 255
        assert (paint_out(picture, mask)[:, mask].float() - 90).abs().max() <= 1, size
        assert torch.equal(blurred_background(picture, mask)[:, mask], picture[:, mask])


def test_a_donor_covers_the_picture_whatever_its_shape() -> None:
    picture, mask = scene()
    for size in ((10, 300), (300, 10), (60, 80), (1, 1)):
        donor = torch.full((3, *size), 33, dtype=torch.uint8)
        assert (swap_background(picture, mask, donor)[:, far_from(mask)] == 33).all(), size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture_3HW": torch.zeros(3, 60, 80)}, r"the picture is \(3, 60, 80\) float32; expected \(3, H, W\) uint8"),
        ({"foreground_HW": torch.zeros(60, 80)}, r"the mask of the picture is .* float32; expected \(60, 80\) bool"),
        ({"foreground_HW": torch.ones(80, 60, dtype=torch.bool)}, r"expected \(60, 80\) bool"),
        ({"foreground_HW": torch.zeros(60, 80, dtype=torch.bool)}, "covers nothing"),
        ({"foreground_HW": torch.ones(60, 80, dtype=torch.bool)}, "covers all of it"),
    ],
)
def test_wrong_pictures_and_masks_are_refused(change: dict[str, Any], message: str) -> None:
    picture, mask = scene()
    given = {"picture_3HW": picture, "foreground_HW": mask, **change}
    picture, mask = given["picture_3HW"], given["foreground_HW"]
    for call in (lambda: coloured_background(picture, mask, (0, 0, 0)), lambda: blurred_background(picture, mask)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message.replace("the picture", "the donor")):
        swap_background(*scene(), picture, mask)


def test_wrong_settings_of_the_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="three values from 0 to 255"):
        coloured_background(*scene(), (0, 0, 256))
    with pytest.raises(ValueError, match="blur is 0"):
        blurred_background(*scene(), blur=0)
    with pytest.raises(ValueError, match=r"the donor is \(1, 4, 4\) uint8"):
        swap_background(*scene(), torch.zeros(1, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("num_classes", [2, 10, 50, 200])
def test_class_colours_are_far_apart(num_classes: int) -> None:
    colours = torch.tensor(class_colours(num_classes, seed=0)).float()
    assert colours.min() >= 20
    assert colours.max() <= 235
    distance = torch.cdist(colours, colours) + 1000 * torch.eye(num_classes)
    # The closest pair of an ideal packing is about 215 * K^(-1/3) apart; half of that is still told apart at a glance.
    assert distance.min() > 0.5 * 215 * num_classes ** (-1 / 3)
    assert class_colours(num_classes, seed=0) == class_colours(num_classes, seed=0)
    if num_classes > 2:
        assert class_colours(num_classes, seed=0) != class_colours(num_classes, seed=1)


def background_colour(dataset: ConceptDataset, index: int) -> tuple[int, ...]:
    sample = dataset.sample(index)
    assert sample.image is not None
    assert sample.foreground_HW is not None
    colours = sample.image[:, far_from(sample.foreground_HW)].unique(dim=1)
    assert colours.shape[1] == 1
    return tuple(colours[:, 0].tolist())


def test_colours_are_tied_to_classes_as_often_as_asked() -> None:
    many = TinySource(counts=(("train", 400), ("test", 400)))
    source = Backgrounds(many, kind="coloured", seed=3)
    palette = class_colours(4, seed=3)
    for split, tie in (("train", 0.8), ("test", 0.8), ("test_ood", 0.3)):
        dataset = source.load(split)
        assert dataset.group_N is not None
        deviation = (tie * (1 - tie) / 400) ** 0.5
        assert abs(float(dataset.group_N.float().mean()) - tie) < 4 * deviation, split
        for index in range(0, 400, 13):
            own = background_colour(dataset, index) == palette[int(dataset.label_N[index])]
            assert own == bool(dataset.group_N[index])
            assert background_colour(dataset, index) in palette
    drawn = source.load("train")
    strangers = {(int(drawn.label_N[i]), background_colour(drawn, i)) for i in range(0, 400) if not drawn.group_N[i]}  # pyright: ignore
    assert len(strangers) == 4 * 3  # every class meets every other colour


@pytest.mark.parametrize("tie", [0.0, 1.0])
def test_a_certain_tie_has_no_exception(tie: float) -> None:
    groups = Backgrounds(SOURCE, kind="coloured", tie=tie, tie_ood=1 - tie)
    assert groups.load("train").group_N.unique().tolist() == [int(tie)]  # pyright: ignore
    assert groups.load("test_ood").group_N.unique().tolist() == [int(1 - tie)]  # pyright: ignore


def test_a_row_depends_on_seed_split_and_row_alone() -> None:
    whole = Backgrounds(SOURCE, kind="coloured").load("test")
    with pytest.warns(UserWarning, match="3 without a usable mask, of 16 pictures, are left out of test"):
        damaged = Backgrounds(Damaged(row0="none", row5="empty", row6="full"), kind="coloured").load("test")
    assert damaged.names == tuple(name for i, name in enumerate(whole.names) if i not in (0, 5, 6))
    for index, name in enumerate(damaged.names):
        assert background_colour(damaged, index) == background_colour(whole, whole.names.index(name))
    other = Backgrounds(SOURCE, kind="coloured", seed=1).load("test")
    assert any(background_colour(other, i) != background_colour(whole, i) for i in range(16))
    assert Backgrounds(SOURCE, kind="coloured").load("test_ood").names == whole.names


def test_donors_are_of_another_class_and_in_the_control_of_the_same() -> None:
    source = Backgrounds(SOURCE, kind="swapped")
    plain, same, ood = (source.load(split) for split in ("test", "test_same", "test_ood"))
    assert plain.names == same.names == ood.names
    assert torch.equal(plain.label_N, ood.label_N)
    for dataset, is_same in ((same, True), (ood, False)):
        donors = dataset.read_image.donors  # pyright: ignore
        assert len(donors) == 16
        for row, donor in donors.items():
            assert row != donor
            assert (plain.label_N[row] == plain.label_N[donor]) == is_same
    sample = ood.sample(3)
    donor = plain.sample(ood.read_image.donors[3])  # pyright: ignore
    assert sample.image is not None
    expected = swap_background(plain.sample(3).image, plain.sample(3).foreground_HW, donor.image, donor.foreground_HW)  # pyright: ignore
    assert torch.equal(sample.image, expected)
    assert torch.equal(sample.foreground_HW, plain.sample(3).foreground_HW)  # pyright: ignore
    assert torch.equal(sample.concepts_M, plain.sample(3).concepts_M)


def test_a_subset_still_meets_its_own_donors() -> None:
    dataset = Backgrounds(SOURCE, kind="swapped").load("test_ood")
    part = dataset.subset([5, 2])
    assert torch.equal(part.sample(0).image, dataset.sample(5).image)  # pyright: ignore


def test_a_lonely_picture_of_a_class_is_left_out_of_all_three() -> None:
    # Class 0 keeps row 0 alone of its rows 0, 4, 8, 12.
    source = Backgrounds(Damaged(row4="none", row8="none", row12="none"), kind="swapped")
    for split in ("test", "test_same", "test_ood"):
        with pytest.warns(UserWarning, match="3 without a usable mask, 1 that are the only one of their class") as told:
            assert 0 not in source.load(split).label_N
        assert len(told) == 1


def test_training_pictures_of_swapped_and_blurred_are_the_sources_own() -> None:
    for kind in ("swapped", "blurred"):
        source = Backgrounds(SOURCE, kind=kind)
        assert source.load("train").fingerprint() == SOURCE.load("train").fingerprint()
        assert torch.equal(source.load("test").sample(2).image, SOURCE.load("test").sample(2).image)  # pyright: ignore
    blurred = Backgrounds(SOURCE, kind="blurred", blur=0.2).load("test_ood").sample(2)
    plain = SOURCE.load("test").sample(2)
    assert torch.equal(blurred.image, blurred_background(plain.image, plain.foreground_HW, blur=0.2))  # pyright: ignore


def test_each_setting_and_split_has_its_own_fingerprint() -> None:
    variants = [
        Backgrounds(SOURCE, kind="coloured"),
        Backgrounds(SOURCE, kind="coloured", seed=1),
        Backgrounds(SOURCE, kind="coloured", tie=0.7, tie_ood=0.2),
        Backgrounds(SOURCE, kind="swapped"),
        Backgrounds(SOURCE, kind="swapped", seed=1),
        Backgrounds(SOURCE, kind="blurred"),
        Backgrounds(SOURCE, kind="blurred", blur=0.2),
    ]
    keys = [source.load("test_ood").fingerprint() for source in variants]
    keys += [variants[0].load(split).fingerprint() for split in ("train", "val", "test")]
    keys += [variants[3].load("test_same").fingerprint(), SOURCE.load("test").fingerprint()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys.append(Backgrounds(Damaged(row1="none"), kind="coloured").load("test_ood").fingerprint())
    assert len(set(keys)) == len(keys)
    assert variants[0].load("test_ood").fingerprint() == keys[0]


def test_other_masks_of_the_same_pictures_change_the_fingerprint() -> None:
    class Grown(Damaged):
        def load(self, split: str) -> ConceptDataset:
            dataset = super().load(split)
            read = dataset.read_foreground
            return replace(dataset, read_foreground=lambda row: read(row).roll(1, 0))  # pyright: ignore

    assert Backgrounds(Grown(), kind="blurred").load("test_ood").fingerprint() != (
        Backgrounds(Damaged(), kind="blurred").load("test_ood").fingerprint()
    )


def test_splits_follow_the_source() -> None:
    assert Backgrounds(SOURCE, kind="coloured").splits == ("train", "val", "test", "test_ood")
    assert Backgrounds(SOURCE, kind="swapped").splits == ("train", "val", "test", "test_same", "test_ood")
    assert Backgrounds(TinySource(), kind="blurred").splits == ("train", "test", "test_ood")
    assert "kind='swapped'" in repr(Backgrounds(SOURCE, kind="swapped"))


def test_it_can_be_sent_to_another_process() -> None:
    dataset = Backgrounds(SOURCE, kind="swapped").load("test_ood")
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.sample(1).image, dataset.sample(1).image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "striped"}, r"kind is 'striped'; choose one of \['coloured', 'swapped', 'blurred'\]"),
        ({"kind": "coloured", "tie": 1.1}, "tie is 1.1"),
        ({"kind": "coloured", "tie_ood": -0.1}, "tie_ood is -0.1"),
        ({"kind": "blurred", "blur": 0.0}, "blur is 0.0"),
        ({"kind": "blurred", "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backgrounds(SOURCE, **settings)


def test_a_source_that_does_not_fit_is_refused() -> None:
    class Maskless(Damaged):
        def load(self, split: str) -> ConceptDataset:
            return replace(SOURCE.load(split), read_foreground=None)

    with pytest.raises(ValueError, match="has no object masks, so its backgrounds cannot be changed"):
        Backgrounds(Maskless(), kind="coloured").load("train")
    with pytest.raises(ValueError, match="have no split 'test_ood2', only train"):
        Backgrounds(SOURCE, kind="blurred").load("test_ood2")
    with pytest.raises(ValueError, match=r"no picture of the test split of .* has a usable mask"):
        Backgrounds(Damaged(**{f"row{i}": "none" for i in range(16)}), kind="blurred").load("test")
    with pytest.raises(ValueError, match="fewer than two classes with two usable masks"):
        Backgrounds(Damaged(**{f"row{i}": "none" for i in range(16) if i % 4}), kind="swapped").load("test")


def test_a_nested_source_in_a_config(tmp_path: Path) -> None:
    from dotcbm.catalog import subclasses
    from dotcbm.cli.config_parser import ConfigParser

    subclasses(ConceptSource, package="dotcbm.data")
    config = tmp_path / "config.yaml"
    config.write_text(
        "source:\n  class_path: Backgrounds\n  init_args:\n    kind: coloured\n    tie: 0.9\n"
        "    source:\n      class_path: Synthetic\n      init_args: {size: 64, num_test: 4, num_classes: 4}\n"
    )
    parser = ConfigParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--source", type=ConceptSource)
    built = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).source
    assert isinstance(built, Backgrounds)
    assert built.tie == 0.9
    assert isinstance(built.source, Synthetic)
    assert len(built.load("test_ood")) == 4


def test_real_birds_keep_their_pixels(shared: Path) -> None:
    from dotcbm.data.cub import CUB

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cub = CUB(str(shared / "data" / "CUB_200_2011_subset"))
        source = Backgrounds(cub, kind="swapped")
        ood = source.load("test_ood")
    plain = {name: i for i, name in enumerate(cub.load("test").names)}
    assert 600 < len(ood) < 703  # some masks of the set are marked as bad
    sample = ood.sample(0)
    before = cub.load("test").sample(plain[ood.names[0]])
    assert sample.image is not None
    assert before.image is not None
    mask = sample.foreground_HW
    assert mask is not None
    assert torch.equal(sample.image[:, mask], before.image[:, mask])
