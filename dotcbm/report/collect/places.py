"""Where the maps of a batch point, measured while the maps are there: they are too large to keep.

Columns are named "<figure>/<map>". Maps are those of `dotcbm.training.evaluation.concept_maps`, "gradcam" for models that have none, and
three controls beside the prior: "saliency" (the norms of the patch features, one map for all concepts, which every encoder offers),
"centre" (a bump in the middle of the picture) and "random" (noise, another one for each picture and concept).

    distance    (B, M)     from the peak to the nearest visible key point of the concept's parts, in diagonals of the picture
    in_mask     (B, M)     1 if the peak lies on a visible part of the concept, 0 if beside it
    part_mass   (B, M)     share of the map inside the concept's visible parts
    part_rank   (B, M)     share of the parts' area that the map's highest patches find
    background  (B, M)     share of the map outside the object
    iou         (B, S, T)  of the one box of each group of parts with the true one, for each of `THRESHOLDS` (`dotcbm.metrics.detection`)
    score       (B, S)     what these boxes are ranked by
    pcp         (B, S)     share of a body part's queries that point at it; only for CUB's key points

and without a map: area (B,), the share of the picture outside the object; visible (B, S), whether a group of parts can be seen.
All are NaN where nothing can be measured.

B pictures, M concepts, P parts, S groups of parts, T thresholds, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dotcbm.data.batches import mix_seed
from dotcbm.metrics.boxes import boxes_around_points, part_boxes
from dotcbm.metrics.detection import THRESHOLDS, correct_parts, detect
from dotcbm.metrics.localization import (
    coverage,
    distance_to_parts,
    peak_points,
    pointing_in_mask,
    relevance_mass,
    relevance_rank,
)
from dotcbm.metrics.part_groups import APN_GROUPS, part_groups
from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet
from dotcbm.training.evaluation import concept_maps

__all__ = ["CONTROLS", "all_maps", "place_columns"]

CONTROLS = ("prior", "saliency", "random", "centre")
"""Maps that know nothing of concepts."""

_RANDOM = 0x4A9D  # separates the random maps from the other uses of the seed
_WIDTH = 0.25  # deviation of the centre bump in picture sides: only mass and boxes depend on it, its peak does not


def all_maps(output: ConceptOutput, *, saliency_BN: Tensor, row_B: Tensor, seed: int) -> dict[str, Tensor]:
    """(B, N, M) maps by name, those of controls among them.

    Args:
        output: Of the batch, on the CPU.
        saliency_BN: (B, N) norms of the patch features.
        row_B: Rows of the pictures, which with `seed` fix their random maps.
        seed: Of the audit.
    """
    maps = {name: value.float() for name, value in concept_maps(output).items()}
    b, m = output.concept_logit_BM.shape
    height, width = output.grid
    y, x = (torch.arange(height) + 0.5) / height - 0.5, (torch.arange(width) + 0.5) / width - 0.5
    centre_N = torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / (2 * _WIDTH**2)).flatten()
    maps["saliency"] = saliency_BN[..., None].expand(-1, -1, m)
    maps["centre"] = centre_N[None, :, None].expand(b, -1, m)
    noise = [torch.rand(height * width, m, generator=torch.Generator().manual_seed(mix_seed(seed, _RANDOM, row))) for row in row_B.tolist()]
    maps["random"] = torch.stack(noise)
    return maps


def place_columns(
    maps: Mapping[str, Tensor], output: ConceptOutput, batch: ConceptBatch, concepts: ConceptSet
) -> dict[str, Tensor]:  # fmt: skip
    """The columns of the head of this file for which there are annotations.

    Args:
        maps: (B, N, M) by name.
        output: Of the batch, on the CPU.
        batch: With all annotations, on the CPU.
        concepts: The vocabulary.
    """
    columns: dict[str, Tensor] = {}
    part_mask_MP = concepts.part_mask_MP()
    has_parts = bool(part_mask_MP.any())
    grid = output.grid
    covered_BHW = None
    if batch.foreground_BHW is not None:
        covered_BHW = coverage(batch.foreground_BHW, grid=grid).unflatten(1, grid)
        outside_B = 1 - covered_BHW.flatten(1).mean(1)
        columns["area"] = torch.where(outside_B < 1, outside_B, torch.nan).float()
    points_BP3 = batch.points_BP3 if has_parts else None
    masks_BPHW = batch.part_masks_BPHW if has_parts else None
    # Covered once for all maps, and once for all concepts that share their parts: at 448 px this is most of the work.
    covered_SBHW, set_of_M = [], torch.zeros(len(part_mask_MP), dtype=torch.long)
    if masks_BPHW is not None:
        sets_SP, set_of_M = part_mask_MP.unique(dim=0, return_inverse=True)
        covered_SBHW = [coverage(masks_BPHW[:, row].any(1), grid=grid).unflatten(1, grid) for row in sets_SP]
    groups = part_groups(concepts)
    truth_BP4 = _true_boxes(batch) if len(groups) else None
    by_points = points_BP3 is not None and batch.box_B4 is not None and len(groups) and set(groups.names) <= set(APN_GROUPS)
    for name, map_BNM in maps.items():
        found: dict[str, Tensor] = {}
        peak_BM2 = peak_points(map_BNM, grid=grid)
        if points_BP3 is not None:
            found["distance"] = distance_to_parts(peak_BM2, points_BP3=points_BP3, part_mask_MP=part_mask_MP, size_B2=batch.size_B2)
        if by_points and points_BP3 is not None and batch.box_B4 is not None:
            found["pcp"] = correct_parts(
                peak_BM2, output.concept_BM, points_BP3=points_BP3, box_B4=batch.box_B4, size_B2=batch.size_B2, groups=groups
            )
        if masks_BPHW is not None:
            found["in_mask"] = pointing_in_mask(map_BNM, grid=grid, part_masks_BPHW=masks_BPHW, part_mask_MP=part_mask_MP)
            for figure, measure in (("part_mass", relevance_mass), ("part_rank", relevance_rank)):
                found[figure] = torch.full((len(map_BNM), len(set_of_M)), torch.nan, dtype=torch.float64)
                for number, mask_BHW in enumerate(covered_SBHW):
                    mine_M = set_of_M == number
                    found[figure][:, mine_M] = measure(map_BNM[..., mine_M], grid=grid, mask_BHW=mask_BHW)
        if truth_BP4 is not None:
            drawn = [
                detect(map_BNM, output.concept_BM.float(), grid=grid, part_box_BP4=truth_BP4, groups=groups, threshold=threshold)
                for threshold in THRESHOLDS
            ]
            found |= {"iou": torch.stack([d.iou_BS for d in drawn], -1), "score": drawn[0].score_BS}
            columns["visible"] = drawn[0].visible_BS.float()
        if covered_BHW is not None:
            found["background"] = 1 - relevance_mass(map_BNM, grid=grid, mask_BHW=covered_BHW)
        columns |= {f"{figure}/{name}": value.float() for figure, value in found.items()}
    return columns


def _true_boxes(batch: ConceptBatch) -> Tensor | None:
    """(B, P, 4) boxes of the parts' masks; without masks, boxes of a fixed share of the object around its key points."""
    if batch.part_masks_BPHW is not None:
        return part_boxes(batch.part_masks_BPHW)
    if batch.points_BP3 is None or batch.box_B4 is None:
        return None
    point_BP2 = torch.where(batch.points_BP3[..., 2:] > 0.5, batch.points_BP3[..., :2], torch.nan)
    return boxes_around_points(point_BP2, box_B4=batch.box_B4)
