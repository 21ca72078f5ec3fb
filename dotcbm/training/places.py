"""The figures of places of one batch, for each kind of map and for each control. `dotcbm.training.evaluation` adds them up.

B pictures, N patches, M concepts, P parts, S groups of parts, X pairs of picture and concept with target 1.

Controls beside the prior, which is a map: "centre", a peak in the middle of the picture, and "random", a peak drawn evenly
from the patches, whose figures are exact expectations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dotcbm.metrics.detection import PartGroups, box_hits, boxes_around_points, correct_parts, detect, map_boxes, part_boxes
from dotcbm.metrics.localization import (
    coverage,
    distance_to_parts,
    peak_points,
    pointing_in_mask,
    prior_map,
    relevance_mass,
    relevance_rank,
)
from dotcbm.metrics.robustness import background_area
from dotcbm.structures import ConceptBatch, ConceptOutput

__all__ = ["RADII", "THRESHOLD", "Places", "concept_maps", "place_figures"]

RADII = (0.01, 0.02, 0.05, 0.1)
"""Shares of the picture's diagonal within which a peak counts as on a key point; those of the protocol."""

THRESHOLD = 0.6
"""Share of a map's maximum at which its box is drawn; the paper's."""


def concept_maps(output: ConceptOutput) -> dict[str, Tensor]:
    """(B, N, M) maps of an output by kind; see the head of `dotcbm.training.evaluation`. Without the controls that are no maps."""
    maps: dict[str, Tensor] = {}
    if output.plan_BNM is not None:
        maps["plan"] = output.plan_BNM
        if output.theta_BN is not None:
            maps["lift"] = output.plan_BNM / output.theta_BN[..., None].clamp(min=torch.finfo(output.theta_BN.dtype).tiny)
    if output.evidence_BNM is not None:
        maps["evidence"] = output.evidence_BNM
    if output.theta_BN is not None:
        maps["prior"] = prior_map(output.theta_BN, num_concepts=output.concept_logit_BM.shape[1])
    return maps


@dataclass(frozen=True)
class Places:
    """What one batch scores; names end in the kind of map.

    Attributes:
        pairs: Name -> (B, M), NaN where nothing can be measured; means are taken over the pairs with target 1.
        correct_parts: Kind -> (B, S), see `dotcbm.metrics.detection.correct_parts`.
        detections: Kind -> (B, S, 3): score, IoU, and whether the part is visible, see `dotcbm.metrics.detection.Detections`.
    """

    pairs: dict[str, Tensor]
    correct_parts: dict[str, Tensor]
    detections: dict[str, Tensor]


def place_figures(output: ConceptOutput, batch: ConceptBatch, *, part_mask_MP: Tensor, groups: PartGroups) -> Places:
    """All figures for which the output has a map and the batch an annotation.

    Args:
        output: Of a batch.
        batch: The same, with whatever annotations there are.
        part_mask_MP: (M, P) bool: which parts a concept can be seen on.
        groups: `dotcbm.metrics.detection.part_groups` of the vocabulary.
    """
    places = Places({}, {}, {})
    maps = concept_maps(output)
    if not maps:
        return places
    has_parts = bool(part_mask_MP.any())
    point = _KeyPoints.of(batch, part_mask_MP) if has_parts else None
    mask = _Masks.of(batch, part_mask_MP, grid=output.grid, has_parts=has_parts)
    frame = batch.box_B4 if len(groups) else None
    part_box_BP4 = None
    if len(groups) and batch.part_masks_BPHW is not None:
        part_box_BP4 = part_boxes(batch.part_masks_BPHW)
    elif frame is not None and batch.points_BP3 is not None:
        points_BP2 = torch.where(batch.points_BP3[..., 2:] > 0.5, batch.points_BP3[..., :2], torch.nan)
        part_box_BP4 = boxes_around_points(points_BP2, box_B4=frame)
    for kind, map_BNM in maps.items():
        map_BNM = map_BNM.float()
        peak_BM2 = peak_points(map_BNM, grid=output.grid)
        if point is not None:
            places.pairs.update(point.figures(peak_BM2, kind))
        if has_parts and batch.part_masks_BPHW is not None:
            places.pairs[f"pointing_mask_{kind}"] = pointing_in_mask(
                map_BNM, grid=output.grid, part_masks_BPHW=batch.part_masks_BPHW, part_mask_MP=part_mask_MP
            )
        places.pairs.update(mask.figures(map_BNM, kind))
        if frame is not None and batch.points_BP3 is not None:
            places.correct_parts[kind] = _correct_parts(peak_BM2, output, batch, frame, groups)
        if part_box_BP4 is not None:
            found = detect(map_BNM, output.concept_BM, grid=output.grid, part_box_BP4=part_box_BP4, groups=groups, threshold=THRESHOLD)
            places.detections[kind] = torch.stack([found.score_BS.double(), found.iou_BS, found.visible_BS.double()], -1)
            box_BM4 = map_boxes(map_BNM, grid=output.grid, threshold=THRESHOLD)
            places.pairs[f"box_share_{kind}"] = box_hits(box_BM4, part_box_BP4=part_box_BP4, part_mask_MP=part_mask_MP)
    centre_BM2 = torch.full((*batch.concepts_BM.shape, 2), 0.5)
    if point is not None:
        places.pairs.update(point.figures(centre_BM2, "centre"))
        places.pairs.update(point.expected(output.grid))
    if frame is not None and batch.points_BP3 is not None:
        places.correct_parts["centre"] = _correct_parts(centre_BM2, output, batch, frame, groups)
    places.pairs.update(mask.expected())
    return places


