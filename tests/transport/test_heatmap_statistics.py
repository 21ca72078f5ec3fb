"""Statistics of heatmaps: by hand, bounds, and the same without a plan."""

from __future__ import annotations

import pytest
import torch
from fakes.transport import DEVICE, problem
from hypothesis import given
from hypothesis import strategies as st

from dotcbm.transport.heatmap_statistics import statistics_of_plan
from dotcbm.transport.sinkhorn import concept_scores, sinkhorn

pytest.importorskip("triton", reason="Triton is not installed")


def test_by_hand():
    plan_BNM = torch.tensor([[[0.25, 0.1, 0.0, 0.0], [0.25, 0.1, 0.0, 0.2], [0.0, 0.2, 0.0, 0.0]]], dtype=torch.float64)
    peak_BM, share_BM, spread_BM = statistics_of_plan(plan_BNM)
    assert peak_BM.tolist() == [[0, 2, 0, 1]]
    torch.testing.assert_close(share_BM, torch.tensor([[0.5, 0.5, 0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(spread_BM, torch.tensor([[2.0, 8**0.5, 0.0, 1.0]], dtype=torch.float64))  # (1/4, 1/4, 1/2): 1.5 bits


@given(seed=st.integers(0, 1000), N=st.integers(1, 30), M=st.integers(1, 12), scale=st.floats(0.1, 30))
def test_within_bounds_whatever_the_mass(seed: int, N: int, M: int, scale: float):
    plan_BNM = (scale * torch.randn(2, N, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).exp()
    peak_BM, share_BM, spread_BM = statistics_of_plan(plan_BNM)
    assert (plan_BNM.gather(1, peak_BM[:, None])[:, 0] == plan_BNM.amax(1)).all()
    assert ((share_BM >= 1 / N - 1e-9) & (share_BM <= 1 + 1e-9)).all()
    assert ((spread_BM >= 1 / share_BM * (1 - 1e-9)) & (spread_BM <= N * (1 + 1e-9))).all()  # entropy is at least min-entropy
    again = statistics_of_plan(7 * plan_BNM)
    torch.testing.assert_close(again.spread_BM, spread_BM)


@pytest.mark.parametrize(("N", "M"), [(1, 1), (9, 40), (70, 33)])
@pytest.mark.parametrize("relax", [None, 0.3])
@pytest.mark.parametrize("solver", ["torch", "triton"])
def test_without_a_plan_as_with_one(solver: str, N: int, M: int, relax: float | None):
    cost, theta, gamma = problem(3, 2, N, M, torch.float32)
    if N > 1:
        theta[:, 0] = 0
        theta = theta / theta.sum(1, keepdim=True)
    if M > 1:
        gamma[:, -1] = 0
        gamma = gamma / gamma.sum(1, keepdim=True)
    settings = {"eps": 0.1, "tol": 1e-6, "relax_patch": relax, "check": False}
    found = concept_scores(cost, theta, gamma, solver=solver, statistics=True, **settings).statistics
    expected = statistics_of_plan(sinkhorn(cost.double(), theta.double(), gamma.double(), solver="torch", **settings).plan_BNM)
    assert found is not None
    assert (found.peak_BM == expected.peak_BM).all()
    torch.testing.assert_close(found.share_BM.double(), expected.share_BM, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.spread_BM.double(), expected.spread_BM, atol=1e-5, rtol=1e-4)
    assert concept_scores(cost, theta, gamma, solver=solver, **settings).statistics is None


def test_triton_operator_is_registered_as_torch_wants_it():
    from dotcbm.transport import triton_statistics

    cost, theta, gamma = problem(5, 2, 9, 40, torch.float32)
    found = sinkhorn(cost, theta, gamma, eps=0.1)
    inputs = (cost, found.log_u_BN, found.log_v_BM, 0.1)
    torch.library.opcheck(triton_statistics._operator, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="half precision on CUDA is another load")
def test_triton_reads_half_precision_costs():
    cost, theta, gamma = problem(6, 2, 50, 40, torch.float32)
    found = concept_scores(cost.bfloat16(), theta, gamma, eps=0.1, solver="triton", statistics=True, check=False).statistics
    expected = statistics_of_plan(sinkhorn(cost.bfloat16().float(), theta, gamma, eps=0.1).plan_BNM)
    assert found is not None
    torch.testing.assert_close(found.share_BM, expected.share_BM, atol=1e-3, rtol=1e-2)
