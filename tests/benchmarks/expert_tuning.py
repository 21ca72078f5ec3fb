"""Where the time of the Triton experts goes, kernel by kernel, and which tiles suit which product.

T tokens, D width, H hidden width, E experts, K experts per token, R = T K rows.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dotcbm.moe.backend_triton import puts_in_order
from dotcbm.moe.triton_launch import Rows, dispatch, down_bias, gate_parts, hidden, out, up, weight, weight_of_rows
from dotcbm.moe.triton_sorting import sort_by_expert, tile_map
from dotcbm.moe.triton_tiles import PRODUCTS, Product, Tiles, tiles_of

from .expert_speed import Problem, Size
from .tables import Table, number
from .timing import NUM_SETS, interleave

__all__ = ["CANDIDATES", "KernelRow", "TileRow", "kernel_table", "measure_kernels", "precompile", "sweep", "tile_table"]

_HEAD_START_CYCLES = 5_000_000  # some 3 ms, in which the host launches what is timed
_ROUNDS = 7

CANDIDATES: dict[str, Tiles] = {
    "128x256 8w 3s": Tiles(128, 256, 64, 8, 3, True),
    "128x256 8w 3s, 8 parts": Tiles(128, 256, 64, 8, 3, True, 8),
    "128x256 8w 4s": Tiles(128, 256, 64, 8, 4, True),
    "256x128 8w 3s": Tiles(256, 128, 64, 8, 3, True),
    "256x128 8w 4s": Tiles(256, 128, 64, 8, 4, True),
    "128x128 8w 3s 128r": Tiles(128, 128, 64, 8, 3, True, 4, 128, 2),
    "128x128 8w 3s 128r, 8 parts": Tiles(128, 128, 64, 8, 3, True, 8, 128, 2),
    "128x128 8w 4s 128r": Tiles(128, 128, 64, 8, 4, True, 4, 128, 2),
    "128x128 4w 3s": Tiles(128, 128, 64, 4, 3, True, programs=2),
    "64x128 4w 3s 128r": Tiles(64, 128, 64, 4, 3, True, 4, 128, 3),
    "64x128 4w 4s 128r": Tiles(64, 128, 64, 4, 4, True, 4, 128, 3),
    "128x256 8w 3s, pointers": Tiles(128, 256, 64, 8, 3, False),
    # Of weight gradients, which are not finished in parts:
    "128x384 8w 5s": Tiles(128, 384, 64, 8, 5, True, 3),
    "64x384 4w 5s": Tiles(64, 384, 64, 4, 5, True, 3),
    "128x256 8w 5s": Tiles(128, 256, 64, 8, 5, True, 1),
    "256x128 8w 5s": Tiles(256, 128, 64, 8, 5, True, 1),
    "128x128 8w 3s 128r, no parts": Tiles(128, 128, 64, 8, 3, True, 1, 128, 2),
    "128x128 8w 5s 128r": Tiles(128, 128, 64, 8, 5, True, 1, 128, 2),
    "128x256 8w 5s, pointers": Tiles(128, 256, 64, 8, 5, False, 1),
}
SMALL_CANDIDATES = {
    "32x32": Tiles(32, 32, 16, 4, 2, True, 2),
    "32x32, pointers": Tiles(32, 32, 16, 4, 2, False, 2),
    "32x96": Tiles(32, 96, 16, 4, 2, True, 3),
    "32x32, pointers, no parts": Tiles(32, 32, 16, 4, 2, False, 1),
}


@dataclass(frozen=True)
class KernelRow:
    """One step alone: milliseconds, and FLOPs (0: none that count)."""

    name: str
    milliseconds: float
    flops: int


@dataclass(frozen=True)
class TileRow:
    """One configuration: milliseconds by product, None where it does not run, and why not."""

    name: str
    milliseconds: dict[str, float | None]
    error: str


def measure_kernels(problem: Problem, *, device: torch.device, repeats: int) -> list[KernelRow]:
    """Each step of forward and backward, as the operators take it."""
    steps, flops = _steps(problem), 2 * problem.num_tokens * problem.size.k * problem.size.width * problem.size.hidden
    num_experts = problem.size.num_experts
    rows = steps.rows[0]
    in_order: dict[str, Callable[[int], object]] = {"dispatch": steps.dispatch} if steps.in_order else {}
    calls: dict[str, Callable[[int], object]] = {
        "sort": lambda index: sort_by_expert(problem.index[index], num_experts),
        "a tile map": lambda index: tile_map(rows.sorted.end_E, rows.num_rows, 128),
        **in_order,
        **{product: lambda index, product=product: steps.run(product, index, None) for product in PRODUCTS},
        "down bias": steps.bias,
    }
    samples = interleave(calls, device=device, repeats=repeats)
    found = [KernelRow(name, x.median, flops if name in PRODUCTS else 0) for name, x in samples.items()]
    # Three maps: forward's, backward's, and chunks, which rows in order do not need; but these are dispatched twice.
    again = found[1].milliseconds + found[2 if steps.in_order else 1].milliseconds
    name = "sum, with two maps and dispatches" if steps.in_order else "sum, with three maps"
    return [*found, KernelRow(name, sum(row.milliseconds for row in found) + again, 6 * flops)]


def kernel_table(title: str, rows: Sequence[KernelRow]) -> Table:
    """Time, share and rate of each step."""
    total = rows[-1].milliseconds
    lines = [
        [
            row.name,
            number(row.milliseconds),
            f"{100 * row.milliseconds / total:.1f} %",
            number(row.flops / row.milliseconds / 1e9) if row.flops else "-",
        ]
        for row in rows
    ]
    note = "down and token include the sum over slots where k > 1; hidden that of the up bias; weight gradients that of chunks."
    return Table(title, ["", "ms", "share", "TFLOP/s"], lines, note)


def precompile(sizes: Sequence[Size], candidates: Sequence[Tiles]) -> None:
    """Compile every kernel of a sweep in as many processes as there are processors, into Triton's cache on the disk."""
    jobs: dict[tuple[object, ...], tuple[Size, Product, Tiles]] = {}
    for size in sizes:
        for product in PRODUCTS:
            for tiles in candidates:
                if not _serves(tiles, product):
                    continue
                wide, deep = _columns(product, size), _inner(product, size)
                sizes_divide = wide % tiles.columns == 0, deep % tiles.inner == 0, deep % tiles.rows == 0
                key = (product, tiles, size.k == 1, _in_order(size), *sizes_divide)
                jobs.setdefault(key, (size, product, tiles))
    workers = min(12, max(1, (os.cpu_count() or 2) - 2))
    parts = [list(jobs.values())[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, parts))


