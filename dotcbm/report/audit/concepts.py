"""Concepts: how well each is recognised, what it leaks, and what covering its region does to it.

N pictures, M concepts, K classes, D draws, G distinct scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.metrics.concepts import (
    all_negative_error,
    concept_auroc,
    concept_average_precision,
    concept_error,
    concept_f1,
)
from dotcbm.metrics.leakage import LeakageFigures, measure_leakage
from dotcbm.report.audit.tools import PAIRS, Gathered, Section, difference, mean, mean_of_pairs, rounded
from dotcbm.report.record import Absence, ConceptRow, Figure, Interval

__all__ = ["auroc_draws", "concept_figures", "concept_rows", "leakage_figures", "occlusion_figures"]

_LEAST_FOR_LEAKAGE = 30  # pictures: the nearest-neighbour estimators say nothing below
_LEAST_OF_KIND = 5  # pictures with a concept, and without it, that an interval of its AUROC needs
_CELLS = 4_000_000  # draws times pictures at once


def auroc_draws(score_NM: Tensor, truth_NM: Tensor, *, num_draws: int, seed: int) -> Tensor:
    """(D, M) float64 AUROC of each concept of pictures drawn with replacement, the same for all concepts; NaN where undefined."""
    n, m = score_NM.shape
    drawn = torch.Generator().manual_seed(seed)
    count_DN = torch.stack([torch.bincount(torch.randint(n, (n,), generator=drawn), minlength=n) for _ in range(num_draws)]).double()
    value_DM = torch.full((num_draws, m), torch.nan, dtype=torch.float64)
    step = max(1, _CELLS // n)
    for j in range(m):
        known = (~truth_NM[:, j].isnan()).nonzero()[:, 0]
        positive = truth_NM[known, j] == 1
        if not positive.any() or positive.all():
            continue
        group = score_NM[known, j].unique(return_inverse=True)[1]
        num_groups = int(group.max()) + 1
        for start in range(0, num_draws, step):
            weight_dn = count_DN[start : start + step][:, known]
            zeros = weight_dn.new_zeros(len(weight_dn), num_groups)
            positive_dG = zeros.index_add(1, group, weight_dn * positive)
            negative_dG = zeros.index_add(1, group, weight_dn * ~positive)
            won = (positive_dG * (negative_dG.cumsum(1) - negative_dG / 2)).sum(1)
            pairs = positive_dG.sum(1) * negative_dG.sum(1)
            value_DM[start : start + step, j] = won / torch.where(pairs > 0, pairs, torch.nan)
    return value_DM


def concept_figures(g: Gathered) -> tuple[Section, list[Interval]]:
    """Macro figures, and the AUROC of each concept with its interval."""
    section, columns, settings = Section(), g.columns, g.settings
    score_NM, truth_NM = columns.concept_logit_NM, columns.truth_NM
    auroc_M = concept_auroc(score_NM, truth_NM)
    num = int((~auroc_M.isnan()).sum())
    if num == 0:
        section.absent.append(Absence("concepts", "AUROC and average precision", "no concept is both present and absent among the labels"))
        return section, [Interval(None)] * len(auroc_M)
    draws_DM = auroc_draws(score_NM, truth_NM, num_draws=settings.num_draws, seed=settings.seed)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low_M, high_M = draws_DM.nanquantile(ends, dim=0)
    known_M = (~truth_NM.isnan()).sum(0)
    positive_M = (truth_NM == 1).sum(0)
    # The draws hardly vary a positive that is alone: of 95 intervals in a hundred, 15 would hold the truth with one and 87 with five.
    enough_M = torch.minimum(positive_M, known_M - positive_M) >= _LEAST_OF_KIND
    low_M, high_M = (torch.where(enough_M, end_M, torch.nan) for end_M in (low_M, high_M))
    rows = [Interval(rounded(auroc_M[j]), rounded(low_M[j]), rounded(high_M[j]), int(known_M[j])) for j in range(len(auroc_M))]
    low, high = draws_DM.nanmean(1).nanquantile(ends)
    section.figures.append(
        Figure(
            "concepts/auroc",
            "Concept AUROC",
            Interval(rounded(auroc_M.nanmean()), rounded(low), rounded(high), num, "concepts"),
            control=Interval(0.5, n=num, over="concepts"),
            control_label="guessing",
            note="Mean over the concepts that are both present and absent in the split; the interval is over pictures.",
        )
    )
    precision_M, f1_M = concept_average_precision(score_NM, truth_NM), concept_f1(columns.concept_NM, truth_NM)
    prevalence_M = (truth_NM == 1).sum(0) / known_M.clamp(min=1)
    varies_M = ~auroc_M.isnan()
    section.figures.append(
        Figure(
            "concepts/average_precision",
            "Concept average precision",
            Interval(rounded(precision_M.nanmean()), n=num, over="concepts"),
            control=Interval(rounded(prevalence_M[varies_M].double().mean()), n=num, over="concepts"),
            control_label="guessing: the share of positives",
        )
    )
    section.figures.append(Figure("concepts/f1", "Concept F1 at 0.5", Interval(rounded(f1_M.nanmean()), n=num, over="concepts")))
    section.figures.append(_error_figure(g))
    return section, rows


def _error_figure(g: Gathered) -> Figure:
    truth_NM = g.columns.truth_NM
    wrong_NM = torch.where(truth_NM.isnan(), torch.nan, ((g.columns.concept_NM > 0.5) != (truth_NM == 1)).double())
    negative_NM = torch.where(truth_NM.isnan(), torch.nan, (truth_NM == 1).double())
    return Figure(
        "concepts/error",
        "Concept error at 0.5",
        mean_of_pairs(wrong_NM, settings=g.settings),
        better="lower",
        control=mean_of_pairs(negative_NM, settings=g.settings),
        control_label="always saying no",
    )


def leakage_figures(g: Gathered) -> tuple[Section, LeakageFigures | None]:
    """CTL, ICL, OIS and NIS, each beside the same after shuffling within the truth."""
    section, columns = Section(), g.columns
    several = int(columns.label_N.unique().numel()) > 1
    spread = float(columns.concept_logit_NM.std(0, unbiased=False).max()) > 0
    if len(columns) < _LEAST_FOR_LEAKAGE or not several or not spread:
        if not several:
            reason = "the split has a single class"
        elif len(columns) < _LEAST_FOR_LEAKAGE:
            reason = f"{len(columns)} pictures; the estimators need {_LEAST_FOR_LEAKAGE} at least"
        else:
            reason = "the model predicts the same of every picture: it knows no concept"
        section.absent.append(Absence("concepts", "leakage", reason))
        return section, None
    # In double precision: a single-precision sigmoid is 1 beyond 17, and what a surer model says besides would be lost.
    found = measure_leakage(columns.concept_logit_NM.double().sigmoid(), columns.truth_NM, columns.label_N, seed=g.settings.seed)
    n = found.num_pictures
    ctl_M, control_M = found.ctl_M, found.ctl_control_M
    shuffled = "each concept shuffled among pictures of equal truth"
    told = (
        ("ctl", "Concepts tell the class more than their truth does (CTL)", float(ctl_M.nanmean()), float(control_M.nanmean()), n),
        ("icl", "Concepts tell each other more than their truths do (ICL)", found.icl, found.icl_control, found.num_pairs),
        ("ois", "Oracle impurity (OIS)", found.ois, found.ois_control, n),
        ("nis", "Niche impurity (NIS)", found.nis, found.nis_control, n),
    )
    for name, label, value, control, count in told:
        over = "pairs of concepts" if name == "icl" else "pictures"
        section.figures.append(
            Figure(
                f"concepts/leakage_{name}",
                label,
                Interval(rounded(value), n=count, over=over),
                unit="number",
                better="lower",
                control=Interval(rounded(control), n=count, over=over),
                control_label=shuffled,
                note="See dotcbm.metrics.leakage for the formula; what exceeds the control is leakage.",
            )
        )
    over_M = (ctl_M - control_M)[~(ctl_M.isnan() | control_M.isnan())]
    section.figures.append(
        Figure(
            "concepts/leakage_excess",
            "CTL above its control",
            mean(over_M, settings=g.settings, over="concepts"),
            unit="number",
            better="lower",
            note="Mean over the concepts, in shares of the class's entropy; the interval is over concepts.",
        )
    )
    return section, found


def occlusion_figures(g: Gathered) -> Section:
    """How far a concept falls when its region is covered, against a random region."""
    section = Section()
    found = g.occlusion
    if found is None or not len(found.picture_S):
        reason = (
            "the model says of no concept where it reads it"
            if not g.columns.has_maps
            else "no concept that is present is recognised in any picture drawn"
        )
        section.absent.append(Absence("concepts", "occlusion of a concept's region", reason))
        return section
    drop_S, random_S = (found.before_S - found.region_S).double(), (found.before_S - found.random_S).double()
    section.figures += [
        Figure(
            "concepts/occlusion_drop",
            "Fall of a concept when its region is covered",
            mean(drop_S, settings=g.settings, over=PAIRS),
            unit="points",
            control=mean(random_S, settings=g.settings, over=PAIRS),
            control_label="a random region of the same size",
            note="The hottest cells that hold half of the map, a quarter of the picture at most, take the picture's mean colour.",
        ),
        Figure(
            "concepts/occlusion_excess",
            "The same, minus the fall for a random region",
            difference(drop_S, random_S, settings=g.settings, over=PAIRS),
            unit="points",
        ),
    ]
    return section


def concept_rows(g: Gathered, auroc: list[Interval], leakage: LeakageFigures | None) -> tuple[ConceptRow, ...]:
    """One row a concept; those with the most weight in the head are shown, as many as the settings say."""
    columns, concepts, settings = g.columns, g.model.concepts, g.settings
    truth_NM, logit_NM = columns.truth_NM, columns.concept_logit_NM
    precision_M = concept_average_precision(logit_NM, truth_NM)
    error_M, negative_M = concept_error(columns.concept_NM, truth_NM), all_negative_error(truth_NM)
    span_M = _weight_span(g)
    importance_M = span_M if span_M is not None else (truth_NM == 1).sum(0).double()
    shown = set(importance_M.nan_to_num(0.0).argsort(descending=True, stable=True)[: settings.num_shown].tolist())
    train_M = g.train.truth_NM.nanmean(0)
    hit_NM, prior_NM = g.pointing(g.map_name), g.pointing(g.control_name)
    present_NM = truth_NM == 1
    mass_NM, background_NM = (columns.places.get(f"{figure}/{g.map_name}") for figure in ("part_mass", "background"))
    mapped_NM = None if background_NM is None else present_NM & ~background_NM.isnan()
    area_N = columns.places.get("area")
    rows: list[ConceptRow] = []
    for j, name in enumerate(concepts.names):
        num_known, num_positive = int((~truth_NM[:, j].isnan()).sum()), int(present_NM[:, j].sum())

        def over_present(value_NM: Tensor | None, j: int = j) -> float | None:
            return None if value_NM is None else rounded(value_NM[present_NM[:, j], j].nanmean())

        drop_S, random_S = _falls(g, j)
        rows.append(
            ConceptRow(
                name=name,
                group=None if concepts.groups is None else concepts.groups[j],
                parts=() if concepts.parts is None else concepts.parts[j],
                shown=j in shown,
                num_positive=num_positive,
                num_known=num_known,
                prevalence=rounded(num_positive / num_known) if num_known else None,
                train_prevalence=rounded(train_M[j]),
                auroc=auroc[j],
                average_precision=rounded(precision_M[j]),
                error=rounded(error_M[j]),
                all_negative_error=rounded(negative_M[j]),
                leakage=None if leakage is None else rounded(leakage.ctl_M[j]),
                pointing=Interval(None) if hit_NM is None else mean(hit_NM[present_NM[:, j], j], settings=settings),
                pointing_prior=over_present(prior_NM),
                part_mass=over_present(mass_NM),
                background_share=over_present(background_NM),
                background_area=None if area_N is None else rounded(area_N[present_NM[:, j]].nanmean()),
                num_mapped=0 if mapped_NM is None else int(mapped_NM[:, j].sum()),
                occlusion_drop=rounded(drop_S.mean()),
                random_drop=rounded(random_S.mean()),
                num_covered=len(drop_S),
                weight_span=None if span_M is None else rounded(span_M[j]),
            )
        )
    return tuple(rows)


def _weight_span(g: Gathered) -> Tensor | None:
    weight_KF = g.model.bottleneck.head.weight.detach().cpu()
    if not g.reads_concepts or weight_KF.shape[1] != len(g.model.concepts.names):
        return None
    return (weight_KF.amax(0) - weight_KF.amin(0)).double()


def _falls(g: Gathered, concept: int) -> tuple[Tensor, Tensor]:
    """(s,) falls of a concept whose region was covered, and for a random region; empty if it never was."""
    found = g.occlusion
    if found is None:
        return torch.zeros(0), torch.zeros(0)
    mine_S = found.concept_S == concept
    return found.before_S[mine_S] - found.region_S[mine_S], found.before_S[mine_S] - found.random_S[mine_S]
