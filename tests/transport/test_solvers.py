"""What every solver promises: agreement with float64, and the edge cases. On CUDA where there is one, else Triton's interpreter.

pytest tests/transport/test_solvers.py
"""

from __future__ import annotations

import pytest
import torch
from fakes.transport import DEVICE, RELAX, SOLVERS, distance, problem, tangent
from torch import Tensor

from dotcbm.transport.sinkhorn import Solver, concept_scores, sinkhorn, solved_eagerly

pytest.importorskip("ot", reason="POT is not installed (pip install 'dotcbm[pot]')")
pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of rows that a mask leaves out

SIZES = [(13, 40), (9, 5), (7, 70)] + ([(196, 112), (196, 312), (100, 1000)] if DEVICE.type == "cuda" else [])
# Each kind of problem at one size, and the balanced ones at every size and eps.
CASES = [*((size, (None, None), eps) for size in SIZES for eps in (0.2, 0.05, 0.01)), *((SIZES[0], relax, 0.05) for relax in RELAX[1:])]


def reference(cost: Tensor, theta: Tensor, gamma: Tensor, weight: Tensor, **settings) -> tuple[Tensor, list[Tensor]]:
    """Plan and gradients of sum(plan * weight), unrolled in float64 to convergence."""
    masses = [x.double() / x.double().sum(1, keepdim=True) for x in (theta, gamma)]  # else no plan could meet both
    inputs = [x.requires_grad_() for x in (cost.double(), *masses)]
    plan = sinkhorn(*inputs, max_iter=3000, tol=1e-9, solver="torch", gradient="unroll", check=False, **settings).plan_BNM
    return plan.detach(), list(torch.autograd.grad((plan * weight).sum(), inputs))


@pytest.mark.parametrize(
    ("solver", "size", "relax", "eps"),
    # POT is slow, and has tests of its own for relaxed problems.
    [(solver, *case) for solver in SOLVERS for case in CASES if solver != "pot" or (case[1] == (None, None) and case[0] in SIZES[:3])],
)
def test_plan_and_gradients_agree_with_float64(solver: Solver, size, relax, eps):
    inputs = problem(1, 2, *size, torch.float32)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE)
    settings = {"eps": eps, "relax_patch": relax[0], "relax_concept": relax[1]}
    expected, gradients = reference(*inputs, weight, **settings)
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = sinkhorn(*leaves, max_iter=3000, tol=4e-6, solver=solver, check=False, **settings)
    assert found.plan_BNM.dtype == torch.float32
    assert distance(found.plan_BNM, expected) < 3e-5  # what a residual of 4e-6 leaves
    got = torch.autograd.grad(found.plan_BNM, leaves, weight.float())
    side = tangent if relax == (None, None) else lambda x: x
    assert distance(got[0], gradients[0]) < 1e-3
    for ours, theirs in zip(got[1:], gradients[1:], strict=True):
        assert distance(side(ours.double()), side(theirs)) < 1e-3


@pytest.mark.parametrize("solver", ["torch", "triton"])
@pytest.mark.parametrize("relax", RELAX)
def test_every_plain_iterate_is_that_of_float64(solver: Solver, relax):
    inputs = problem(3, 2, 11, 37, torch.float32)
    for max_iter in (1, 2, 5):
        settings = {"eps": 0.05, "max_iter": max_iter, "tol": None, "relax_patch": relax[0], "relax_concept": relax[1]}
        expected = sinkhorn(*(x.double() for x in inputs), solver="torch", **settings)
        found = sinkhorn(*inputs, solver=solver, **settings)
        assert distance(found.plan_BNM, expected.plan_BNM) < 1e-5
        torch.testing.assert_close(found.residual_B.double(), expected.residual_B, atol=1e-5, rtol=1e-4)
        assert found.num_iter_B.tolist() == [max_iter] * 2


