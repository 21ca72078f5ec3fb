"""NEC and truncation against sorted lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dotcbm.metrics.sparsity import ANEC_LEVELS, anec, nec, truncate_weights


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 15), st.integers(0, 1000))
def test_truncation_keeps_the_largest_of_the_whole_matrix(classes: int, inputs: int, wanted: int, seed: int) -> None:
    weight = torch.randn(classes, inputs, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties and zeros
    kept = truncate_weights(weight, wanted)
    assert nec(kept) <= wanted
    assert ((kept == 0) | (kept == weight)).all()
    count = min(wanted * classes, weight.numel())
    expected = sorted(weight.abs().flatten().tolist(), reverse=True)[:count]
    assert sorted(kept.abs().flatten().tolist(), reverse=True)[:count] == expected


def test_a_class_may_keep_more_than_its_share() -> None:
    weight = torch.tensor([[5.0, -4.0, 3.0], [1.0, 0.5, 0.2]])
    assert torch.equal(truncate_weights(weight, 1), torch.tensor([[5.0, -4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(weight, torch.tensor([[5.0, -4.0, 3.0], [1.0, 0.5, 0.2]]))


def test_nec_counts_above_the_tolerance() -> None:
    weight = torch.tensor([[1.0, 1e-6, 0.0], [0.0, -2.0, 3.0]])
    assert nec(weight) == 2.0
    assert nec(weight, tol=1e-5) == 1.5


def test_anec_is_the_mean_over_the_six_levels() -> None:
    accuracy = {level: level / 100 for level in (*ANEC_LEVELS, 112)}
    assert anec(accuracy).anec_5 == 0.05
    assert anec(accuracy).anec_avg == pytest.approx(0.175)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs \[20\]"):
        anec({level: 0.5 for level in ANEC_LEVELS if level != 20})
    with pytest.raises(ValueError, match="nec is 0"):
        truncate_weights(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        nec(torch.ones(3))
