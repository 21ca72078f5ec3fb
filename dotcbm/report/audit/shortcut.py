"""Does the model read the background? Found by experiment: the object of a picture on another background.

The background of another picture of the object's own class has the same seams and paint and tells the same class; whatever another class's
background costs beyond that is owed to what backgrounds say of classes.

S swapped pictures, N pictures of a split, M concepts, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dotcbm.report.audit.background_probe import probe_background
from dotcbm.report.audit.classes import contribution_to
from dotcbm.report.audit.tools import Gathered, Section, difference, mean, rounded, share
from dotcbm.report.collect.probe import Swap
from dotcbm.report.record import SWAP_FALL_CLASS, Absence, Figure, Interval, Suspect, Verdict

__all__ = ["CONCEPT_FALL", "Shortcut", "shortcut"]

CONCEPT_FALL = 0.05
"""A concept is carried by the background if its fall beyond the control's is surely above 0 and at least this large."""

_MOST, _LEAST, _LEAST_SWAPPED = 20, 3, 8  # suspects listed; pictures a pair needs; swapped pictures a pair's own verdict needs
_CLASSES, _LEAST_OF_CLASS = 5, 5  # classes whose own fall is reported, and the swapped pictures that this takes
_LEVEL = 0.99  # of the intervals that accuse: many audits are made
_NO_MASKS = "the data has no masks of the object: its background cannot be exchanged"


@dataclass(frozen=True)
class Shortcut:
    """Figures, and the pairs of concept and class under suspicion."""

    section: Section
    suspects: tuple[Suspect, ...]


def shortcut(g: Gathered) -> Shortcut:
    """What backgrounds say, what the model reads of them, and through which concepts."""
    section = Section()
    section.extend(_data(g))
    section.extend(_shares(g))
    swap = g.swap
    if swap is None or not len(swap.picture_S):
        if "area" not in g.columns.places:
            reason = _NO_MASKS
        elif len(g.columns.label_N.unique()) < 2:
            reason = "the split has a single class: there is no background of another one"
        else:
            reason = "no picture has a mask and a second picture of its class with one"
        section.absent.append(Absence("suspects", "the background swap", reason))
    else:
        section.figures += _swap_figures(g, swap)
    return Shortcut(section, _suspects(g))


def _data(g: Gathered) -> Section:
    """A fact about the data: how far the background's colours alone tell the class."""
    section = Section()
    if "area" not in g.columns.places:
        return section
    found = probe_background(g.data, split=g.columns.split, num_train=400, num_test=400, seed=g.settings.seed)
    if found is None:
        section.absent.append(Absence("suspects", "what the background's colours say of the class", "too few pictures have a mask"))
        return section
    section.figures.append(
        Figure(
            "suspects/background_colours",
            "Classes told by the background's colours alone",
            share(found.correct_N.double()),
            better=None,
            control=Interval(rounded(found.largest_share), n=len(found.correct_N)),
            control_label="the largest class",
            note=f"A property of the data: a linear classifier on the colours outside the object, fitted to {found.num_train} pictures.",
        )
    )
    return section


def _shares(g: Gathered) -> Section:
    section, places = Section(), g.columns.places
    share_NM = None if g.map_name is None or not g.columns.has_maps else places.get(f"background/{g.map_name}")
    area_N = places.get("area")
    if share_NM is None or area_N is None:
        reason = "the model has no maps" if not g.columns.has_maps else "the data has no masks of the object"
        section.absent.append(Absence("suspects", "share of the maps on the background", reason))
        return section
    present_NM = torch.where(g.columns.truth_NM == 1, share_NM.double(), torch.nan)
    section.figures.append(
        Figure(
            "suspects/background_share",
            f"Share of the {g.map_name} on the background",
            mean(present_NM.nanmean(1), settings=g.settings),
            better="lower",
            control=mean(area_N.double(), settings=g.settings),
            control_label="the background's share of the picture",
            note="Mean over the concepts that are there, then over pictures.",
        )
    )
    return section


