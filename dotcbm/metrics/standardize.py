"""Columns with mean 0 and deviation 1, where they vary by more than rounding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["standardize"]

_ROUNDING = 1e-5  # of a column's largest value: what sums in single precision leave of a constant, with a margin of ten


def standardize(value_nX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised columns, and what standardised them.

    A concept that never varies has a logit that is constant but for the last digits. Divided by their deviation, those would become a
    column like any other: noise in training, and other noise for another device or order of summation.

    Args:
        value_nX: (n, X) of any floating type.

    Returns:
        (n, X) float64 (value - mean) / deviation, 0 in columns that are constant up to rounding; (X,) means; (X,) deviations of all n,
        1 for such columns.
    """
    value_nX = value_nX.double()
    mean_X, deviation_X = value_nX.mean(0), value_nX.std(0, unbiased=False)
    varies_X = deviation_X > _ROUNDING * value_nX.abs().amax(0)
    deviation_X = torch.where(varies_X, deviation_X, 1.0)
    return torch.where(varies_X, (value_nX - mean_X) / deviation_X, 0.0), mean_X, deviation_X
