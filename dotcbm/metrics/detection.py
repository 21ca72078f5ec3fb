"""Part detection: is the box that a heatmap draws the box of the part?

B pictures, N patches, M concepts, P parts, S groups of parts (`dotcbm.metrics.part_groups`), X detections, Q queries.

**Boxes (DOT-CBM, Section 4).** A heatmap is cut at a share of its maximum (0.6), one box encloses what is left, and it is right at an
IoU of at least 0.5 with the part's true box. The paper says neither which of the many concepts of a part draws its box nor how boxes
are ranked for the average precision. Here:

- For each picture and group of parts, **one detection**: the box of that group's concept with the highest probability (`detect`).
- It is **ranked** by that probability. Where the part cannot be seen, the detection is a false one. A map without heat detects nothing.
- The **truth** is each picture in which a part of the group is visible; with several visible (two wings), the best IoU counts.
- Average precision is the area under the precision-recall curve with precision made monotone, at all points (PASCAL VOC since 2010);
  equal scores enter together, so the order of pictures does not matter. Scores that say nothing about the boxes, of which a share s is
  right, give s * s and not s: read it beside the plain share of right boxes.

`concept_detection` is the stricter variant: each concept is a class of its own, to be found where its target is 1.

**True boxes** come from masks (`part_boxes`). With key points only (CUB), boxes of 1 / 1.4 of the object's box around them stand in
(`boxes_around_points`): a proxy, whose sizes are not those of the parts.

**Percentage of correct parts** (Xu et al. 2020, "Attribute Prototype Network", and their released code): for each group of attributes on a
body part ("bill shape" on the head) the attribute with the highest probability draws a box of fixed size around its peak; it is right above
IoU 0.5 with the same box around the nearest visible key point of that body part. Departures: the peak is the centre of a patch and
not of an upsampled map (see `dotcbm.metrics.localization`); the nearest key point is found in pixels of the original picture; their printed
mean leaves out the tail, ours takes all seven; attributes are those of the vocabulary at hand (112, not 312).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dotcbm.metrics.boxes import box_iou, boxes_around_points, map_boxes, part_boxes
from dotcbm.metrics.localization import peak_points
from dotcbm.metrics.part_groups import APN_GROUPS, PartGroups, part_groups

__all__ = [
    "APN_GROUPS",
    "THRESHOLDS",
    "Detections",
    "PartGroups",
    "PartScores",
    "Sweep",
    "average_precision_at_iou",
    "box_hits",
    "box_iou",
    "boxes_around_points",
    "concept_detection",
    "concept_truth_boxes",
    "correct_parts",
    "detect",
    "map_boxes",
    "part_boxes",
    "part_detection",
    "part_groups",
    "pcp",
    "sweep",
]

THRESHOLDS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the maximum at which the sweep cuts; results change several-fold between them."""


def concept_truth_boxes(box_BM4: Tensor, *, part_box_BP4: Tensor, part_mask_MP: Tensor) -> Tensor:
    """(B, M, 4): the true box that each concept's box is held against: of its visible parts the one that overlaps it most.

    Args:
        box_BM4: Drawn boxes; NaN (none) takes the first visible part.
        part_box_BP4: (B, P, 4) true boxes, NaN for parts that cannot be seen.
        part_mask_MP: (M, P) bool: which parts a concept can be seen on.

    Returns:
        NaN where none of the parts is visible.

    Raises:
        ValueError: Shapes do not fit.
    """
    m, p = part_mask_MP.shape
    if box_BM4.shape[1] != m or part_box_BP4.shape[1:] != (p, 4) or len(box_BM4) != len(part_box_BP4):
        raise ValueError(
            f"boxes have shape {tuple(box_BM4.shape)} and part boxes {tuple(part_box_BP4.shape)}; part_mask_MP {(m, p)} needs "
            f"(B, {m}, 4) and (B, {p}, 4)"
        )
    if p == 0:
        return torch.full_like(box_BM4, torch.nan)
    part_box_BP4 = part_box_BP4.to(box_BM4.device)
    visible_BMP = ~part_box_BP4.isnan().any(-1)[:, None] & part_mask_MP.to(box_BM4.device)
    iou_BMP = box_iou(box_BM4[:, :, None], part_box_BP4[:, None]).nan_to_num(0.0).masked_fill(~visible_BMP, -1.0)
    truth_BM4 = part_box_BP4.gather(1, iou_BMP.argmax(-1)[..., None].expand(-1, -1, 4))
    return torch.where(visible_BMP.any(-1)[..., None], truth_BM4, torch.nan)


