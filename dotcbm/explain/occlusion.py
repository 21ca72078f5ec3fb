"""The occlusion test of one picture: cover where a concept's map is hot, and random places of the same size, and look again.

If the map says where the concept was read from, covering that place lowers the concept's probability, and by more than covering
another place does. One picture is an anecdote: the audit repeats the test over a split (`dotcbm.metrics.faithfulness`).

M concepts, R random regions, h w rows and columns of the map's grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dotcbm.explain.explanation import Explanation, explain
from dotcbm.explain.heatmaps import View
from dotcbm.explain.naming import evaluating
from dotcbm.metrics.faithfulness import Fill, cover, random_region, region_of
from dotcbm.models.concept_model import ConceptModel, Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OccludedConcept", "Occlusion", "occlude"]

_MOST_SEEN = 3  # concepts tested unless asked


@dataclass(frozen=True, eq=False)
class OccludedConcept:
    """One concept of the test.

    Attributes:
        name: Of the concept.
        probability: In the picture as it is.
        region_hw: (h, w) bool, what was covered: the hottest cells of the concept's map.
        covered: The concept's probability then.
        random_Rhw: (R, h, w) bool, the random regions, of as many cells, beside it where there is room.
        random_R: (R,) the concept's probability with each of them covered.
    """

    name: str
    probability: float
    region_hw: Tensor
    covered: float
    random_Rhw: Tensor
    random_R: Tensor

    @property
    def drop(self) -> float:
        """How far the probability falls when its own place is covered, in [-1, 1]."""
        return self.probability - self.covered

    @property
    def random_drop(self) -> float:
        """The mean of the same for the random places."""
        return self.probability - float(self.random_R.mean())

    @property
    def beaten(self) -> float:
        """Share of the random places that lower the probability less than the own place does."""
        return float((self.random_R > self.covered).float().mean())


@dataclass(frozen=True, eq=False)
class Occlusion:
    """The test of one picture.

    Attributes:
        explanation: Of the picture as it is.
        concepts: One row each, in the order asked for.
        share, max_area, fill, seed: Settings; see `occlude`.
    """

    explanation: Explanation
    concepts: tuple[OccludedConcept, ...]
    share: float
    max_area: float
    fill: Fill
    seed: int

    def plot(self) -> Figure:
        """What was covered and what followed; see `dotcbm.explain.answers.plot_occlusion`."""
        from dotcbm.explain.answers import plot_occlusion

        return plot_occlusion(self)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.concepts)
        lines = [f"{'concept':<{width}}  probability  own place covered  random place covered  own place matters more"]
        lines += [
            f"{row.name:<{width}}  {row.probability:>11.1%}  {row.covered:>17.1%}  {float(row.random_R.mean()):>20.1%}  {row.beaten:>22.0%}"
            for row in self.concepts
        ]
        return "\n".join(lines)


def occlude(
    model: ConceptModel,
    picture: Picture,
    *,
    concepts: Sequence[str] | None = None,
    view: View | None = None,
    share: float = 0.5,
    max_area: float = 0.25,
    num_random: int = 8,
    fill: Fill = "mean",
    seed: int = 0,
) -> Occlusion:
    """Cover what a concept's map highlights, and random regions of the same size, and read the concept again.

    Args:
        model: Any bottleneck that reads concepts; its mode is restored.
        picture: A path, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor.
        concepts: Names; by default the three that contribute most to the predicted class among those that are seen (50 % and more).
        view: Which maps are tested; the model's natural view by default.
        share: Of a map's mass that the covered cells hold (`dotcbm.metrics.faithfulness.region_of`), in (0, 1].
        max_area: They are at most this share of the grid.
        num_random: R, at least 1.
        fill: What covers.
        seed: Of the random regions.

    Raises:
        ValueError: There is no such concept, no concept is seen, a map without heat, or a setting out of range.
    """
    if num_random < 1:
        raise ValueError(f"num_random is {num_random}; without a random region a drop cannot be compared with anything")
    explanation = explain(model, picture, view=view)
    names = list(concepts) if concepts is not None else _seen(explanation)
    image_3HW = model.prepare([explanation.picture_3HW])[0]
    regions: list[Tensor] = []
    for name in names:
        map_hw = explanation.heatmaps_MHW[explanation.concept(name).index]
        region_hw = region_of(map_hw, share=share, max_area=max_area)
        if not bool(region_hw.any()):
            raise ValueError(f"the {explanation.view!r} map of {name!r} has no heat, so there is no place to cover; choose another view")
        regions += [region_hw, *(random_region(region_hw, seed=seed * num_random + r) for r in range(num_random))]
    covered = torch.stack([cover(image_3HW, region_hw.to(image_3HW.device), fill=fill) for region_hw in regions])
    probability_XM = _probabilities(model, covered)
    rows = []
    for i, name in enumerate(names):
        start, j = i * (num_random + 1), explanation.concept(name).index
        value_R = probability_XM[start : start + num_random + 1, j]
        rows.append(
            OccludedConcept(
                name=name,
                probability=float(explanation.concept_M[j]),
                region_hw=regions[start],
                covered=float(value_R[0]),
                random_Rhw=torch.stack(regions[start + 1 : start + num_random + 1]),
                random_R=value_R[1:],
            )
        )
    return Occlusion(explanation, tuple(rows), share=share, max_area=max_area, fill=fill, seed=seed)


def _seen(explanation: Explanation) -> list[str]:
    every = explanation.top_concepts(len(explanation.concept_names))
    names = [evidence.name for evidence in every if evidence.probability >= 0.5][:_MOST_SEEN]
    if not names:
        raise ValueError(
            f"no concept that speaks for {explanation.target_class!r} is seen (50 % or more) in this picture; name the concepts to test"
        )
    return names


@torch.no_grad()
def _probabilities(model: ConceptModel, image_B3HW: Tensor) -> Tensor:
    with evaluating(model):
        # Few at once: an encoder's feature maps of many leave the processor's cache.
        return torch.cat([model(part).concept_BM.float().cpu() for part in image_B3HW.split(8)])