def sweep(problem: Problem, candidates: dict[str, Tiles], *, device: torch.device) -> list[TileRow]:
    """Every candidate for every product; the better of two passes, the second in the opposite order."""
    steps = _steps(problem)
    found: dict[tuple[str, Product], float] = {}
    errors: dict[str, str] = {}
    for names in (list(candidates), list(candidates)[::-1]):
        for product in PRODUCTS:
            for name in names:
                if not _serves(candidates[name], product):
                    continue
                try:
                    time = _median(lambda index: steps.run(product, index, candidates[name]), device)  # noqa: B023 (called at once)
                except Exception as error:
                    errors[name] = f"{product}: {type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
                    continue
                found[name, product] = min(time, found.get((name, product), time))
    return [TileRow(name, {product: found.get((name, product)) for product in PRODUCTS}, errors.get(name, "")) for name in candidates]


def tile_table(title: str, rows: Sequence[TileRow], size: Size, num_tokens: int) -> Table:
    """Rates, with a star at the best of each product and in brackets what `tiles_of` takes now."""
    flops = 2 * num_tokens * size.k * size.width * size.hidden
    best = {product: min((row.milliseconds[product] or np.inf) for row in rows) for product in PRODUCTS}
    now = {product: _chosen(product, size, num_tokens) for product in PRODUCTS}
    lines = []
    for row in rows:
        line = [row.name]
        for product in PRODUCTS:
            time = row.milliseconds[product]
            text = "-" if time is None else f"{flops / time / 1e9:.0f}" + ("*" if time == best[product] else "")
            line.append(f"({text})" if row.name == now[product] else text)
        lines.append(line)
    total = sum(best.values())
    lines.append(["best of each, ms", *(number(best[product]) for product in PRODUCTS)])
    errors = "".join(f" {row.name} does not run: {row.error}." for row in rows if row.error)
    rate = number(6 * flops / total / 1e9)
    ordered = " Rows were put in order, for which PyTorch makes gradients of weights (see the table of kernels)." if _in_order(size) else ""
    note = f"TFLOP/s. *: best. In brackets: what tiles_of takes now. Best together: {number(total)} ms, {rate} TFLOP/s.{ordered}{errors}"
    return Table(title, ["rows x columns (x 64), warps, stages", *PRODUCTS], lines, note)


