"""Paired statistics over the pictures of one split: bootstrap draws shared by all models, and tests of single concepts and classes.

A draw resamples pictures with replacement; it is kept as how often each picture was drawn, so that a mean over a draw is a product
with a matrix. All models are measured on the same draws, which is what makes a difference paired.

n pictures, D draws, M concepts, G sub-populations or classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dotcbm.report.record import Interval

__all__ = [
    "adjusted",
    "auroc_draws",
    "delong",
    "draw_counts",
    "group_draws",
    "interval",
    "mcnemar",
    "mean_draws",
    "unpaired_difference",
]

_FEW = 5  # positives and negatives that DeLong's normal approximation is asked for at least; the usual rule of thumb for cell counts


def draw_counts(n: int, *, num_draws: int = 1000, seed: int = 0) -> Tensor:
    """(n, D) float32: how often each picture is in each bootstrap draw of n pictures."""
    generator = torch.Generator().manual_seed(seed)
    count_Dn = torch.zeros(num_draws, n)
    for d in range(num_draws):
        count_Dn[d] = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n)
    return count_Dn.T.contiguous()


def interval(value: float, drawn_D: Tensor, *, n: int, level: float = 0.95, over: str = "pictures") -> Interval:
    """The percentile interval of a figure; draws in which it is not defined (NaN) are left out, and without any left there is none."""
    if math.isnan(value):
        return Interval(None, n=n, over=over)
    known = drawn_D.double()
    known = known[~known.isnan()]
    if not len(known):
        return Interval(value, n=n, over=over)
    low, high = torch.quantile(known, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(value, low, high, n, over)


def mean_draws(value_n: Tensor, count_nD: Tensor, *, weight_n: Tensor | None = None) -> Tensor:
    """(D,) float64: sum of the values over the sum of the weights (1 by default) in each draw; NaN where the weights add up to 0."""
    value_n = value_n.double()
    weight_n = torch.ones_like(value_n) if weight_n is None else weight_n.double()
    total_D2 = count_nD.T.double() @ torch.stack([value_n, weight_n], 1)
    return total_D2[:, 0] / torch.where(total_D2[:, 1] > 0, total_D2[:, 1], torch.nan)


def group_draws(value_n: Tensor, count_nD: Tensor, *, group_n: Tensor, num_groups: int) -> Tensor:
    """(D, G) float64: mean of the values within each group in each draw; NaN for a group that a draw has no picture of."""
    count_Dn = count_nD.T.double()
    member_nG = torch.nn.functional.one_hot(group_n, num_groups).double()
    size_DG = count_Dn @ member_nG
    return (count_Dn @ (member_nG * value_n.double()[:, None])) / torch.where(size_DG > 0, size_DG, torch.nan)


def auroc_draws(score_n: Tensor, truth_n: Tensor, count_nD: Tensor) -> Tensor:
    """(D,) float64: the area under the ROC curve in each draw, NaN where a draw lacks positives or negatives.

    Args:
        score_n: (n,) finite scores.
        truth_n: (n,) in {0, 1}, NaN where unknown.
        count_nD: (n, D) as `draw_counts` gives it.
    """
    score_n = score_n.double()
    positive, negative = (truth_n == 1).nonzero()[:, 0], (truth_n == 0).nonzero()[:, 0]
    positive = positive[score_n[positive].argsort()]
    score_p, score_u = score_n[positive].contiguous(), score_n[negative].contiguous()
    count_pD, count_uD = count_nD[positive], count_nD[negative]
    # A negative counts for all positives from its own place upwards: adding it there and cumulating over the positives, which are few,
    # is eight times as fast as cumulating over the negatives. float32 holds these counts exactly up to 2^24.
    places = [torch.searchsorted(score_p, score_u, right=right) for right in (False, True)]
    if torch.equal(*places):  # no ties; else they count half
        places = places[:1]
    won_D = torch.zeros(count_nD.shape[1], dtype=torch.float64)
    for place_u in places:
        passed_pD = count_nD.new_zeros(len(positive) + 1, count_nD.shape[1]).index_add_(0, place_u, count_uD).cumsum_(0)
        won_D += (count_pD * passed_pD[:-1]).sum(0).double() / len(places)
    pairs_D = count_pD.sum(0).double() * count_uD.sum(0).double()
    return won_D / torch.where(pairs_D > 0, pairs_D, torch.nan)


def delong(a_n: Tensor, b_n: Tensor, truth_n: Tensor) -> float | None:
    """Two-sided p-value of equal areas under the ROC curve of two scores of the same pictures.

    DeLong, DeLong and Clarke-Pearson, Biometrics 1988: the difference over its deviation, estimated from the pictures' shares of
    both areas, is normal. The deviation is bounded below by the smallest step that the difference can make.

    Returns:
        None with fewer than 5 positives or negatives, where the approximation says nothing.
    """
    positive, negative = truth_n == 1, truth_n == 0
    num_p, num_u = int(positive.sum()), int(negative.sum())
    if min(num_p, num_u) < _FEW:
        return None
    shares = [_placements(score.double()[positive], score.double()[negative]) for score in (a_n, b_n)]
    difference = float(shares[0][0].mean() - shares[1][0].mean())
    if difference == 0:
        return 1.0
    gap_p, gap_u = shares[0][0] - shares[1][0], shares[0][1] - shares[1][1]
    variance = float(gap_p.var() / num_p + gap_u.var() / num_u)
    deviation = max(variance**0.5, 0.5 / (num_p * num_u))
    return math.erfc(abs(difference) / deviation / 2**0.5)


def _placements(high_p: Tensor, low_u: Tensor) -> tuple[Tensor, Tensor]:
    """For each positive the share of negatives below it, for each negative the share of positives above it; ties count half."""
    sorted_p, sorted_u = high_p.sort().values, low_u.sort().values
    below = torch.searchsorted(sorted_u, high_p, right=False) + torch.searchsorted(sorted_u, high_p, right=True)
    above = 2 * len(high_p) - torch.searchsorted(sorted_p, low_u, right=False) - torch.searchsorted(sorted_p, low_u, right=True)
    return below.double() / (2 * len(low_u)), above.double() / (2 * len(high_p))


def mcnemar(a_n: Tensor, b_n: Tensor) -> float:
    """Exact two-sided p-value of McNemar's test (1947): of the pictures that one gets right and the other wrong, as many either way.

    Args:
        a_n, b_n: (n,) bool, right or not.
    """
    first, second = int((a_n & ~b_n).sum()), int((b_n & ~a_n).sum())
    total, smaller = first + second, min(first, second)
    if first == second:
        return 1.0
    ways = tail = 1  # of choosing k of all, and of choosing up to k
    for k in range(smaller):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def adjusted(p: Sequence[float | None]) -> tuple[float | None, ...]:
    """Benjamini and Hochberg's q-value (1995) of each p-value: the smallest false discovery rate at which it counts as a discovery.

    q_(i) = min over k >= i of p_(k) m / k, m tests that were made; None, where no test could be made, stays None.
    """
    made = sorted((value, i) for i, value in enumerate(p) if value is not None)
    q: list[float | None] = [None] * len(p)
    smallest = 1.0
    for rank in range(len(made), 0, -1):
        value, i = made[rank - 1]
        smallest = min(smallest, value * len(made) / rank)
        q[i] = smallest
    return tuple(q)


def unpaired_difference(a: Interval, b: Interval) -> Interval:
    """a - b of two figures of which only the intervals are known, as if they were measured on different pictures.

    Zou and Donner, Statistics in Medicine 2008 (MOVER): the distances to the ends of both intervals add up as squares. For figures of the
    same pictures, which usually rise and fall together, the interval is wider than it needs to be.
    """
    if a.value is None or b.value is None:
        return Interval(None)
    difference = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Interval(difference, n=min(a.n, b.n), over=a.over)
    low = difference - math.hypot(a.value - a.low, b.high - b.value)
    high = difference + math.hypot(a.high - a.value, b.value - b.low)
    return Interval(difference, low, high, min(a.n, b.n), a.over)
