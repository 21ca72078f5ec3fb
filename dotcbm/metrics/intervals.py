"""How far a figure can be trusted: intervals for shares, means, differences, and for any statistic of pictures.

Pictures are what is drawn at random, so pictures are what is resampled: a mean over pairs of picture and concept is a ratio of
sums over pictures (`picture_sums` gives value and weight for `bootstrap_mean`), since the pairs of one picture are not independent.

All functions give (value, low, high) and draw from their own generator: the same seed gives the same interval. A statistic that
never varies has an interval of width 0; for shares near 0 or 1 use `wilson`, which knows better. n and N count pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap", "bootstrap_mean", "newcombe", "paired_bootstrap", "picture_sums", "wilson"]

Interval = tuple[float, float, float]
"""value, low, high."""

_UNKNOWN: Interval = (math.nan, math.nan, math.nan)
_CELLS = 4_000_000  # Draws times pictures held at once: 32 MB of indices.


def wilson(hits: int, n: int, *, level: float = 0.95) -> Interval:
    """Score interval of a share (Wilson 1927): right also for few pictures and for shares near 0 or 1.

    Args:
        hits: In [0, n].
        n: How many were counted.
        level: Coverage in (0, 1).

    Returns:
        hits / n and the ends, all in [0, 1]; NaN for n = 0.

    Raises:
        ValueError: Counts or level out of range.
    """
    _check_level(level)
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n}: hits must lie in [0, n]")
    if n == 0:
        return _UNKNOWN
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the borders the closed form is 0 or 1 up to rounding.
    return share, 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half


def newcombe(hits_a: int, n_a: int, hits_b: int, n_b: int, *, level: float = 0.95) -> Interval:
    """Difference a - b of two independent shares, the ends from their Wilson intervals (Newcombe 1998, method 10).

    For the same pictures seen twice use `paired_bootstrap`, which is sharper. NaN if either n is 0.
    """
    a, low_a, high_a = wilson(hits_a, n_a, level=level)
    b, low_b, high_b = wilson(hits_b, n_b, level=level)
    return a - b, a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, *, num_draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:  # fmt: skip
    """Percentile interval (Efron 1979) of any statistic of pictures, one call for each draw.

    Args:
        statistic: Takes (n,) long rows, drawn with replacement, and gives a figure; draws for which it is NaN are left out.
        n: Number of pictures.
        num_draws: 1000 draws place the ends to about a twentieth of the interval's width.
        level: Coverage in (0, 1).
        seed: Of the draws.

    Returns:
        The statistic of all pictures once, and the ends; NaN for n = 0.

    Raises:
        ValueError: Level or number of draws out of range.
    """
    _check_draws(num_draws, level)
    if n == 0:
        return _UNKNOWN
    generator = torch.Generator().manual_seed(seed)
    draws = torch.tensor([statistic(torch.randint(n, (n,), generator=generator)) for _ in range(num_draws)], dtype=torch.float64)
    return float(statistic(torch.arange(n))), *_ends(draws, level)


def bootstrap_mean(
    value_N: Tensor, *, weight_N: Tensor | None = None, num_draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:  # fmt: skip
    """Percentile interval of a mean over pictures, or of the ratio sum(weight * value) / sum(weight).

    Args:
        value_N: (N,); pictures with NaN are left out.
        weight_N: (N,) not negative, for instance how many pairs of a picture count; NaN counts as 0.
        num_draws: As in `bootstrap`.
        level: Coverage in (0, 1).
        seed: Of the draws.

    Returns:
        NaN if no picture counts.

    Raises:
        ValueError: Shapes do not fit, a weight is negative, or level or number of draws is out of range.
    """
    _check_draws(num_draws, level)
    if value_N.ndim != 1:
        raise ValueError(f"values have shape {tuple(value_N.shape)}; give one value for each picture, (N,)")
    value_N = value_N.detach().double().cpu()
    weight_N = torch.ones_like(value_N) if weight_N is None else weight_N.detach().double().cpu().nan_to_num(0.0)
    if weight_N.shape != value_N.shape or (weight_N < 0).any():
        raise ValueError(f"weights have shape {tuple(weight_N.shape)} for {len(value_N)} values; give one weight >= 0 for each")
    counts_N = ~value_N.isnan() & (weight_N > 0)
    weight_n = weight_N[counts_N]
    total_n = value_N[counts_N] * weight_n
    n = len(weight_n)
    if n == 0:
        return _UNKNOWN
    generator = torch.Generator().manual_seed(seed)
    draws: list[Tensor] = []
    for done in range(0, num_draws, step := max(1, _CELLS // n)):
        row_Dn = torch.randint(n, (min(step, num_draws - done), n), generator=generator)
        draws.append(total_n[row_Dn].sum(1) / weight_n[row_Dn].sum(1))
    return float(total_n.sum() / weight_n.sum()), *_ends(torch.cat(draws), level)


def paired_bootstrap(
    a_N: Tensor,
    b_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`bootstrap_mean` of a - b for the same pictures; pictures for which either is NaN are left out.

    Raises:
        ValueError: As `bootstrap_mean`.
    """
    if a_N.shape != b_N.shape:
        raise ValueError(f"{tuple(a_N.shape)} values against {tuple(b_N.shape)}: a paired difference needs the same pictures in both")
    return bootstrap_mean(a_N.double() - b_N.double(), weight_N=weight_N, num_draws=num_draws, level=level, seed=seed)


def picture_sums(value_BM: Tensor, counts_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the pairs that count and their number, for each picture: value and weight for `bootstrap_mean`.

    Args:
        value_BM: (B, M) values of pairs of picture and concept.
        counts_BM: (B, M) bool, `dotcbm.metrics.localization.scored_pairs` for instance.

    Returns:
        (B,) mean, NaN for a picture without a pair, and (B,) number of pairs.
    """
    number_B = counts_BM.sum(1)
    total_B = torch.where(counts_BM, value_BM.double(), 0.0).sum(1)
    return total_B / torch.where(number_B > 0, number_B.double(), torch.nan), number_B


def _ends(draws: Tensor, level: float) -> tuple[float, float]:
    ends = torch.nanquantile(draws, draws.new_tensor([(1 - level) / 2, (1 + level) / 2]))
    return float(ends[0]), float(ends[1])


def _check_draws(num_draws: int, level: float) -> None:
    _check_level(level)
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; a bootstrap needs at least one draw, 1000 for 95 % intervals")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a coverage lies in (0, 1), 0.95 for instance")
