"""What if: other concepts, and other weights of the class head, in one explained picture.

Every function gives a new explanation, exact and without another pass through the encoder, whose `before` is the old one.

M concepts, K classes, X whatever the head reads beside the concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dotcbm.explain.naming import class_index, evaluating, index_of
from dotcbm.models.base import Bottleneck

if TYPE_CHECKING:
    from dotcbm.explain.explanation import Explanation

__all__ = ["intervene", "intervene_group", "read_head", "reweigh", "same_logits"]

_TOLERANCE = 1e-2  # absolute and relative: leaves room for half precision; a head that reads something else is off by far more

_SURELY_NOT = 0.01  # stands for a probability of 0 where the head reads logits and has no range; ours, any finite logit would do


def intervene(explanation: Explanation, changes: Mapping[str, float], *, logit_range: tuple[Tensor, Tensor] | None = None) -> Explanation:
    """What the classes would be if concepts had other probabilities.

    Args:
        explanation: Of one picture.
        changes: Concept name -> probability in [0, 1]: {"red wing": 0.0}.
        logit_range: (M,) lowest and (M,) highest logit that a concept is set to, such as the training split's 5th and 95th
            percentiles (Koh et al. 2020; `dotcbm.metrics.intervention.logit_bounds`). Without it 0 and 1 are taken by their word,
            and where the head reads logits, for which that would be infinite, as 1 % and 99 %.

    Raises:
        ValueError: There is no such concept, a value outside [0, 1], or the model was changed since.
    """
    logit_M = explanation.concept_logit_M.clone()
    changed: dict[int, float] = {}
    for name, value in changes.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name!r} cannot be set to {value}: it is a probability and must lie in [0, 1]")
        changed[index_of(name, explanation.concept_names, what="concept")] = value
    columns = list(changed)
    probability = torch.tensor(list(changed.values()), dtype=torch.float64)
    wanted = torch.logit(probability)
    if logit_range is not None:
        low, high = (bound[columns].to(wanted) for bound in logit_range)
        wanted = wanted.clamp(min=low, max=high)
    logit_M[columns] = wanted.to(logit_M.dtype)
    _check_unchanged(explanation)
    class_K, contribution_KM = read_head(explanation.bottleneck, logit_M, explanation.context_X)
    if not bool(class_K.isfinite().all()):
        logit_M[columns] = torch.logit(probability.clamp(_SURELY_NOT, 1 - _SURELY_NOT)).to(logit_M.dtype)
        class_K, contribution_KM = read_head(explanation.bottleneck, logit_M, explanation.context_X)
    return replace(explanation, concept_logit_M=logit_M, before=explanation, **_weighed(class_K, contribution_KM, explanation.factor_KM))


def intervene_group(
    explanation: Explanation, group: str, value: str | None, *, logit_range: tuple[Tensor, Tensor] | None = None
) -> Explanation:
    """A group of exclusive concepts set to one of its values, the others off.

    Args:
        explanation: Of one picture.
        group: Its name ("bill shape").
        value: The concept of the group that is set to 1; None sets all of them to 0.
        logit_range: See `intervene`.

    Raises:
        ValueError: The concepts have no groups, there is no such group, or the value is not in it.
    """
    if explanation.groups is None:
        raise ValueError("the concepts of this data set are in no groups; set them one by one with intervene")
    index_of(group, tuple(dict.fromkeys(explanation.groups)), what="group")
    members = [name for name, of in zip(explanation.concept_names, explanation.groups, strict=True) if of == group]
    if value is not None and value not in members:
        raise ValueError(f"{value!r} is no value of the group {group!r}, which has {members[:20]}")
    return intervene(explanation, {name: float(name == value) for name in members}, logit_range=logit_range)


def reweigh(explanation: Explanation, factors: Mapping[str, float], *, target_class: int | str | None = None) -> Explanation:
    """What the classes would be if the head's weights of concepts were multiplied.

    Nothing is fitted again: a head that was trained with a concept leans on its companions when it is gone.

    Args:
        explanation: Of one picture.
        factors: Concept name -> factor: 0 removes the concept, 1 leaves it.
        target_class: Only in this class's row of the head; in every class by default.

    Raises:
        ValueError: There is no such concept or class, or a factor that is not finite.
    """
    rows = slice(None) if target_class is None else class_index(target_class, explanation.class_names)
    scale_KM = torch.ones_like(explanation.contribution_KM)
    for name, factor in factors.items():
        if not abs(factor) < float("inf"):
            raise ValueError(f"the weight of {name!r} cannot be multiplied by {factor}; give a finite number")
        scale_KM[rows, index_of(name, explanation.concept_names, what="concept")] = factor
    weight_KM, factor_KM = explanation.weight_KM, explanation.factor_KM
    return replace(
        explanation,
        weight_KM=None if weight_KM is None else weight_KM * scale_KM,
        factor_KM=scale_KM if factor_KM is None else factor_KM * scale_KM,
        before=explanation,
        **_weighed(explanation.class_logit_K, explanation.contribution_KM, scale_KM),
    )


def same_logits(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of class logits agree but for rounding."""
    return torch.allclose(a, b, atol=_TOLERANCE, rtol=_TOLERANCE)


@torch.no_grad()
def read_head(bottleneck: Bottleneck, logit_M: Tensor, context_X: Tensor | None) -> tuple[Tensor, Tensor]:
    """(K,) class logits and (K, M) contributions of concept logits, on the CPU."""
    weight = bottleneck.head.weight
    logit_BM = logit_M[None].to(weight.device, weight.dtype)
    context_BX = None if context_X is None else context_X[None].to(weight.device)
    with evaluating(bottleneck):
        class_BK, contribution_BKM = bottleneck.classify(logit_BM, context_BX), bottleneck.contributions(logit_BM, context_BX)
    return class_BK[0].float().cpu(), contribution_BKM[0].float().cpu()


def _weighed(class_K: Tensor, contribution_KM: Tensor, factor_KM: Tensor | None) -> dict[str, Any]:
    """Class logits and contributions of a head whose weights are multiplied by `factor_KM`."""
    if factor_KM is None:
        return {"class_logit_K": class_K, "contribution_KM": contribution_KM}
    weighed_KM = factor_KM * contribution_KM
    return {"class_logit_K": class_K + (weighed_KM - contribution_KM).sum(1), "contribution_KM": weighed_KM}


def _check_unchanged(explanation: Explanation) -> None:
    """The bottleneck is the model's own, not a copy: it may have learned since."""
    read = read_head(explanation.bottleneck, explanation.concept_logit_M, explanation.context_X)
    if not same_logits(_weighed(*read, explanation.factor_KM)["class_logit_K"], explanation.class_logit_K):
        raise ValueError(f"the {type(explanation.bottleneck).__name__} of this explanation was changed since; explain the picture again")
