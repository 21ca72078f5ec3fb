"""Intervals against SciPy, against closed forms, and by counting how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dotcbm.metrics.intervals import bootstrap, bootstrap_mean, newcombe, paired_bootstrap, picture_sums, wilson


@settings(max_examples=50)
@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n: int, share: float, level: float) -> None:
    hits = round(share * n)
    expected = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    assert wilson(hits, n, level=level) == pytest.approx((hits / n, expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_borders() -> None:
    assert wilson(0, 10)[:2] == (0.0, 0.0)
    assert wilson(10, 10)[2] == 1.0
    assert 0 < wilson(0, 10)[2] < 0.31
    assert all(math.isnan(value) for value in wilson(0, 0))


def test_newcombe_gives_the_worked_example_of_the_paper() -> None:
    """Newcombe 1998, Table II, method 10: 56/70 - 48/80."""
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert all(math.isnan(value) for value in newcombe(1, 2, 0, 0))


def test_bootstrap_agrees_with_scipy() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    expected = stats.bootstrap((values.numpy(),), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0))
    value, low, high = bootstrap_mean(values, num_draws=20_000)
    assert value == pytest.approx(float(values.mean()))
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=1.5e-3)  # the ends' own noise at 20,000 draws
    general = bootstrap(lambda row_n: float(values[row_n].mean()), 200, num_draws=4000)
    assert general == pytest.approx((value, low, high), abs=3e-3)


def test_the_ratio_resamples_numerator_and_denominator_together() -> None:
    g = torch.Generator().manual_seed(1)
    value, weight = torch.rand(150, generator=g, dtype=torch.float64), torch.randint(0, 9, (150,), generator=g)

    def ratio(rows: np.ndarray) -> float:
        return float((value.numpy()[rows] * weight.numpy()[rows]).sum() / weight.numpy()[rows].sum())

    expected = stats.bootstrap(
        (np.arange(150),), ratio, method="percentile", n_resamples=5000, vectorized=False, rng=np.random.default_rng(0)
    ).confidence_interval
    got = bootstrap_mean(value, weight_N=weight, num_draws=5000)
    assert got[0] == pytest.approx(ratio(np.arange(150)))
    assert got[1:] == pytest.approx((expected.low, expected.high), abs=3e-3)


def test_pictures_without_a_value_are_left_out() -> None:
    known = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    holes = torch.tensor([0.0, torch.nan, 1.0, 1.0, torch.nan, 0.0, 1.0])
    assert bootstrap_mean(holes) == bootstrap_mean(known)
    assert bootstrap_mean(holes, weight_N=torch.ones(7)) == bootstrap_mean(known)
    weight = torch.tensor([1.0, 5.0, 1.0, torch.nan, 5.0, 1.0, 0.0])
    assert bootstrap_mean(holes, weight_N=weight)[0] == pytest.approx(1 / 3)
    assert all(math.isnan(value) for value in bootstrap_mean(torch.full((3,), torch.nan)))
    assert all(math.isnan(value) for value in bootstrap(lambda row_n: 0.0, 0))
    assert bootstrap_mean(torch.tensor([0.3], dtype=torch.float64)) == pytest.approx((0.3, 0.3, 0.3))


def test_draws_in_several_blocks_are_the_same_kind_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(2))
    whole = bootstrap_mean(values, num_draws=3000)
    monkeypatch.setattr("dotcbm.metrics.intervals._CELLS", 700)  # 7 draws a block, the last one of 4
    assert bootstrap_mean(values, num_draws=3000) == pytest.approx(whole, abs=6e-3)


def test_the_seed_decides() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pairing_removes_what_both_share() -> None:
    g = torch.Generator().manual_seed(0)
    shared, noise = torch.randn(300, generator=g), torch.randn(300, generator=g)
    a, b = shared + 0.1, shared + 0.05 * noise
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(float((a - b).mean()), abs=1e-6)
    assert 0 < low < difference < high
    wide = bootstrap_mean(a)
    assert high - low < (wide[2] - wide[1]) / 5
    a[0] = torch.nan
    assert paired_bootstrap(a, b)[0] == pytest.approx(float((a - b)[1:].mean()), abs=1e-6)
    assert paired_bootstrap(b, b) == (0.0, 0.0, 0.0)


def test_ninety_five_percent_intervals_hold_about_ninety_five_times_in_a_hundred() -> None:
    g = torch.Generator().manual_seed(0)
    draws, held = 300, {"mean": 0, "ratio": 0, "wilson": 0}
    for i in range(draws):
        value = torch.rand(80, generator=g).square()
        low, high = bootstrap_mean(value, num_draws=400, seed=i)[1:]
        held["mean"] += low <= 1 / 3 <= high
        pairs = torch.randint(1, 10, (80,), generator=g)  # the share of hits varies with the picture: pairs are not independent
        rate = torch.rand(80, generator=g)
        low, high = bootstrap_mean(rate, weight_N=pairs, num_draws=400, seed=i)[1:]
        held["ratio"] += low <= 0.5 <= high
        low, high = wilson(int((torch.rand(40, generator=g) < 0.1).sum()), 40)[1:]
        held["wilson"] += low <= 0.1 <= high
    for name, number in held.items():  # three standard errors of a share of 300, and the percentile method's small undercoverage
        assert 0.90 <= number / draws <= 0.99, (name, number / draws)


def test_pictures_are_resampled_and_not_pairs() -> None:
    """Ten pairs of each picture that always agree carry the information of one."""
    hit_B = (torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    value_BM, counts_BM = hit_B[:, None].expand(-1, 10), torch.ones(100, 10, dtype=torch.bool)
    mean_B, number_B = picture_sums(value_BM, counts_BM)
    assert number_B.tolist() == [10] * 100
    by_picture = bootstrap_mean(mean_B, weight_N=number_B)
    assert by_picture == pytest.approx(bootstrap_mean(hit_B))
    by_pair = bootstrap_mean(value_BM.flatten())
    assert by_picture[2] - by_picture[1] > 2.5 * (by_pair[2] - by_pair[1])  # sqrt(10) in theory
    counts_BM[0] = False
    mean_B, number_B = picture_sums(value_BM.masked_fill(~counts_BM, torch.nan), counts_BM)
    assert mean_B[0].isnan()
    assert number_B[0] == 0
    assert bootstrap_mean(mean_B, weight_N=number_B)[0] == pytest.approx(float(hit_B[1:].mean()))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="5 hits of 3"):
        wilson(5, 3)
    with pytest.raises(ValueError, match="level is 95"):
        wilson(1, 3, level=95)
    with pytest.raises(ValueError, match="num_draws is 0"):
        bootstrap_mean(torch.ones(3), num_draws=0)
    with pytest.raises(ValueError, match="one value for each picture"):
        bootstrap_mean(torch.ones(3, 2))
    with pytest.raises(ValueError, match="one weight >= 0 for each"):
        bootstrap_mean(torch.ones(3), weight_N=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="same pictures in both"):
        paired_bootstrap(torch.ones(3), torch.ones(4))