@pytest.mark.parametrize("solver", ["torch", "triton"])
def test_each_picture_stops_on_its_own(solver: Solver):
    inputs = problem(4, 4, 30, 20, torch.float32)
    cost = inputs[0] * torch.tensor([0.1, 1.0, 0.5, 1.5], device=DEVICE)[:, None, None]
    together = sinkhorn(cost, *inputs[1:], eps=0.02, solver=solver)
    assert len(set(together.num_iter_B.tolist())) > 1
    assert (together.residual_B < 1e-3).all()
    for b in range(4):
        alone = sinkhorn(*(x[b : b + 1] for x in (cost, *inputs[1:])), eps=0.02, solver=solver)
        assert alone.num_iter == together.num_iter_B[b]
        torch.testing.assert_close(alone.plan_BNM[0], together.plan_BNM[b], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("solver", ["torch", "triton"])
@pytest.mark.parametrize("relax", [(None, None), (0.3, 0.2)])
@pytest.mark.parametrize("M", [5, 37])
def test_scores_are_the_column_sums_of_plan_times_similarity(solver: Solver, relax, M):
    inputs = problem(5, 2, 11, M, torch.float32)
    weight = torch.randn(2, M, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    settings = {"eps": 0.05, "max_iter": 500, "tol": 4e-6, "relax_patch": relax[0], "relax_concept": relax[1], "check": False}
    wide = [x.double().requires_grad_() for x in inputs]
    expected = (sinkhorn(*wide, solver="torch", **{**settings, "tol": 1e-9, "max_iter": 3000}).plan_BNM * (1 - wide[0])).sum(1)
    leaves = [x.clone().requires_grad_() for x in inputs]
    score_BM, residual_B, _ = concept_scores(*leaves, solver=solver, **settings)
    assert (residual_B < 1e-5).all()
    assert distance(score_BM, expected) < 3e-5
    side = tangent if relax == (None, None) else lambda x: x
    ours, theirs = torch.autograd.grad(score_BM, leaves, weight), torch.autograd.grad(expected, wide, weight.double())
    assert distance(ours[0], theirs[0]) < 1e-3
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert distance(side(a.double()), side(b)) < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("relax", [None, 0.3])
def test_entries_without_mass_are_not_there(solver: Solver, relax):
    cost, theta, gamma = problem(6, 2, 8, 5, torch.float32)
    theta[:, 3], gamma[1, 2] = 0.0, 0.0
    theta, gamma = theta / theta.sum(1, keepdim=True), gamma / gamma.sum(1, keepdim=True)
    settings = {"eps": 0.1, "solver": solver, "relax_patch": relax, "relax_concept": relax}
    leaves = [x.clone().requires_grad_() for x in (cost, theta, gamma)]
    found = sinkhorn(*leaves, max_iter=500, tol=1e-5, **settings)
    assert (found.plan_BNM[:, 3] == 0).all()
    assert (found.plan_BNM[1, :, 2] == 0).all()
    assert (found.log_u_BN[:, 3] == -torch.inf).all()
    assert found.log_v_BM[1, 2] == -torch.inf
    d_cost, d_theta, d_gamma = torch.autograd.grad(found.plan_BNM.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (d_cost, d_theta, d_gamma))
    assert (d_theta[:, 3] == 0).all()
    assert d_gamma[1, 2] == 0
    assert (d_cost[:, 3] == 0).all()
    assert (d_cost[1, :, 2] == 0).all()
    kept = [0, 1, 2, 4, 5, 6, 7]
    without = sinkhorn(cost[:, kept], theta[:, kept], gamma, max_iter=500, tol=1e-5, **settings)
    torch.testing.assert_close(found.plan_BNM[:, kept], without.plan_BNM, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("N", "M"), [(1, 1), (1, 5), (5, 1)])
def test_one_patch_or_one_concept(solver: Solver, N, M):
    cost, theta, gamma = problem(7, 2, N, M, torch.float32)
    cost.requires_grad_()
    plan = sinkhorn(cost, theta, gamma, eps=0.05, solver=solver).plan_BNM
    torch.testing.assert_close(plan, theta[:, :, None] * gamma[:, None], atol=0, rtol=1e-5)
    (gradient,) = torch.autograd.grad(plan.square().sum(), cost)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_eps_too_small_for_exp(solver: Solver, eps):
    cost = torch.tensor([[0.0, 2.0]] * 3 + [[2.0, 0.0]] * 3, device=DEVICE)[None].requires_grad_()
    theta, gamma = torch.full((6,), 1 / 6, device=DEVICE), torch.tensor([0.5, 0.5], device=DEVICE)
    found = sinkhorn(cost, theta, gamma, eps=eps, solver=solver)
    expected = torch.tensor([[1 / 6, 0.0]] * 3 + [[0.0, 1 / 6]] * 3, device=DEVICE)[None]
    torch.testing.assert_close(found.plan_BNM, expected, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(found.plan_BNM.square().sum(), cost)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_not_finite_names_the_picture(solver: Solver, bad):
    cost, theta, gamma = problem(8, 4, 6, 4, torch.float32)
    cost[2, 1, 3] = bad
    with pytest.raises(ValueError, match="cost of picture 2 of the batch"):
        sinkhorn(cost, theta, gamma, eps=0.1, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_marginals_that_cannot_be_met(solver: Solver):
    cost, theta, gamma = problem(9, 2, 6, 4, torch.float32)
    with pytest.raises(ValueError, match=r"theta of picture 0 of the batch sums to 2, not 1"):
        sinkhorn(cost, 2 * theta, gamma, eps=0.1, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs(solver: Solver, dtype):
    cost, theta, gamma = problem(10, 2, 20, 9, torch.float32)
    half = cost.to(dtype).requires_grad_()
    found = sinkhorn(half, theta, gamma, eps=0.1, max_iter=300, tol=1e-5, solver=solver)
    assert found.plan_BNM.dtype == torch.float32
    expected = sinkhorn(
        half.detach().double(), theta.double(), gamma.double(), eps=0.1, max_iter=2000, tol=1e-9, solver="torch", check=False
    )
    assert distance(found.plan_BNM, expected.plan_BNM) < 1e-4
    (gradient,) = torch.autograd.grad(found.plan_BNM.square().sum(), half)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_memory_layout_and_shared_marginals(solver: Solver):
    cost, theta, gamma = problem(11, 2, 6, 5, torch.float32)
    strided = cost.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    plain = cost.clone().requires_grad_()
    weight = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(1, 2)
    a = sinkhorn(strided, theta[0], gamma[0], eps=0.1, max_iter=300, tol=1e-5, solver=solver)
    b = sinkhorn(plain, theta[:1].repeat(2, 1), gamma[:1].repeat(2, 1), eps=0.1, max_iter=300, tol=1e-5, solver=solver)
    torch.testing.assert_close(a.plan_BNM, b.plan_BNM, atol=1e-6, rtol=1e-4)
    ours, theirs = torch.autograd.grad(a.plan_BNM, strided, weight), torch.autograd.grad(b.plan_BNM, plain, weight.contiguous())
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_batch(solver: Solver):
    cost, theta, gamma = problem(12, 2, 6, 4, torch.float32)
    found = sinkhorn(cost[:0].requires_grad_(), theta[:0], gamma[:0], eps=0.1, solver=solver)
    assert found.plan_BNM.shape == (0, 6, 4)
    assert found.num_iter == 0
    found.plan_BNM.sum().backward()


def test_triton_says_where_it_does_not_run(monkeypatch):
    cost, theta, gamma = problem(13, 2, 6, 4)
    with pytest.raises(ValueError, match=r"computes in float32, and the cost is in float64"):
        sinkhorn(cost, theta, gamma, eps=0.1, solver="triton")
    with pytest.raises(ValueError, match=r"takes up to 1024 concepts, and there are 1025"):
        sinkhorn(
            cost.float()[:, :, :1].expand(-1, -1, 1025),
            theta.float(),
            gamma.float()[:, :1].expand(-1, 1025),
            eps=0.1,
            solver="triton",
            check=False,
        )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"runs on CUDA, and the cost is on cpu"):
        sinkhorn(cost.cpu().float(), theta.cpu().float(), gamma.cpu().float(), eps=0.1, solver="triton")


def test_triton_operators_are_registered_as_torch_wants_them():
    from dotcbm.transport import backend_triton

    cost, theta, gamma = problem(14, 2, 9, 40, torch.float32)
    settings = (0.1, 20, 1e-4, None, None, True)
    leaves = [x.clone().requires_grad_() for x in (cost, theta, gamma)]
    for scores in (False, True):
        torch.library.opcheck(
            backend_triton._operator,
            (*leaves, *settings, scores),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
    found = backend_triton._forward(cost, theta, gamma, *settings, False)
    inputs = (torch.ones_like(cost), cost, theta, gamma, *found[1:4], 0.1, None, None, 1e-5, False)
    torch.library.opcheck(backend_triton._gradient_operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_triton_is_traced_as_a_whole():
    """By torch.compile, whose graph takes the operators as they are."""
    leaves = [x.requires_grad_() for x in problem(15, 2, 9, 40, torch.float32)]
    weight = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def plan(*x: Tensor) -> Tensor:
        return 2 * sinkhorn(*x, eps=0.1, solver="triton", check=False).plan_BNM

    traced = torch.compile(plan, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(traced, plan(*leaves))
    for a, b in zip(torch.autograd.grad(traced, leaves, weight), torch.autograd.grad(plan(*leaves), leaves, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("solver", ["torch", "pot"])
def test_a_compiled_function_can_leave_the_solver_to_eager_code(solver: Solver):
    """Between two graphs: plan, iterations and implicit gradient are then those of eager code. Elsewhere iterations are unrolled."""
    leaves = [x.requires_grad_() for x in problem(16, 2, 9, 40, torch.float32)]
    weight = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def plan(*x: Tensor) -> tuple[Tensor, Tensor]:
        found = sinkhorn(*x, eps=0.05, max_iter=200, tol=1e-4, solver=solver, check=False)
        return 2 * found.plan_BNM, found.num_iter_B

    expected, num_iter_B = plan(*leaves)
    gradients = torch.autograd.grad(expected, leaves, weight)
    torch.compiler.reset()
    for _ in range(2):
        with solved_eagerly():
            found, num_found_B = torch.compile(plan, backend="aot_eager")(*leaves)
        assert torch.equal(found, expected)
        assert torch.equal(num_found_B, num_iter_B)
        for a, b in zip(torch.autograd.grad(found, leaves, weight), gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert (torch.compile(plan, backend="aot_eager")(*leaves)[1] == 200).all()
    torch.compiler.reset()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch.compile and CUDA graphs take the kernels as they are on a GPU only")
def test_compiled_and_captured():
    inputs = problem(14, 4, 49, 70, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    weight = torch.randn_like(inputs[0])

    def step(*x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sinkhorn(*x, eps=0.05, check=False).plan_BNM, x, weight)

    expected = step(*leaves)

    @torch.compile(fullgraph=True)
    def plan(*x: Tensor) -> Tensor:
        return 2 * sinkhorn(*x, eps=0.05, check=False).plan_BNM

    got = torch.autograd.grad(plan(*leaves) / 2, leaves, weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*leaves)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
