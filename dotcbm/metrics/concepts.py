"""How well concepts are recognised, one number a concept; labels nobody knows (NaN) are left out.

In this file N counts the pictures of a split. All functions are exact: ties are handled by ranks, not by thresholds on a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "all_negative_error",
    "concept_auroc",
    "concept_average_precision",
    "concept_error",
    "concept_f1",
    "count_errors",
    "macro_auroc",
    "macro_average",
    "macro_average_precision",
    "macro_f1",
]


def concept_auroc(score_NM: Tensor, target_NM: Tensor) -> Tensor:
    """Area under the ROC curve of each concept: P(score of a positive > score of a negative) + P(equal) / 2.

    Args:
        score_NM: (N, M) probabilities or logits; only their order matters.
        target_NM: (N, M) in {0, 1}, NaN where unknown.

    Returns:
        (M,) float64 in [0, 1]; NaN for a concept without a known positive or without a known negative.

    Raises:
        ValueError: Shapes differ, a score is not finite, or a target is none of 0, 1, NaN.
    """
    score_MN, known_MN, positive_MN = _columns(score_NM, target_NM)
    below_MN, not_above_MN, _ = _ranks(score_MN, known_MN)
    rank_MN = (below_MN + not_above_MN + 1).double() / 2  # average rank among ties, from 1
    num_positive_M, num_negative_M = positive_MN.sum(1).double(), (known_MN & ~positive_MN).sum(1).double()
    pairs_won_M = (rank_MN * positive_MN).sum(1) - num_positive_M * (num_positive_M + 1) / 2
    return pairs_won_M / _nan_for_zero(num_positive_M * num_negative_M)


def concept_average_precision(score_NM: Tensor, target_NM: Tensor) -> Tensor:
    """Average precision of each concept: sum over thresholds of (recall gained) * precision, ties at one threshold.

    Args:
        score_NM: (N, M) probabilities or logits; only their order matters.
        target_NM: (N, M) in {0, 1}, NaN where unknown.

    Returns:
        (M,) float64 in (0, 1]; NaN where `concept_auroc` is NaN, so that both average over the same concepts.

    Raises:
        ValueError: As `concept_auroc`.
    """
    score_MN, known_MN, positive_MN = _columns(score_NM, target_NM)
    below_MN, _, order_MN = _ranks(score_MN, known_MN)
    # Positives among the r lowest scores, for r = 0 ... N: looked up at the number of scores below each score.
    cumulative_MN = positive_MN.gather(1, order_MN).cumsum(1)
    cumulative_MR = torch.cat([cumulative_MN.new_zeros(len(cumulative_MN), 1), cumulative_MN], 1)
    num_positive_M1, num_known_M1 = positive_MN.sum(1, keepdim=True), known_MN.sum(1, keepdim=True)
    found_MN = num_positive_M1 - cumulative_MR.gather(1, below_MN)
    # Unknown rows sort last and may divide 0 by 0; `where` drops them.
    precision_MN = torch.where(positive_MN, found_MN.double() / (num_known_M1 - below_MN).double(), 0.0)
    varies_M = (num_positive_M1 > 0) & (num_positive_M1 < num_known_M1)
    return torch.where(varies_M[:, 0], precision_MN.sum(1) / num_positive_M1[:, 0].double(), torch.nan)


def concept_error(probability_NM: Tensor, target_NM: Tensor, *, threshold: float = 0.5) -> Tensor:
    """(M,) float64: share of a concept's known labels that `probability > threshold` gets wrong; NaN where none is known.

    Raises:
        ValueError: As `concept_auroc`.
    """
    wrong_M, known_M = count_errors(probability_NM, target_NM, threshold=threshold)
    return wrong_M.double() / _nan_for_zero(known_M.double())


def count_errors(probability_NM: Tensor, target_NM: Tensor, *, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """(M,) and (M,) long: how many known labels `probability > threshold` gets wrong, and how many are known."""
    probability_MN, known_MN, positive_MN = _columns(probability_NM, target_NM)
    wrong_MN = ((probability_MN > threshold) != positive_MN) & known_MN
    return wrong_MN.sum(1), known_MN.sum(1)


def all_negative_error(target_NM: Tensor) -> Tensor:
    """(M,) float64: the error of always saying no, which is each concept's share of positives; NaN where none is known.

    About 1 in 9 concept labels of CUB is positive, so an error of 11 % there says nothing was learned.
    """
    return concept_error(torch.zeros_like(target_NM), target_NM)


def concept_f1(probability_NM: Tensor, target_NM: Tensor, *, threshold: float = 0.5) -> Tensor:
    """(M,) float64: harmonic mean of precision and recall of `probability > threshold`; NaN for a concept that does not vary.

    Raises:
        ValueError: As `concept_auroc`.
    """
    probability_MN, known_MN, positive_MN = _columns(probability_NM, target_NM)
    said_MN = (probability_MN > threshold) & known_MN
    f1_M = 2 * (said_MN & positive_MN).sum(1).double() / _nan_for_zero((said_MN.sum(1) + positive_MN.sum(1)).double())
    varies_M = positive_MN.any(1) & (known_MN & ~positive_MN).any(1)
    return torch.where(varies_M, f1_M, torch.nan)


def macro_average(value_M: Tensor) -> Tensor:
    """Mean over the concepts where a value is defined; NaN if it is defined nowhere."""
    return value_M.nanmean()


def macro_auroc(score_NM: Tensor, target_NM: Tensor) -> Tensor:
    """Mean of `concept_auroc` over the concepts that vary: a 0-d float64 tensor."""
    return macro_average(concept_auroc(score_NM, target_NM))


def macro_average_precision(score_NM: Tensor, target_NM: Tensor) -> Tensor:
    """Mean of `concept_average_precision` over the concepts that vary: a 0-d float64 tensor."""
    return macro_average(concept_average_precision(score_NM, target_NM))


def macro_f1(probability_NM: Tensor, target_NM: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Mean of `concept_f1` over the concepts that vary: a 0-d float64 tensor."""
    return macro_average(concept_f1(probability_NM, target_NM, threshold=threshold))


