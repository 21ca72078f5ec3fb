"""Why a picture was given its class: which concepts were seen, where, and how much each of them adds to the class.

The class logit of a concept bottleneck is a sum, and nothing is left over:

    class_logit_c = bias_c + sum_j weight_cj * probability_j

The terms of that sum are the contributions. M concepts, K classes, H W pixels; maps are (M, grid_h, grid_w).
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from dotcbm.explain.heatmaps import Box, View, box, gate, heatmaps, natural_view, peak, visible_region
from dotcbm.models.concept_model import ConceptModel, Picture, read_any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ConceptEvidence", "Explanation", "explain"]

Order = Literal["contribution", "probability"]


@dataclass(frozen=True, eq=False)
class ConceptEvidence:
    """One concept in one explanation.

    Attributes:
        name: Of the concept.
        index: Its column.
        probability: That it is there, in [0, 1].
        weight: Of the class head, for the class in question.
        contribution: weight * probability: what it adds to the class logit.
        heatmap_HW: (grid_h, grid_w) map, gated by the probability.
        box: Around all cells of at least 0.6 of the map's maximum, fractions of the picture; None without heat.
        peak: x and y of the highest cell's centre, fractions of the picture; None without heat.
    """

    name: str
    index: int
    probability: float
    weight: float
    contribution: float
    heatmap_HW: Tensor
    box: Box | None
    peak: tuple[float, float] | None


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a model saw in one picture, where, and what class follows for which reasons.

    Attributes:
        picture_3HW: (3, H, W) uint8, as read.
        concept_names: M names.
        class_names: K names.
        concept_M: (M,) concept probabilities.
        class_logit_K: (K,).
        weight_KM: (K, M) of the class head.
        bias_K: (K,) of the class head.
        target: Index of the class that is explained: the predicted one, or the one that was asked for.
        heatmaps_MHW: (M, grid_h, grid_w), not negative, not gated.
        view: What the maps show; see `dotcbm.explain.heatmaps`.
        region: x0, y0, x1, y1: the part of the picture that the maps cover.
        before: The explanation this one was made from by an intervention.
    """

    picture_3HW: Tensor
    concept_names: tuple[str, ...]
    class_names: tuple[str, ...]
    concept_M: Tensor
    class_logit_K: Tensor
    weight_KM: Tensor
    bias_K: Tensor
    target: int
    heatmaps_MHW: Tensor
    view: View
    region: Box = (0.0, 0.0, 1.0, 1.0)
    before: Explanation | None = None

    @property
    def class_K(self) -> Tensor:
        """(K,) class probabilities."""
        return self.class_logit_K.softmax(0)

    @property
    def predicted(self) -> int:
        """Index of the class with the highest probability."""
        return int(self.class_logit_K.argmax())

    @property
    def predicted_class(self) -> str:
        """Name of the class with the highest probability."""
        return self.class_names[self.predicted]

    @property
    def target_class(self) -> str:
        """Name of the class that is explained."""
        return self.class_names[self.target]

    @property
    def contribution_M(self) -> Tensor:
        """(M,): weight * probability for the class that is explained. With its bias they add up to its logit."""
        return self.weight_KM[self.target] * self.concept_M

    def concept(self, name: str) -> ConceptEvidence:
        """The evidence of one concept.

        Raises:
            ValueError: There is no such concept; the nearest names are given.
        """
        j = _index(name, self.concept_names, what="concept")
        probability = float(self.concept_M[j])
        return ConceptEvidence(
            name=name,
            index=j,
            probability=probability,
            weight=float(self.weight_KM[self.target, j]),
            contribution=float(self.contribution_M[j]),
            heatmap_HW=gate(self.heatmaps_MHW[j], self.concept_M[j]),
            box=box(self.heatmaps_MHW[j], region=self.region),
            peak=peak(self.heatmaps_MHW[j], region=self.region),
        )

    def top_concepts(self, n: int = 5, *, by: Order = "contribution") -> tuple[ConceptEvidence, ...]:
        """The first `n` concepts, highest first.

        Args:
            n: How many at most.
            by: "contribution": those that speak for the class, so there may be fewer than n; "probability": those that
                are most surely there, whatever they say of the class.

        Raises:
            ValueError: Another `by`.
        """
        if by not in get_args(Order):
            raise ValueError(f"there is no order {by!r}; choose one of {list(get_args(Order))}")
        value_M = self.contribution_M if by == "contribution" else self.concept_M
        order = value_M.argsort(descending=True, stable=True)[:n].tolist()
        return tuple(self.concept(self.concept_names[j]) for j in order if by == "probability" or value_M[j] > 0)

    def against(self, n: int = 5) -> tuple[ConceptEvidence, ...]:
        """The first `n` concepts that speak against the class, strongest first; there may be fewer."""
        order = self.contribution_M.argsort(stable=True)[:n].tolist()
        return tuple(self.concept(self.concept_names[j]) for j in order if self.contribution_M[j] < 0)

    def for_class(self, target_class: int | str) -> Explanation:
        """The same picture asked about another class: why this one, or why not.

        Raises:
            ValueError: There is no such class.
        """
        before = None if self.before is None else self.before.for_class(target_class)
        return replace(self, target=_class_index(target_class, self.class_names), before=before)

    def intervene(self, changes: Mapping[str, float]) -> Explanation:
        """What the classes would be if concepts had other probabilities; `before` of the result is this explanation.

        Args:
            changes: Concept name -> probability in [0, 1]: {"red wing": 0.0}.

        Raises:
            ValueError: There is no such concept, or a value outside [0, 1].
        """
        concept_M = self.concept_M.clone()
        for name, value in changes.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name!r} cannot be set to {value}: it is a probability and must lie in [0, 1]")
            concept_M[_index(name, self.concept_names, what="concept")] = value
        return replace(self, concept_M=concept_M, class_logit_K=self.weight_KM @ concept_M + self.bias_K, before=self)

    def plot(self, n: int = 6) -> Figure:
        """One figure: the picture, the maps of the first `n` concepts (1 to 8), and all that adds up to the class.

        After an intervention: the classes before and after it.
        """
        from dotcbm.explain.comparison import plot_comparison
        from dotcbm.explain.plots import plot_explanation

        return plot_explanation(self, n=n) if self.before is None else plot_comparison(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: classes, and for each concept probability, weight, contribution, box, peak and map."""
        concepts = []
        for name in self.concept_names:
            evidence = self.concept(name)
            concepts.append(
                {
                    "name": name,
                    "probability": evidence.probability,
                    "weight": evidence.weight,
                    "contribution": evidence.contribution,
                    "box": None if evidence.box is None else list(evidence.box),
                    "peak": None if evidence.peak is None else list(evidence.peak),
                    "heatmap": evidence.heatmap_HW.tolist(),
                }
            )
        return {
            "picture_size": list(self.picture_3HW.shape[1:]),
            "predicted_class": self.predicted_class,
            "target_class": self.target_class,
            "target_logit": float(self.class_logit_K[self.target]),
            "target_bias": float(self.bias_K[self.target]),
            "class_probabilities": dict(zip(self.class_names, self.class_K.tolist(), strict=True)),
            "view": self.view,
            "region": list(self.region),
            "concepts": concepts,
        }

    def __repr__(self) -> str:
        return (
            f"Explanation(target_class={self.target_class!r}, predicted_class={self.predicted_class!r}, "
            f"probability={float(self.class_K[self.target]):.3f}, concepts={len(self.concept_names)}, view={self.view!r})"
        )

    def __str__(self) -> str:
        shown = [*self.top_concepts(5), *reversed(self.against(3))]
        width = max([len(evidence.name) for evidence in shown] + [len("all others")])
        asked = "" if self.target == self.predicted else f" (predicted: {self.predicted_class})"
        lines = [f"{self.target_class} {float(self.class_K[self.target]):.1%}{asked}"]
        if self.before is not None:
            lines.append(
                f"before the intervention: {float(self.before.class_K[self.target]):.1%} (predicted: {self.before.predicted_class})"
            )
        lines.append(f"{'concept':<{width}}  probability  weight  contribution")
        lines += [f"{e.name:<{width}}  {e.probability:>11.1%}  {e.weight:>+6.2f}  {e.contribution:>+12.3f}" for e in shown]
        rest = float(self.contribution_M.sum()) - sum(e.contribution for e in shown)
        for name, value in (("all others", rest), ("bias", self.bias_K[self.target]), ("logit", self.class_logit_K[self.target])):
            lines.append(f"{name:<{width}}  {'':>11}  {'':>6}  {float(value):>+12.3f}")
        return "\n".join(lines)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def explain(model: ConceptModel, image: Picture, *, target_class: int | str | None = None, view: View | None = None) -> Explanation:
    """Explain a model's decision on one picture.

    Args:
        model: An encoder with a concept bottleneck; its mode is restored.
        image: A path, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor.
        target_class: The class to explain, by name or index; the predicted one by default.
        view: What the maps show (see `dotcbm.explain.heatmaps`): "concept" for models with a transport plan and "evidence" for
            the others by default.

    Raises:
        ValueError: The model has no maps or its classes are not read from its concepts (a linear probe); there is no such class or
            view; the picture cannot be read.

    Example:
        >>> explanation = explain(model, "bird.jpg")  # doctest: +SKIP
        >>> explanation.top_concepts(3)[0].name  # doctest: +SKIP
        'hooked bill'
        >>> explanation.plot().savefig("why.png")  # doctest: +SKIP
    """
    picture_3HW = read_any(image)
    output = model.predict(picture_3HW)
    kind = view or natural_view(output)
    concept_M, class_logit_K = output.concept_BM[0].float(), output.class_logit_BK[0].float()
    head = model.bottleneck.head
    weight_KM, bias_K = head.weight.detach().float().cpu(), torch.zeros_like(class_logit_K)
    if head.bias is not None:
        bias_K = head.bias.detach().float().cpu()
    # 1e-2 leaves room for half precision; a head that reads something else is off by far more.
    if weight_KM.shape[1] != len(concept_M) or not torch.allclose(weight_KM @ concept_M + bias_K, class_logit_K, atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"the classes of {type(model.bottleneck).__name__} are not read from its concept probabilities, so no concept "
            "contributes to them; explain a concept bottleneck instead"
        )
    size = (int(picture_3HW.shape[1]), int(picture_3HW.shape[2]))
    return Explanation(
        picture_3HW=picture_3HW.cpu(),
        concept_names=model.concepts.names,
        class_names=model.concepts.class_names,
        concept_M=concept_M,
        class_logit_K=class_logit_K,
        weight_KM=weight_KM,
        bias_K=bias_K,
        target=int(class_logit_K.argmax()) if target_class is None else _class_index(target_class, model.concepts.class_names),
        heatmaps_MHW=heatmaps(output, view=kind)[0],
        view=kind,
        region=visible_region(model.preprocessing, size),
    )


def _class_index(target_class: int | str, class_names: Sequence[str]) -> int:
    if isinstance(target_class, str):
        return _index(target_class, class_names, what="class")
    if not 0 <= target_class < len(class_names):
        raise ValueError(f"there is no class {target_class}; the {len(class_names)} classes are numbered from 0")
    return target_class


def _index(name: str, names: Sequence[str], *, what: str) -> int:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or list(names[:3])
        raise ValueError(f"there is no {what} {name!r} among the {len(names)}; did you mean one of {near}?")
    return names.index(name)
