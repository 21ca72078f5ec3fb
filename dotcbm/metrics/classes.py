"""How well classes are predicted, for whom, and how far the stated confidence can be trusted.

In this file N counts the pictures of a split, G the sub-populations (Waterbirds: class and background).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "accuracy",
    "balanced_accuracy",
    "calibration_bins",
    "calibration_error",
    "class_recall",
    "group_accuracy",
    "predicted_correctly",
    "worst_group_accuracy",
]


def accuracy(score_NK: Tensor, label_N: Tensor) -> Tensor:
    """Share of pictures whose highest score (logit or probability) is their label: a 0-d float64 tensor.

    Raises:
        ValueError: Shapes do not fit, a label is out of range, a score is NaN, or there is no picture.
    """
    return predicted_correctly(score_NK, label_N).double().mean()


def class_recall(score_NK: Tensor, label_N: Tensor) -> Tensor:
    """(K,) float64: share of each class's pictures that are predicted as it; NaN for a class without pictures."""
    return group_accuracy(score_NK, label_N, group_N=label_N, num_groups=score_NK.shape[1])


def balanced_accuracy(score_NK: Tensor, label_N: Tensor) -> Tensor:
    """Mean of `class_recall` over the classes that have pictures: a 0-d float64 tensor."""
    return class_recall(score_NK, label_N).nanmean()


def group_accuracy(score_NK: Tensor, label_N: Tensor, *, group_N: Tensor, num_groups: int | None = None) -> Tensor:
    """(G,) float64: accuracy within each sub-population; NaN for one without pictures.

    Args:
        score_NK: (N, K) logits or probabilities.
        label_N: (N,) class indices.
        group_N: (N,) long in [0, G).
        num_groups: G; the largest number seen plus one by default.

    Raises:
        ValueError: As `accuracy`, or a group out of range.
    """
    correct_N = predicted_correctly(score_NK, label_N)
    group_N = group_N.to(correct_N.device)
    if group_N.shape != label_N.shape:
        raise ValueError(f"{tuple(group_N.shape)} groups for {tuple(label_N.shape)} labels; give one group number for each picture")
    size = int(group_N.max()) + 1 if num_groups is None else num_groups
    if group_N.min() < 0 or group_N.max() >= size:
        raise ValueError(f"group numbers run from {int(group_N.min())} to {int(group_N.max())}; they must lie in [0, {size})")
    count_G = torch.bincount(group_N, minlength=size).double()
    hit_G = torch.bincount(group_N[correct_N], minlength=size).double()
    return hit_G / torch.where(count_G > 0, count_G, torch.nan)


def worst_group_accuracy(score_NK: Tensor, label_N: Tensor, *, group_N: Tensor) -> Tensor:
    """The lowest `group_accuracy` among the sub-populations that have pictures: a 0-d float64 tensor."""
    per_group_G = group_accuracy(score_NK, label_N, group_N=group_N)
    return per_group_G[~per_group_G.isnan()].min()


def calibration_error(probability_NK: Tensor, label_N: Tensor, *, num_bins: int = 15) -> Tensor:
    """Expected calibration error: sum over bins of (share of pictures) * |accuracy - mean confidence|.

    Guo et al. 2017, "On Calibration of Modern Neural Networks": bins of equal width, (lower, upper]; 15 bins is theirs.

    Args:
        probability_NK: (N, K), rows sum to 1 (a softmax, not logits).
        label_N: (N,) class indices.
        num_bins: Bins over [0, 1].

    Returns:
        A 0-d float64 tensor in [0, 1].

    Raises:
        ValueError: As `accuracy`, or rows that are no probabilities.
    """
    return calibration_bins(probability_NK, label_N, num_bins=num_bins).abs().sum() / len(label_N)


def calibration_bins(probability_NK: Tensor, label_N: Tensor, *, num_bins: int = 15) -> Tensor:
    """(bins,) float64: sum of (correct - confidence) over the pictures of each confidence bin; adds up over batches."""
    correct_N = predicted_correctly(probability_NK, label_N).double()
    if probability_NK.min() < 0 or not torch.allclose(probability_NK.double().sum(1), correct_N.new_ones(()), atol=1e-2):
        raise ValueError("calibration_error needs class probabilities, but rows are negative or do not sum to 1; apply a softmax first")
    confidence_N = probability_NK.max(1).values.double()
    inner = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence_N.device)[1:-1]
    bin_N = torch.bucketize(confidence_N, inner, right=False)  # right=False puts a value on a border into the bin below it
    return torch.bincount(bin_N, weights=correct_N - confidence_N, minlength=num_bins)


def predicted_correctly(score_NK: Tensor, label_N: Tensor) -> Tensor:
    """(N,) bool: whether the highest score of each picture is its label's."""
    if score_NK.ndim != 2 or label_N.shape != score_NK.shape[:1]:
        raise ValueError(
            f"scores have shape {tuple(score_NK.shape)} and labels {tuple(label_N.shape)}; they must be (pictures, classes) and (pictures,)"
        )
    if len(label_N) == 0:
        raise ValueError("there is no picture to score; check that the split is not empty")
    if score_NK.isnan().any():
        raise ValueError(f"the class scores of picture {int(score_NK.isnan().any(1).nonzero()[0])} hold NaN")
    label_N = label_N.to(score_NK.device)
    if label_N.min() < 0 or label_N.max() >= score_NK.shape[1]:
        raise ValueError(
            f"labels run from {int(label_N.min())} to {int(label_N.max())}; {score_NK.shape[1]} classes need [0, {score_NK.shape[1]})"
        )
    return score_NK.argmax(1) == label_N
