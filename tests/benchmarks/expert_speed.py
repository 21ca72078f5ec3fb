"""Backends of sparse experts beside a dense MLP of equal active FLOPs: errors, times, memory.

T tokens, D width, H hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dotcbm.moe.experts import Backend, Experts
from dotcbm.moe.flops import experts_flops

from .tables import Table, milliseconds, number
from .timing import NUM_SETS, Samples, interleave, peak_bytes

__all__ = ["BACKENDS", "DENSE", "ErrorRow", "Problem", "Size", "SpeedRow", "error_table", "measure_errors", "measure_speed", "speed_table"]

BACKENDS: tuple[Backend, ...] = ("triton", "grouped", "padded", "loop")
DENSE = "dense FFN"
NAMES = ("y", "x", "gate", "up", "down", "up bias", "down bias")


class Size(NamedTuple):
    """One layer."""

    width: int
    hidden: int
    num_experts: int
    k: int

    def __str__(self) -> str:
        return f"d {self.width}, hidden {self.hidden}, E {self.num_experts}, k {self.k}"


@dataclass(frozen=True)
class ErrorRow:
    """Largest difference relative to the largest value, of the output and each gradient in the order of NAMES."""

    backend: str
    dtype: str
    errors: list[float]


@dataclass(frozen=True)
class SpeedRow:
    """One backend or the dense MLP.

    Attributes:
        name: Of the backend.
        forward: Its times, without gradients.
        both: Its times forward and backward.
        flops: Of forward; both together take three times as many.
        to_dense: Time of the dense MLP over its own, forward and backward: the median over rounds.
        peak: Bytes of memory that forward and backward take, results included; 0 on a CPU.
    """

    name: str
    forward: Samples
    both: Samples
    flops: int
    to_dense: float
    peak: int


class Problem:
    """Weights of a layer, and tokens routed at random: each expert gets about its share."""

    def __init__(self, size: Size, num_tokens: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        rng = torch.Generator(device).manual_seed(seed)
        self.size = size
        self.num_tokens = num_tokens
        self.experts = Experts(size.width, size.hidden, size.num_experts).to(device, dtype)
        for parameter in self.experts.parameters():  # biases too, which start at zero
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng, device=device) * 0.02)
        sets = range(NUM_SETS)
        self.x = [self._random(rng, num_tokens, size.width, like=self.experts.up_EDH).requires_grad_() for _ in sets]
        self.dy = [self._random(rng, num_tokens, size.width, like=self.experts.up_EDH) for _ in sets]
        chosen = [torch.rand(num_tokens, size.num_experts, generator=rng, device=device).topk(size.k, dim=1) for _ in sets]
        self.index = [found.indices for found in chosen]
        self.gate = [found.values.softmax(1).mul(0.9).requires_grad_() for found in chosen]

    @staticmethod
    def _random(rng: torch.Generator, *shape: int, like: Tensor) -> Tensor:
        return torch.randn(*shape, generator=rng, device=like.device).to(like.dtype)

    def forward(self, backend: Backend, index: int) -> Tensor:
        """(T, D) for an input set."""
        return self.experts(self.x[index], self.index[index], self.gate[index], backend)

    def results(self, backend: Backend, index: int) -> list[Tensor]:
        """Output, and gradients of what NAMES says."""
        y = self.forward(backend, index)
        leaves = [self.x[index], self.gate[index], *self.experts.parameters()]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy[index])]

    def as_type(self, dtype: torch.dtype) -> Problem:
        """The same numbers in a wider type."""
        other = Problem.__new__(Problem)
        other.size, other.num_tokens, other.index = self.size, self.num_tokens, self.index
        other.experts = Experts(*self.experts.up_EDH.shape[1:], self.size.num_experts).to(self.experts.up_EDH.device, dtype)
        other.experts.load_state_dict(self.experts.state_dict())
        other.x, other.gate = ([tensor.detach().to(dtype).requires_grad_() for tensor in group] for group in (self.x, self.gate))
        other.dy = [tensor.to(dtype) for tensor in self.dy]
        return other


def measure_errors(size: Size, num_tokens: int, *, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[ErrorRow]:
    """Of Triton's and the grouped backend, against the loop in float64 from the same numbers."""
    rows: list[ErrorRow] = []
    for dtype in dtypes:
        problem = Problem(size, num_tokens, device=device, dtype=dtype)
        exact = problem.as_type(torch.float64).results("loop", 0)
        for backend in ("triton", "grouped"):
            try:
                found = problem.results(backend, 0)
            except RuntimeError as error:  # a type that this version of PyTorch does not take there
                print(f"{backend} in {dtype}: {error}")
                continue
            errors = [_error(ours, theirs) for ours, theirs in zip(found, exact, strict=True)]
            rows.append(ErrorRow(backend, str(dtype).removeprefix("torch."), errors))
    return rows


