"""The map that a model offers as its explanation: its own where it has one, Grad-CAM where not.

B pictures, N patches of a picture, M concepts, X concepts asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dotcbm.explain.attribution import attribute
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptOutput, PatchFeatures

__all__ = ["MAPS", "explaining_map", "saliency_map"]

MAPS = ("plan", "evidence", "gradcam")
"""By preference; a model offers the first that it has."""

_AT_ONCE = 16  # pictures: Grad-CAM goes forth and back through the bottleneck for each concept, and larger batches leave the caches


def explaining_map(
    model: ConceptModel, features: PatchFeatures, output: ConceptOutput, *, concepts: Sequence[int] | None = None
) -> tuple[str, Tensor] | None:
    """The name of the map, and (B, N, X) maps on the CPU; None for a black box.

    Args:
        model: In eval mode.
        features: Of the pictures, on the model's device.
        output: What the model said of them.
        concepts: Whose maps; all by default. Grad-CAM costs a backward pass for each.

    Raises:
        ModuleNotFoundError: Grad-CAM is needed and captum is not installed.
    """
    for name, map_BNM in (("plan", output.plan_BNM), ("evidence", output.evidence_BNM)):
        if map_BNM is not None:
            return name, (map_BNM if concepts is None else map_BNM[..., list(concepts)]).detach().float().cpu()
    if not model.bottleneck.reads_concepts:
        return None
    maps = [
        attribute(model, _rows(features, slice(start, start + _AT_ONCE)), method="gradcam", indices=concepts).map_BXHW.cpu()
        for start in range(0, len(features.patch_BND), _AT_ONCE)
    ]
    return "gradcam", torch.cat(maps).flatten(2).transpose(1, 2)


def saliency_map(features: PatchFeatures) -> Tensor:
    """(B, N) norms of the patch features on the CPU: a map that knows no concept, which any encoder offers."""
    return features.patch_BND.float().norm(dim=-1).cpu()


def _rows(features: PatchFeatures, rows: slice) -> PatchFeatures:
    kept: dict[str, Any] = {
        entry.name: value[rows] for entry in fields(features) if isinstance(value := getattr(features, entry.name), Tensor)
    }
    return PatchFeatures(grid=features.grid, **kept)
