"""What an edit changed: accuracies of all pictures, classes and sub-populations, before and after, on the same pictures.

n pictures of a split, K classes, G sub-populations, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dotcbm.report.compare.statistics import adjusted, draw_counts, group_draws, interval, mcnemar
from dotcbm.report.record import Interval

__all__ = ["ChangeRow", "Scored", "change_rows"]

Kind = Literal["all", "balanced", "worst group", "class", "group"]


@dataclass(frozen=True)
class Scored:
    """The predictions of all versions of a model on one split.

    Attributes:
        split: Its name.
        label_n: (n,) class indices.
        group_n: (n,) long, or None.
        predicted: By version, (n,) class indices.
    """

    split: str
    label_n: Tensor
    group_n: Tensor | None
    predicted: Mapping[str, Tensor]


@dataclass(frozen=True)
class ChangeRow:
    """One accuracy of all versions; every tuple is by version.

    Attributes:
        split: Whose pictures.
        kind: "all" pictures, "balanced" over classes, "worst group", or one "class" or "group".
        name: Of the class or group, else of the figure.
        values: Accuracy, with bootstrap interval.
        differences: To the first version, paired over the same pictures; None for the first.
        p: McNemar's exact test against the first; None for the first, and for figures that are no share of pictures.
        q: Benjamini and Hochberg's over the classes (or the groups) of a split; None where p is.
    """

    split: str
    kind: Kind
    name: str
    values: tuple[Interval, ...]
    differences: tuple[Interval | None, ...]
    p: tuple[float | None, ...]
    q: tuple[float | None, ...]


def change_rows(
    scored: Scored,
    *,
    class_names: tuple[str, ...],
    group_names: tuple[str, ...] = (),
    num_draws: int = 1000,
    seed: int = 0,
) -> tuple[ChangeRow, ...]:
    """The rows of one split, the first version being the one that the others are held against.

    Classes and groups without a picture in the split have values of None.
    """
    label_n, group_n = scored.label_n, scored.group_n
    n = len(label_n)
    count_nD, once_n1 = draw_counts(n, num_draws=num_draws, seed=seed), torch.ones(n, 1)
    correct = [predicted == label_n for predicted in scored.predicted.values()]
    rows: list[ChangeRow] = []

    def add(kind: Kind, names: tuple[str, ...], member_n: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One row for each group; their values (G,) and draws (D, G) by version."""
        num = len(names)
        value_I = [group_draws(c, once_n1, group_n=member_n, num_groups=num)[0] for c in correct]
        draws_I = [group_draws(c, count_nD, group_n=member_n, num_groups=num) for c in correct]
        size_G = torch.bincount(member_n, minlength=num).tolist()
        inside = [member_n == g for g in range(num)]
        p_I: list[list[float | None]] = [
            [None if i == 0 or not size_G[g] else mcnemar(c[inside[g]], correct[0][inside[g]]) for g in range(num)]
            for i, c in enumerate(correct)
        ]
        q_I = [adjusted(p) for p in p_I]
        for g, name in enumerate(names):
            values = tuple(interval(float(v[g]), d[:, g], n=size_G[g]) for v, d in zip(value_I, draws_I, strict=True))
            differences = tuple(
                None if i == 0 or not size_G[g] else interval(float(v[g] - value_I[0][g]), d[:, g] - draws_I[0][:, g], n=size_G[g])
                for i, (v, d) in enumerate(zip(value_I, draws_I, strict=True))
            )
            rows.append(ChangeRow(scored.split, kind, name, values, differences, tuple(p[g] for p in p_I), tuple(q[g] for q in q_I)))
        return value_I, draws_I

    def add_summary(kind: Kind, name: str, value_I: list[Tensor], draws_I: list[Tensor]) -> None:
        """One row of a figure made from others: 0-d values and (D,) draws by version."""
        values = tuple(interval(float(v), d, n=n) for v, d in zip(value_I, draws_I, strict=True))
        differences = tuple(
            None if i == 0 else interval(float(v - value_I[0]), d - draws_I[0], n=n)
            for i, (v, d) in enumerate(zip(value_I, draws_I, strict=True))
        )
        none = (None,) * len(values)
        rows.append(ChangeRow(scored.split, kind, name, values, differences, none, none))

    add("all", ("accuracy",), torch.zeros(n, dtype=torch.long))
    value_I, draws_I = add("class", class_names, label_n)
    add_summary("balanced", "balanced accuracy", [v.nanmean() for v in value_I], [d.nanmean(1) for d in draws_I])
    if group_n is not None:
        num = int(group_n.max()) + 1
        names = group_names if len(group_names) >= num else tuple(f"group {g}" for g in range(num))
        value_I, draws_I = add("group", names, group_n)
        worst = [d.nan_to_num(torch.inf).min(1).values for d in draws_I]
        add_summary("worst group", "worst group", [v.nan_to_num(torch.inf).min() for v in value_I], worst)
    order = ("all", "balanced", "worst group", "group", "class")
    return tuple(sorted(rows, key=lambda row: order.index(row.kind)))