class _Steps:
    """Inputs of each product, by input set."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        experts = problem.experts
        self.rows = [Rows(sort_by_expert(index, problem.size.num_experts), problem.size.k) for index in problem.index]
        self.gate = [gate.detach() for gate in problem.gate]
        self.x = [x.detach() for x in problem.x]
        weights = (experts.up_EDH, experts.up_bias_EH, experts.down_EHD, experts.down_bias_ED)
        self.weights = tuple(None if w is None else w.detach() for w in weights)
        self.in_order = _in_order(problem.size)
        self.x_rows = [dispatch(x, rows) if self.in_order else x for x, rows in zip(self.x, self.rows, strict=True)]
        self.dy_rows = [dispatch(dy, rows) if self.in_order else dy for dy, rows in zip(problem.dy, self.rows, strict=True)]
        forward = [self.run("up", index, None) for index in range(NUM_SETS)]
        self.z, self.gated = zip(*forward, strict=True)
        self.dz = [self.run("hidden", index, None)[0] for index in range(NUM_SETS)]
        self.d_up, self.d_down = torch.empty_like(self.weights[0]), torch.empty_like(self.weights[2])  # pyright: ignore[reportArgumentType]

    def run(self, product: Product, index: int, tiles: Tiles | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows, gate, x, dy = self.rows[index], self.gate[index], self.x_rows[index], self.dy_rows[index]
        up_EDH, up_bias, down_EHD, down_bias = self.weights
        assert up_EDH is not None
        assert down_EHD is not None
        if product == "up":
            return up(x, up_EDH, up_bias, gate, rows, keep=True, in_order=self.in_order, tiles=tiles)
        if product == "down":
            return (out("down", self.gated[index], down_EHD, down_bias, gate, rows, tiles=tiles),) * 2
        if product == "hidden":
            parts_PR = gate.new_empty(gate_parts(down_EHD, tiles), rows.num_rows)
            bias = torch.empty_like(up_bias)  # pyright: ignore[reportArgumentType]
            routing = gate, rows, parts_PR
            return (hidden(dy, down_EHD, self.z[index], *routing, d_bias_EH=bias, in_order=self.in_order, tiles=tiles),) * 2
        if product == "token":
            return (out("token", self.dz[index], up_EDH, None, gate, rows, tiles=tiles),) * 2
        in_order = self.in_order and tiles is None  # tiles are of our own kernel
        if product == "up_weight" and in_order:
            return (weight_of_rows(x, self.dz[index], rows),) * 2
        if product == "up_weight":
            weight("up_weight", self.x[index], self.dz[index], rows, self.d_up, tiles=tiles)
        elif in_order:
            return (weight_of_rows(self.gated[index], dy, rows),) * 2
        else:
            weight("down_weight", self.problem.dy[index], self.gated[index], rows, self.d_down, tiles=tiles)
        return self.d_up, self.d_down

    def dispatch(self, index: int) -> torch.Tensor:
        return dispatch(self.x[index], self.rows[index])

    def bias(self, index: int) -> None:
        bias_ED, dgate_R = self.weights[3], torch.empty_like(self.gate[index].view(-1))
        assert bias_ED is not None
        routing = self.gate[index], self.problem.index[index], self.rows[index]
        down_bias(self.problem.dy[index], bias_ED, *routing, dgate_R, torch.empty_like(bias_ED))


def _steps(problem: Problem) -> _Steps:
    with torch.no_grad():
        return _Steps(problem)


def _columns(product: Product, size: Size) -> int:
    return size.width if product in ("down", "token") else size.hidden


def _inner(product: Product, size: Size) -> int:
    return size.hidden if product in ("down", "token") else size.width


def _chosen(product: Product, size: Size, num_tokens: int) -> str:
    sizes = {"inner": _inner(product, size), "columns": _columns(product, size)}
    chosen = tiles_of(product, torch.bfloat16, **sizes, in_order=_in_order(size))
    return next((name for name, tiles in CANDIDATES.items() if tiles == chosen and _serves(tiles, product)), "")


def _serves(tiles: Tiles, product: Product) -> bool:
    """A weight gradient has 1 or 3 sums beside each other; what else there is is finished in 2, 4 or 8 parts."""
    return (tiles.parts in (1, 3)) == (product in ("up_weight", "down_weight"))


def _in_order(size: Size) -> bool:
    sizes = {"width": size.width, "hidden": size.hidden, "num_experts": size.num_experts}
    return torch.cuda.is_available() and puts_in_order(torch.bfloat16, torch.device("cuda"), **sizes)


def _median(call: Callable[[int], object], device: torch.device) -> float:
    if device.type != "cuda":
        return interleave({"": call}, device=device, repeats=1)[""].median
    for index in range(NUM_SETS):
        call(index)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
    torch.cuda._sleep(_HEAD_START_CYCLES)
    events[0].record()
    for i in range(_ROUNDS):
        call(i % NUM_SETS)
        events[i + 1].record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in pairwise(events)]))


def _compile(jobs: Sequence[tuple[Size, Product, Tiles]]) -> None:
    """In a process of its own: run on few tokens, which compiles what many tokens take."""
    problems: dict[Size, _Steps] = {}
    for size, product, tiles in jobs:
        if size not in problems:
            problems[size] = _steps(Problem(size, 512, device=torch.device("cuda"), dtype=torch.bfloat16))
        try:
            problems[size].run(product, 0, tiles)
            torch.cuda.synchronize()
        except Exception as error:  # the sweep meets it again, and tells
            print(f"{product} {tiles} on {size}: {type(error).__name__}")
