"""Mutual information between one-dimensional variables, in nats, from samples.

    discrete, discrete       plug-in: the frequencies as they are
    continuous, discrete     psi(n) + <psi(k)> - <psi(n_y)> - <psi(m)>       Ross, PLoS ONE 9(2), 2014
    continuous, continuous   psi(n) + psi(k) - <psi(n_x + 1) + psi(n_y + 1)>  Kraskov, Stoegbauer and Grassberger, Phys. Rev. E 69, 2004

with k-th nearest neighbours, as scikit-learn's `mutual_info_classif` and `mutual_info_regression`. Estimates below 0 become 0.
The neighbour estimators need distinct values: `separate_ties` first. They see far too little of a variable that repeats values.

In this file n counts samples and X variables that are estimated at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.metrics.standardize import standardize

__all__ = ["discrete_entropy", "discrete_information", "ksg_information", "ross_information", "separate_ties"]

_TIE_NOISE = 1e-10  # of a standard deviation: scikit-learn's, after Kraskov et al.


def separate_ties(value_nX: Tensor, *, seed: int = 0) -> Tensor:
    """(n, X) float64: each variable divided by its deviation, plus noise far below it that depends on the seed alone."""
    z_nX, mean_X, deviation_X = standardize(value_nX.detach().cpu())
    scaled_nX = z_nX + mean_X / deviation_X
    noise_nX = torch.randn(value_nX.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scaled_nX + _TIE_NOISE * scaled_nX.abs().mean(0).clamp(min=1) * noise_nX


def discrete_entropy(count: Tensor) -> Tensor:
    """Entropy of counts along the last dimension; 0 where all are 0."""
    share = count.double() / count.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1)


def discrete_information(joint_XAB: Tensor) -> Tensor:
    """(X,) plug-in information of tables of counts (X, A, B)."""
    both_X = discrete_entropy(joint_XAB.flatten(1))
    return (discrete_entropy(joint_XAB.sum(2)) + discrete_entropy(joint_XAB.sum(1)) - both_X).clamp(min=0)


def ross_information(value_nX: Tensor, label_n: Tensor, *, k: int = 3) -> Tensor:
    """Information between continuous variables and one discrete variable.

    Args:
        value_nX: (n, X) distinct values of each variable.
        label_n: (n,) integers. A value seen once has no neighbours and is left out, as in scikit-learn.
        k: Neighbours; fewer where a label is seen k times or fewer.

    Returns:
        (X,) float64; NaN if no label is seen twice.
    """
    label_n, count_L = label_n.unique(return_inverse=True, return_counts=True)[1:]
    repeated_n = count_L[label_n] > 1
    value_nX, label_n = value_nX.detach().double()[repeated_n], label_n[repeated_n]
    n = len(value_nX)
    if not n:
        return torch.full((value_nX.shape[1],), torch.nan, dtype=torch.float64)
    psi = _digamma_table(n)
    all_Xn = value_nX.T.contiguous().sort(dim=1).values
    margin_X1 = _rounding(all_Xn)
    total_X = torch.zeros(value_nX.shape[1], dtype=torch.float64)
    for label in label_n.unique():
        own_Xm = value_nX[label_n == label].T.contiguous().sort(dim=1).values
        m = own_Xm.shape[1]
        neighbours = min(k, m - 1)
        radius_Xm = _neighbour_distance(own_Xm, k=neighbours)
        inside_Xm = _count_within(all_Xn, own_Xm, radius_Xm - margin_X1)
        total_X += (psi[neighbours] - psi[m] - psi[inside_Xm]).sum(1)
    return (psi[n] + total_X / n).clamp(min=0)


def ksg_information(x_n: Tensor, y_n: Tensor, *, k: int = 3) -> float:
    """Information between two continuous variables of distinct values; n must be above k.

    Raises:
        ValueError: Too few samples.
        ModuleNotFoundError: SciPy is missing.
    """
    try:
        from scipy.spatial import KDTree
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('information between predicted concepts needs SciPy: pip install "dotcbm[audit]"') from error
    n = len(x_n)
    if n <= k:
        raise ValueError(f"{n} samples have no {k} neighbours each; give at least {k + 1}")
    plane = torch.stack([x_n, y_n], 1).double().numpy()
    distance = KDTree(plane).query(plane, k=k + 1, p=torch.inf)[0][:, -1]  # the first neighbour is the point itself
    radius_n = torch.from_numpy(distance)
    psi = _digamma_table(n)
    total = psi[n] + psi[k]
    for value_n in (x_n.double(), y_n.double()):
        sorted_1n = value_n.sort().values[None]
        # The count holds the point itself: n_x + 1.
        total = total - psi[_count_within(sorted_1n, value_n[None], radius_n[None] - _rounding(sorted_1n))].mean()
    return max(float(total), 0.0)


def _neighbour_distance(sorted_Xm: Tensor, *, k: int) -> Tensor:
    """(X, m) distance of each value to its k-th nearest: the narrowest of the windows of k + 1 values that hold it."""
    m = sorted_Xm.shape[1]
    best_Xm = torch.full_like(sorted_Xm, torch.inf)
    for before in range(k + 1):  # how many of the window lie before the value
        first, stop = before, m - (k - before)
        left = sorted_Xm[:, first:stop] - sorted_Xm[:, first - before : stop - before]
        right = sorted_Xm[:, first + k - before : stop + k - before] - sorted_Xm[:, first:stop]
        best_Xm[:, first:stop] = torch.minimum(best_Xm[:, first:stop], torch.maximum(left, right))
    return best_Xm


def _count_within(sorted_Xn: Tensor, centre_Xm: Tensor, radius_Xm: Tensor) -> Tensor:
    """(X, m) how many of the values lie within the radius of each centre, the centre itself among them."""
    above_Xm = torch.searchsorted(sorted_Xn, centre_Xm + radius_Xm, right=True)
    below_Xm = torch.searchsorted(sorted_Xn, centre_Xm - radius_Xm, right=False)
    return (above_Xm - below_Xm).clamp(min=1)


def _rounding(sorted_Xn: Tensor) -> Tensor:
    """(X, 1) what the sum of a centre and a radius may be off by; the k-th neighbour itself must lie outside."""
    return 4 * torch.finfo(torch.float64).eps * sorted_Xn.abs().amax(1, keepdim=True)


def _digamma_table(n: int) -> Tensor:
    """psi(0 ... n); the entry at 0 is never read."""
    return torch.special.digamma(torch.arange(n + 1, dtype=torch.float64).clamp(min=1))