def _swap_figures(g: Gathered, swap: Swap) -> list[Figure]:
    columns, settings = g.columns, g.settings
    label_S = columns.label_N[swap.picture_S]
    taken_same_S, taken_other_S = swap.same_logit_SK.argmax(1), swap.other_logit_SK.argmax(1)
    same_S, other_S = (taken_same_S == label_S).double(), (taken_other_S == label_S).double()
    same_odds_S, other_odds_S = _log_odds(swap.same_logit_SK, label_S), _log_odds(swap.other_logit_SK, label_S)
    own_S = columns.correct_N[swap.picture_S]
    donor_S = columns.label_N[swap.other_S]
    to_donor_S, by_chance_S = (taken_other_S == donor_S).double(), (taken_same_S == donor_S).double()
    note = "The same objects on the background of another class minus on that of another picture of their own class."
    figures = [
        Figure(
            "suspects/swap_fall",
            "Fall of accuracy on another class's background",
            difference(same_S, other_S, settings=settings, level=_LEVEL),
            unit="points",
            better="lower",
            control=difference(own_S, same_S, settings=settings),
            control_label="fall on another background of the own class: seams and paint",
            note=f"{note} Its interval covers 99 %: many audits are made.",
        ),
        Figure(
            "suspects/swap_log_odds",
            "Fall of the true class's log-odds on another class's background",
            difference(same_odds_S, other_odds_S, settings=settings, level=_LEVEL),
            unit="number",
            better="lower",
            control=difference(_log_odds(columns.class_logit_NK[swap.picture_S], label_S), same_odds_S, settings=settings),
            control_label="fall on another background of the own class: seams and paint",
            note=f"{note} In natural logarithms; seen long before decisions change. Its interval covers 99 %.",
        ),
        Figure(
            "suspects/swap_to_donor",
            "Taken for the class that lent the background",
            share(to_donor_S),
            better="lower",
            control=share(by_chance_S),
            control_label="taken for that class on a background of the own class",
        ),
        Figure(
            "suspects/swap_to_donor_excess",
            "The same, minus the control",
            difference(to_donor_S, by_chance_S, settings=settings, level=_LEVEL),
            unit="points",
            better="lower",
        ),
    ]
    falls: list[tuple[float, int, Tensor]] = []
    for label in label_S.unique().tolist():
        mine_S = label_S == label
        if int(mine_S.sum()) >= _LEAST_OF_CLASS:
            falls.append((float((same_S - other_S)[mine_S].mean()), label, mine_S))
    for _, label, mine_S in sorted(falls, key=lambda fall: (-fall[0], fall[1]))[:_CLASSES]:
        name = g.model.concepts.class_names[label]
        fall = difference(same_S[mine_S], other_S[mine_S], settings=settings)
        figures.append(Figure(f"{SWAP_FALL_CLASS}{name}", f"Fall of accuracy: {name}", fall, "points", "lower"))
    return figures


def _log_odds(logit_SK: Tensor, label_S: Tensor) -> Tensor:
    """(S,) log of p / (1 - p) for the probability p of the labels."""
    logit_SK = logit_SK.double()
    true_S = logit_SK.gather(1, label_S[:, None])[:, 0]
    return true_S - logit_SK.scatter(1, label_S[:, None], -torch.inf).logsumexp(1)


