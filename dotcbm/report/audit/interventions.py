"""Interventions: what the accuracy becomes when groups of concepts are set right, on the audited split and on the others.

N pictures, M concepts, K classes, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from dotcbm.metrics.intervention import Curve, Policy, intervention_curve, logit_bounds
from dotcbm.report.audit.tools import Gathered, Section, difference, rounded
from dotcbm.report.collect.run import Columns
from dotcbm.report.record import Absence, Figure, Interval, InterventionCurve

__all__ = ["Interventions", "interventions"]


@dataclass(frozen=True)
class Interventions:
    """Figures and curves."""

    section: Section
    curves: tuple[InterventionCurve, ...]


def interventions(g: Gathered) -> Interventions:
    """Curves of all policies on all splits; none for a model whose classes are not read from concepts."""
    section = Section()
    if not g.reads_concepts:
        reason = f"the classes of {type(g.model.bottleneck).__name__} are not read from concepts: there is nothing to correct"
        section.absent.append(Absence("interventions", "all of it", reason))
        return Interventions(section, ())
    if bool((g.columns.truth_NM.isnan()).all()):
        section.absent.append(Absence("interventions", "all of it", "no concept is known for any picture of the split"))
        return Interventions(section, ())
    curves: list[InterventionCurve] = []
    # A teacher's training labels are scores, which say of no picture that a concept is there: then the percentiles stand alone.
    truth_NM = g.train.truth_NM
    scored = bool(((truth_NM != 0) & (truth_NM != 1) & ~truth_NM.isnan()).any())
    bounds = logit_bounds(g.train.concept_logit_NM, None if scored else truth_NM)
    percentiles = logit_bounds(g.train.concept_logit_NM)
    for columns in (g.columns, *g.others):
        for policy in get_args(Policy):
            curve = _curve(g, columns, bounds, policy)
            curves.append(
                InterventionCurve(
                    policy=policy,
                    split=columns.split,
                    accuracy=tuple(rounded(value) or 0.0 for value in curve.accuracy_S),
                    area=rounded(curve.area) or 0.0,
                    steps_down=rounded(curve.steps_down) or 0.0,
                    spread=None if curve.spread_S is None else tuple(rounded(value) or 0.0 for value in curve.spread_S),
                    num_pictures=len(columns),
                )
            )
            if columns is g.columns:
                section.figures += _figures(g, policy, curve)
                if policy == "random":
                    section.figures.append(_plain(g, _curve(g, columns, percentiles, policy)))
            elif policy == "random":
                section.figures.append(_area(g, f"interventions/area_{policy}_{columns.split}", f"Area, {policy}, {columns.split}", curve))
    return Interventions(section, tuple(curves))


def _curve(g: Gathered, columns: Columns, bounds: tuple[Tensor, Tensor], policy: Policy) -> Curve:
    bottleneck = g.model.bottleneck
    device = next(bottleneck.parameters()).device

    def classify(logit_nM: Tensor, rows_n: Tensor) -> Tensor:
        context = columns.context(rows_n)
        return bottleneck.classify(logit_nM.to(device), None if context is None else context.to(device)).cpu()

    return intervention_curve(
        classify,
        columns.concept_logit_NM,
        columns.truth_NM,
        columns.label_N,
        g.model.concepts.group_index_M(),
        bounds,
        policy=policy,
        seed=g.settings.seed,
    )


def _area(g: Gathered, key: str, label: str, curve: Curve) -> Figure:
    own_N = curve.correct_NS[:, 0].double()
    area = difference(curve.correct_NS.double().mean(1), torch.zeros_like(own_N), settings=g.settings)
    note = "Mean accuracy over 0, 1, ... all groups corrected; the control is the accuracy without any correction."
    control = Interval(rounded(own_N.mean()), n=len(own_N))
    return Figure(key, label, area, control=control, control_label="no correction", note=note)


def _plain(g: Gathered, curve: Curve) -> Figure:
    """Koh et al.'s own bounds beside ours."""
    figure = _area(g, "interventions/area_percentiles", "Area, random order, plain percentiles", curve)
    note = (
        "As Koh et al. set it: a corrected concept gets the 5th or 95th percentile of its logit in training, whatever the truth there. For "
        "a concept rarer than 5 % the 95th is that of pictures without it, and a correction may say the opposite of what it means."
    )
    return replace(figure, note=note)


def _figures(g: Gathered, policy: Policy, curve: Curve) -> list[Figure]:
    correct_NS = curve.correct_NS.double()
    figures = [_area(g, f"interventions/area_{policy}", f"Area, {policy} order", curve)]
    if policy != "random":
        return figures
    gain = difference(correct_NS[:, -1], correct_NS[:, 0], settings=g.settings)
    figures.append(
        Figure(
            "interventions/gain",
            "Accuracy with all concepts corrected, minus without",
            gain,
            unit="points",
            note="Truth comes from the labels; concepts that are not known stay as predicted.",
        )
    )
    # The deepest fall is found on all pictures, its interval on those two steps.
    accuracy_S = correct_NS.mean(0)
    peak_S = accuracy_S.cummax(0)
    end = int((peak_S.values - accuracy_S).argmax())
    start = int(peak_S.indices[end])
    fall = difference(correct_NS[:, start], correct_NS[:, end], settings=g.settings)
    figures.append(
        Figure(
            "interventions/fall",
            "Largest fall from one step to a later one, random order",
            fall,
            unit="points",
            better="lower",
            note=f"From {start} to {end} corrected groups. A model that uses its concepts loses nothing when they are set right.",
        )
    )
    return figures
