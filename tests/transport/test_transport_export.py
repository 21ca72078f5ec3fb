"""Cost, priors and plan run as exported programs, at batch sizes that they were not exported with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dotcbm.structures import PatchFeatures
from dotcbm.transport.cost import add_null, cosine_cost, strip_null
from dotcbm.transport.priors import PatchPrior, patch_prior
from dotcbm.transport.sinkhorn import sinkhorn

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
