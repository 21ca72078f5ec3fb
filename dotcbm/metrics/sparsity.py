"""How many concepts a class is read from: the number of effective concepts (NEC), and accuracy at a given number.

    NEC(W) = (weights of W that are not zero) / K        Srivastava et al. (VLG-CBM), NeurIPS 2024, section 4

A dense head on random concepts is as accurate as one on real concepts, so accuracies compare only at equal NEC. ANEC-5 is the
accuracy at NEC 5, ANEC-avg its mean over 5, 10, 15, 20, 25 and 30.

K classes, F inputs of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ANEC_LEVELS", "Anec", "anec", "nec", "truncate_weights"]

ANEC_LEVELS = (5, 10, 15, 20, 25, 30)
"""The NECs that VLG-CBM averages over (`measure_level` in its evaluations/sparse_utils.py)."""


@dataclass(frozen=True)
class Anec:
    """Accuracy under sparsity.

    Attributes:
        anec_5: Accuracy at NEC 5.
        anec_avg: Mean accuracy over `ANEC_LEVELS`.
    """

    anec_5: float
    anec_avg: float


def nec(weight_KF: Tensor, *, tol: float = 0.0) -> float:
    """Weights above `tol` in magnitude, divided by the number of classes.

    Args:
        weight_KF: (K, F) weights of a linear head.
        tol: VLG-CBM counts above 1e-5, since SAGA leaves small values; heads from `dotcbm.training.sparse_head` hold exact zeros.

    Returns:
        Between 0 and F.

    Raises:
        ValueError: Not a matrix, or without classes.
    """
    _check(weight_KF)
    return float((weight_KF.abs() > tol).sum()) / len(weight_KF)


def truncate_weights(weight_KF: Tensor, nec: int) -> Tensor:
    """The nec * K weights of largest magnitude over the whole matrix; the others become 0.

    A class may keep more than `nec` and another fewer: the count is a mean, as VLG-CBM's (`weight_truncation` in its
    model/utils.py). Theirs keeps all that are equal to the smallest one kept; here the first in reading order stay, so that
    the NEC is never above the one asked for.

    Args:
        weight_KF: (K, F). Magnitudes compare only between inputs of one scale: give weights for standardised inputs.
        nec: Weights to keep for each class in the mean; F or more keeps all.

    Returns:
        (K, F) a new tensor.

    Raises:
        ValueError: Not a matrix, or nec below 1.
    """
    _check(weight_KF)
    if nec < 1:
        raise ValueError(f"nec is {nec}; a class needs one weight at least")
    flat = weight_KF.flatten()
    keep = flat.abs().argsort(descending=True, stable=True)[: nec * len(weight_KF)]
    return torch.zeros_like(flat).index_copy(0, keep, flat[keep]).view_as(weight_KF)


def anec(accuracy_by_nec: Mapping[int, float]) -> Anec:
    """ANEC-5 and ANEC-avg of the accuracies of truncated heads.

    Args:
        accuracy_by_nec: NEC -> accuracy, with all of `ANEC_LEVELS`; others are ignored.

    Raises:
        ValueError: A level is missing.
    """
    missing = [level for level in ANEC_LEVELS if level not in accuracy_by_nec]
    if missing:
        raise ValueError(f"accuracies are given for NEC {sorted(accuracy_by_nec)}; ANEC also needs {missing}")
    return Anec(accuracy_by_nec[5], math.fsum(accuracy_by_nec[level] for level in ANEC_LEVELS) / len(ANEC_LEVELS))


def _check(weight_KF: Tensor) -> None:
    if weight_KF.ndim != 2 or not len(weight_KF):
        raise ValueError(f"weights have shape {tuple(weight_KF.shape)}; a head's are (classes, inputs)")
