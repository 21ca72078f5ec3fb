"""Test-time interventions: what the class accuracy becomes when an expert corrects groups of concepts.

    logit of a corrected concept = its 95th percentile over the training pictures if it is there, the 5th if it is not

after Koh et al., "Concept bottleneck models", ICML 2020, section 4.3. The order of the groups is a policy's:

    random       orders drawn, each for all pictures
    uncertainty  per picture, the group with the largest mean entropy of its concepts first (Shin et al., ICML 2023)
    coop         per picture, entropy plus importance for the predicted class (Chauhan et al., AAAI 2023); see `coop_score`
    greedy       per picture and step, the group whose correction raises the true class's log probability most: an oracle

Departures: Koh et al. draw an order for each picture; one for all shows how far the order matters, and the mean over the orders is
told where their code takes the best of five. Where their truth is a class's and a part is invisible in the picture, they set its
concepts to absent; here the truth is the labels', whatever is visible, and a concept without a label stays as predicted. Percentiles
of concepts rarer than 5 % would be those of pictures without them: given the truth, a bound is no less extreme than the median of its
own pictures. CooP scores the model's own prediction once, not again after each step, and has equal weights, which the authors tune.

In this file N counts the pictures of a split; n those of one call. M concepts, K classes, G groups, S = G + 1 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Bounds", "Classify", "Curve", "Policy", "coop_score", "corrected", "group_uncertainty", "intervention_curve", "logit_bounds"]

Policy = Literal["random", "uncertainty", "coop", "greedy"]

Classify = Callable[[Tensor, Tensor], Tensor]
"""(n, M) concept logits and (n,) the pictures' rows -> (n, K) class logits. The rows find what the head reads besides."""

Bounds = tuple[Tensor, Tensor]
"""(M,) logits of a concept that is not there, and of one that is."""


@dataclass(frozen=True)
class Curve:
    """Accuracy over the number of corrected groups.

    Attributes:
        policy: Who chose the order.
        accuracy_S: (S,) float64, for 0 ... G groups corrected; the first is the model's own.
        spread_S: (S,) standard deviation over the drawn orders; None for policies that draw nothing.
        area: Mean of `accuracy_S`.
        steps_down: The largest fall from one step to a later one; 0 for a curve that never falls.
        correct_NS: (N, S) share of the orders in which a picture is right, 0 or 1 without draws: resample its rows for an interval.
    """

    policy: Policy
    accuracy_S: Tensor
    spread_S: Tensor | None
    area: float
    steps_down: float
    correct_NS: Tensor


def logit_bounds(concept_logit_NM: Tensor, truth_NM: Tensor | None = None) -> Bounds:
    """The 5th and 95th percentile of each concept's logit over the training pictures.

    Args:
        concept_logit_NM: (N, M) predicted for the training pictures.
        truth_NM: (N, M) in {0, 1, NaN}. With it, the low bound is at most the median of the pictures without the concept,
            the high one at least the median of those with it.

    Returns:
        (M,) low and (M,) high.

    Raises:
        ValueError: No picture, a logit that is not finite, or another shape of the truth.
    """
    _check_logits(concept_logit_NM)
    logit_NM = concept_logit_NM.detach()
    low_M, high_M = _quantile(logit_NM, 0.05), _quantile(logit_NM, 0.95)
    if truth_NM is None:
        return low_M, high_M
    _check_truth(truth_NM, logit_NM)
    negative_M = _quantile(torch.where(truth_NM == 0, logit_NM, torch.nan), 0.5)
    positive_M = _quantile(torch.where(truth_NM == 1, logit_NM, torch.nan), 0.5)
    return torch.fmin(low_M, negative_M), torch.fmax(high_M, positive_M)  # fmin and fmax pass over NaN: no such picture


def corrected(concept_logit_NM: Tensor, truth_NM: Tensor, mask: Tensor, bounds: Bounds) -> Tensor:
    """Logits with some concepts set to their true values.

    Args:
        concept_logit_NM: (N, M) predicted.
        truth_NM: (N, M) in {0, 1}; NaN leaves the prediction.
        mask: Which to correct, (N, M) bool, or (M,) for all pictures.
        bounds: From `logit_bounds`.

    Returns:
        (N, M).
    """
    low_M, high_M = (bound.to(concept_logit_NM) for bound in bounds)
    true_NM = torch.where(truth_NM > 0.5, high_M, low_M)
    return torch.where(mask & ~truth_NM.isnan(), true_NM, concept_logit_NM)


