"""Boxes, overlaps, average precision and correct parts against loops, scikit-learn, closed forms, and chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve

from dotcbm.explain.heatmaps import box
from dotcbm.metrics.detection import (
    APN_GROUPS,
    THRESHOLDS,
    Detections,
    _most_probable,
    average_precision_at_iou,
    box_hits,
    box_iou,
    boxes_around_points,
    concept_detection,
    concept_truth_boxes,
    correct_parts,
    detect,
    map_boxes,
    part_boxes,
    part_detection,
    part_groups,
    pcp,
    sweep,
)
from dotcbm.metrics.localization import peak_points
from dotcbm.structures import ConceptSet

Box = tuple[float, float, float, float]


def vocabulary(part_names: tuple[str, ...], parts: tuple[tuple[str, ...], ...], groups: tuple[str, ...] | None = None) -> ConceptSet:
    names = tuple(f"c{j}" for j in range(len(parts)))
    return ConceptSet(names, ("x",), torch.zeros(1, len(parts)), groups=groups, part_names=part_names, parts=parts)


BIRD = tuple(sorted(part for parts in APN_GROUPS.values() for part in parts))
BIRDS = vocabulary(
    BIRD,
    (("beak",), ("beak",), ("left eye", "right eye"), ("left wing", "right wing"), ("tail",), ("back", "nape"), ()),
    ("bill shape", "bill shape", "eye color", "wing color", "tail shape", "upperparts", "size"),
)


def slow_iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def random_boxes(g: torch.Generator, *shape: int) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2, generator=g, dtype=torch.float64).sort(-2).values
    return corners.flatten(-2)


# ---------------------------------------------------------------------------------------------------------------- boxes


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.6, 0.95, 1.0]))
def test_map_boxes_are_those_of_the_heatmaps(seed: int, threshold: float) -> None:
    maps = torch.randn(3, 4 * 6, 5, generator=torch.Generator().manual_seed(seed))
    maps[0, :, 0] = -1
    got = map_boxes(maps, grid=(4, 6), threshold=threshold)
    for b in range(3):
        for j in range(5):
            expected = box(maps[b, :, j].view(4, 6), threshold=threshold)
            if expected is None:
                assert got[b, j].isnan().all()
            else:
                assert got[b, j].tolist() == pytest.approx(expected)


def test_part_boxes_enclose_the_pixels() -> None:
    masks = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.9
    masks[0, 0] = False
    got = part_boxes(masks)
    assert got[0, 0].isnan().all()
    for b, p in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        ys, xs = masks[b, p].nonzero(as_tuple=True)
        expected = [xs.min() / 9, ys.min() / 7, (xs.max() + 1) / 9, (ys.max() + 1) / 7]
        assert got[b, p].tolist() == pytest.approx([float(value) for value in expected])


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_iou_equals_the_loop_and_has_its_properties(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = random_boxes(g, 20), random_boxes(g, 20)
    got = box_iou(a, b)
    assert got.tolist() == pytest.approx([slow_iou(tuple(x), tuple(y)) for x, y in zip(a.tolist(), b.tolist())])
    torch.testing.assert_close(box_iou(b, a), got)
    torch.testing.assert_close(box_iou(a, a), torch.ones(20, dtype=torch.float64))
    stretch = torch.tensor([300.0, 200.0, 300.0, 200.0])  # pixels of any picture
    torch.testing.assert_close(box_iou(a * stretch, b * stretch), got)
    assert box_iou(a[:1], torch.full((1, 4), torch.nan)).isnan().all()
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_boxes_around_points_have_the_objects_shape_and_stay_in_the_picture() -> None:
    points = torch.tensor([[[0.5, 0.5], [0.0, 0.95], [torch.nan, 0.0]]])
    got = boxes_around_points(points, box_B4=torch.tensor([[0.2, 0.3, 0.48, 0.72]]))  # width 0.28, height 0.42
    assert got[0, 0].tolist() == pytest.approx([0.4, 0.35, 0.6, 0.65])
    assert got[0, 1].tolist() == pytest.approx([0.0, 0.7, 0.2, 1.0])  # moved, not cut
    assert got[0, 2, 0].isnan()
    with pytest.raises(ValueError, match=r"divisor is 0\.5"):
        boxes_around_points(points, box_B4=torch.ones(1, 4), divisor=0.5)


def test_the_visible_part_that_overlaps_most_is_the_truth() -> None:
    g = torch.Generator().manual_seed(0)
    boxes, truths = random_boxes(g, 6, 5), random_boxes(g, 6, 4)
    truths[torch.rand(6, 4, generator=g) < 0.3] = torch.nan
    mask = torch.rand(5, 4, generator=g) < 0.5
    boxes[0, 0] = torch.nan
    mask[0] = torch.tensor([True, True, True, True])
    mask[1] = False
    hits = box_hits(boxes, part_box_BP4=truths, part_mask_MP=mask, iou=0.2)
    chosen = concept_truth_boxes(boxes, part_box_BP4=truths, part_mask_MP=mask)
    for b in range(6):
        for j in range(5):
            visible = [truths[b, p] for p in range(4) if mask[j, p] and not truths[b, p].isnan().any()]
            if not visible:
                assert hits[b, j].isnan()
                assert chosen[b, j].isnan().all()
            elif boxes[b, j].isnan().any():
                assert hits[b, j] == 0
            else:
                best = max(slow_iou(tuple(boxes[b, j].tolist()), tuple(truth.tolist())) for truth in visible)
                assert hits[b, j].item() == float(best >= 0.2)
                assert box_iou(boxes[b, j], chosen[b, j]).item() == pytest.approx(best)
    assert (hits == 1).any()
    assert (hits == 0).any()


# --------------------------------------------------------------------------------------------------- average precision


def slow_average_precision(scores: list[float], correct: list[bool], num_truth: int) -> float:
    """VOC by its definition: for each recall reached the best precision at that recall or beyond."""
    points = []
    for cut in sorted(set(scores), reverse=True):
        chosen = [c for s, c in zip(scores, correct) if s >= cut]
        points.append((sum(chosen) / num_truth, sum(chosen) / len(chosen)))
    area, before = 0.0, 0.0
    for recall, _ in points:
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30), st.integers(0, 5))
def test_average_precision_equals_the_definition_and_does_not_depend_on_the_order(rows: list[tuple[int, bool]], missed: int) -> None:
    scores, correct = [float(score) for score, _ in rows], [right for _, right in rows]
    num_truth = sum(correct) + missed
    got = average_precision_at_iou(torch.tensor(scores), torch.tensor(correct), num_truth)
    if num_truth == 0:
        assert math.isnan(got)
        return
    assert got == pytest.approx(slow_average_precision(scores, correct, num_truth))
    assert average_precision_at_iou(torch.tensor(scores[::-1]), torch.tensor(correct[::-1]), num_truth) == pytest.approx(got)


def test_average_precision_against_scikit_learn() -> None:
    """Its curve made monotone, scaled to the truths that no box finds; and plain where the curve is monotone by itself."""
    rng = np.random.default_rng(0)
    scores, correct = rng.normal(size=200).round(1), rng.random(200) < 0.4
    precision, recall, _ = precision_recall_curve(correct, scores)
    envelope = np.maximum.accumulate(precision)  # from full recall down to none
    expected = float(-(np.diff(recall) * envelope[:-1]).sum())
    found = int(correct.sum())
    assert average_precision_at_iou(torch.tensor(scores), torch.tensor(correct), found) == pytest.approx(expected)
    assert average_precision_at_iou(torch.tensor(scores), torch.tensor(correct), 2 * found) == pytest.approx(expected / 2)
    assert expected > average_precision_score(correct, scores)
    falling = np.array([True] * 5 + [False] * 3)
    plain = average_precision_score(falling, np.arange(8)[::-1])
    assert average_precision_at_iou(torch.arange(8).flip(0).float(), torch.tensor(falling), 5) == pytest.approx(plain) == 1


def test_average_precision_of_nothing() -> None:
    nothing = torch.zeros(0)
    assert average_precision_at_iou(nothing, nothing.bool(), 3) == 0
    assert math.isnan(average_precision_at_iou(nothing, nothing.bool(), 0))
    assert average_precision_at_iou(torch.tensor([torch.nan, 0.5]), torch.tensor([False, True]), 1) == 1  # no heat is no detection
    with pytest.raises(ValueError, match="2 of them correct, for 1 truths"):
        average_precision_at_iou(torch.rand(2), torch.tensor([True, True]), 1)


def test_scores_that_say_nothing_give_the_square_of_the_share() -> None:
    g = torch.Generator().manual_seed(0)
    correct = torch.rand(40_000, generator=g) < 0.3
    assert average_precision_at_iou(torch.rand(40_000, generator=g), correct, 40_000) == pytest.approx(0.09, abs=0.004)


# ------------------------------------------------------------------------------------------------------- part detection


def test_groups_of_parts() -> None:
    groups = part_groups(BIRDS)
    assert groups.names == ("head", "wing", "tail")
    # The upper parts lie on the back and on the nape (head); "size" lies nowhere.
    assert groups.concept_SM.long().tolist() == [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]]
    assert groups.query_group_Q.tolist() == [0, 0, 1, 2]
    assert groups.query_QM.long().tolist()[:2] == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]
    other = part_groups(vocabulary(("head", "wing", "tail"), (("head",), ("wing", "tail"), ("wing",), (), ("head",))))
    assert other.names == ("head", "wing / tail", "wing")
    assert other.concept_SM.long().tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert other.part_SP.long().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert len(part_groups(ConceptSet(("a",), ("x",), torch.zeros(1, 1)))) == 0
    assert len(APN_GROUPS) == 7
    assert len(BIRD) == len(set(BIRD)) == 15


def test_detection_equals_the_loop() -> None:
    g = torch.Generator().manual_seed(0)
    concepts = vocabulary(("p", "q"), (("p",), ("p",), ("q",), ("p", "q"), ("p",)))
    groups = part_groups(concepts)
    maps, probability = torch.rand(40, 20, 5, generator=g).square(), torch.rand(40, 5, generator=g)
    truth = random_boxes(g, 40, 2)
    truth[torch.rand(40, 2, generator=g) < 0.3] = torch.nan
    maps[0] = 0
    detections = detect(maps, probability, grid=(4, 5), part_box_BP4=truth, groups=groups, threshold=0.5)
    scores = part_detection(detections, groups, iou=0.3)
    for s, (parts, members) in enumerate((((0,), (0, 1, 4)), ((1,), (2,)), ((0, 1), (3,)))):
        found, rank, truths = [], [], 0
        for b in range(40):
            best = max(members, key=lambda j: float(probability[b, j]))
            visible = [tuple(truth[b, p].tolist()) for p in parts if not truth[b, p].isnan().any()]
            truths += bool(visible)
            drawn = box(maps[b, :, best].view(4, 5), threshold=0.5)
            if drawn is not None:
                rank.append(float(probability[b, best]))
                found.append(bool(visible) and max(slow_iou(drawn, own) for own in visible) >= 0.3)
        assert scores.num_truth_S[s] == truths
        assert scores.correct_S[s].item() == pytest.approx(sum(found) / truths)
        assert scores.average_precision_S[s].item() == pytest.approx(slow_average_precision(rank, found, truths))
    assert scores.mean_average_precision == pytest.approx(float(scores.average_precision_S.mean()))
    hits = ((detections.iou_BS >= 0.3) & detections.visible_BS).sum() / detections.visible_BS.sum()
    assert scores.share_correct == pytest.approx(float(hits))


def test_perfect_maps_are_perfect_and_the_sweep_shows_the_threshold() -> None:
    """A map that is 1 on the part and 0.5 on the rest: right above the threshold 0.5, wrong below it."""
    concepts = vocabulary(("p", "q"), (("p",), ("q",)))
    groups = part_groups(concepts)
    masks = torch.zeros(6, 2, 8, 8, dtype=torch.bool)
    masks[:, 0, :2, 2:4], masks[:, 1, 4:6, :6] = True, True
    masks[5, 1] = False
    maps = 0.5 + 0.5 * masks.flatten(2).transpose(1, 2).float()
    swept = sweep(
        maps, torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), grid=(8, 8), part_box_BP4=part_boxes(masks), groups=groups
    )
    assert swept.thresholds == THRESHOLDS
    assert swept.share_correct == pytest.approx((0, 0, 0, 0, 0, 1, 1, 1, 1))
    # The false detection of the hidden part may rank above right ones.
    assert all(value == 0 for value in swept.mean_average_precision[:5])
    assert all(0.9 <= value <= 1 for value in swept.mean_average_precision[5:])


def test_a_part_that_is_never_visible_has_no_figure() -> None:
    concepts = vocabulary(("p", "q"), (("p",), ("q",)))
    truth = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [torch.nan] * 4]]).expand(3, 2, 4)
    maps = torch.zeros(3, 4, 2)
    maps[:, 0] = 1
    groups = part_groups(concepts)
    scores = part_detection(detect(maps, torch.ones(3, 2), grid=(2, 2), part_box_BP4=truth, groups=groups), groups)
    assert scores.correct_S.isnan().tolist() == [False, True]
    assert scores.average_precision_S.isnan().tolist() == [False, True]
    assert scores.mean_average_precision == scores.share_correct == 1
    nobody = Detections(torch.ones(3, 0), torch.ones(3, 0), torch.ones(3, 0, dtype=torch.bool))
    assert math.isnan(part_detection(nobody, part_groups(vocabulary((), ((),)))).mean_average_precision)


def test_concept_detection_wants_the_concept_and_its_place() -> None:
    concepts = vocabulary(("p",), (("p",), ("p",)))
    truth = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=torch.float64).expand(4, 1, 4)
    right, wrong = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]
    boxes = torch.tensor([[right, wrong], [wrong, right], [right, right], [right, right]], dtype=torch.float64)
    probability = torch.tensor([[0.9, 0.9], [0.8, 0.8], [0.7, 0.7], [0.6, 0.6]])
    target = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, torch.nan], [1.0, 1.0]])
    got = concept_detection(boxes, probability, target, part_box_BP4=truth, part_mask_MP=concepts.part_mask_MP())
    # a: right, wrong place, absent, right of 3 truths. b: wrong place, right, left out, right of 3 truths.
    assert got.tolist() == pytest.approx([1 / 3 * 1 + 1 / 3 * 2 / 4, 1 / 3 * 2 / 3 + 1 / 3 * 2 / 3])


# --------------------------------------------------------------------------------------------------------- correct parts


def bird_case(seed: int, b: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(b, 15, 3, generator=g)
    points[..., 2] = (points[..., 2] > 0.4).float()
    points[points[..., 2] == 0] *= torch.nan
    points[..., 2] = points[..., 2].nan_to_num(0)
    return {
        "maps": torch.randn(b, 30, 7, generator=g),
        "probability": torch.rand(b, 7, generator=g),
        "points_BP3": points,
        "box_B4": random_boxes(g, b),
        "size_B2": torch.randint(50, 400, (b, 2), generator=g),
    }


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_correct_parts_equal_the_loop_of_the_protocol_in_pixels(seed: int) -> None:
    c = bird_case(seed)
    groups = part_groups(BIRDS)
    arguments = {name: c[name] for name in ("points_BP3", "box_B4", "size_B2")}
    got = correct_parts(peak_points(c["maps"], grid=(5, 6)), c["probability"], groups=groups, **arguments)
    queries = {"head": [(0, 1), (2,)], "wing": [(3,)], "tail": [(4,)]}
    for b in range(12):
        height, width = c["size_B2"][b].tolist()
        x0, y0, x1, y1 = c["box_B4"][b].tolist()
        w, h = (x1 - x0) * width / 1.4, (y1 - y0) * height / 1.4

        def around(x: float, y: float, w: float = w, h: float = h, width: int = width, height: int = height) -> Box:
            left, top = min(max(x - w / 2, 0), width - w), min(max(y - h / 2, 0), height - h)
            return (left, top, left + w, top + h)

        for s, name in enumerate(groups.names):
            own = [c["points_BP3"][b, BIRD.index(part)].tolist() for part in APN_GROUPS[name]]
            seen = [(x * width, y * height) for x, y, visible in own if visible]
            if not seen:
                assert got[b, s].isnan()
                continue
            outcome = []
            for members in queries[name]:
                best = max(members, key=lambda j: float(c["probability"][b, j]))
                cell = int(c["maps"][b, :, best].argmax())
                peak = ((cell % 6 + 0.5) / 6 * width, (cell // 6 + 0.5) / 5 * height)
                nearest = min(seen, key=lambda point: math.dist(point, peak))
                outcome.append(slow_iou(around(*peak), around(*nearest)) > 0.5)
            assert got[b, s].item() == pytest.approx(sum(outcome) / len(outcome))
    share, by_group = pcp(c["maps"], c["probability"], grid=(5, 6), groups=groups, **arguments)
    torch.testing.assert_close(by_group, got.nanmean(0), equal_nan=True)
    assert share == pytest.approx(float(got.nanmean(0).nanmean()))


def test_correct_parts_of_a_picture_without_a_box_are_unknown() -> None:
    c = bird_case(1)
    arguments = {name: c[name] for name in ("points_BP3", "size_B2")}
    box_B4 = c["box_B4"].clone()
    box_B4[3] = torch.nan
    peak_BM2 = peak_points(c["maps"], grid=(5, 6))
    full, without = (
        correct_parts(peak_BM2, c["probability"], box_B4=box, groups=part_groups(BIRDS), **arguments) for box in (c["box_B4"], box_B4)
    )
    assert without[3].isnan().all()
    rest = torch.arange(len(full)) != 3
    torch.testing.assert_close(without[rest], full[rest], equal_nan=True)


def test_pcp_of_random_peaks_is_the_share_of_places_near_enough() -> None:
    """With the part at the middle, boxes of half the picture overlap by more than half for the cells counted here one by one."""
    concepts = vocabulary(("tail",), (("tail",),))
    b = 20_000
    maps = torch.rand(b, 100, 1, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([0.5, 0.5, 1.0]).expand(b, 1, 3)
    frame = torch.tensor([[0.15, 0.15, 0.85, 0.85]]).expand(b, 4)  # 0.7 / 1.4 = 0.5
    share, _ = pcp(
        maps,
        torch.ones(b, 1),
        grid=(10, 10),
        points_BP3=points,
        box_B4=frame,
        size_B2=torch.full((b, 2), 100),
        groups=part_groups(concepts),
    )
    near = 0
    for row in range(10):
        for column in range(10):
            left, top = (min(max((i + 0.5) / 10 - 0.25, 0), 0.5) for i in (column, row))
            near += slow_iou((left, top, left + 0.5, top + 0.5), (0.25, 0.25, 0.75, 0.75)) > 0.5
    assert 0 < near < 100
    assert share == pytest.approx(near / 100, abs=0.012)  # three standard errors


def test_random_maps_draw_right_boxes_as_often_as_two_random_boxes_agree() -> None:
    """Boxes of random maps against an equally random truth: the share is that of shuffled pairs, and the precision its square."""
    g = torch.Generator().manual_seed(0)
    b = 6000
    concepts = vocabulary(("p",), (("p",),))
    groups = part_groups(concepts)
    maps, others = (torch.rand(b, 25, 1, generator=g) ** 8 for _ in range(2))
    truth = map_boxes(others, grid=(5, 5))
    detections = detect(maps, torch.rand(b, 1, generator=g), grid=(5, 5), part_box_BP4=truth, groups=groups)
    scores = part_detection(detections, groups)
    drawn = map_boxes(maps, grid=(5, 5))
    chance = float(torch.cat([box_iou(drawn, truth.roll(shift, 0)) >= 0.5 for shift in range(1, 20)]).double().mean())
    assert 0.1 < chance < 0.9
    assert scores.share_correct == pytest.approx(chance, abs=3 * (chance * (1 - chance) / b) ** 0.5)
    assert scores.mean_average_precision == pytest.approx(chance**2, abs=0.02)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], got 0"):
        map_boxes(torch.rand(1, 4, 1), grid=(2, 2), threshold=0)
    with pytest.raises(ValueError, match=r"2 x 3 needs \(B, 6, M\)"):
        map_boxes(torch.rand(1, 4, 1), grid=(2, 3))
    broken = torch.rand(2, 4, 3)
    broken[1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="picture 1, concept 2 holds NaN"):
        map_boxes(broken, grid=(2, 2))
    with pytest.raises(ValueError, match=r"needs \(B, 3, 4\) and \(B, 2, 4\)"):
        concept_truth_boxes(torch.rand(1, 4, 4), part_box_BP4=torch.rand(1, 2, 4), part_mask_MP=torch.ones(3, 2, dtype=torch.bool))
    c = bird_case(0)
    with pytest.raises(ValueError, match=r"groups of 15 parts need \(B, 15, 3\)"):
        correct_parts(
            torch.rand(12, 7, 2), c["probability"], points_BP3=torch.ones(12, 4, 3), box_B4=c["box_B4"], size_B2=c["size_B2"],
            groups=part_groups(BIRDS),
        )  # fmt: skip


def test_a_vocabulary_follows_its_maps_to_another_device():
    if not torch.cuda.is_available():
        # "meta" is the one other device of every machine: it has shapes and no values, which is enough to see tensors meet.
        chosen, score = _most_probable(torch.rand(2, 7, device="meta"), part_groups(BIRDS).concept_SM)
        assert chosen.device == score.device == torch.device("meta")
        return
    groups, g = part_groups(BIRDS), torch.Generator().manual_seed(0)
    maps, concept = torch.rand(3, 6, 7, generator=g), torch.rand(3, 7, generator=g)
    points = torch.cat([torch.rand(3, len(BIRD), 2, generator=g), torch.ones(3, len(BIRD), 1)], -1)
    frame, size = torch.tensor([[0.1, 0.1, 0.9, 0.9]] * 3), torch.tensor([[40, 50]] * 3)
    boxes = boxes_around_points(points[..., :2], box_B4=frame)
    here, there = (detect(m, concept.to(m.device), grid=(2, 3), part_box_BP4=boxes, groups=groups) for m in (maps, maps.cuda()))
    assert torch.equal(here.iou_BS, there.iou_BS.cpu())
    found = [
        pcp(m, concept.to(m.device), grid=(2, 3), points_BP3=points, box_B4=frame, size_B2=size, groups=groups)[0]
        for m in (maps, maps.cuda())
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-9, nan_ok=True)
