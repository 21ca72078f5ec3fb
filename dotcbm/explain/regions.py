"""Questions about a place: which concepts live in this box, and what would follow if the box could not be seen?

There are three ways to take a box away, `Muting`:

    evidence    The patches in the box no longer add to the concepts' logits. Exact, and what the box gave to the decision; for every
                bottleneck whose logits are sums over patches. Muting everything leaves the concepts' biases.
    transport   The patches in the box lose their mass (the patch prior is zero there and renormalised), and the transport is solved
                again: concepts look for their patches elsewhere. What the model would say if it could not look there; only for DOT-CBM.
    picture     The box is covered with the picture's mean colour, and the encoder looks again. For every model, but the encoder never
                saw such pictures, and what it sees around the box changes too.

Cells that the box covers in part count by the share that is covered. Boxes are x0, y0, x1, y1 in fractions of the picture.

B = 1 picture, N patches, M concepts, h w rows and columns of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from dotcbm.explain.explanation import Explanation, explain, explanation_of
from dotcbm.explain.heatmaps import Box, heatmaps, natural_view, visible_region
from dotcbm.explain.naming import evaluating
from dotcbm.metrics.faithfulness import cover
from dotcbm.models.concept_model import ConceptModel, Picture, read_any
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import ConceptOutput, PatchFeatures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BoxReport", "BoxShare", "MutedRegion", "Muting", "cells_in_box", "concepts_in_box", "mute_region"]

Muting = Literal["evidence", "transport", "picture"]
_WHY = {
    "evidence": "the patches inside no longer add to the concepts",
    "transport": "the patches inside have no mass, and the transport was solved again",
    "picture": "the box was covered with the mean colour, and the encoder looked again",
}


@dataclass(frozen=True)
class BoxShare:
    """One concept and one box.

    Attributes:
        name: Of the concept.
        probability: That it is in the picture.
        share: Of its map, in [0, 1]; NaN for a map without heat.
        lift: `share` over the box's area: above 1 the map favours the box.
        evidence: What the box adds to its logit; None where the logit is no sum over patches.
    """

    name: str
    probability: float
    share: float
    lift: float
    evidence: float | None


@dataclass(frozen=True, eq=False)
class BoxReport:
    """What lives in a box.

    Attributes:
        explanation: Of the picture.
        box: Asked about.
        area: Share of what the encoder sees that lies in the box, in [0, 1].
        concepts: All M, those first of which most is seen in the box: by probability * share.
    """

    explanation: Explanation
    box: Box
    area: float
    concepts: tuple[BoxShare, ...]

    def plot(self, n: int = 6) -> Figure:
        """The box, and the concepts in it; see `dotcbm.explain.answers.plot_box`."""
        from dotcbm.explain.answers import plot_box

        return plot_box(self, n=n)


@dataclass(frozen=True, eq=False)
class MutedRegion:
    """A prediction without a box.

    Attributes:
        after: Without the box; `after.before` is the picture as it is.
        box: Taken away.
        how: In which way; `why` says it in words.
    """

    after: Explanation
    box: Box
    how: Muting

    @property
    def before(self) -> Explanation:
        """The picture as it is."""
        assert self.after.before is not None
        return self.after.before

    @property
    def why(self) -> str:
        """What was done to the box."""
        return _WHY[self.how]

    def plot(self) -> Figure:
        """Concepts and classes before and after; see `dotcbm.explain.answers.plot_muted`."""
        from dotcbm.explain.answers import plot_muted

        return plot_muted(self)


def cells_in_box(box: Box, *, grid: tuple[int, int], region: Box = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """(h, w) in [0, 1]: the share of each cell's area that lies in a box.

    Args:
        box: x0, y0, x1, y1 as fractions of the picture.
        grid: (h, w).
        region: The part of the picture that the grid covers (`dotcbm.explain.heatmaps.visible_region`).

    Raises:
        ValueError: A box that is empty or leaves the picture.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"{box} is no box in the picture; give x0 < x1 and y0 < y1 as fractions in [0, 1], from the top left")
    sides = []
    for low, high, start, stop, count in ((y0, y1, region[1], region[3], grid[0]), (x0, x1, region[0], region[2], grid[1])):
        edge = torch.linspace(start, stop, count + 1, dtype=torch.float64)
        inside = (edge[1:].clamp(max=high) - edge[:-1].clamp(min=low)).clamp(min=0)
        sides.append((inside / (edge[1:] - edge[:-1])).clamp(max=1))
    return sides[0][:, None] * sides[1][None]


def concepts_in_box(explanation: Explanation, box: Box) -> BoxReport:
    """Which concepts live in a box: how much of each concept's map and evidence lies in it, against its area.

    Raises:
        ValueError: A box that is empty, leaves the picture, or lies outside the part that the encoder sees.
    """
    maps_MHW = explanation.heatmaps_MHW.double()
    cell_hw = cells_in_box(box, grid=(maps_MHW.shape[1], maps_MHW.shape[2]), region=explanation.region)
    if not bool(cell_hw.any()):
        raise ValueError(f"the box {box} lies outside {explanation.region}, the part of the picture that the encoder sees")
    area = float(cell_hw.mean())
    share_M = (maps_MHW * cell_hw).sum((1, 2)) / maps_MHW.sum((1, 2))
    evidence_M = None if explanation.evidence_MHW is None else (explanation.evidence_MHW.double() * cell_hw).sum((1, 2))
    order = (explanation.concept_M.double() * share_M.nan_to_num(0)).argsort(descending=True, stable=True).tolist()
    rows = tuple(
        BoxShare(
            name=explanation.concept_names[j],
            probability=float(explanation.concept_M[j]),
            share=float(share_M[j]),
            lift=float(share_M[j]) / area,
            evidence=None if evidence_M is None else float(evidence_M[j]),
        )
        for j in order
    )
    return BoxReport(explanation, box, area, rows)