def _columns(score_NM: Tensor, target_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, which labels are known, and which of them are positive; one row a concept."""
    if score_NM.ndim != 2 or score_NM.shape != target_NM.shape:
        raise ValueError(
            f"scores have shape {tuple(score_NM.shape)} and targets {tuple(target_NM.shape)}; both must be (pictures, concepts)"
        )
    if not score_NM.isfinite().all():
        row, concept = (~score_NM.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"the score of picture {row}, concept {concept} is {score_NM[row, concept].item()}; scores must be finite")
    target_NM = target_NM.to(score_NM.device)
    known_NM = ~target_NM.isnan()
    strange_NM = known_NM & (target_NM != 0) & (target_NM != 1)
    if strange_NM.any():
        row, concept = strange_NM.nonzero()[0].tolist()
        raise ValueError(
            f"the target of picture {row}, concept {concept} is {target_NM[row, concept].item():g}; targets must be 0, 1 or "
            "NaN (unknown): cut soft labels at a threshold first"
        )
    return score_NM.detach().T.contiguous(), known_NM.T, (known_NM & (target_NM == 1)).T


def _ranks(score_MN: Tensor, known_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each score how many known scores lie below it and how many do not lie above it; and the ascending order."""
    filled_MN = score_MN.double().masked_fill(~known_MN, torch.inf)  # unknown ones sort behind everything
    sorted_MN, order_MN = filled_MN.sort(dim=1)
    below_MN = torch.searchsorted(sorted_MN, filled_MN, right=False)
    not_above_MN = torch.searchsorted(sorted_MN, filled_MN, right=True)
    return below_MN, not_above_MN, order_MN


def _nan_for_zero(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, torch.nan)
