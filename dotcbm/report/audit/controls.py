"""Controls: what accuracy alone proves. Heads fitted anew on few concepts, on random projections, and to shuffled labels.

n training pictures, F inputs of a head, M concepts, D features, K classes.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dotcbm.data.batches import mix_seed
from dotcbm.metrics.sparsity import ANEC_LEVELS, anec, nec
from dotcbm.metrics.standardize import standardize
from dotcbm.report.audit.tools import Gathered, Section, difference, rounded, share
from dotcbm.report.collect.run import Columns
from dotcbm.report.record import Absence, Figure, Interval
from dotcbm.training.head_fit import HeadFit, fit_head
from dotcbm.training.sparse_head import fit_path

__all__ = ["control_figures"]

_PROJECTION, _SHUFFLE = 0x9A0, 0x5F1  # separate streams of the seed
_L2 = 2e-3  # the strength of the shipped configs
_LEAST = 20  # training pictures: below, a head proves nothing


def control_figures(g: Gathered) -> Section:
    """Accuracy at NEC 5 and ANEC of the concepts, beside random concepts; dense heads on random concepts and shuffled labels."""
    section = Section()
    k = g.columns.class_logit_NK.shape[1]
    if len(g.train) < _LEAST or len(g.train.label_N.unique()) < 2:
        section.absent.append(Absence("controls", "heads fitted anew", f"{len(g.train)} training pictures of too few classes"))
        return section
    random_nM, random_NM = _random_concepts(g)
    dense = fit_head(random_nM, g.train.label_N, num_classes=k, l2=_L2)
    own = share(g.columns.correct_N)
    section.figures.append(
        Figure(
            "controls/random_concepts_dense",
            "Random concepts, dense head",
            share(_correct(dense, random_NM, g.columns)),
            better=None,
            control=own,
            control_label="the model",
            note=f"As many random projections of the pooled features as there are concepts, squashed; head with l2 {_L2:g}. "
            "What comes near the model here is no proof that its concepts mean anything.",
        )
    )
    if not g.reads_concepts:
        section.absent.append(Absence("controls", "accuracy at few concepts", "the classes are not read from concepts"))
        return section
    shuffled_n = g.train.label_N[torch.randperm(len(g.train), generator=_drawn(g, _SHUFFLE))]
    chance = fit_head(g.train.concept_NM, shuffled_n, num_classes=k, l2=_L2)
    section.figures.append(
        Figure(
            "controls/shuffled_labels",
            "Head fitted to shuffled labels",
            share(_correct(chance, g.columns.concept_NM, g.columns)),
            better=None,
            control=Interval(rounded(1 / k), n=k, over="classes"),
            control_label="guessing",
            note="If this is far above guessing, the evaluation itself leaks.",
        )
    )
    weight_KF = g.model.bottleneck.head.weight.detach()
    if weight_KF.shape[1] == len(g.model.concepts.names):
        value = Interval(rounded(nec(weight_KF)), n=k, over="classes")
        section.figures.append(Figure("controls/nec", "Non-zero weights a class (NEC)", value, "number", "lower"))
    section.figures += _sparse(g, random_nM, random_NM)
    return section


def _sparse(g: Gathered, random_nM: Tensor, random_NM: Tensor) -> list[Figure]:
    k = g.columns.class_logit_NK.shape[1]
    label_n = g.train.label_N
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a path that ends early is not the audited model's fault
        path, random_path = (
            fit_path(x, label_n, num_classes=k, num_strengths=g.settings.num_strengths) for x in (_read(g, g.train), random_nM)
        )
    levels = {level: _correct(path.at(level), _read(g, g.columns), g.columns) for level in ANEC_LEVELS}
    random_levels = {level: _correct(random_path.at(level), random_NM, g.columns) for level in ANEC_LEVELS}
    scores, random_scores = (anec({level: float(hit.mean()) for level, hit in each.items()}) for each in (levels, random_levels))
    note = "A head fitted along the elastic-net path to what the model's own reads of the training pictures, cut to 5 weights a class."
    random_label = "random concepts"
    return [
        Figure(
            "controls/nec5", "Accuracy at NEC 5", share(levels[5]), control=share(random_levels[5]), control_label=random_label, note=note
        ),
        Figure(
            "controls/anec",
            "Accuracy, mean over NEC 5 to 30",
            Interval(rounded(scores.anec_avg), n=len(g.columns)),
            control=Interval(rounded(random_scores.anec_avg), n=len(g.columns)),
            control_label=random_label,
        ),
        Figure(
            "controls/nec5_gain",
            "Accuracy at NEC 5 above random concepts",
            difference(levels[5], random_levels[5], settings=g.settings),
            unit="points",
        ),
    ]


def _read(g: Gathered, columns: Columns) -> Tensor:
    """(N, M) what the model's head reads of each concept; their probabilities where that is more than one number."""
    device = g.model.bottleneck.head.weight.device
    context = columns.context_NX
    with torch.no_grad():
        read_NF = g.model.bottleneck.head_input(columns.concept_logit_NM.to(device), None if context is None else context.to(device)).cpu()
    return read_NF if read_NF.shape[1] == columns.concept_logit_NM.shape[1] else columns.concept_NM


def _random_concepts(g: Gathered) -> tuple[Tensor, Tensor]:
    """(n, M) and (N, M) random concepts of the training and of the audited pictures, in (0, 1)."""
    train_nD, test_ND = g.train.pooled_ND.double(), g.columns.pooled_ND.double()
    _, mean_D, deviation_D = standardize(train_nD)
    weight_DM = torch.randn(train_nD.shape[1], len(g.model.concepts.names), generator=_drawn(g, _PROJECTION), dtype=torch.float64)
    weight_DM = weight_DM / train_nD.shape[1] ** 0.5
    train_nM, test_NM = (((value - mean_D) / deviation_D @ weight_DM).sigmoid() for value in (train_nD, test_ND))
    return train_nM, test_NM


def _drawn(g: Gathered, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix_seed(g.settings.seed, stream))


def _correct(fit: HeadFit, input_NF: Tensor, columns: Columns) -> Tensor:
    logit_NK = input_NF.double() @ fit.weight_KF.T + fit.bias_K
    return (logit_NK.argmax(1) == columns.label_N).double()
