"""The benchmark of transport: one command, every table.

From the repository's root:

    python -m tests.benchmarks.transport --device cuda --out reports/benchmarks

Sections: correctness, each size at equal residual, memory and floor (CUDA), scores without the plan, the training step and the cached
epoch (CUDA, or tiny with --quick), each size at 50 passes. `--only` picks sections by a part of their name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import torch

from .comparison import Hardware, Mode, Row, compare, floor_table, memory_table, time_table
from .correctness import correctness_table, measure_errors
from .problems import Size
from .readout import measure_readout, readout_table
from .report import Report, device_of, free
from .rivals import Method, Missing, methods
from .timing import one_thread
from .training_step import CachedEpoch, LiveStep, cached_epoch, epoch_table, live_steps, step_table

__all__ = ["main"]

SIZES: dict[str, list[Size]] = {
    "cuda": [(256, 196, 112), (256, 196, 312), (128, 324, 112), (64, 576, 1000)],
    "cpu": [(64, 196, 112), (64, 196, 312)],
    "quick": [(4, 16, 6), (3, 9, 20)],
}
TINY_STEP = LiveStep("vit_tiny_patch16_224", image=32, num_images=2, num_concepts=6)
TINY_EPOCH = CachedEpoch(num_images=12, num_patches=9, width=24, batch=5, num_concepts=6)
PACKAGES = ("torch", "triton", "pot", "geomloss", "flash-sinkhorn", "timm", "dotcbm")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; see `--help`."""
    given = _parser().parse_args(args)
    device = device_of(given.device)
    report = Report("transport", args, device=device, packages=PACKAGES, out=given.out)
    with one_thread(device):
        _measure(report, given, device)


def _measure(report: Report, given: argparse.Namespace, device: torch.device) -> None:
    found, missing = methods(device, compiled=given.compile or device.type == "cuda")
    repeats = _repeats(given, device)

    def wanted(section: str) -> bool:
        return given.only in section

    if wanted("correctness"):
        errors = measure_errors(found, all_eps=(0.2,) if given.quick else (0.01, 0.05, 0.2), device=device)
        report.add(correctness_table(errors))
        report.keep("correctness", errors)
    _compare(report, given, device, "equal residual", found, missing)
    sizes_read = SIZES["quick" if given.quick else device.type] if given.quick or device.type == "cuda" else []
    if wanted("scores without the plan") and sizes_read:
        ways = [row for size in sizes_read for row in measure_readout(size, eps=given.eps, device=device, repeats=repeats)]
        report.add(readout_table("scores without the plan", ways))
        report.keep("readout", ways)
        free(device)
    steps_too = given.quick or device.type == "cuda"
    if not steps_too:
        report.console.print("scores without the plan, training step, cached epoch: on CUDA, or tiny with --quick\n")
    if wanted("training step") and steps_too:
        sizes = TINY_STEP if given.quick else LiveStep()
        steps = live_steps(sizes, eps=given.eps, device=device, repeats=repeats)
        report.add(step_table(f"training step, {_described(sizes)}", steps))
        report.keep("training_step", steps, **asdict(sizes))
        free(device)
    if wanted("cached epoch") and steps_too:
        sizes = TINY_EPOCH if given.quick else CachedEpoch()
        steps = cached_epoch(sizes, eps=given.eps, device=device, repeats=repeats)
        report.add(epoch_table(f"cached epoch, {_described(sizes)}", steps))
        report.keep("cached_epoch", steps, **asdict(sizes))
        free(device)
    _compare(report, given, device, "50 passes", found, missing)


def _compare(
    report: Report, given: argparse.Namespace, device: torch.device, mode: Mode, found: list[Method], missing: list[Missing]
) -> None:
    """Every solver on every size."""
    rows: list[Row] = []
    for size in SIZES["quick" if given.quick else device.type]:
        title = f"{mode} {size}"
        if given.only in title:
            of_size, left_out = compare(size, mode, found, eps=given.eps, device=device, repeats=_repeats(given, device))
            report.add(time_table(title, of_size, [*left_out, *missing], device=device))
            report.keep("solvers", of_size, mode=mode)
            report.keep("left_out", [*left_out, *missing], mode=mode, size=size)
            rows += of_size
            free(device)
    if rows and device.type == "cuda":
        hardware = Hardware(bandwidth=given.bandwidth * 1e12, exponentials=given.exp_per_clock * given.num_sms * given.clock * 1e9)
        report.add(memory_table(f"memory, {mode}", rows))
        report.add(floor_table(f"floor, {mode}", rows, hardware))
        report.keep("solvers", [])


def _repeats(given: argparse.Namespace, device: torch.device) -> int:
    return given.repeats or (20 if device.type == "cuda" else 5)


def _described(sizes: LiveStep | CachedEpoch) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(sizes).items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.transport", description="Time, memory and exactness.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", metavar="FOLDER", help="write transport_<device>.md and transport_<device>.json there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial of the command, not a measurement")
    parser.add_argument("--repeats", type=int, metavar="R", help="rounds in which each call is timed once (20 on CUDA, 5 on a CPU)")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help='sections whose name holds it: "correctness", "equal residual (64", ...'
    )
    parser.add_argument("--eps", type=float, default=0.05, help="entropy of everything that is timed (0.05)")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too; it needs a C++ compiler")
    floor = parser.add_argument_group("floor", "what the hardware can do; the defaults are one H100 SXM's, at its boost clock")
    floor.add_argument("--bandwidth", type=float, default=3.35, metavar="TB/s", help="to and from memory (3.35)")
    floor.add_argument("--exp-per-clock", type=float, default=16, help="exponentials a clock and multiprocessor (16)")
    floor.add_argument("--num-sms", type=int, default=132, help="multiprocessors (132)")
    floor.add_argument("--clock", type=float, default=1.755, metavar="GHz", help="(1.755)")
    return parser


if __name__ == "__main__":
    main()
