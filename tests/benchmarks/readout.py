"""What it saves never to write the plan where only its column sums of plan * similarity are wanted.

B pictures, N patches, M concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dotcbm.transport.sinkhorn import concept_scores, sinkhorn

from .comparison import TARGET
from .problems import Inputs, Size, make_inputs
from .tables import Table, milliseconds, number
from .timing import NUM_SETS, Samples, interleave, peak_bytes

__all__ = ["ReadoutRow", "measure_readout", "readout_table"]

_MOST = 100


@dataclass(frozen=True)
class ReadoutRow:
    """One way to the concept scores on one size.

    Attributes:
        way: Its name.
        size: (B, N, M).
        forward: Times without a graph.
        both: With gradients to cost, theta and gamma.
        peak_arrays: Most memory that both hold, in float32 arrays of shape (B, N, M); None on a CPU.
        difference: Largest difference of its scores from those of the plan.
    """

    way: str
    size: Size
    forward: Samples
    both: Samples
    peak_arrays: float | None
    difference: float


def measure_readout(size: Size, *, eps: float, device: torch.device, repeats: int) -> list[ReadoutRow]:
    """Scores by way of the plan and without it, in turns."""
    solver: Literal["torch", "triton"] = "triton" if device.type == "cuda" else "torch"
    sets = [make_inputs(size, device=device, seed=seed) for seed in range(NUM_SETS)]
    upstream_BM = torch.randn_like(sets[0].gamma_BM)

    def by_plan(inputs: Inputs) -> Tensor:
        cost_BNM = inputs.cost_BNM
        found = sinkhorn(cost_BNM, inputs.theta_BN, inputs.gamma_BM, eps=eps, tol=TARGET, max_iter=_MOST, solver=solver, check=False)
        return (found.plan_BNM * (1 - cost_BNM)).sum(1)

    def alone(inputs: Inputs) -> Tensor:
        masses = inputs.theta_BN, inputs.gamma_BM
        return concept_scores(inputs.cost_BNM, *masses, eps=eps, tol=TARGET, max_iter=_MOST, solver=solver, check=False).score_BM

    ways = {"the plan, then its sums": by_plan, "scores alone": alone}

    def forward(way: str, index: int) -> Tensor:
        with torch.no_grad():
            return ways[way](sets[index])

    def both(way: str, index: int) -> object:
        inputs = sets[index].with_gradients()
        score_BM = ways[way](inputs)
        return score_BM.detach(), torch.autograd.grad(score_BM, (inputs.cost_BNM, inputs.theta_BN, inputs.gamma_BM), upstream_BM)

    calls = {f"{way} / {kind.__name__}": partial(kind, way) for way in ways for kind in (forward, both)}
    samples = interleave(calls, device=device, repeats=repeats)
    expected_BM = forward("the plan, then its sums", 0)
    return [
        ReadoutRow(
            way,
            size,
            samples[f"{way} / forward"],
            samples[f"{way} / both"],
            peak_bytes(partial(both, way), device=device) / sets[0].cost_BNM.nbytes if device.type == "cuda" else None,
            float((forward(way, 0) - expected_BM).abs().max()),
        )
        for way in ways
    ]


def readout_table(title: str, rows: Sequence[ReadoutRow]) -> Table:
    """A line for each size and way."""
    lines = [
        [
            str(row.size),
            row.way,
            milliseconds(row.forward),
            milliseconds(row.both),
            "" if row.peak_arrays is None else number(row.peak_arrays),
            f"{row.difference:.1e}",
        ]
        for row in rows
    ]
    note = (
        "Median (10th to 90th percentile) as above; scores are sums over patches of plan * (1 - cost). Memory of forward + backward in "
        "arrays of B N M. The difference is the largest of any score from that of the plan."
    )
    columns = ["(B, N, M)", "way", "forward, ms", "forward + backward, ms", "memory, arrays", "difference"]
    return Table(title, columns, lines, note)