def box_hits(box_BM4: Tensor, *, part_box_BP4: Tensor, part_mask_MP: Tensor, iou: float = 0.5) -> Tensor:
    """(B, M): 1 where a concept's box has at least this IoU with a visible part of it, else 0; NaN where no part is visible.

    A concept without a box is a miss. For the share of right boxes take the mean over the pairs with target 1
    (`dotcbm.metrics.localization.positive_mean`). Arguments as in `concept_truth_boxes`.
    """
    truth_BM4 = concept_truth_boxes(box_BM4, part_box_BP4=part_box_BP4, part_mask_MP=part_mask_MP)
    hit_BM = (box_iou(box_BM4, truth_BM4) >= iou).double()
    return torch.where(truth_BM4.isnan().any(-1), torch.nan, hit_BM)


@dataclass(frozen=True)
class Detections:
    """One detection for each picture and group of parts.

    Attributes:
        score_BS: (B, S) probability of the concept that draws the box; NaN where its map has no heat.
        iou_BS: (B, S) with the best true box; NaN without a box or a visible part.
        visible_BS: (B, S) bool: a part of the group can be seen.
    """

    score_BS: Tensor
    iou_BS: Tensor
    visible_BS: Tensor


def detect(
    map_BNM: Tensor,
    probability_BM: Tensor,
    *,
    grid: tuple[int, int],
    part_box_BP4: Tensor,
    groups: PartGroups,
    threshold: float = 0.6,
) -> Detections:
    """The box of each group's most probable concept, held against the true ones; see the head of this file.

    Args:
        map_BNM: (B, N, M).
        probability_BM: (B, M) concept probabilities.
        grid: (grid_h, grid_w) of the map.
        part_box_BP4: (B, P, 4) true boxes, NaN for parts that cannot be seen.
        groups: Of the vocabulary.
        threshold: Share of the maximum in (0, 1].

    Raises:
        ValueError: As `map_boxes` and `concept_truth_boxes`.
    """
    chosen_BS, score_BS = _most_probable(probability_BM.to(map_BNM.device), groups.concept_SM)
    map_BNS = map_BNM.gather(2, chosen_BS[:, None].expand(-1, map_BNM.shape[1], -1))
    box_BS4 = map_boxes(map_BNS, grid=grid, threshold=threshold)
    truth_BS4 = concept_truth_boxes(box_BS4, part_box_BP4=part_box_BP4, part_mask_MP=groups.part_SP)
    return Detections(
        score_BS=torch.where(box_BS4.isnan().any(-1), torch.nan, score_BS),
        iou_BS=box_iou(box_BS4, truth_BS4),
        visible_BS=~truth_BS4.isnan().any(-1),
    )


def average_precision_at_iou(score_X: Tensor, correct_X: Tensor, num_truth: int) -> float:
    """Area under the monotone precision-recall curve of detections (PASCAL VOC since 2010).

    Args:
        score_X: (X,) what detections are ranked by; NaN is no detection.
        correct_X: (X,) bool: the detection finds its truth, which no other detection finds.
        num_truth: How many there are to be found.

    Returns:
        In [0, 1]; NaN if there is nothing to find.

    Raises:
        ValueError: Shapes do not fit, or more is found than there is.
    """
    given_X = ~score_X.isnan()
    score_X, correct_X = score_X[given_X], correct_X[given_X].double()
    if score_X.shape != correct_X.shape or correct_X.sum() > num_truth:
        raise ValueError(
            f"{len(score_X)} scores and {len(correct_X)} outcomes, {int(correct_X.sum())} of them correct, for {num_truth} truths"
        )
    if num_truth == 0:
        return math.nan
    if not len(score_X):
        return 0.0
    score_X, order_X = score_X.sort(descending=True)
    found_X = correct_X[order_X].cumsum(0)
    last_X = torch.ones_like(score_X, dtype=torch.bool)
    last_X[:-1] = score_X[1:] != score_X[:-1]  # equal scores enter together
    precision = (found_X / torch.arange(1, len(score_X) + 1, dtype=torch.float64, device=score_X.device))[last_X]
    envelope = precision.flip(0).cummax(0).values.flip(0)
    recall = torch.cat([found_X.new_zeros(1), found_X[last_X]]) / num_truth
    return float((recall.diff() * envelope).sum())


