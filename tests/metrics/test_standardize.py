"""Standardised columns against scikit-learn, and what is left of columns that vary by rounding alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from dotcbm.metrics.standardize import standardize


@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100), scale=st.floats(0.1, 100))
def test_columns_that_vary_are_those_of_scikit_learn(seed: int, shift: float, scale: float) -> None:
    value = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed)) * scale + shift
    scaler = StandardScaler().fit(value.double().numpy())
    z_nX, mean_X, deviation_X = standardize(value)
    np.testing.assert_allclose(z_nX, scaler.transform(value.double().numpy()), atol=1e-9)
    np.testing.assert_allclose(mean_X, scaler.mean_, atol=1e-9)
    np.testing.assert_allclose(deviation_X, scaler.scale_, rtol=1e-9)


@given(constant=st.floats(-1e4, 1e4), rounding=st.floats(0, 2e-6))
def test_a_constant_up_to_rounding_is_a_column_of_zeros(constant: float, rounding: float) -> None:
    noise = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_nX, mean_X, deviation_X = standardize(constant * (1 + rounding * noise))
    assert torch.equal(z_nX, torch.zeros_like(z_nX))
    assert abs(float(mean_X) - constant) <= 1e-5 * abs(constant)
    assert float(deviation_X) == 1
