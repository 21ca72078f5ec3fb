"""Drawn creatures: exactness of masks, labels and rule, and independence of everything from everything it should not know."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.data.synthetic import CLASS_NAMES, SCENES, Synthetic, class_from_concepts, class_rule
from dotcbm.data.synthetic_canvas import Canvas, Frame, Ink
from dotcbm.data.synthetic_creature import PARTS, draw_creature, draw_obstacle

SMALL = Synthetic(size=96, num_train=160, num_val=8, num_test=120)


def _hash(source: Synthetic, split: str, rows: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(source.picture(split, row).numpy().tobytes())
        digest.update(source.part_masks(split, row).numpy().tobytes())
    return digest.hexdigest()


def test_pictures_are_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_synthetic import SMALL, _hash\nprint(_hash(SMALL, 'test_ood', (7, 0, 31)))"
    )
    directory = str(Path(__file__).parent)
    out = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == _hash(SMALL, "test_ood", (7, 0, 31))


def test_a_picture_depends_on_seed_split_and_row_only() -> None:
    more = replace(SMALL, num_train=7, num_val=3, num_test=2, labels="class", min_visible=0.9)
    assert _hash(more, "train", (5,)) == _hash(SMALL, "train", (5,))
    assert more.load("val").fingerprint() != SMALL.load("val").fingerprint()  # fewer rows
    assert SMALL.load("val").fingerprint() == replace(SMALL, labels="class").load("val").fingerprint()
    hashes = {_hash(SMALL, split, (row,)) for split in SMALL.splits for row in (0, 8)}
    assert len(hashes) == 8
    assert _hash(replace(SMALL, seed=1), "train", (5,)) != _hash(SMALL, "train", (5,))
    assert replace(SMALL, seed=1).load("val").fingerprint() != SMALL.load("val").fingerprint()


def test_datasets_travel_to_worker_processes() -> None:
    dataset = SMALL.load("val")
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3].image, dataset[3].image)
    subset = again.subset([5, 2])
    assert torch.equal(subset[1].image, dataset[2].image)
    assert torch.equal(subset[1].part_masks_PHW, dataset[2].part_masks_PHW)


def test_writing_into_a_sample_leaves_the_data_alone() -> None:
    dataset = SMALL.load("val")
    first = dataset[0]
    kept = first.image.clone(), first.foreground_HW.clone()
    first.image.zero_()
    first.foreground_HW.zero_()
    again = dataset[0]
    assert torch.equal(again.image, kept[0])
    assert torch.equal(again.foreground_HW, kept[1])


def test_part_masks_are_disjoint_and_make_up_the_foreground() -> None:
    dataset = SMALL.load("train")
    for row in range(40):
        sample = dataset[row]
        count = sample.part_masks_PHW.sum(0)
        assert count.max() == 1
        assert torch.equal(count > 0, sample.foreground_HW)
        assert 0.08 < sample.foreground_HW.float().mean() < 0.6


def _eroded(mask: torch.Tensor, margin: int) -> torch.Tensor:
    return -torch.nn.functional.max_pool2d(-mask.float()[None, None], 2 * margin + 1, 1, margin)[0, 0] > 0


@pytest.mark.parametrize("row", range(12))
def test_another_place_changes_no_pixel_inside_the_creature(row: int) -> None:
    here, there = SMALL.picture("test", row), SMALL.picture("test_ood", row)
    mask = SMALL.foreground("test", row)
    assert torch.equal(mask, SMALL.foreground("test_ood", row))
    changed = (here != there).any(0)
    assert changed[_eroded(mask, 2)].float().mean() < 0.002  # seams where two outlines meet
    assert changed[~mask].float().mean() > 0.5  # the obstacle alone stays


@pytest.mark.parametrize("row", range(12))
def test_the_creature_covers_at_least_half_of_each_pixel_of_its_mask(row: int) -> None:
    """Painted on black and on white, a pixel differs by the share of it that is not covered."""
    recipe, drawn = SMALL._recipe("test", row), []
    for ground in (0, 255):
        canvas = Canvas((96, 96), image_3HW=np.full((3, 96, 96), ground, dtype=np.float32))
        draw_creature(canvas, recipe.creature)
        drawn.append(canvas.image_3HW)
    open_share = (drawn[1] - drawn[0]).max(0) / 255
    mask = canvas.part_HW > 0
    assert open_share[mask].max() <= 0.5 + 1e-3
    assert open_share[~mask].min() > 0.2  # two edges of less than half each
    assert (open_share[~mask] < 0.5).mean() < 0.01


@pytest.mark.parametrize(("part", "attribute"), [("wing", 3), ("head", 6), ("belly", 7), ("legs", 8)])
def test_recolouring_a_part_changes_the_pixels_of_its_mask(part: str, attribute: int) -> None:
    """The colour of a part is painted where its mask says, and nowhere else but for the blended edge."""
    number = PARTS.index(part)
    for row in range(4):
        recipe = SMALL._recipe("test", row)
        drawn = []
        for value in (0, 1):
            values = list(recipe.creature.values)
            values[attribute] = value
            values[1] = 3  # ears take the colour of the head, a crest does not
            image = np.full((3, 96, 96), 128, dtype=np.float32)
            canvas = Canvas((96, 96), image_3HW=image)
            draw_creature(canvas, replace(recipe.creature, values=tuple(values)))
            drawn.append((image, canvas.part_HW == number + 1))
        (image_a, mask), (image_b, mask_b) = drawn
        assert (mask == mask_b).all()
        changed = np.abs(image_a - image_b).max(0) > 12
        padded = np.pad(mask, 1)
        grown = np.stack([padded[dy : dy + 96, dx : dx + 96] for dy in range(3) for dx in range(3)]).any(0)
        assert changed[mask].mean() > 0.5  # outlines, eyes and their like keep their colour
        assert not changed[~grown].any()


def test_a_strided_canvas_takes_every_kth_pixel_of_the_full_one() -> None:
    recipe = next(r for r in (SMALL._recipe("train", i) for i in range(50)) if r.obstacle is not None)
    maps = []
    for stride in (1, 3):
        canvas = Canvas((96, 96), stride=stride)
        draw_creature(canvas, recipe.creature)
        draw_obstacle(canvas, recipe.obstacle)
        maps.append(canvas.part_HW)
    assert maps[0].max() > 0
    assert (maps[0][1::3, 1::3] == maps[1]).all()


@settings(max_examples=40)
@given(
    a=st.floats(0.05, 0.3),
    b=st.floats(0.05, 0.3),
    turn=st.floats(-3, 3),
    angle=st.floats(-3, 3),
    mirror=st.booleans(),
    scale=st.floats(0.3, 1),
)
def test_ellipse_masks_agree_with_a_loop_over_pixels(a: float, b: float, turn: float, angle: float, mirror: bool, scale: float) -> None:
    frame, centre, side = Frame((0.45, 0.55), scale, turn, mirror), (0.1, -0.05), 24
    canvas = Canvas((side, side))
    canvas.ellipse(frame, centre, (a, b), Ink((0, 0, 0)), angle=angle, part=1)
    x0, y0 = frame.at(*centre)
    ex, ey = frame.at(centre[0] + np.cos(angle), centre[1] + np.sin(angle))
    axis = (ex - x0) / scale**2, (ey - y0) / scale**2
    for row in range(side):
        for column in range(side):
            dx, dy = (column + 0.5) / side - x0, (row + 0.5) / side - y0
            u, v = dx * axis[0] + dy * axis[1], dx * axis[1] - dy * axis[0]
            value = (u / a) ** 2 + (v / b) ** 2
            if abs(value - 1) > 1e-3:
                assert canvas.part_HW[row, column] == (value < 1)


def test_stroke_masks_agree_with_a_loop_over_pixels() -> None:
    points, radii, side = [(0.2, 0.2), (0.7, 0.4), (0.5, 0.8)], [0.1, 0.06, 0.03], 40
    canvas = Canvas((side, side))
    canvas.stroke(Frame(), points, radii, Ink((0, 0, 0)), part=3)
    for row in range(side):
        for column in range(side):
            p = np.array([(column + 0.5) / side, (row + 0.5) / side])
            gap = np.inf
            for (start, end), (r0, r1) in zip(pairwise(points), pairwise(radii)):
                step = np.subtract(end, start)
                h = np.clip(np.dot(p - start, step) / np.dot(step, step), 0, 1)
                gap = min(gap, np.linalg.norm(p - start - h * step) - (r0 + h * (r1 - r0)))
            if abs(gap) > 1e-4:
                assert (canvas.part_HW[row, column] == 3) == (gap < 0)


@pytest.mark.parametrize("num_classes", [2, 8, 16])
def test_full_concepts_give_the_class_exactly(num_classes: int) -> None:
    source = Synthetic(size=64, num_train=200, num_classes=num_classes, labels="class", variation=0.5)
    train = source.load("train")
    assert torch.equal(class_from_concepts(train.concept_NM, num_classes=num_classes), train.label_N)
    assert train.concept_NM.sum(1).eq(9).all()  # one value of each attribute


@pytest.mark.parametrize(("num_classes", "most_shared"), [(8, 1), (16, 2)])
def test_classes_share_few_concepts(num_classes: int, most_shared: int) -> None:
    rule_KM = class_rule(num_classes)
    assert rule_KM.sum(1).eq(7).all()
    shared = [int((rule_KM[a] * rule_KM[b]).sum()) for a, b in combinations(range(num_classes), 2)]
    assert max(shared) == most_shared
    assert min(shared) >= 1
    assert rule_KM.sum(0)[:28].eq(num_classes / 4).all()  # every value serves equally many classes
    together = (rule_KM.T @ rule_KM - torch.diag(rule_KM.sum(0)))[:28, :28]
    assert together.max() == num_classes / 8  # of the classes with a concept at most half share another


@pytest.mark.parametrize("num_classes", [5, 8, 16])
def test_the_rule_bears_one_missing_concept(num_classes: int) -> None:
    train = Synthetic(size=64, num_train=300, num_classes=num_classes, labels="class", variation=0.5).load("train")
    for concept in range(28):
        concept_NM = train.concept_NM.clone()
        concept_NM[:, concept] = 0
        assert torch.equal(class_from_concepts(concept_NM, num_classes=num_classes), train.label_N)


def test_creatures_stray_as_often_as_asked_for() -> None:
    rule_KM = class_rule(8)
    strays = {}
    for variation in (0.0, 0.1, 0.4):
        source = replace(SMALL, variation=variation, labels="class")
        train = source.load("train")
        strays[variation] = 7 - (train.concept_NM * rule_KM[train.label_N]).sum(1)
    assert strays[0.0].eq(0).all()
    assert 0.2 < strays[0.1].mean() < 0.8 < strays[0.4].mean() < 2.8
    assert strays[0.4].max() <= 4


@pytest.mark.parametrize("num_classes", [4, 16])
def test_class_shares_are_those_of_the_pictures(num_classes: int) -> None:
    source = Synthetic(size=64, num_classes=num_classes, variation=0.4)
    num = 400 * num_classes
    value_NG = torch.tensor([source._recipe("train", i).creature.values for i in range(num)])
    share_KM = source.concepts.class_concept_KM
    for k in range(num_classes):
        for g, told in enumerate(share_KM[k, :28].reshape(7, 4)):
            share = torch.bincount(value_NG[k::num_classes, g], minlength=4) / 400
            assert ((share - told).abs() <= 4.5 * (told * (1 - told) / 400).sqrt() + 1e-6).all()
    assert share_KM[:, 28:].eq(0.5).all()
    assert share_KM[:, :28].reshape(-1, 7, 4).sum(-1).allclose(torch.tensor(1.0))


def test_hidden_parts_take_their_concepts_along_and_only_with_visible_labels() -> None:
    source = replace(SMALL, occlusion=1.0)
    seen, true = source.load("train"), replace(source, labels="class").load("train")
    visible_NM = (seen.points_NP3[:, :, 2] @ seen.concepts.part_mask_MP().float().T).bool()
    assert torch.equal(seen.concept_NM, true.concept_NM * visible_NM)
    assert 0.03 < 1 - visible_NM.float().mean() < 0.3
    assert torch.equal(seen.points_NP3, true.points_NP3)
    clear = replace(SMALL, occlusion=0.0, labels="visible").load("train")
    assert clear.points_NP3[:, :, 2].eq(1).all()


def test_visibility_is_the_unhidden_share_of_the_exact_mask() -> None:
    source = replace(SMALL, occlusion=1.0, min_visible=0.5)
    points_NP3 = source.load("train").points_NP3
    shares, told = [], []
    for row in range(60):
        recipe = source._recipe("train", row)
        canvas = Canvas((96, 96))
        draw_creature(canvas, recipe.creature)
        whole = np.bincount(canvas.part_HW.ravel(), minlength=9)[1:]
        shares.append(source.part_masks("train", row).sum((1, 2)).numpy() / whole)
        told.append(points_NP3[row, :, 2].numpy())
    share_NP, told_NP = np.stack(shares), np.stack(told)
    assert ((share_NP >= 0.5) == told_NP).all()
    assert 0.0 < (share_NP == 0).mean() < (share_NP < 0.5).mean() < 0.4


@pytest.mark.parametrize("size", [96, 224])
def test_points_lie_in_the_masks_and_boxes_around_them(size: int) -> None:
    dataset = replace(SMALL, size=size, num_test=30, occlusion=1.0).load("test")
    for sample in dataset:
        for (x, y, visible), mask in zip(sample.points_P3.tolist(), sample.part_masks_PHW):
            if visible:
                assert mask[int(y * size), int(x * size)]
        rows, columns = sample.foreground_HW.nonzero(as_tuple=True)
        box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / size
        assert (box - sample.box_4).abs().max() <= 2 / size + 1e-6


def test_visible_parts_are_large_enough_to_point_at() -> None:
    """On a 14 x 14 grid (nearly) every visible part holds the centre of a cell."""
    dataset = replace(SMALL, size=112).load("train")
    misses = total = 0
    for row in range(100):
        sample = dataset.sample(row, image=False)
        centres = sample.part_masks_PHW[:, 4::8, 4::8].flatten(1).any(1)
        visible = sample.points_P3[:, 2].bool()
        misses += int((~centres & visible).sum())
        total += int(visible.sum())
    assert misses <= 0.01 * total


def test_creatures_stand_inside_the_picture() -> None:
    source = replace(SMALL, occlusion=0.0)
    cut = 0
    for row in range(100):
        mask = source.foreground("train", row)
        cut += int(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    assert cut <= 5


def _places(source: Synthetic, split: str, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    scene_N = torch.tensor([source._recipe(split, i).scene for i in range(num)])
    return torch.arange(num) % source.num_classes, scene_N


@pytest.mark.parametrize("shortcut", [0.0, 0.5, 0.8, 1.0])
def test_the_shortcut_has_the_strength_asked_for(shortcut: float) -> None:
    num = 1600
    label_N, scene_N = _places(replace(SMALL, shortcut=shortcut), "train", num)
    own = shortcut + (1 - shortcut) / len(SCENES)
    assert abs((scene_N == label_N).float().mean() - own) <= 4 * (own * (1 - own) / num) ** 0.5
    others = scene_N[scene_N != label_N]
    if shortcut < 1:
        count = torch.bincount(others, minlength=8) / len(others)
        assert (count - 1 / 8).abs().max() < 4 * (7 / 64 / len(others)) ** 0.5


def test_out_of_distribution_places_are_even_over_the_others_whatever_the_shortcut() -> None:
    num = 1600
    label_N, scene_N = _places(replace(SMALL, shortcut=0.9), "test_ood", num)
    assert not (scene_N == label_N).any()
    count = torch.bincount((scene_N - label_N) % 8, minlength=8)[1:] / num
    assert (count - 1 / 7).abs().max() < 4 * (6 / 49 / num) ** 0.5
    assert torch.equal(_places(SMALL, "test_ood", 100)[1], scene_N[:100])


def test_out_of_distribution_shows_the_creatures_of_test() -> None:
    test, ood = SMALL.load("test"), SMALL.load("test_ood")
    assert torch.equal(test.concept_NM, ood.concept_NM)
    assert torch.equal(test.points_NP3, ood.points_NP3)
    assert torch.equal(test.label_N, ood.label_N)
    assert not torch.equal(test.group_N, ood.group_N)


def test_groups_number_class_and_place() -> None:
    dataset = SMALL.load("val")
    expected = [row % 8 * 8 + SMALL._recipe("val", row).scene for row in range(8)]
    assert dataset.group_N.tolist() == expected


def test_creature_and_obstacle_do_not_know_the_place() -> None:
    """The free attributes, the obstacle and the pose are drawn from other numbers than the place."""
    for row in range(20):
        weak, strong = SMALL._recipe("train", row), replace(SMALL, shortcut=1.0)._recipe("train", row)
        assert weak.creature == strong.creature
        assert weak.obstacle == strong.obstacle


def test_free_attributes_and_obstacles_are_even_in_every_class() -> None:
    num = 1600
    recipes = [SMALL._recipe("train", i) for i in range(num)]
    belly = np.array([r.creature.values[7] for r in recipes])
    hidden = np.array([r.obstacle is not None for r in recipes])
    for k in range(8):
        assert abs(belly[k::8].mean() - 0.5) < 4 * (0.25 / (num / 8)) ** 0.5
        assert abs(hidden[k::8].mean() - SMALL.occlusion) < 4 * (0.24 / (num / 8)) ** 0.5


def test_a_picture_is_drawn_in_less_time_than_a_thorough_blur_of_it() -> None:
    """Speed, against a reference in the same run: 60 box blurs of the picture by Pillow."""
    from PIL import Image, ImageFilter

    source = Synthetic()
    for row in range(100):
        source.picture("test", row)  # paints the places once
    picture = Image.fromarray(source.picture("test", 0).permute(1, 2, 0).numpy())
    drawn, blurred = [], []
    for row in range(100, 120):
        start = time.process_time()
        source.picture("test", row)
        source.part_masks("test", row)
        middle = time.process_time()
        for _ in range(60):
            picture.filter(ImageFilter.BoxBlur(2))
        drawn.append(middle - start)
        blurred.append(time.process_time() - middle)
    assert sorted(drawn)[10] < sorted(blurred)[10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 17}, "num_classes is 17; there are 2 to 16"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"size": 32}, "size is 32; creatures need pictures of 64"),
        ({"shortcut": 1.2}, r"shortcut is 1.2; give a share in \[0, 1\]"),
        ({"occlusion": -0.1}, "occlusion is -0.1"),
        ({"variation": float("nan")}, "variation is nan; give a probability"),
        ({"min_visible": 0}, "min_visible is 0, which calls hidden parts visible"),
        ({"num_val": 0}, "num_val is 0; a split needs at least one picture"),
        ({"seed": -1}, "seed is -1"),
        ({"labels": "seen"}, "labels is 'seen'; choose 'visible' or 'class'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"no split 'dev'; Synthetic has \['train', 'val', 'test', 'test_ood'\]"):
        SMALL.load("dev")


def test_the_vocabulary() -> None:
    concepts = SMALL.concepts
    assert concepts.num_concepts == 32
    assert concepts.class_names == CLASS_NAMES[:8]
    assert concepts.part_names == PARTS
    assert concepts.part_mask_MP().sum(1).eq(1).all()
    assert len(set(concepts.groups)) == 9