def _error(ours: Tensor, theirs: Tensor) -> float:
    error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
    return error if error < 1e9 else 1e9  # NaN too, which JSON does not know


def error_table(title: str, rows: Sequence[ErrorRow]) -> Table:
    """Errors by output and gradient."""
    lines = [[row.backend, row.dtype, *(f"{error:.1e}" for error in row.errors)] for row in rows]
    return Table(title, ["backend", "type", *NAMES], lines, "Largest difference from float64 relative to the largest value.")


def measure_speed(problem: Problem, *, device: torch.device, repeats: int) -> list[SpeedRow]:
    """Every backend and the dense MLP, in turns."""
    dense_forward, dense_both = _dense(problem, device)
    forward: dict[str, Callable[[int], object]] = {DENSE: dense_forward}
    both: dict[str, Callable[[int], object]] = {DENSE: dense_both}
    for backend in BACKENDS:
        forward[backend] = lambda index, backend=backend: _without_gradients(problem, backend, index)
        both[backend] = lambda index, backend=backend: problem.results(backend, index)
    times_forward = interleave(forward, device=device, repeats=repeats)
    times_both = interleave(both, device=device, repeats=repeats)
    size = problem.size
    flops = experts_flops(problem.num_tokens, width=size.width, hidden=size.hidden, k=size.k)
    base = np.array(times_both[DENSE].device)
    return [
        SpeedRow(
            name,
            times_forward[name],
            times_both[name],
            flops,
            float(np.median(base / np.array(times_both[name].device))),
            peak_bytes(both[name], device=device) if device.type == "cuda" else 0,
        )
        for name in both
    ]


def speed_table(title: str, rows: Sequence[SpeedRow]) -> Table:
    """Times, rates, and the ratio to the dense MLP."""
    lines = [
        [
            row.name,
            milliseconds(row.forward),
            number(row.flops / row.forward.median / 1e9),
            milliseconds(row.both),
            number(3 * row.flops / row.both.median / 1e9),
            f"{row.to_dense:.2f}",
            number(row.both.wall_median),
            f"{row.peak / 2**20:.0f}" if row.peak else "-",
        ]
        for row in rows
    ]
    columns = ["", "forward, ms", "TFLOP/s", "forward + backward, ms", "TFLOP/s", "to dense", "wall, ms", "peak, MiB"]
    return Table(
        title, columns, lines, "Median and 10th to 90th percentile. To dense: the time of a dense MLP of equal FLOPs over that of the row."
    )


def _without_gradients(problem: Problem, backend: Backend, index: int) -> Tensor:
    with torch.no_grad():
        return problem.forward(backend, index)


def _dense(problem: Problem, device: torch.device) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """As timm's MLP: hidden width K H, biases, GELU; forward without gradients, and forward and backward."""
    size, dtype = problem.size, problem.x[0].dtype
    hidden = size.k * size.hidden
    rng = torch.Generator().manual_seed(1)
    shapes = ((hidden, size.width), (hidden,), (size.width, hidden), (size.width,))
    weights = [(torch.randn(*shape, generator=rng) * 0.02).to(device, dtype).requires_grad_() for shape in shapes]
    up, up_bias, down, down_bias = weights

    def run(index: int) -> Tensor:
        return F.linear(F.gelu(F.linear(problem.x[index], up, up_bias)), down, down_bias)

    def forward(index: int) -> Tensor:
        with torch.no_grad():
            return run(index)

    def both(index: int) -> object:
        y = run(index)
        return y, torch.autograd.grad(y, [problem.x[index], *weights], problem.dy[index])

    return forward, both
