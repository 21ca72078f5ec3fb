"""The benchmark of sparse experts: one command, every table.

From the repository's root:

    python -m tests.benchmarks.experts --device cuda --out reports/benchmarks --tune
    TRITON_INTERPRET=1 python -m tests.benchmarks.experts --quick --tune

Sections: correctness; for each size of the specification's table the speed of every backend beside a dense MLP of equal active FLOPs,
and where the time of the Triton backend goes; a summary; with `--tune` the rate of each product under a list of tile configurations, from
which `dotcbm.moe.triton_tiles.tiles_of` is chosen. `--only` picks sections by a part of their name.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from .expert_speed import Problem, Size, SpeedRow, error_table, measure_errors, measure_speed, speed_table
from .expert_tuning import CANDIDATES, SMALL_CANDIDATES, kernel_table, measure_kernels, precompile, sweep, tile_table
from .report import Report, device_of, free
from .tables import Table, number
from .timing import one_thread

__all__ = ["main"]

# The table of the specification, with its number of tokens and its type.
SIZES = [
    Size(384, 1536, 8, 1),
    Size(384, 384, 32, 4),
    Size(768, 3072, 8, 1),
    Size(768, 3072, 8, 2),
    Size(768, 768, 32, 4),
    Size(768, 768, 64, 1),
    Size(1024, 1024, 64, 2),
]
NUM_TOKENS = 65536
QUICK_SIZES = [Size(32, 64, 4, 2)]
QUICK_TOKENS = 24
PACKAGES = ("torch", "triton", "dotcbm")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    given = _parser().parse_args(args)
    device = device_of(given.device)
    if device.type == "cpu" and not given.quick:
        raise SystemExit("on a CPU Triton's kernels are interpreted, not compiled: there is nothing to time; add --quick for a trial")
    if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("on a CPU Triton's kernels need TRITON_INTERPRET=1 in the environment")
    report = Report("experts", args, device=device, packages=PACKAGES, out=given.out)
    with one_thread(device):
        _measure(report, given, device)


def _measure(report: Report, given: argparse.Namespace, device: torch.device) -> None:
    sizes, num_tokens, few = (QUICK_SIZES, QUICK_TOKENS, 20) if given.quick else (SIZES, NUM_TOKENS, 5003)
    repeats = given.repeats or (10 if device.type == "cuda" else 1)
    candidates = SMALL_CANDIDATES if given.quick else CANDIDATES
    summary: list[tuple[Size, list[SpeedRow]]] = []

    def problem(size: Size) -> Problem:
        return Problem(size, num_tokens, device=device, dtype=torch.bfloat16)

    def correctness(title: str, size: Size) -> None:
        errors = measure_errors(size, few, device=device, dtypes=(torch.float32,) if given.quick else (torch.float32, torch.bfloat16))
        report.add(error_table(title, errors))
        report.keep("errors", errors, size=str(size))

    def speed(title: str, size: Size) -> None:
        rows = measure_speed(problem(size), device=device, repeats=repeats)
        summary.append((size, rows))
        report.add(speed_table(title, rows))
        report.keep("speed", rows, size=str(size))

    def kernels(title: str, size: Size) -> None:
        rows = measure_kernels(problem(size), device=device, repeats=repeats)
        report.add(kernel_table(title, rows))
        report.keep("kernels", rows, size=str(size))

    def tiles(title: str, size: Size) -> None:
        rows = sweep(problem(size), candidates, device=device)
        report.add(tile_table(title, rows, size, num_tokens))
        report.keep("tiles", rows, size=str(size))

    def section(title: str, measure: Callable[[str, Size], None], size: Size) -> None:
        if given.only not in title:
            return
        try:
            measure(title, size)
        except Exception:  # the next section begins: time on a GPU is dear
            error = traceback.format_exc()
            report.console.print(f"{title} failed:\n{error}", markup=False, highlight=False)
            report.raw.setdefault("failed", []).append({"section": title, "error": error})
        free(device)

    if device.type == "cuda" and given.tune:
        start = time.perf_counter()
        try:
            precompile(sizes, list(candidates.values()))
        except Exception:  # then each is compiled when its turn comes
            report.console.print(traceback.format_exc(), markup=False, highlight=False)
        report.console.print(f"compiled in {time.perf_counter() - start:.0f} s\n")
    for size in sizes[:1] if given.quick else (sizes[0], Size(384, 200, 8, 8), sizes[-1]):
        section(f"correctness, {few} tokens, {size}", correctness, size)
    for size in sizes:
        section(f"speed, {size}", speed, size)
        section(f"kernels, {size}", kernels, size)
    if summary:
        report.add(_summary_table(summary, num_tokens))
        report.keep("speed", [])
    for size in sizes if given.tune else ():
        section(f"tiles, {size}", tiles, size)


def _summary_table(summary: Sequence[tuple[Size, Sequence[SpeedRow]]], num_tokens: int) -> Table:
    lines = []
    for size, rows in summary:
        rates = [number(3 * row.flops / row.both.median / 1e9) for row in rows]
        triton = next(row for row in rows if row.name == "triton")
        lines.append([str(size), *rates, f"{triton.to_dense:.2f}"])
    names = [row.name for row in summary[0][1]]
    return Table(
        f"summary: forward + backward, {num_tokens} tokens, bfloat16, TFLOP/s", ["", *names, "triton to dense"], lines, "To reach: 0.75."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.experts", description="Speed and exactness of sparse experts.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", metavar="FOLDER", help="write experts_<device>.md and experts_<device>.json there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial of the command, not a measurement")
    parser.add_argument("--repeats", type=int, metavar="R", help="rounds in which each call is timed once (10 on CUDA, 1 on a CPU)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='sections whose name holds it: "correctness", "speed, d 384", ...')
    parser.add_argument("--tune", action="store_true", help="also try a list of tile configurations for each product")
    return parser


if __name__ == "__main__":
    main()
