"""Why a picture was given its class: which concepts were seen, where, and how much each of them adds to the class.

The class logit of a concept bottleneck is a sum, and nothing is left over:

    class_logit_c = bias_c + sum_j contribution_cj

A contribution is weight_cj * probability_j where the head reads probabilities, weight_cj * logit_j where it reads logits, and a sum
over the inputs that belong to concept j where it reads several numbers of a concept (`Bottleneck.contributions`).

M concepts, K classes, X whatever the head reads beside the concepts, H W pixels; maps are (M, grid_h, grid_w).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from dotcbm.explain.heatmaps import ATTRIBUTIONS, Box, View, box, gate, heatmaps, natural_view, peak, visible_region
from dotcbm.explain.interventions import read_head, same_logits
from dotcbm.explain.naming import class_index, index_of
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel, Picture, read_any
from dotcbm.structures import ConceptOutput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dotcbm.explain.contrast import Contrast

__all__ = ["ConceptEvidence", "Explanation", "explain", "explanation_of"]

Order = Literal["contribution", "probability"]


@dataclass(frozen=True, eq=False)
class ConceptEvidence:
    """One concept in one explanation.

    Attributes:
        name: Of the concept.
        index: Its column.
        probability: That it is there, in [0, 1].
        weight: Of the class head, for the class in question; None where the head reads several numbers of a concept.
        contribution: What it adds to the class logit.
        heatmap_HW: (grid_h, grid_w) map, gated by the probability.
        box: Around all cells of at least 0.6 of the map's maximum, fractions of the picture; None without heat.
        peak: x and y of the highest cell's centre, fractions of the picture; None without heat.
    """

    name: str
    index: int
    probability: float
    weight: float | None
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
        groups: The group of each concept ("bill shape"), or None.
        concept_logit_M: (M,); infinite where an intervention set a probability of 0 or 1.
        class_logit_K: (K,).
        contribution_KM: (K, M) what each concept adds to each class; with the bias it adds up to the class logit.
        weight_KM: (K, M) of the class head; None where it reads several numbers of a concept.
        bias_K: (K,) of the class head.
        target: Index of the class that is explained: the predicted one, or the one that was asked for.
        heatmaps_MHW: (M, grid_h, grid_w), not negative, not gated.
        view: What the maps show; see `dotcbm.explain.heatmaps`.
        bottleneck: What reads classes from concepts, shared with the model; `intervene` asks it again.
        context_X: What the head reads beside the concepts (`ConceptOutput.context_BX`), or None.
        evidence_MHW: (M, grid_h, grid_w) what each patch adds to each concept's logit, signed; None where it is no sum over patches.
        factor_KM: (K, M) by which `reweigh` multiplied the head's weights; None for the head as it is.
        region: x0, y0, x1, y1: the part of the picture that the maps cover.
        before: The explanation this one was made from by an intervention.
    """

    picture_3HW: Tensor
    concept_names: tuple[str, ...]
    class_names: tuple[str, ...]
    concept_logit_M: Tensor
    class_logit_K: Tensor
    contribution_KM: Tensor
    weight_KM: Tensor | None
    bias_K: Tensor
    target: int
    heatmaps_MHW: Tensor
    view: View
    bottleneck: Bottleneck
    context_X: Tensor | None = None
    evidence_MHW: Tensor | None = None
    groups: tuple[str, ...] | None = None
    factor_KM: Tensor | None = None
    region: Box = (0.0, 0.0, 1.0, 1.0)
    before: Explanation | None = None

    @property
    def concept_M(self) -> Tensor:
        """(M,) concept probabilities."""
        return self.concept_logit_M.sigmoid()

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
        """(M,) contributions to the class that is explained. With its bias they add up to its logit."""
        return self.contribution_KM[self.target]

    @property
    def runner_up(self) -> int:
        """The most probable class but the one that is explained."""
        return next(k for k in self.class_logit_K.argsort(descending=True, stable=True).tolist() if k != self.target)

    def concept(self, name: str) -> ConceptEvidence:
        """The evidence of one concept.

        Raises:
            ValueError: There is no such concept; the nearest names are given.
        """
        j = index_of(name, self.concept_names, what="concept")
        probability = float(self.concept_M[j])
        return ConceptEvidence(
            name=name,
            index=j,
            probability=probability,
            weight=None if self.weight_KM is None else float(self.weight_KM[self.target, j]),
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
        return replace(self, target=class_index(target_class, self.class_names), before=before)

    def intervene(self, changes: Mapping[str, float], *, logit_range: tuple[Tensor, Tensor] | None = None) -> Explanation:
        """What the classes would be if concepts had other probabilities, {"red wing": 0.0}; `before` of it is this explanation
        (`dotcbm.explain.interventions.intervene`)."""
        from dotcbm.explain import interventions

        return interventions.intervene(self, changes, logit_range=logit_range)

    def intervene_group(self, group: str, value: str | None, *, logit_range: tuple[Tensor, Tensor] | None = None) -> Explanation:
        """A group of exclusive concepts ("bill shape") set to one of its values, or to none; the others off
        (`dotcbm.explain.interventions.intervene_group`)."""
        from dotcbm.explain import interventions

        return interventions.intervene_group(self, group, value, logit_range=logit_range)

    def reweigh(self, factors: Mapping[str, float], *, target_class: int | str | None = None) -> Explanation:
        """What the classes would be if the head's weights of concepts were multiplied, {"red wing": 0.0}
        (`dotcbm.explain.interventions.reweigh`)."""
        from dotcbm.explain import interventions

        return interventions.reweigh(self, factors, target_class=target_class)

    def versus(self, other: int | str | None = None) -> Contrast:
        """Why this class and not the other: what speaks for each of the two, concept by concept; the runner-up by default
        (`dotcbm.explain.contrast.contrast`)."""
        from dotcbm.explain.contrast import contrast

        return contrast(self, other)

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

    def __getstate__(self) -> dict[str, Any]:
        """The bottleneck as what builds it again: modules with parametrizations (LaBo's) cannot be pickled as they are."""
        made = self.bottleneck
        weights = {name: value.detach().cpu() for name, value in made.state_dict().items()}
        return {**self.__dict__, "bottleneck": (type(made), made.problem, made.settings, weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kind, problem, settings, weights = state["bottleneck"]
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
            made: Bottleneck = kind(problem, **settings)
        made.load_state_dict(weights)
        self.__dict__.update({**state, "bottleneck": made.eval().requires_grad_(False)})

    def __repr__(self) -> str:
        return (
            f"Explanation(target_class={self.target_class!r}, predicted_class={self.predicted_class!r}, "
            f"probability={float(self.class_K[self.target]):.3f}, concepts={len(self.concept_names)}, view={self.view!r})"
        )

    def __str__(self) -> str:
        shown = [*self.top_concepts(5), *reversed(self.against(3))]
        width = max([len(evidence.name) for evidence in shown] + [len("all others")])
        weights = self.weight_KM is not None
        asked = "" if self.target == self.predicted else f" (predicted: {self.predicted_class})"
        lines = [f"{self.target_class} {float(self.class_K[self.target]):.1%}{asked}"]
        if self.before is not None:
            lines.append(
                f"before the intervention: {float(self.before.class_K[self.target]):.1%} (predicted: {self.before.predicted_class})"
            )
        lines.append(f"{'concept':<{width}}  probability  {'weight  ' if weights else ''}contribution")
        for e in shown:
            weight = "" if e.weight is None else f"{e.weight:>+6.2f}  "
            lines.append(f"{e.name:<{width}}  {e.probability:>11.1%}  {weight}{e.contribution:>+12.3f}")
        rest = float(self.contribution_M.sum()) - sum(e.contribution for e in shown)
        for name, value in (("all others", rest), ("bias", self.bias_K[self.target]), ("logit", self.class_logit_K[self.target])):
            lines.append(f"{name:<{width}}  {'':>11}  {' ' * 8 if weights else ''}{float(value):>+12.3f}")
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
        view: What the maps show (see `dotcbm.explain.heatmaps`): "concept" for models with a transport plan, "evidence" for those
            whose logits are sums over patches and "gradcam" for the others by default. "integrated_gradients" takes a backward pass
            for each concept and step: a minute for DOT-CBM with 112 concepts on one core.

    Raises:
        ValueError: The classes of the model are not read from its concepts (a linear probe); there is no such class or view; the
            picture cannot be read.
        ModuleNotFoundError: The view is an attribution, and captum is not installed.

    Example:
        >>> explanation = explain(model, "bird.jpg")  # doctest: +SKIP
        >>> explanation.top_concepts(3)[0].name  # doctest: +SKIP
        'hooked bill'
        >>> explanation.plot().savefig("why.png")  # doctest: +SKIP
    """
    picture_3HW = read_any(image)
    if not model.bottleneck.reads_concepts:
        raise ValueError(
            f"the classes of {type(model.bottleneck).__name__} are not read from concepts, so no concept contributes to them; explain a "
            'concept bottleneck instead, or take the maps of its classes from dotcbm.explain.attribution.attribute(model, ..., of="class")'
        )
    output = model.predict(picture_3HW)
    kind = view or natural_view(output)
    if kind in ATTRIBUTIONS:
        from dotcbm.explain.attribution import attribute

        maps_MHW = attribute(model, model.prepare([picture_3HW]), method=kind).map_BXHW[0].clamp(min=0)
    else:
        maps_MHW = heatmaps(output, view=kind)[0]
    return explanation_of(model, output, picture_3HW=picture_3HW, target_class=target_class, view=kind, heatmaps_MHW=maps_MHW)


def explanation_of(
    model: ConceptModel,
    output: ConceptOutput,
    *,
    picture_3HW: Tensor,
    heatmaps_MHW: Tensor,
    view: View,
    target_class: int | str | None = None,
) -> Explanation:
    """The explanation of an output that is there already.

    Args:
        model: That gave it.
        output: Of one picture, on the CPU.
        picture_3HW: (3, H, W) uint8.
        heatmaps_MHW: (M, grid_h, grid_w), not negative.
        view: What they show.
        target_class: The predicted one by default.

    Raises:
        ValueError: The classes of the model are not read from its concepts; there is no such class.
    """
    output = output.detach()
    logit_M, class_K = output.concept_logit_BM[0].float(), output.class_logit_BK[0].float()
    context_X = None if output.context_BX is None else output.context_BX[0]
    _, contribution_KM = read_head(model.bottleneck, logit_M, context_X)
    head = model.bottleneck.head
    bias_K = torch.zeros_like(class_K) if head.bias is None else head.bias.detach().float().cpu()
    if not same_logits(contribution_KM.sum(1) + bias_K, class_K):
        raise ValueError(
            f"the classes of {type(model.bottleneck).__name__} are not read from its concepts: what these contribute does not add up to "
            "the class logits; explain a concept bottleneck instead"
        )
    one_each = head.weight.shape[1] == len(logit_M)
    evidence = output.evidence_BNM
    return Explanation(
        picture_3HW=picture_3HW.cpu(),
        concept_names=model.concepts.names,
        class_names=model.concepts.class_names,
        concept_logit_M=logit_M,
        class_logit_K=class_K,
        contribution_KM=contribution_KM,
        weight_KM=head.weight.detach().float().cpu().clone() if one_each else None,
        bias_K=bias_K.clone(),
        target=int(class_K.argmax()) if target_class is None else class_index(target_class, model.concepts.class_names),
        heatmaps_MHW=heatmaps_MHW.float().cpu(),
        view=view,
        bottleneck=model.bottleneck,
        context_X=context_X,
        evidence_MHW=None if evidence is None else evidence[0].float().T.unflatten(1, output.grid),
        groups=model.concepts.groups,
        region=visible_region(model.preprocessing, (int(picture_3HW.shape[1]), int(picture_3HW.shape[2]))),
    )
