"""Weights of training pictures under which the class does not depend on concepts that a user disapproves of.

After Enouen and Galhotra, "Debugging Concept Bottleneck Models through Removal and Retraining" (CBDebug, ICLR 2026, arXiv 2509.21385):
what the model sees of the undesired concepts serves as auxiliary label of each picture, and permutation weighting (Arbour et al.,
AISTATS 2021) makes class and auxiliary label independent,

    w_i = p(y_i) p(v_i) / p(y_i, v_i)

y the class of a picture, v the pattern of its undesired concepts (each seen or not). The weighted share of (y, v) is then p(y) p(v):
classes and patterns keep their shares and are independent.

Departures:

1. The authors estimate the ratio with a classifier (gradient boosting that tells pictures from permuted ones, on the concepts'
   activations). Here v is binary, so that the ratio is one of counts: exact, without seed, and it can be checked by hand.
2. Weights are bounded (`limit`), because a rare cell of five pictures would otherwise decide the fit. A bound that was hit leaves some
   dependence; how much is in `Reweighting.left`.
3. Pairs (y, v) without a picture cannot be weighted up; where there are any, independence is out of reach, and `left` says so.
4. The authors also re-train the concepts, with augmented pictures. Here the concepts stay, and only the head is fitted anew.

n training pictures, S undesired concepts, V patterns, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Reweighting", "mutual_information", "reweight"]


@dataclass(frozen=True)
class Reweighting:
    """Weights of pictures, and what they reach.

    Attributes:
        weight_n: (n,) float64, mean 1.
        before, left: Mutual information of class and pattern in bits, without and with the weights.
        num_patterns: V that occur.
        empty: Pairs of a class and a pattern that occur, but never together.
        limited: Pictures whose weight was bounded.
        effective: (sum w)^2 / sum w^2, how many equally weighted pictures say as much (Kish 1965).
    """

    weight_n: Tensor
    before: float
    left: float
    num_patterns: int
    empty: int
    limited: int
    effective: float


def reweight(label_n: Tensor, seen_nS: Tensor, *, limit: float = 10.0) -> Reweighting:
    """The weights at the head of this file.

    Args:
        label_n: (n,) class indices.
        seen_nS: (n, S) bool: whether each undesired concept is seen.
        limit: Largest weight, and 1 / limit the smallest, before they are scaled to mean 1. 10 is ours: it lets a shortcut that holds
            in 95 % of the pictures (Waterbirds) be undone (w = 0.5 / 0.05).

    Raises:
        ValueError: No picture, no concept, shapes that differ, or a limit below 1.
    """
    if label_n.ndim != 1 or seen_nS.ndim != 2 or len(label_n) != len(seen_nS):
        raise ValueError(f"labels have shape {tuple(label_n.shape)} and concepts {tuple(seen_nS.shape)}; expected (n,) and (n, S)")
    if not len(label_n) or not seen_nS.shape[1]:
        raise ValueError("there is nothing to weight by: give one picture and one undesired concept at least")
    if not limit >= 1:
        raise ValueError(f"limit is {limit}; it bounds weights around 1, so it is 1 or more")
    pattern_n = seen_nS.bool().unique(dim=0, return_inverse=True)[1]
    num_V = int(pattern_n.max()) + 1
    joint_KV = _joint(label_n, pattern_n, torch.ones(len(label_n), dtype=torch.float64))
    product_KV = joint_KV.sum(1, keepdim=True) * joint_KV.sum(0, keepdim=True)
    ratio_n = product_KV[label_n, pattern_n] / joint_KV[label_n, pattern_n]
    bounded_n = ratio_n.clamp(1 / limit, limit)
    weight_n = bounded_n / bounded_n.mean()
    return Reweighting(
        weight_n=weight_n,
        before=mutual_information(joint_KV),
        left=mutual_information(_joint(label_n, pattern_n, weight_n)),
        num_patterns=num_V,
        empty=int(((joint_KV == 0) & (product_KV > 0)).sum()),
        limited=int((ratio_n != bounded_n).sum()),
        effective=float(weight_n.sum().square() / weight_n.square().sum()),
    )


def mutual_information(joint_KV: Tensor) -> float:
    """Of a table of probabilities, in bits; at least 0."""
    product_KV = joint_KV.sum(1, keepdim=True) * joint_KV.sum(0, keepdim=True)
    there_KV = joint_KV > 0
    return max(0.0, float((joint_KV[there_KV] * (joint_KV[there_KV] / product_KV[there_KV]).log()).sum()) / math.log(2))


def _joint(label_n: Tensor, pattern_n: Tensor, weight_n: Tensor) -> Tensor:
    num_V = int(pattern_n.max()) + 1
    cell_n = label_n * num_V + pattern_n
    joint = torch.bincount(cell_n, weights=weight_n, minlength=(int(label_n.max()) + 1) * num_V)
    return (joint / weight_n.sum()).view(-1, num_V)
