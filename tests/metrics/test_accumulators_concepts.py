"""Interventions and leakage over batches, and over two processes of a real gloo group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torchmetrics import Metric

from dotcbm.metrics.accumulators_concepts import (
    ConceptTaskLeakage,
    InterConceptLeakage,
    InterventionAccuracy,
    NicheImpurity,
    OracleImpurity,
)
from dotcbm.metrics.leakage import concept_task_leakage, interconcept_leakage, niche_impurity, oracle_impurity

N, M, S = 60, 3, 4
HITS = torch.rand(N, S, generator=torch.Generator().manual_seed(0)).round()
LABEL = torch.arange(N) % 6
TRUTH = torch.stack([LABEL % 2, LABEL // 3, LABEL == 1], 1).float()
CONCEPT = TRUTH + LABEL[:, None] / 20 + 0.1 * torch.rand(N, M, generator=torch.Generator().manual_seed(1))


# Metric and its function; what ICL, OIS and NIS take has no class.
PAIRED = (
    (InterConceptLeakage(seed=1), float(interconcept_leakage(CONCEPT, TRUTH, seed=1).nanmean())),
    (OracleImpurity(seed=1), oracle_impurity(CONCEPT, TRUTH, seed=1)),
    (NicheImpurity(seed=1), niche_impurity(CONCEPT, TRUTH, seed=1)),
)


def _fill(rows: slice) -> tuple[InterventionAccuracy, ConceptTaskLeakage, list[Metric]]:
    curve, leakage, paired = InterventionAccuracy(S), ConceptTaskLeakage(), [metric.clone() for metric, _ in PAIRED]
    for batch in torch.arange(N)[rows].split(13):
        curve.update(HITS[batch])
        leakage.update(CONCEPT[batch], TRUTH[batch], LABEL[batch])
        for metric in paired:
            metric.update(CONCEPT[batch], TRUTH[batch])
    return curve, leakage, paired


def _check(curve: InterventionAccuracy, leakage: ConceptTaskLeakage, paired: list[Metric]) -> None:
    torch.testing.assert_close(curve.compute(), HITS.double().mean(0))
    torch.testing.assert_close(leakage.compute(), concept_task_leakage(CONCEPT, TRUTH, LABEL).nanmean(), atol=1e-9, rtol=0)
    for metric, (_, expected) in zip(paired, PAIRED):
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-9)


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    _check(*_fill(slice(0, 37) if rank == 0 else slice(37, N)))
    distributed.destroy_process_group()


def test_batches_add_up_to_the_function() -> None:
    assert concept_task_leakage(CONCEPT, TRUTH, LABEL).nanmean() > 0.05
    assert all(0 < expected < 1 for _, expected in PAIRED)
    _check(*_fill(slice(0, N)))


def test_two_processes_reduce_to_the_function(tmp_path: Path) -> None:
    # Forked: a spawned process imports torch again, which takes longer than all of this file.
    multiprocessing.start_processes(_rank, args=(str(tmp_path / "store"),), nprocs=2, start_method="fork")


@pytest.mark.filterwarnings("ignore:The ``compute``")
def test_before_the_first_picture_leakage_is_nan() -> None:
    assert all(metric.clone().compute().isnan() for metric in (ConceptTaskLeakage(), *(metric for metric, _ in PAIRED)))


def test_another_number_of_steps_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(60, 4\); num_steps is 5"):
        InterventionAccuracy(5).update(HITS)
