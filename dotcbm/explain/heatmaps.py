"""Maps of where each concept was read from, and what is read off them: a box and a peak.

Three views of one output, none of them negative:

    concept    Q_ij / gamma_j       how concept j spreads its mass over the patches; a column of the plan, equation (13)
    patch      Q_ij / theta_i       how patch i divides its mass among the concepts: the patch prior is taken out
    evidence   max(e_ij, 0)         what patch i adds to the logit of concept j; for every bottleneck whose logit is a sum over patches

and three that are made afterwards, for every bottleneck: the attributions "gradcam", "integrated_gradients" and "lrp" of
`dotcbm.explain.attribution`, which needs the model and not only its output.

B pictures, N patches, M concepts, H W rows and columns of a map. Boxes and points are fractions of the picture.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from dotcbm.structures import ConceptOutput, Preprocessing

__all__ = ["ATTRIBUTIONS", "Box", "View", "box", "gate", "heatmaps", "natural_view", "peak", "upsample", "visible_region"]

View = Literal["concept", "patch", "evidence", "gradcam", "integrated_gradients", "lrp"]
ATTRIBUTIONS = ("gradcam", "integrated_gradients", "lrp")
Box = tuple[float, float, float, float]


def natural_view(output: ConceptOutput) -> View:
    """ "concept" for a model with a transport plan, "evidence" where logits are sums over patches, else "gradcam"."""
    if output.plan_BNM is not None:
        return "concept"
    return "gradcam" if output.evidence_BNM is None else "evidence"


def heatmaps(output: ConceptOutput, *, view: View | None = None) -> Tensor:
    """(B, M, grid_h, grid_w), not negative, not gated: one map for each concept.

    Args:
        output: Of a bottleneck in eval mode.
        view: See the head of this file; `natural_view` by default.

    Raises:
        ValueError: The model has no such map, there is no such view, or it needs the model.
    """
    chosen = view or natural_view(output)
    if chosen not in get_args(View):
        raise ValueError(f"there is no view {chosen!r}; choose one of {list(get_args(View))}")
    if chosen in ATTRIBUTIONS:
        why = "" if view else "this output holds neither a transport plan nor evidence per patch (evidence is given in eval mode); "
        raise ValueError(
            f"{why}{chosen!r} is an attribution, made from the model and not from its output: use dotcbm.explain(model, picture, "
            f'view="{chosen}") or dotcbm.explain.attribution.attribute'
        )
    if chosen == "evidence":
        if output.evidence_BNM is None:
            raise ValueError(
                f"this model's concept logits are no sums over patches, so there is no 'evidence' view; use {_instead(output)}"
            )
        map_BNM = output.evidence_BNM.clamp(min=0)
    else:
        if output.plan_BNM is None:
            raise ValueError(f"the {chosen!r} view divides a transport plan, and this model has none; use {_instead(output)}")
        marginal = output.gamma_BM if chosen == "concept" else output.theta_BN
        if marginal is None:
            raise ValueError(f"the {chosen!r} view divides by a patch prior, and this model has none; use {_instead(output)}")
        mass = marginal[:, None] if chosen == "concept" else marginal[..., None]
        # A patch or concept without mass sends and gets nothing: 0 / 0 is 0 here.
        map_BNM = output.plan_BNM / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return map_BNM.detach().float().transpose(1, 2).unflatten(2, output.grid)


def _instead(output: ConceptOutput) -> str:
    """A view that an output does have, for a hint."""
    if output.plan_BNM is not None and output.theta_BN is not None:
        return "view='concept' or view='patch'"
    return f"view='{natural_view(output)}'"


def gate(map_BMHW: Tensor, concept_BM: Tensor) -> Tensor:
    """Maps times the concept's probability: transport also gives mass to absent concepts, whose maps mean nothing."""
    return map_BMHW * concept_BM[..., None, None]


def upsample(
    map_MHW: Tensor, size: tuple[int, int], *, region: Box = (0.0, 0.0, 1.0, 1.0), mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """(M, height, width) maps at the size of the picture.

    Args:
        map_MHW: (M, grid_h, grid_w).
        size: (height, width) of the picture.
        region: The part of the picture that the maps cover (`visible_region`); zero outside.
        mode: Bicubic overshoots; it is cut to the range of each map.
    """
    height, width = size
    x0, x1 = (max(0, min(width, round(value * width))) for value in (region[0], region[2]))
    y0, y1 = (max(0, min(height, round(value * height))) for value in (region[1], region[3]))
    inner = functional.interpolate(map_MHW[None].float(), size=(max(1, y1 - y0), max(1, x1 - x0)), mode=mode, align_corners=False)[0]
    inner = inner.clamp(min=map_MHW.amin((1, 2), keepdim=True), max=map_MHW.amax((1, 2), keepdim=True))
    full = inner.new_zeros(len(map_MHW), height, width)
    full[:, y0:y1, x0:x1] = inner[:, : y1 - y0, : x1 - x0]
    return full


def box(map_HW: Tensor, *, threshold: float = 0.6, region: Box = (0.0, 0.0, 1.0, 1.0)) -> Box | None:
    """x0, y0, x1, y1 of the one box around all cells of at least `threshold` times the maximum; None for a map without heat.

    Args:
        map_HW: (grid_h, grid_w), or an upsampled map.
        threshold: Share of the maximum in (0, 1]; the paper's is 0.6.
        region: The part of the picture that the map covers.

    Raises:
        ValueError: A threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}: it is a share of the map's maximum")
    highest = map_HW.max()
    if highest <= 0:
        return None
    rows, columns = (map_HW >= threshold * highest).nonzero(as_tuple=True)
    height, width = map_HW.shape
    return (
        *_place(int(columns.min()) / width, int(rows.min()) / height, region),
        *_place((int(columns.max()) + 1) / width, (int(rows.max()) + 1) / height, region),
    )


def peak(map_HW: Tensor, *, region: Box = (0.0, 0.0, 1.0, 1.0)) -> tuple[float, float] | None:
    """x and y of the centre of the highest cell, as `dotcbm.metrics.localization.peak_points`; None for a map without heat."""
    if map_HW.max() <= 0:
        return None
    row, column = divmod(int(map_HW.flatten().argmax()), map_HW.shape[1])
    return _place((column + 0.5) / map_HW.shape[1], (row + 0.5) / map_HW.shape[0], region)


def visible_region(preprocessing: Preprocessing, size: tuple[int, int]) -> Box:
    """x0, y0, x1, y1: the part of a picture of `size` (height, width) that reaches the encoder, as fractions of the picture.

    The whole picture when it is squashed; the centre crop when its shorter side is resized and the centre taken.
    """
    if preprocessing.resize == "squash":
        return (0.0, 0.0, 1.0, 1.0)
    height, width = size
    # Scale at which the crop, enlarged by 1 / crop_fraction, fits inside the picture.
    scale = max(preprocessing.size[0] / height, preprocessing.size[1] / width) / preprocessing.crop_fraction
    half_y, half_x = preprocessing.size[0] / scale / height / 2, preprocessing.size[1] / scale / width / 2
    return (0.5 - half_x, 0.5 - half_y, 0.5 + half_x, 0.5 + half_y)


def _place(x: float, y: float, region: Box) -> tuple[float, float]:
    """A point of the map on the picture."""
    x0, y0, x1, y1 = region
    return (x0 + x * (x1 - x0), y0 + y * (y1 - y0))