@dataclass(frozen=True)
class PartScores:
    """What detections score.

    Attributes:
        names: S groups of parts.
        average_precision_S: (S,) NaN for a group that is never visible.
        correct_S: (S,) share of the visible parts whose box is right.
        num_truth_S: (S,) pictures in which it is visible.
    """

    names: tuple[str, ...]
    average_precision_S: Tensor
    correct_S: Tensor
    num_truth_S: Tensor

    @property
    def mean_average_precision(self) -> float:
        """Mean over the groups that are ever visible; NaN if none is."""
        return float(self.average_precision_S.nanmean())

    @property
    def share_correct(self) -> float:
        """Share of all visible parts whose box is right; NaN if none is visible."""
        return float((self.correct_S.nan_to_num(0.0) * self.num_truth_S).sum() / self.num_truth_S.sum())


def part_detection(detections: Detections, groups: PartGroups, *, iou: float = 0.5) -> PartScores:
    """Average precision and share of right boxes for each group of parts, over all pictures of a split.

    Args:
        detections: Of all pictures.
        groups: Of the vocabulary.
        iou: A box is right at this IoU and above.
    """
    right_BS = (detections.iou_BS >= iou) & detections.visible_BS
    num_truth_S = detections.visible_BS.sum(0)
    precisions = [
        average_precision_at_iou(detections.score_BS[:, s], right_BS[:, s], int(num_truth_S[s])) for s in range(right_BS.shape[1])
    ]
    return PartScores(
        names=groups.names,
        average_precision_S=torch.tensor(precisions, dtype=torch.float64),
        correct_S=right_BS.sum(0).double() / torch.where(num_truth_S > 0, num_truth_S.double(), torch.nan),
        num_truth_S=num_truth_S,
    )


def concept_detection(
    box_BM4: Tensor, probability_BM: Tensor, target_BM: Tensor, *, part_box_BP4: Tensor, part_mask_MP: Tensor, iou: float = 0.5
) -> Tensor:
    """(M,) average precision of each concept as a class of its own, to be found where its target is 1 and its part visible.

    Pictures with an unknown target (NaN) are left out of a concept's figure. NaN for a concept that is nowhere to be found.
    """
    hit_BM = box_hits(box_BM4, part_box_BP4=part_box_BP4, part_mask_MP=part_mask_MP, iou=iou)
    truth_BM = (target_BM == 1) & ~hit_BM.isnan()
    score_BM = torch.where(box_BM4.isnan().any(-1) | target_BM.isnan(), torch.nan, probability_BM)
    columns = zip(score_BM.T, ((hit_BM == 1) & truth_BM).T, truth_BM.sum(0).tolist())
    return torch.tensor([average_precision_at_iou(score, right, number) for score, right, number in columns], dtype=torch.float64)


@dataclass(frozen=True)
class Sweep:
    """Part detection at several thresholds; see `PartScores` for the two figures."""

    thresholds: tuple[float, ...]
    mean_average_precision: tuple[float, ...]
    share_correct: tuple[float, ...]


def sweep(
    map_BNM: Tensor,
    probability_BM: Tensor,
    *,
    grid: tuple[int, int],
    part_box_BP4: Tensor,
    groups: PartGroups,
    thresholds: Sequence[float] = THRESHOLDS,
    iou: float = 0.5,
) -> Sweep:
    """`part_detection` at each threshold. Arguments as in `detect`, of all pictures of a split."""
    scores = [
        part_detection(
            detect(map_BNM, probability_BM, grid=grid, part_box_BP4=part_box_BP4, groups=groups, threshold=threshold), groups, iou=iou
        )
        for threshold in thresholds
    ]
    return Sweep(
        thresholds=tuple(thresholds),
        mean_average_precision=tuple(score.mean_average_precision for score in scores),
        share_correct=tuple(score.share_correct for score in scores),
    )


