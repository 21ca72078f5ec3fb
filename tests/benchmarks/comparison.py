"""Solvers side by side on one size: time, memory and the distance to what the hardware allows.

B pictures, N patches, M concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from .problems import Inputs, Size, make_inputs, residual
from .rivals import Method, Missing, Passes, most_passes, ours_name
from .tables import Table, milliseconds, number
from .timing import NUM_SETS, Samples, interleave, peak_bytes

__all__ = ["Hardware", "Mode", "Row", "compare", "floor_table", "memory_table", "time_table"]

Mode = Literal["equal residual", "50 passes"]

TARGET = 1e-3
FIXED = 50
# Ours and the hand-written rival with a tolerance stop by themselves long before; for the others the search for a count ends here.
MOST = 512


@dataclass(frozen=True)
class Hardware:
    """What the floor is computed from.

    Attributes:
        bandwidth: Bytes a second to and from the GPU's memory.
        exponentials: Per second, of the whole GPU.
    """

    bandwidth: float
    exponentials: float


@dataclass(frozen=True)
class Row:
    """One solver on one size.

    Attributes:
        method: Its name.
        size: (B, N, M).
        passes: Updates of both sides.
        residual: Reached, rows plus columns; see `problems.residual`.
        forward: Times of the plan alone, without a graph.
        both: Times of the plan and its gradients; None where the solver has none.
        peak_arrays: Most memory that both hold, in float32 arrays of shape (B, N, M); None on a CPU.
    """

    method: str
    size: Size
    passes: int
    residual: float
    forward: Samples
    both: Samples | None
    peak_arrays: float | None


def compare(
    size: Size, mode: Mode, found: Sequence[Method], *, eps: float, device: torch.device, repeats: int
) -> tuple[list[Row], list[Missing]]:
    """Time every solver on one size, in turns.

    Args:
        size: (B, N, M).
        mode: "equal residual": each takes the fewest passes that reach 1e-3 on the worst picture. "50 passes": just that.
        found: The solvers.
        eps: Entropy.
        device: Where they run.
        repeats: Rounds.

    Returns:
        A row for each solver that could do it, and the reason for each that could not.
    """
    torch.compiler.reset()  # a compiled function holds a few shapes only, and then quietly runs uncompiled
    sets = [make_inputs(size, device=device, seed=seed) for seed in range(NUM_SETS)]
    counts: dict[str, tuple[int, float]] = {}
    missing: list[Missing] = []
    taking_part: list[Method] = []
    for method in found:
        if mode == "50 passes" and not method.fixed:
            missing.append(Missing(method.name, "timed at equal residual only"))
            continue
        measured = _passes(method, sets[:1] if method.slow else sets, mode, eps)
        if mode == "equal residual" and measured[0] >= MOST:
            missing.append(Missing(method.name, f"leaves {measured[1]:.1e} after {MOST} passes"))
            continue
        counts[method.name] = measured
        taking_part.append(method)

    def forward(method: Method, index: int) -> object:
        with torch.no_grad():
            return _solve(method, sets[index], mode, eps, counts[method.name][0])

    def both(method: Method, index: int) -> object:
        inputs = sets[index].with_gradients()
        plan_BNM, _ = _solve(method, inputs, mode, eps, counts[method.name][0])
        return plan_BNM.detach(), inputs.gradients(plan_BNM)

    differentiable = [method for method in taking_part if method.backward]
    calls = {(method.name, "forward"): partial(forward, method) for method in taking_part}
    calls |= {(method.name, "both"): partial(both, method) for method in differentiable}
    few = {f"{method.name} / forward": 3 for method in taking_part if method.slow}
    samples = interleave({" / ".join(key): call for key, call in calls.items()}, device=device, repeats=repeats, fewer=few)
    peaks: dict[str, float] = {}
    if device.type == "cuda":
        one_array = sets[0].cost_BNM.nbytes
        peaks = {method.name: peak_bytes(partial(both, method), device=device) / one_array for method in differentiable}
    missing += [Missing(f"{method.name}, backward", f"does not apply: {method.why_not}") for method in taking_part if not method.backward]
    rows = [
        Row(
            method.name,
            size,
            *counts[method.name],
            forward=samples[f"{method.name} / forward"],
            both=samples.get(f"{method.name} / both"),
            peak_arrays=peaks.get(method.name),
        )
        for method in taking_part
    ]
    return rows, missing


def time_table(title: str, rows: Sequence[Row], missing: Sequence[Missing], *, device: torch.device) -> Table:
    """Medians with their spread, and how many times slower than ours each is."""
    cuda = device.type == "cuda"
    ours = next((row for row in rows if row.method == ours_name("triton" if cuda else "torch")), None)

    def cells(row: Row) -> list[str]:
        times = [milliseconds(x) if x else "" for x in (row.forward, row.both)]
        pairs = ((row.forward, ours.forward), (row.both, ours.both)) if ours else ((None, None), (None, None))
        ratios = [f"{number(x.median / y.median)}x" if x and y else "" for x, y in pairs]
        walls = [number(x.wall_median) if x else "" for x in (row.forward, row.both)] if cuda else []
        return [row.method, str(row.passes), f"{row.residual:.1e}", times[0], ratios[0], times[1], ratios[1], *walls]

    columns = ["solver", "passes", "residual", "forward, ms", "to ours", "forward + backward, ms", "to ours"]
    columns += ["wall forward, ms", "wall forward + backward, ms"] if cuda else []
    blank = [""] * (len(columns) - 2)
    lines = [*(cells(row) for row in rows), *([x.name, x.reason, *blank] for x in missing)]
    clock = "time between two events on the GPU" if cuda else "processor time of one thread"
    note = f"Median (10th to 90th percentile), {clock}. Residual: L1, rows plus columns, worst picture, in float64 from the returned plan."
    return Table(title, columns, lines, note)


def memory_table(title: str, rows: Sequence[Row]) -> Table:
    """Peak memory of forward + backward."""
    lines = [[row.method, str(row.size), number(row.peak_arrays)] for row in rows if row.peak_arrays is not None]
    note = "In float32 arrays of shape (B, N, M), beyond the inputs; the plan and the three gradients that are returned are counted."
    return Table(title, ["solver", "(B, N, M)", "peak of forward + backward, arrays"], lines, note)


def floor_table(title: str, rows: Sequence[Row], hardware: Hardware) -> Table:
    """How far our Triton solver is from the time that its exponentials and bytes need."""
    lines = []
    for row in rows:
        elements = row.size[0] * row.size[1] * row.size[2]
        exponentials = 1e3 * elements * row.passes / hardware.exponentials
        for phase, samples, num_arrays in (("forward", row.forward, 2), ("forward + backward", row.both, 5)):
            if row.method == ours_name("triton") and samples:
                moved = 1e3 * 4 * num_arrays * elements / hardware.bandwidth
                distance = [f"{number(samples.median / x)}x" for x in (max(exponentials, moved), moved)]
                lines.append([str(row.size), phase, str(row.passes), *map(number, (exponentials, moved, samples.median)), *distance])
    note = (
        f"Exponentials: B N M passes / {hardware.exponentials:.3g} a second, for the form that takes one an element and pass; a form that "
        f"exponentiates once is bound by bytes alone. Bytes: 4 B N M times 2 forward (cost in, plan out) or 5 with backward (and plan and "
        f"its gradient in, gradient of the cost out) / {hardware.bandwidth:.3g} a second. Floor: the larger of the two."
    )
    columns = ["(B, N, M)", "what", "passes", "exponentials, ms", "bytes, ms", "measured, ms", "to the floor", "to the bytes"]
    return Table(title, columns, lines, note)


def _solve(method: Method, inputs: Inputs, mode: Mode, eps: float, passes: int) -> tuple[torch.Tensor, Passes]:
    if mode == "equal residual" and method.stops_itself:
        return method.solve(inputs, eps, MOST, TARGET)
    return method.solve(inputs, eps, passes, None)


@torch.no_grad()
def _passes(method: Method, sets: Sequence[Inputs], mode: Mode, eps: float) -> tuple[int, float]:
    """The passes to make, at most MOST, and the residual that they leave on the worst set."""

    def left(passes: int) -> float:
        return max(residual(method.solve(inputs, eps, passes, None)[0], inputs) for inputs in sets)

    if mode == "50 passes":
        return FIXED, left(FIXED)
    if method.stops_itself:
        solved = [(*method.solve(inputs, eps, MOST, TARGET), inputs) for inputs in sets]
        return max(most_passes(passes) for _, passes, _ in solved), max(residual(plan_BNM, inputs) for plan_BNM, _, inputs in solved)
    high = 1
    while high < MOST and left(high) > TARGET:
        high *= 2
    if high == MOST:
        return MOST, left(MOST)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= TARGET else (middle, high)
    return high, left(high)