def mute_region(
    model: ConceptModel, picture: Picture, box: Box, *, how: Muting | None = None, target_class: int | str | None = None
) -> MutedRegion:
    """Take a box out of the picture's account and predict again.

    Args:
        model: Any bottleneck that reads concepts; its mode is restored.
        picture: A path, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor.
        box: x0, y0, x1, y1 as fractions of the picture.
        how: See the head of this file; by default "transport" for DOT-CBM, "evidence" where there is evidence, else "picture".
        target_class: The class to explain; the predicted one by default.

    Raises:
        ValueError: A box that is empty or leaves the picture, or a way that the model does not have.
    """
    picture_3HW = read_any(picture)
    bottleneck = model.bottleneck
    size = (int(picture_3HW.shape[1]), int(picture_3HW.shape[2]))
    region = visible_region(model.preprocessing, size)
    before = explain(model, picture_3HW, target_class=target_class)
    chosen = how or _natural(bottleneck, before)
    if chosen not in get_args(Muting):
        raise ValueError(f"there is no way {chosen!r} to mute a region; choose one of {list(get_args(Muting))}")
    if chosen == "transport" and not isinstance(bottleneck, DotCBM | PublishedDotCBM):
        raise ValueError(f"{type(bottleneck).__name__} transports nothing; mute the region's 'evidence' or cover the 'picture'")
    if chosen == "evidence" and before.evidence_MHW is None:
        raise ValueError(f"the logits of {type(bottleneck).__name__} are no sums over patches; cover the 'picture' instead")
    with torch.no_grad(), evaluating(model):
        image_B3HW = model.prepare([picture_3HW])
        if chosen == "picture":
            seen_HW = cells_in_box(box, grid=(image_B3HW.shape[2], image_B3HW.shape[3]), region=region) >= 0.5
            output = model(cover(image_B3HW, seen_HW[None].to(image_B3HW.device)))
        else:
            features = model.encoder(image_B3HW)
            output = bottleneck(features)
            keep_N = 1 - cells_in_box(box, grid=features.grid, region=region).flatten().to(output.concept_logit_BM)
            if chosen == "evidence":
                output = _without_evidence(model, output, keep_N)
            else:
                assert isinstance(bottleneck, DotCBM | PublishedDotCBM)
                output = _without_mass(bottleneck, features, output, keep_N)
    output = output.to("cpu")
    kind = natural_view(output)
    if kind == "gradcam":  # made from the untouched features, and kept: the box has no map of its own
        maps_MHW, kind = before.heatmaps_MHW, before.view
    else:
        maps_MHW = heatmaps(output, view=kind)[0]
    after = explanation_of(model, output, picture_3HW=picture_3HW, heatmaps_MHW=maps_MHW, view=kind, target_class=before.target)
    return MutedRegion(after=replace(after, before=before), box=box, how=chosen)


def _natural(bottleneck: object, explanation: Explanation) -> Muting:
    if isinstance(bottleneck, DotCBM | PublishedDotCBM):
        return "transport"
    return "picture" if explanation.evidence_MHW is None else "evidence"


def _without_evidence(model: ConceptModel, output: ConceptOutput, keep_N: Tensor) -> ConceptOutput:
    assert output.evidence_BNM is not None
    evidence_BNM = output.evidence_BNM * keep_N[:, None]
    logit_BM = output.concept_logit_BM - (output.evidence_BNM - evidence_BNM).sum(1)
    return replace(
        output,
        concept_logit_BM=logit_BM,
        class_logit_BK=model.bottleneck.classify(logit_BM, output.context_BX),
        evidence_BNM=evidence_BNM,
        plan_BNM=None if output.plan_BNM is None else output.plan_BNM * keep_N[:, None],
    )


def _without_mass(bottleneck: DotCBM | PublishedDotCBM, features: PatchFeatures, output: ConceptOutput, keep_N: Tensor) -> ConceptOutput:
    """The forward pass with another patch prior; where nothing is left to be transported, without any evidence."""
    assert output.theta_BN is not None
    theta_BN = output.theta_BN * keep_N
    mass = float(theta_BN.sum())
    if mass > 0:
        return bottleneck.transported(features, theta_BN / mass)
    evidence_BNM = output.evidence_BNM
    if evidence_BNM is None:
        raise ValueError("the box holds all that is transported; the printed readout says nothing of an empty plan; choose a smaller one")
    logit_BM = output.concept_logit_BM - evidence_BNM.sum(1)
    return replace(
        output,
        concept_logit_BM=logit_BM,
        class_logit_BK=bottleneck.classify(logit_BM),
        evidence_BNM=torch.zeros_like(evidence_BNM),
        plan_BNM=torch.zeros_like(evidence_BNM),
        theta_BN=theta_BN,
    )