def correct_parts(
    peak_BM2: Tensor,
    probability_BM: Tensor,
    *,
    points_BP3: Tensor,
    box_B4: Tensor,
    size_B2: Tensor,
    groups: PartGroups,
    divisor: float = 1.4,
    iou: float = 0.5,
) -> Tensor:
    """(B, S): share of a body part's queries that point at it (APN protocol; see the head of this file); NaN where it is not visible.

    Args:
        peak_BM2: (B, M, 2) peak of each concept's map (`dotcbm.metrics.localization.peak_points`), or any other guess.
        probability_BM: (B, M) concept probabilities.
        points_BP3: (B, P, 3) x and y as fractions, and visible in {0, 1}.
        box_B4: (B, 4) box of the object as fractions.
        size_B2: (B, 2) height and width of the original picture in pixels.
        groups: Of the vocabulary.
        divisor: Boxes are of the object's width and height divided by it.
        iou: A guess is right above it.

    Raises:
        ValueError: The key points are not those of the groups.
    """
    device, num_parts = peak_BM2.device, groups.part_SP.shape[1]
    if points_BP3.shape[1:] != (num_parts, 3):
        raise ValueError(f"key points have shape {tuple(points_BP3.shape)}; groups of {num_parts} parts need (B, {num_parts}, 3)")
    points_BP3, box_B4, size_B2 = points_BP3.to(device), box_B4.to(device), size_B2.to(device)
    part_SP, group_Q = groups.part_SP.to(device), groups.query_group_Q.to(device)
    chosen_BQ, _ = _most_probable(probability_BM.to(device), groups.query_QM)
    peak_BQ2 = peak_BM2.double().gather(1, chosen_BQ[..., None].expand(-1, -1, 2))
    # Invisible points may carry any coordinates, NaN among them.
    point_BP2 = torch.where(points_BP3[..., 2:] > 0.5, points_BP3[..., :2], 0.0).double()
    counts_BQP = (points_BP3[..., 2] > 0.5)[:, None] & part_SP[group_Q]
    away_BQP2 = (peak_BQ2[:, :, None] - point_BP2[:, None]) * size_B2.flip(1)[:, None, None]
    nearest_BQ = away_BQP2.norm(dim=-1).masked_fill(~counts_BQP, torch.inf).argmin(-1)
    truth_BQ2 = point_BP2.gather(1, nearest_BQ[..., None].expand(-1, -1, 2))
    guess_BQ4, truth_BQ4 = (boxes_around_points(points, box_B4=box_B4, divisor=divisor) for points in (peak_BQ2, truth_BQ2))
    measured_BQ = counts_BQP.any(-1) & ~box_B4.isnan().any(-1)[:, None]
    right_BQ = torch.where(measured_BQ, (box_iou(guess_BQ4, truth_BQ4) > iou).double(), torch.nan)
    number_S = torch.bincount(group_Q, minlength=len(groups))
    total_BS = right_BQ.new_zeros(len(right_BQ), len(groups)).index_add(1, group_Q, right_BQ)
    return total_BS / number_S


def pcp(
    map_BNM: Tensor,
    probability_BM: Tensor,
    *,
    grid: tuple[int, int],
    points_BP3: Tensor,
    box_B4: Tensor,
    size_B2: Tensor,
    groups: PartGroups,
) -> tuple[float, Tensor]:
    """Percentage of correct parts, as a share in [0, 1]: the mean over the groups, and (S,) of each group, the mean over its pictures.

    Arguments as in `correct_parts`. NaN for a group that is never visible, which the mean leaves out.
    """
    correct_BS = correct_parts(
        peak_points(map_BNM, grid=grid), probability_BM, points_BP3=points_BP3, box_B4=box_B4, size_B2=size_B2, groups=groups
    )
    correct_S = correct_BS.nanmean(0)
    return float(correct_S.nanmean()), correct_S


def _most_probable(probability_BM: Tensor, member_QM: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q) which of each set's concepts has the highest probability (the first among equals), and that probability."""
    masked_BQM = torch.where(member_QM.to(probability_BM.device), probability_BM[:, None], -torch.inf)
    score_BQ = masked_BQM.amax(-1) if member_QM.shape[1] else probability_BM.new_zeros(len(probability_BM), len(member_QM))
    return masked_BQM.argmax(-1), score_BQ
