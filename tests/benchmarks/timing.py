"""Interleaved timing: all rivals take turns, so that a drift of the clock or a busy neighbour meets each of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["NUM_SETS", "Samples", "interleave", "one_thread", "peak_bytes"]

# Input sets in rotation: at the sizes of interest two others push a set out of the caches before its turn comes again.
NUM_SETS = 3

# The GPU sleeps this long (some 20 ms at 1.8 GHz) before the first event: longer than a slow host takes to launch any rival that stops
# at the tolerance, so that launches are not timed, of nobody. Wall times have them.
_HEAD_START_CYCLES = 40_000_000

Call = Callable[[int], object]


@dataclass(frozen=True)
class Samples:
    """Every repeat of one call, in milliseconds.

    Attributes:
        device: On CUDA the time between two events on the GPU; on a CPU the processor time of this process, which a busy
            machine does not lengthen.
        wall: From the call to the moment its result is there, host overhead included.
    """

    device: list[float]
    wall: list[float]

    @property
    def median(self) -> float:
        """Of the device times."""
        return float(np.median(self.device))

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile of the device times."""
        low, high = np.percentile(self.device, [10, 90])
        return float(low), float(high)

    @property
    def wall_median(self) -> float:
        """Of the wall times."""
        return float(np.median(self.wall))


def interleave(
    calls: Mapping[str, Call], *, device: torch.device, repeats: int, fewer: Mapping[str, int] | None = None
) -> dict[str, Samples]:
    """Time the calls in turns.

    Args:
        calls: By name; each takes the number of the input set, 0 to NUM_SETS - 1.
        device: Where they run.
        repeats: Rounds; each call is timed once a round (on CUDA twice, for GPU time and for wall time).
        fewer: Rounds of calls that are too slow for all of them.
    """
    rounds = {name: min(repeats, (fewer or {}).get(name, repeats)) for name in calls}
    for name, call in calls.items():
        for index in range(NUM_SETS if device.type == "cuda" and rounds[name] == repeats else 1):
            call(index)
    once = _cuda_once if device.type == "cuda" else _cpu_once
    samples = {name: Samples([], []) for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            if repeat >= rounds[name]:
                continue
            device_ms, wall_ms = once(call, repeat % NUM_SETS)
            samples[name].device.append(device_ms)
            samples[name].wall.append(wall_ms)
    return samples


def peak_bytes(call: Call, *, device: torch.device) -> int:
    """Most memory that the call holds beyond what was allocated before it, its results included."""
    result = call(0)
    del result
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call(0)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread inside; the number from before comes back after it."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_once(call: Call, index: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call(index)
    return 1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - wall)


def _cuda_once(call: Call, index: int) -> tuple[float, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    call(index)
    end.record()
    torch.cuda.synchronize()
    wall = time.perf_counter()
    call(index)
    torch.cuda.synchronize()
    return start.elapsed_time(end), 1e3 * (time.perf_counter() - wall)
