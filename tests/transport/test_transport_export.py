"""Cost, priors and plan run as exported programs, at batch sizes that they were not exported with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dotcbm.structures import PatchFeatures
from dotcbm.transport.cost import add_null, cosine_cost, strip_null
from dotcbm.transport.priors import PatchPrior, patch_prior
from dotcbm.transport.sinkhorn import Gradient, sinkhorn

BATCH = {0: torch.export.Dim("B", min=1, max=512)}


class Transport(nn.Module):
    """The transport layer as a model calls it: nothing in it may depend on values."""

    def __init__(self, *, relax: float | None, kind: PatchPrior) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.concept_MD = nn.Parameter(torch.randn(7, 8, generator=rng))
        self.null_cost = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("gamma_M", torch.full((7,), 1 / 7))
        self.relax = relax
        self.kind: PatchPrior = kind

    def forward(self, patch_BND: Tensor) -> tuple[Tensor, Tensor]:
        theta = patch_prior(self.kind, PatchFeatures(patch_BND, patch_BND.mean(1), (4, 4)), temperature=0.5)
        cost, theta, gamma = add_null(
            cosine_cost(patch_BND, self.concept_MD),
            theta,
            self.get_buffer("gamma_M"),
            null_concept_mass=0.3,
            null_patch_mass=0.2,
            null_cost=self.null_cost,
        )
        result = sinkhorn(
            cost, theta, gamma, eps=0.05, max_iter=10, tol=None, check=False, relax_patch=self.relax, relax_concept=self.relax
        )
        return strip_null(result.plan_BNM, num_patches=16, num_concepts=7), result.residual_B


@pytest.mark.parametrize(("relax", "kind"), [(None, "border"), (0.3, "cosine")])
def test_torch_export_with_any_batch_size(relax, kind):
    module = Transport(relax=relax, kind=kind).eval()
    program = torch.export.export(module, (torch.randn(3, 16, 8),), dynamic_shapes=(BATCH,))
    for B in (1, 8, 17):
        x = torch.randn(B, 16, 8)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("relax", [None, 0.3])
def test_onnx_with_any_batch_size(tmp_path: Path, relax):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'dotcbm[export]')")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'dotcbm[export]')")
    module = Transport(relax=relax, kind="norm").eval()
    path = tmp_path / "transport.onnx"
    program = torch.onnx.export(module, (torch.randn(3, 16, 8),), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(17, 16, 8)
    plan, residual = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = module(x)
    torch.testing.assert_close(torch.from_numpy(plan), expected[0].detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(torch.from_numpy(residual), expected[1], atol=1e-5, rtol=1e-3)


class Stopping(nn.Module):
    """Transport with a tolerance; its outputs are the plan, and the passes and the residual of each picture."""

    def __init__(self, *, relax: float | None = None, max_iter: int = 10, gradient: Gradient = "implicit", accelerate: bool = True) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.concept_MD = nn.Parameter(torch.randn(7, 8, generator=rng))
        self.register_buffer("gamma_M", torch.tensor([0.3, 0.2, 0.1, 0.1, 0.2, 0.1, 0.0]))
        self.relax, self.max_iter, self.gradient, self.accelerate = relax, max_iter, gradient, accelerate

    def forward(self, patch_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = sinkhorn(
            cosine_cost(patch_BND, self.concept_MD),
            patch_prior("norm", PatchFeatures(patch_BND, patch_BND.mean(1), (4, 4)), temperature=0.5),
            self.get_buffer("gamma_M"),
            eps=0.05,
            max_iter=self.max_iter,
            tol=1e-3,
            gradient=self.gradient,
            accelerate=self.accelerate,
            relax_patch=self.relax,
            relax_concept=self.relax,
            check=False,
        )
        return result.plan_BNM, result.num_iter_B, result.residual_B


def pictures(count: int) -> Tensor:
    """(count, 16, 8) patches, from all but equal in the first picture to unlike in the last: the first need fewer passes."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, generator=rng) + torch.logspace(-4, 1, count)[:, None, None] * torch.randn(count, 16, 8, generator=rng)


def assert_same(module: Stopping, program: Callable[[Tensor], Iterable[Tensor]]) -> None:
    for x in (pictures(12), pictures(12)[-1:]):
        with torch.no_grad():
            expected, found = module(x), tuple(program(x))
        torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-5)
        assert found[1].tolist() == expected[1].tolist()
        torch.testing.assert_close(found[2], expected[2], atol=1e-6, rtol=0)
        assert len(x) == 1 or len(expected[1].unique()) > 2, "the pictures must stop at different passes"


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("relax", [None, 0.1])
def test_an_exported_program_stops_each_picture_where_the_solver_does(relax, accelerate):
    module = Stopping(relax=relax, accelerate=accelerate).eval()
    program = torch.export.export(module, (pictures(3),), dynamic_shapes=(BATCH,)).module()
    assert_same(module, program)


@pytest.mark.parametrize("relax", [None, 0.1])
def test_an_onnx_program_stops_each_picture_where_the_solver_does(tmp_path: Path, relax):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'dotcbm[export]')")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'dotcbm[export]')")
    module, path = Stopping(relax=relax).eval(), tmp_path / "transport.onnx"
    program = torch.onnx.export(module, (pictures(3),), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert_same(module, lambda x: map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: x.numpy()})))


def test_an_exported_program_does_not_grow_with_the_passes():
    def nodes(max_iter: int) -> int:
        program = torch.export.export(Stopping(max_iter=max_iter).eval(), (pictures(3),), dynamic_shapes=(BATCH,))
        return sum(len(module.graph.nodes) for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule))

    assert nodes(500) == nodes(2)


def test_an_exported_program_has_gradients_where_unrolled():
    x = pictures(3)
    program = torch.export.export(Stopping(gradient="unroll").eval(), (x,), dynamic_shapes=(BATCH,)).module()
    plan, passes, _ = program(x)
    assert passes.tolist() == [10, 10, 10]
    plan.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in program.parameters())