def group_uncertainty(concept_logit_NM: Tensor, group_M: Tensor) -> Tensor:
    """(N, G) mean binary entropy of each group's concepts, in [0, 1] (in bits); `group_M` numbers the groups from 0."""
    p_NM = concept_logit_NM.double().sigmoid()
    entropy_NM = (torch.special.entr(p_NM) + torch.special.entr(1 - p_NM)) / torch.log(torch.tensor(2.0))
    return _group_mean(entropy_NM, group_M)


@torch.no_grad()
def coop_score(classify: Classify, concept_logit_NM: Tensor, group_M: Tensor, bounds: Bounds) -> Tensor:
    """(N, G) uncertainty plus importance, both means over a group's concepts and in [0, 1].

    The importance of concept j is the change that its truth is expected to make to the predicted class's probability:

        p_j |P(c | a_j = 1) - P(c)| + (1 - p_j) |P(c | a_j = 0) - P(c)|,   c = argmax P

    Chauhan et al. weigh the two, and a cost of asking, by constants tuned on validation data; here all weigh 1 and asking is free.
    """
    rows_N = torch.arange(len(concept_logit_NM), device=concept_logit_NM.device)
    before_NK = classify(concept_logit_NM, rows_N).softmax(1)
    class_N1 = before_NK.argmax(1, keepdim=True)
    before_N = before_NK.gather(1, class_N1)[:, 0]
    p_NM = concept_logit_NM.sigmoid()
    importance_NM = torch.zeros_like(concept_logit_NM, dtype=torch.float64)
    for there, bound_M in enumerate(bounds):
        for j in range(concept_logit_NM.shape[1]):
            logit_NM = concept_logit_NM.clone()
            logit_NM[:, j] = bound_M[j]
            after_N = classify(logit_NM, rows_N).softmax(1).gather(1, class_N1)[:, 0]
            chance_N = p_NM[:, j] if there else 1 - p_NM[:, j]
            importance_NM[:, j] += (chance_N * (after_N - before_N).abs()).double()
    return group_uncertainty(concept_logit_NM, group_M) + _group_mean(importance_NM, group_M)


@torch.no_grad()
def intervention_curve(
    classify: Classify,
    concept_logit_NM: Tensor,
    truth_NM: Tensor,
    label_N: Tensor,
    group_M: Tensor,
    bounds: Bounds,
    *,
    policy: Policy,
    seed: int = 0,
    num_orders: int = 5,
) -> Curve:
    """Correct one group after the other, and count who is classified right after each.

    Args:
        classify: The model from concepts on.
        concept_logit_NM: (N, M) predicted.
        truth_NM: (N, M) in {0, 1}; NaN where unknown: stays as predicted.
        label_N: (N,) classes.
        group_M: (M,) the number of each concept's group; any integers.
        bounds: From `logit_bounds` of the training pictures.
        policy: See the head of this file.
        seed: Of the random orders.
        num_orders: How many orders "random" draws (Koh et al.'s code repeats 5 times).

    Raises:
        ValueError: No picture, shapes that differ, logits that are not finite, truth besides 0, 1 and NaN, or an unknown policy.
    """
    _check_logits(concept_logit_NM)
    _check_truth(truth_NM, concept_logit_NM)
    if len(label_N) != len(concept_logit_NM) or len(group_M) != concept_logit_NM.shape[1]:
        raise ValueError(
            f"{len(label_N)} labels and {len(group_M)} groups for logits of shape {tuple(concept_logit_NM.shape)}; "
            "give a label for each picture and a group for each concept"
        )
    if policy not in get_args(Policy):
        raise ValueError(f"policy is {policy!r}; choose one of {list(get_args(Policy))}")
    if num_orders < 1:
        raise ValueError(f"num_orders is {num_orders}; draw one order at least")
    group_M = group_M.unique(return_inverse=True)[1]
    rows_N = torch.arange(len(label_N), device=concept_logit_NM.device)
    true_NM = corrected(concept_logit_NM, truth_NM, torch.ones_like(group_M, dtype=torch.bool), bounds)
    if policy == "greedy":
        orders = [_greedy_order(classify, concept_logit_NM, true_NM, label_N, group_M)]
    elif policy == "random":
        generator = torch.Generator().manual_seed(seed)
        num_groups = int(group_M.max()) + 1
        drawn = [torch.randperm(num_groups, generator=generator) for _ in range(num_orders)]
        orders = [order.to(rows_N.device).expand(len(rows_N), -1) for order in drawn]
    else:
        score_NG = group_uncertainty(concept_logit_NM, group_M)
        if policy == "coop":
            score_NG = coop_score(classify, concept_logit_NM, group_M, bounds)
        orders = [score_NG.argsort(dim=1, descending=True, stable=True)]
    correct_RNS = torch.stack([_follow(classify, order, concept_logit_NM, true_NM, label_N, group_M) for order in orders]).double()
    accuracy_RS = correct_RNS.mean(1)
    accuracy_S = accuracy_RS.mean(0)
    return Curve(
        policy=policy,
        accuracy_S=accuracy_S,
        spread_S=accuracy_RS.std(0, unbiased=len(orders) > 1) if policy == "random" else None,
        area=float(accuracy_S.mean()),
        steps_down=float((accuracy_S.cummax(0).values - accuracy_S).max()),
        correct_NS=correct_RNS.mean(0),
    )


