"""Sub-populations and other splits: for whom the model is worse, and what other surroundings cost.

N pictures, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotcbm.data.batches import mix_seed
from dotcbm.metrics.robustness import independent_gap
from dotcbm.report.audit.tools import Gathered, Section, difference, interval, share
from dotcbm.report.collect.run import Columns
from dotcbm.report.record import Absence, Figure, GroupRow, Interval

__all__ = ["dealt_gap", "group_figures", "group_names", "group_rows", "paired_rows"]

_DEALT = 0xDEA17  # separates the deals of answers from the other uses of the seed
_LEAST = 10  # pictures: smaller groups have a row and are not called the worst


def group_names(g: Gathered) -> dict[int, str]:
    """A name for each group that occurs: that of its class and its number, or what the data set calls it."""
    group_N, label_N = g.columns.group_N, g.columns.label_N
    if group_N is None:
        return {}
    known_names = tuple[str, ...]()
    source = type(g.data.source).__name__
    if source == "Waterbirds":
        from dotcbm.data.waterbirds import GROUP_NAMES

        known_names = GROUP_NAMES
    names: dict[int, str] = {}
    for number in group_N.unique().tolist():
        labels = label_N[group_N == number].unique().tolist()
        if number < len(known_names):
            names[number] = known_names[number]
        elif len(labels) == 1 and source == "Synthetic":
            from dotcbm.data.synthetic import SCENES

            names[number] = f"{g.model.concepts.class_names[labels[0]]} on {SCENES[number % len(SCENES)]}"
        elif len(labels) == 1:
            names[number] = f"{g.model.concepts.class_names[labels[0]]}, group {number}"
        else:
            names[number] = f"group {number}"
    return names


def group_rows(g: Gathered) -> tuple[GroupRow, ...]:
    """One row a group, worst first, and one for each other split."""
    columns, rows = g.columns, list[GroupRow]()
    correct_N = columns.correct_N
    if columns.group_N is not None:
        for number, name in group_names(g).items():
            mine_N = columns.group_N == number
            gap = interval(independent_gap(correct_N[~mine_N], correct_N[mine_N]), n=int(mine_N.sum())) if not mine_N.all() else None
            rows.append(GroupRow(name, "group", share(correct_N[mine_N]), gap))
        rows.sort(key=lambda row: row.accuracy.value or 0.0)
    for other in g.others:
        rows.append(GroupRow(other.split, "split", share(other.correct_N), _gap(g, other)))
    return tuple(rows)


def paired_rows(one: Columns, other: Columns) -> tuple[Tensor, Tensor]:
    """Rows of the pictures that two splits share, by their names without the splits' names."""
    place = {other.pair_name(n): n for n in range(len(other))}
    pairs = [(n, place[name]) for n in range(len(one)) if (name := one.pair_name(n)) in place]
    found = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return found[:, 0], found[:, 1]


def _gap(g: Gathered, other: Columns) -> Interval:
    ours, theirs = paired_rows(g.columns, other)
    if len(ours):
        return difference(g.columns.correct_N[ours], other.correct_N[theirs], settings=g.settings)
    return interval(independent_gap(g.columns.correct_N, other.correct_N), n=len(other))


def dealt_gap(g: Gathered, other: Columns) -> Interval:
    """The gap that chance makes: each object's two answers are dealt to the splits at random (all answers, where none are shared)."""
    drawn = torch.Generator().manual_seed(mix_seed(g.settings.seed, _DEALT))
    ours, theirs = paired_rows(g.columns, other)
    num = g.settings.num_draws
    if len(ours):
        gap_n = g.columns.correct_N[ours] - other.correct_N[theirs]
        sign_Sn = 2.0 * torch.randint(2, (num, len(gap_n)), generator=drawn) - 1
        gap_S = sign_Sn.double() @ gap_n / len(gap_n)
        n = len(gap_n)
    else:
        n, all_N = len(other), torch.cat([g.columns.correct_N, other.correct_N])
        dealt_SN = torch.stack([all_N[torch.randperm(len(all_N), generator=drawn)] for _ in range(num)])
        gap_S = dealt_SN[:, n:].mean(1) - dealt_SN[:, :n].mean(1)
    low, high = torch.quantile(gap_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return interval((float(gap_S.mean()), low, high), n=n)


def group_figures(g: Gathered) -> Section:
    """The worst group, accuracy and gap of the other splits, and usual against unusual surroundings."""
    section, columns = Section(), g.columns
    if columns.group_N is None:
        section.absent.append(Absence("groups", "sub-populations", "the data names none"))
    else:
        correct_N, group_N = columns.correct_N, columns.group_N
        count_G = torch.bincount(group_N)
        large = [i for i in range(len(count_G)) if count_G[i] >= _LEAST] or [int(count_G.argmax())]
        worst = min(large, key=lambda i: float(correct_N[group_N == i].mean()))
        section.figures.append(
            Figure(
                "groups/worst_group_accuracy",
                f"Accuracy of the worst group ({group_names(g)[worst]})",
                share(correct_N[group_N == worst]),
                control=share(correct_N[group_N != worst]) if len(large) > 1 else None,
                control_label="all others" if len(large) > 1 else "",
                note=f"Of the groups with {_LEAST} pictures at least. The worst of many is low by chance too: read its interval.",
            )
        )
        section.figures += _usual(g)
    for other in g.others:
        section.figures.append(Figure(f"groups/accuracy_{other.split}", f"Accuracy on {other.split}", share(other.correct_N)))
        section.figures.append(
            Figure(
                f"groups/gap_{other.split}",
                f"Accuracy on {columns.split} minus {other.split}",
                _gap(g, other),
                control=dealt_gap(g, other),
                control_label="the answers dealt to the splits at random",
                unit="points",
                better="lower",
                note="Of the same pictures where names match.",
            )
        )
    return section


def _usual(g: Gathered) -> list[Figure]:
    """Accuracy in the surroundings in which a class was trained most, minus in its others; where groups divide classes."""
    columns, train = g.columns, g.train
    if columns.group_N is None or train.group_N is None:
        return []
    usual: dict[int, int] = {}
    for label in train.label_N.unique().tolist():
        groups = torch.bincount(train.group_N[train.label_N == label])
        if int((groups > 0).sum()) > 1:
            usual[label] = int(groups.argmax())
    tied = sum(int((train.group_N[train.label_N == label] == group).sum()) for label, group in usual.items())
    of_these = torch.tensor([int(label) in usual for label in columns.label_N])
    if not usual or not of_these.any():
        return []
    at_home = torch.tensor([usual.get(int(label), -1) == int(group) for label, group in zip(columns.label_N, columns.group_N)])
    inside, outside = columns.correct_N[of_these & at_home], columns.correct_N[of_these & ~at_home]
    if len(inside) < _LEAST or len(outside) < _LEAST:
        return []
    share_tied = tied / max(int(sum((train.label_N == label).sum() for label in usual)), 1)
    return [
        Figure(
            "groups/usual_gap",
            "Accuracy in a class's commonest training group minus in its others",
            interval(independent_gap(inside, outside), n=len(outside)),
            unit="points",
            better="lower",
            note=f"{share_tied:.0%} of the training pictures are in their class's commonest group; {len(inside)} pictures here are, "
            f"{len(outside)} are not.",
        )
    ]