def _correct_parts(point_BM2: Tensor, output: ConceptOutput, batch: ConceptBatch, box_B4: Tensor, groups: PartGroups) -> Tensor:
    assert batch.points_BP3 is not None
    return correct_parts(point_BM2, output.concept_BM, points_BP3=batch.points_BP3, box_B4=box_B4, size_B2=batch.size_B2, groups=groups)


@dataclass(frozen=True)
class _KeyPoints:
    """How near peaks come to the key points of their concepts' parts."""

    points_BP3: Tensor
    size_B2: Tensor
    part_mask_MP: Tensor

    @classmethod
    def of(cls, batch: ConceptBatch, part_mask_MP: Tensor) -> _KeyPoints | None:
        return None if batch.points_BP3 is None else cls(batch.points_BP3, batch.size_B2, part_mask_MP)

    def figures(self, point_BM2: Tensor, kind: str) -> dict[str, Tensor]:
        distance_BM = self._distance(point_BM2, self.part_mask_MP)
        within = {f"pointing_{r:g}_{kind}": torch.where(distance_BM.isnan(), torch.nan, (distance_BM <= r).double()) for r in RADII}
        return {f"pointing_distance_{kind}": distance_BM, **within}

    def expected(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Of a peak drawn evenly from the patches."""
        rows, columns = ((torch.arange(number) + 0.5) / number for number in grid)
        patch_N2 = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).flatten(0, 1)
        patch_BN2 = patch_N2.expand(len(self.points_BP3), -1, -1)
        sets_SP, set_of_M = self.part_mask_MP.unique(dim=0, return_inverse=True)  # many concepts share their parts
        distances_BNS = torch.stack([self._distance(patch_BN2, set_P.expand(len(patch_N2), -1)) for set_P in sets_SP], -1)
        hidden_BS = distances_BNS[:, 0].isnan()
        figures = {"pointing_distance_random": distances_BNS.mean(1)}
        for r in RADII:
            figures[f"pointing_{r:g}_random"] = torch.where(hidden_BS, torch.nan, (distances_BNS <= r).double().mean(1))
        return {name: value_BS[:, set_of_M] for name, value_BS in figures.items()}

    def _distance(self, point_BX2: Tensor, part_mask_XP: Tensor) -> Tensor:
        return distance_to_parts(point_BX2, points_BP3=self.points_BP3, part_mask_MP=part_mask_XP, size_B2=self.size_B2)


@dataclass(frozen=True)
class _Masks:
    """How much of a map lies on the object and on the concept's part, for the X pairs that count.

    Only these, since ranks sort the patches of each map and most concepts are absent from a picture. Masks are averaged onto the
    grid once for all maps; from then on a patch is a pixel.

    Attributes:
        grid: (grid_h, grid_w).
        shape: (B, M).
        row_X, concept_X: The pairs.
        object_BN: (B, N) share of each patch inside the object.
        object_area_B: (B,) share of the picture, NaN without a mask.
        part_XN: (X, N) share of each patch inside the concept's visible parts.
    """

    grid: tuple[int, int]
    shape: tuple[int, int]
    row_X: Tensor
    concept_X: Tensor
    object_BN: Tensor | None
    object_area_B: Tensor | None
    part_XN: Tensor | None

    @classmethod
    def of(cls, batch: ConceptBatch, part_mask_MP: Tensor, *, grid: tuple[int, int], has_parts: bool) -> _Masks:
        row_X, concept_X = (batch.concepts_BM == 1).nonzero(as_tuple=True)
        foreground_BHW, masks_BPHW = batch.foreground_BHW, batch.part_masks_BPHW if has_parts else None
        part_XN = None
        if masks_BPHW is not None:
            sets_SP, set_of_M = part_mask_MP.unique(dim=0, return_inverse=True)
            covered_BSN = torch.stack([coverage(masks_BPHW[:, set_P].any(1), grid=grid) for set_P in sets_SP], 1)
            part_XN = covered_BSN[row_X, set_of_M[concept_X]]
        return cls(
            grid=grid,
            shape=(len(batch), len(part_mask_MP)),
            row_X=row_X,
            concept_X=concept_X,
            object_BN=None if foreground_BHW is None else coverage(foreground_BHW, grid=grid),
            object_area_B=None if foreground_BHW is None else 1 - background_area(foreground_BHW),
            part_XN=part_XN,
        )

    def figures(self, map_BNM: Tensor, kind: str) -> dict[str, Tensor]:
        map_XN = map_BNM.transpose(1, 2)[self.row_X, self.concept_X]
        values: dict[str, Tensor] = {}
        if self.object_BN is not None:
            mass_X, rank_X = self._mass_and_rank(map_XN, self.object_BN[self.row_X])
            values[f"foreground_mass_{kind}"], values[f"foreground_rank_{kind}"] = mass_X, rank_X
            values[f"background_share_{kind}"] = 1 - mass_X
        if self.part_XN is not None:
            values[f"part_mass_{kind}"], values[f"part_rank_{kind}"] = self._mass_and_rank(map_XN, self.part_XN)
        return {name: self._spread(value_X) for name, value_X in values.items()}

    def expected(self) -> dict[str, Tensor]:
        """Of a map that knows nothing: the mass of a uniform one (the area), and the rank of patches in random order."""
        values: dict[str, Tensor] = {}
        if self.object_BN is not None and self.object_area_B is not None:
            area_X = self.object_area_B[self.row_X]
            values["foreground_mass_random"], values["background_share_random"] = area_X, 1 - area_X
            values["foreground_rank_random"] = _random_rank(self.object_BN)[self.row_X]
        if self.part_XN is not None:
            area_X = self.part_XN.mean(1)
            values["part_mass_random"] = torch.where(area_X > 0, area_X, torch.nan)
            values["part_rank_random"] = _random_rank(self.part_XN)
        return {name: self._spread(value_X) for name, value_X in values.items()}

    def _mass_and_rank(self, map_XN: Tensor, covered_XN: Tensor) -> tuple[Tensor, Tensor]:
        mask_XHW, map_XN1 = covered_XN.unflatten(1, self.grid), map_XN[..., None]
        mass_X1 = relevance_mass(map_XN1, grid=self.grid, mask_BHW=mask_XHW)
        return mass_X1[:, 0], relevance_rank(map_XN1, grid=self.grid, mask_BHW=mask_XHW)[:, 0]

    def _spread(self, value_X: Tensor) -> Tensor:
        value_BM = torch.full(self.shape, torch.nan, dtype=torch.float64)
        value_BM[self.row_X, self.concept_X] = value_X
        return value_BM


def _random_rank(covered_XN: Tensor) -> Tensor:
    """(X,) expectation of `relevance_rank` for patches in random order: what K patches cover on average, over the most they can."""
    num_patches_X1 = covered_XN.sum(1, keepdim=True).round().clamp(min=1)
    chosen_XN = torch.arange(covered_XN.shape[1]) < num_patches_X1
    best_X = (covered_XN.sort(1, descending=True).values * chosen_XN).sum(1)
    return num_patches_X1[:, 0] * covered_XN.mean(1) / torch.where(best_X > 0, best_X, torch.nan)