def _follow(classify: Classify, order_NG: Tensor, logit_NM: Tensor, true_NM: Tensor, label_N: Tensor, group_M: Tensor) -> Tensor:
    """(N, S) bool: who is right after 0 ... G groups in this order."""
    rows_N = torch.arange(len(logit_NM), device=logit_NM.device)
    step_NM = order_NG.argsort(1)[:, group_M]  # at which step, from 0, a concept is corrected
    hits = [classify(torch.where(step_NM < step, true_NM, logit_NM), rows_N).argmax(1) == label_N for step in range(order_NG.shape[1] + 1)]
    return torch.stack(hits, 1)


def _greedy_order(classify: Classify, logit_NM: Tensor, true_NM: Tensor, label_N: Tensor, group_M: Tensor) -> Tensor:
    """(N, G) groups in the order of the oracle; among equals the first group."""
    num_groups = int(group_M.max()) + 1
    num, device = len(logit_NM), logit_NM.device
    rows_N = torch.arange(num, device=device)
    open_NG = torch.ones(num, num_groups, dtype=torch.bool, device=device)
    current_NM = logit_NM
    order = []
    for _ in range(num_groups):
        gain_NG = torch.full((num, num_groups), -torch.inf, dtype=torch.float64, device=device)
        for g in range(num_groups):
            rows_n = open_NG[:, g].nonzero()[:, 0]
            if not len(rows_n):
                continue
            tried_nM = torch.where(group_M == g, true_NM[rows_n], current_NM[rows_n])
            log_p_nK = classify(tried_nM, rows_n).double().log_softmax(1)
            gain_NG[rows_n, g] = log_p_nK.gather(1, label_N[rows_n, None])[:, 0]
        # A log probability of minus infinity must not send a picture to a group that it has had.
        chosen_N = torch.where(open_NG, gain_NG.clamp(min=torch.finfo(torch.float64).min), -torch.inf).argmax(1)
        open_NG[rows_N, chosen_N] = False
        current_NM = torch.where(group_M == chosen_N[:, None], true_NM, current_NM)
        order.append(chosen_N)
    return torch.stack(order, 1)


def _quantile(value_NM: Tensor, q: float) -> Tensor:
    """(M,) quantile of each column's values that are not NaN; column by column, since torch refuses more than 2^24 values at once."""
    if value_NM.dtype not in (torch.float32, torch.float64):
        value_NM = value_NM.float()  # torch has no quantiles of half precision
    return torch.stack([column_N.nanquantile(q) for column_N in value_NM.T])


def _group_mean(value_NM: Tensor, group_M: Tensor) -> Tensor:
    """(N, G)."""
    num_groups = int(group_M.max()) + 1
    total_NG = value_NM.new_zeros(len(value_NM), num_groups).index_add(1, group_M, value_NM)
    return total_NG / group_M.bincount(minlength=num_groups)


def _check_logits(concept_logit_NM: Tensor) -> None:
    if concept_logit_NM.ndim != 2 or not concept_logit_NM.numel():
        raise ValueError(f"concept logits have shape {tuple(concept_logit_NM.shape)}; give (pictures, concepts), one of each at least")
    if not concept_logit_NM.isfinite().all():
        row, concept = (~concept_logit_NM.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"the logit of picture {row}, concept {concept} is {concept_logit_NM[row, concept].item()}; logits must be finite")


def _check_truth(truth_NM: Tensor, concept_logit_NM: Tensor) -> None:
    if truth_NM.shape != concept_logit_NM.shape:
        raise ValueError(f"truth has shape {tuple(truth_NM.shape)} and logits {tuple(concept_logit_NM.shape)}; they must be the same")
    strange_NM = ~truth_NM.isnan() & (truth_NM != 0) & (truth_NM != 1)
    if strange_NM.any():
        row, concept = strange_NM.nonzero()[0].tolist()
        raise ValueError(
            f"the truth of picture {row}, concept {concept} is {truth_NM[row, concept].item():g}; it must be 0, 1 or NaN (unknown): "
            "cut soft labels at a threshold first"
        )
