"""Every Metric class gives its function's answer, over uneven batches and over two ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torchmetrics import Metric

from dotcbm.metrics import accumulators as acc
from dotcbm.metrics.classes import accuracy, balanced_accuracy, calibration_error, group_accuracy, worst_group_accuracy
from dotcbm.metrics.concepts import concept_error, macro_auroc, macro_average_precision, macro_f1
from dotcbm.metrics.localization import pointing_accuracy, positive_mean

G = torch.Generator().manual_seed(0)
N, M, K = 53, 6, 4
PROBABILITY = torch.rand(N, M, generator=G)
TARGET = torch.randint(0, 2, (N, M), generator=G).float().masked_fill(torch.rand(N, M, generator=G) < 0.2, torch.nan)
TARGET[:, 0] = torch.nan
CLASS = torch.randn(N, K, generator=G).softmax(1)
LABEL = torch.randint(0, K, (N,), generator=G)
GROUP = torch.randint(0, 3, (N,), generator=G)
DISTANCE = torch.rand(N, M, generator=G).masked_fill(torch.rand(N, M, generator=G) < 0.2, torch.nan)

CASES: list[tuple[Callable[[], Metric], tuple[torch.Tensor, ...], torch.Tensor]] = [
    (acc.ConceptAUROC, (PROBABILITY, TARGET), macro_auroc(PROBABILITY, TARGET)),
    (acc.ConceptAveragePrecision, (PROBABILITY, TARGET), macro_average_precision(PROBABILITY, TARGET)),
    (acc.ConceptF1, (PROBABILITY, TARGET), macro_f1(PROBABILITY, TARGET)),
    (lambda: acc.ConceptError(M), (PROBABILITY, TARGET), concept_error(PROBABILITY, TARGET).nanmean()),
    (lambda: acc.ClassAccuracy(K), (CLASS, LABEL), accuracy(CLASS, LABEL)),
    (lambda: acc.BalancedAccuracy(K), (CLASS, LABEL), balanced_accuracy(CLASS, LABEL)),
    (lambda: acc.GroupAccuracy(4), (CLASS, LABEL, GROUP), group_accuracy(CLASS, LABEL, group_N=GROUP, num_groups=4)),
    (lambda: acc.WorstGroupAccuracy(4), (CLASS, LABEL, GROUP), worst_group_accuracy(CLASS, LABEL, group_N=GROUP)),
    (acc.CalibrationError, (CLASS, LABEL), calibration_error(CLASS, LABEL)),
    (acc.PositiveMean, (DISTANCE, TARGET), positive_mean(DISTANCE, TARGET)),
    (lambda: acc.PointingAccuracy(r=0.3), (DISTANCE, TARGET), pointing_accuracy(DISTANCE, TARGET, r=0.3)),
]


@pytest.mark.parametrize(("make", "inputs", "expected"), CASES, ids=lambda c: getattr(c, "__name__", ""))
def test_batches_add_up_to_the_function(make: Callable[[], Metric], inputs: tuple[torch.Tensor, ...], expected: torch.Tensor) -> None:
    metric = make()
    for start, stop in ((0, 20), (20, 21), (21, N)):
        metric.update(*(column[start:stop] for column in inputs))
    torch.testing.assert_close(metric.compute(), expected, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize(("make", "inputs", "expected"), CASES, ids=lambda c: getattr(c, "__name__", ""))
def test_two_ranks_reduce_to_the_function(make: Callable[[], Metric], inputs: tuple[torch.Tensor, ...], expected: torch.Tensor) -> None:
    """The gather of a second rank, replayed: what `dist_reduce_fx` does to the states of both."""
    rank0, rank1 = make(), make()
    rank0.update(*(column[:31] for column in inputs))
    rank1.update(*(column[31:] for column in inputs))
    second = iter([_state(rank1, name) for name in rank1._defaults])
    rank0.dist_sync_fn = lambda mine, group=None: [mine, next(second)]
    rank0.distributed_available_fn = lambda: True
    torch.testing.assert_close(rank0.compute(), expected, equal_nan=True, check_dtype=False)


def _state(metric: Metric, name: str) -> torch.Tensor:
    value = getattr(metric, name)
    return torch.cat(value) if isinstance(value, list) else value


def test_reset_forgets_and_an_empty_metric_is_nan() -> None:
    metric = acc.PointingAccuracy(r=1.0)
    metric.update(DISTANCE, TARGET)
    assert metric.num_pairs == ((TARGET == 1) & ~DISTANCE.isnan()).sum()
    metric.reset()
    assert metric.num_pairs == 0
    with pytest.warns(UserWarning, match="before"):
        assert metric.compute().isnan()


EMPTY: tuple[tuple[Metric, tuple[torch.Tensor, ...]], ...] = (
    (acc.ClassAccuracy(4), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))),
    (acc.BalancedAccuracy(4), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))),
    (acc.CalibrationError(), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))),
    (acc.WorstGroupAccuracy(3), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))),
    (acc.ConceptAUROC(), (torch.zeros(0, 3), torch.zeros(0, 3))),
    (acc.ConceptError(3), (torch.zeros(0, 3), torch.zeros(0, 3))),
)


@pytest.mark.filterwarnings("ignore:The ``compute``")
@pytest.mark.parametrize(("metric", "nothing"), EMPTY, ids=lambda each: type(each).__name__)
def test_before_the_first_picture_a_metric_is_nan_and_an_empty_batch_changes_nothing(
    metric: Metric, nothing: tuple[torch.Tensor, ...]
) -> None:
    metric.reset()
    assert metric.compute().isnan()
    metric.update(*nothing)
    metric._computed = None
    assert metric.compute().isnan()


def test_group_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 2; num_groups=2"):
        acc.GroupAccuracy(2).update(CLASS, LABEL, GROUP)


def test_functions_import_without_torchmetrics() -> None:
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "import dotcbm.metrics.concepts, dotcbm.metrics.classes, dotcbm.metrics.localization"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