def _suspects(g: Gathered) -> tuple[Suspect, ...]:
    """The pairs of class and concept with the largest background share times contribution, and those whose concepts fell most."""
    columns, places, concepts = g.columns, g.columns.places, g.model.concepts
    background_NM = None if g.map_name is None or not g.columns.has_maps else places.get(f"background/{g.map_name}")
    if background_NM is None or not g.reads_concepts:
        return ()
    falls = _concept_falls(g)
    pairs: list[tuple[float, float, int, int, float, float]] = []
    for k in range(len(concepts.class_names)):
        rows = (columns.label_N == k).nonzero()[:, 0]
        if not len(rows):
            continue
        added_nM = contribution_to(g, rows, k).double()
        present_nM = (columns.truth_NM[rows] == 1) & ~background_NM[rows].isnan()
        count_M = present_nM.sum(0)
        weight_M = torch.where(present_nM, added_nM, 0.0).sum(0) / count_M.clamp(min=1)
        share_M = torch.where(present_nM, background_NM[rows].double(), 0.0).sum(0) / count_M.clamp(min=1)
        for j in (count_M >= _LEAST).nonzero()[:, 0].tolist():
            if weight_M[j] > 0:
                suspicion = float(weight_M[j] * share_M[j])
                pairs.append((suspicion, float(weight_M[j]) * falls.get(j, 0.0), k, j, float(share_M[j]), float(weight_M[j])))
    by_map = sorted(pairs, key=lambda pair: (-pair[0], pair[2], pair[3]))
    by_fall = sorted((pair for pair in pairs if pair[1] > 0), key=lambda pair: (-pair[1], pair[2], pair[3]))
    # Half the list by the maps, half by the experiment: a map may be silent of what the swap shows.
    chosen = list(dict.fromkeys([*by_map[: _MOST // 2], *by_fall[: _MOST // 2], *by_map]))[:_MOST]
    suspects = [_suspect(g, k, j, share=share, weight=weight, suspicion=suspicion) for suspicion, _, k, j, share, weight in chosen]
    return tuple(sorted(suspects, key=lambda suspect: (-suspect.suspicion, suspect.class_name, suspect.concept)))


def _concept_falls(g: Gathered) -> dict[int, float]:
    """Mean fall of each concept that is there, on another class's background beyond that on an own one's."""
    if g.swap is None:
        return {}
    there_SM = g.columns.truth_NM[g.swap.picture_S] == 1
    fall_SM = (g.swap.same_concept_SM - g.swap.other_concept_SM).double()
    count_M = there_SM.sum(0)
    fall_M = torch.where(there_SM, fall_SM, 0.0).sum(0) / count_M.clamp(min=1)
    return {j: float(fall_M[j]) for j in (count_M >= _LEAST_SWAPPED).nonzero()[:, 0].tolist()}


def _suspect(g: Gathered, class_index: int, concept: int, *, share: float, weight: float, suspicion: float) -> Suspect:
    concepts = g.model.concepts
    drop, control, verdict = _swapped(g, class_index, concept)
    return Suspect(
        concept=concepts.names[concept],
        class_name=concepts.class_names[class_index],
        background_share=rounded(share) or 0.0,
        weight=rounded(weight) or 0.0,
        suspicion=rounded(suspicion) or 0.0,
        swap_drop=drop,
        control_drop=control,
        verdict=verdict,
    )


def _swapped(g: Gathered, class_index: int, concept: int) -> tuple[Interval | None, Interval | None, Verdict]:
    """Falls of a concept on both backgrounds: in the class's own pictures, or in all that show it where those are too few."""
    swap = g.swap
    if swap is None:
        return None, None, "open"
    there_S = g.columns.truth_NM[swap.picture_S, concept] == 1
    own_S = there_S & (g.columns.label_N[swap.picture_S] == class_index)
    chosen = own_S if int(own_S.sum()) >= _LEAST_SWAPPED else there_S
    if int(chosen.sum()) < _LEAST_SWAPPED:
        return None, None, "open"
    before = g.columns.concept_NM[swap.picture_S[chosen], concept]
    same, other = swap.same_concept_SM[chosen, concept], swap.other_concept_SM[chosen, concept]
    excess = difference(same, other, settings=g.settings)
    verdict: Verdict = "open"
    if excess.value is not None and excess.low is not None and excess.high is not None:
        if excess.low > 0 and excess.value >= CONCEPT_FALL:
            verdict = "confirmed"
        elif excess.high < CONCEPT_FALL:
            verdict = "refuted"
    return difference(before, other, settings=g.settings), difference(before, same, settings=g.settings), verdict
