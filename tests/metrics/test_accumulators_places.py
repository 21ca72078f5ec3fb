"""Every Metric of places gives its function's answer over uneven batches, and over two processes that talk through gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torchmetrics import Metric

from dotcbm.metrics import accumulators_places as acc
from dotcbm.metrics.detection import Detections, correct_parts, detect, part_detection, part_groups, sweep
from dotcbm.metrics.faithfulness import occlusion_drop
from dotcbm.metrics.localization import peak_points, positive_mean
from dotcbm.metrics.robustness import background_share
from dotcbm.structures import ConceptSet

N, M = 41, 4
GRID = (4, 5)
GROUPS = part_groups(
    ConceptSet(("a", "b", "c", "d"), ("x",), torch.zeros(1, M), part_names=("p", "q"), parts=(("p",), ("p",), ("q",), ("p", "q")))
)


def data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    corners = torch.rand(N, 3, 2, 2, generator=g, dtype=torch.float64).sort(-2).values.flatten(-2)
    corners[:, :2][torch.rand(N, 2, generator=g) < 0.3] = torch.nan
    points = torch.rand(N, 2, 3, generator=g).round(decimals=1)
    return {
        "map": torch.rand(N, 20, M, generator=g).square(),
        "probability": torch.rand(N, M, generator=g),
        "truth": corners[:, :2],
        "frame": corners[:, 2],
        "points": points,
        "size": torch.full((N, 2), 100),
        "target": torch.randint(0, 2, (N, M), generator=g).float().masked_fill(torch.rand(N, M, generator=g) < 0.2, torch.nan),
        "foreground": torch.rand(N, 4, 5, generator=g) > 0.5,
        "correct": torch.rand(N, generator=g) > 0.4,
        "outside": torch.rand(N, generator=g) > 0.5,
        "drop": occlusion_drop(torch.rand(N, generator=g), torch.rand(N, generator=g)),
        "random": occlusion_drop(torch.rand(N, generator=g), torch.rand(N, generator=g)).masked_fill(torch.arange(N) == 3, torch.nan),
    }


def _detections(d: dict[str, Tensor]) -> Detections:
    return detect(d["map"], d["probability"], grid=GRID, part_box_BP4=d["truth"], groups=GROUPS, threshold=0.5)


def _correct(d: dict[str, Tensor]) -> Tensor:
    return correct_parts(
        peak_points(d["map"], grid=GRID), d["probability"], points_BP3=d["points"], box_B4=d["frame"], size_B2=d["size"], groups=GROUPS
    )


def _swept(d: dict[str, Tensor]) -> Tensor:
    got = sweep(d["map"], d["probability"], grid=GRID, part_box_BP4=d["truth"], groups=GROUPS, thresholds=(0.3, 0.6), iou=0.2)
    return torch.tensor(list(zip(got.mean_average_precision, got.share_correct)), dtype=torch.float64)


Case = tuple[Callable[[], Metric], Callable[[Any, dict[str, Tensor]], None], Callable[[dict[str, Tensor]], Tensor]]
CASES: dict[str, Case] = {
    "PartDetection": (
        lambda: acc.PartDetection(GROUPS, iou=0.2),
        lambda metric, d: metric.update(_detections(d)),
        lambda d: torch.tensor(part_detection(_detections(d), GROUPS, iou=0.2).mean_average_precision),
    ),
    "DetectionSweep": (
        lambda: acc.DetectionSweep(GROUPS, thresholds=(0.3, 0.6), iou=0.2),
        lambda metric, d: metric.update(d["map"], d["probability"], grid=GRID, part_box_BP4=d["truth"]),
        _swept,
    ),
    "CorrectParts": (
        lambda: acc.CorrectParts(len(GROUPS)),
        lambda metric, d: metric.update(_correct(d)),
        lambda d: _correct(d).nanmean(0).nanmean(),
    ),
    "BackgroundShare": (
        lambda: acc.BackgroundShare(grid=GRID),
        lambda metric, d: metric.update(d["map"], d["target"], d["foreground"]),
        lambda d: positive_mean(background_share(d["map"], grid=GRID, foreground_BHW=d["foreground"]), d["target"]),
    ),
    "AccuracyGap": (
        acc.AccuracyGap,
        lambda metric, d: metric.update(d["correct"], d["outside"]),
        lambda d: d["correct"][~d["outside"]].double().mean() - d["correct"][d["outside"]].double().mean(),
    ),
    "OcclusionDrop": (
        acc.OcclusionDrop,
        lambda metric, d: metric.update(d["drop"], d["random"]),
        lambda d: (d["drop"] - d["random"]).nanmean(),
    ),
}


def rows(d: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[start:stop] for name, value in d.items()}


@pytest.mark.parametrize("name", CASES)
def test_batches_add_up_to_the_function(name: str) -> None:
    make, update, expected = CASES[name]
    metric = make()
    for start, stop in ((0, 20), (20, 21), (21, N)):
        update(metric, rows(data(), start, stop))
    wanted = expected(data())
    assert not wanted.isnan().any()
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(metric.compute(), wanted, check_dtype=False)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = rows(data(), 0, 26) if rank == 0 else rows(data(), 26, N)  # uneven shares
    said = {}
    for name, (make, update, _) in CASES.items():
        metric = make()
        update(metric, share)
        said[name] = metric.compute()
    torch.save(said, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets through a file here")
def test_two_processes_give_the_figure_of_one(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (_, _, expected) in CASES.items():
            torch.testing.assert_close(said[name], expected(data()), check_dtype=False, msg=name)


@pytest.mark.filterwarnings("ignore:The ``compute``")
def test_before_the_first_picture_detection_is_nan() -> None:
    assert acc.PartDetection(GROUPS).compute().isnan()
    assert acc.DetectionSweep(GROUPS).compute().isnan().all()


def test_the_parts_can_be_read_one_by_one_and_reset_forgets() -> None:
    metric = acc.PartDetection(GROUPS)
    metric.update(_detections(data()))
    assert metric.per_part().names == ("p", "q", "p / q")
    metric.reset()
    gap = acc.AccuracyGap()
    gap.update(torch.tensor([True]), torch.tensor([True]))
    assert gap.compute().isnan()
