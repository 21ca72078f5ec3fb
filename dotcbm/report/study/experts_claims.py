"""What the records of a study of experts say: a table, and for each thing that was to be shown whether it was.

Figures are means over seeds with their sample deviations; differences between arms are taken seed by seed first.

    balance  parts "plain" (the Switch loss with one active expert) and "remedy"
    budgets  parts "matryoshka" (the first such row is the one that is judged) and "specialist" (one fixed k)
    growth   parts "base" (which tells how exact growth is, too), "grown" (the first is judged), "scratch", "whole" (from nothing with
             the base's FLOPs too), "continued", "sunk" (grown from earlier steps)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from dotcbm.moe.matryoshka import area_under_flops, monotonicity_violations
from dotcbm.report.study.experts_plan import ExpertRow, ExpertStudy
from dotcbm.report.study.plan import Record

__all__ = ["Check", "area", "by_seed", "checks", "markdown", "rows_of", "told"]


@dataclass(frozen=True)
class Check:
    """One thing that was to be shown."""

    what: str
    found: str
    met: bool | None
    """None for a figure that is reported and not judged."""


def told(values: Sequence[float], *, digits: int = 2, scale: float = 1.0) -> str:
    """ "mean ± deviation".

    >>> told([0.71, 0.73], digits=1, scale=100)
    '72.0 ± 1.4'
    """
    if not values:
        return "—"
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def by_seed(records: Sequence[Record], row: str, figure: str) -> dict[int, float]:
    """A figure of all runs of a row that have it."""
    return {record.seed: record.figures[figure] for record in records if record.row == row and figure in record.figures}


def rows_of(study: ExpertStudy, records: Sequence[Record], *parts: str) -> list[ExpertRow]:
    """The rows of these parts, in the study's order, that have records."""
    present = {record.row for record in records}
    return [row for row in study.rows if row.part in parts and row.name in present]


def markdown(study: ExpertStudy, records: Sequence[Record]) -> str:
    """The table, and below it what was to be shown."""
    table = {"balance": _balance_table, "budgets": _budget_table, "growth": _growth_table}[study.claim](study, records)
    lines = [table, "| to be shown | found | |", "| --- | --- | --- |"]
    mark = {True: "met", False: "**not met**", None: ""}
    lines += [f"| {check.what} | {check.found} | {mark[check.met]} |" for check in checks(study, records)]
    return "\n".join(lines) + "\n"


def checks(study: ExpertStudy, records: Sequence[Record]) -> list[Check]:
    """Everything that was to be shown and for which there are records."""
    return {"balance": _balance_checks, "budgets": _budget_checks, "growth": _growth_checks}[study.claim](study, records)


def area(record: Record, budgets: Sequence[int]) -> float:
    """Under the accuracy of a run over FLOPs, as a mean accuracy."""
    return area_under_flops([record.figures[f"flops@{k}"] for k in budgets], [record.figures[f"accuracy@{k}"] for k in budgets])


def _difference(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in a if seed in b]


def _values(records: Sequence[Record], row: str, figure: str) -> list[float]:
    return list(by_seed(records, row, figure).values())


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [list(head), ["---"] * len(head), *body]]) + "\n"


def _layers(records: Sequence[Record], row: str) -> int:
    return sum(name.endswith("/max_vio") for name in next(record for record in records if record.row == row).figures)


def _dead(records: Sequence[Record], row: str) -> list[float]:
    """By seed, the dead experts of the layer that has most."""
    layers = range(_layers(records, row))
    return [max(record.figures[f"experts/{layer}/dead"] for layer in layers) for record in records if record.row == row]


def _balance_table(study: ExpertStudy, records: Sequence[Record]) -> str:
    columns = (("switch_loss", "Switch loss"), ("max_vio", "MaxVio"), ("min_vio", "MinVio"), ("entropy", "entropy"))
    head = [
        "row",
        "n",
        "accuracy",
        *(f"{heading}, layer 0" for _, heading in columns),
        "MaxVio, worst layer",
        "dead, worst layer",
        "bias spread",
    ]
    body = []
    for row in rows_of(study, records, "plain", "remedy", ""):
        layers = range(_layers(records, row.name))
        worst = [max(r.figures[f"experts/{i}/max_vio"] for i in layers) for r in records if r.row == row.name]
        accuracy = _values(records, row.name, "accuracy")
        body.append(
            [row.name, str(len(accuracy)), told(accuracy, digits=1, scale=100)]
            + [told(_values(records, row.name, f"experts/0/{name}")) for name, _ in columns]
            + [told(worst), told(_dead(records, row.name), digits=1), told(_values(records, row.name, "experts/0/bias_spread"))]
        )
    return _table(head, body)


def _balance_checks(study: ExpertStudy, records: Sequence[Record]) -> list[Check]:
    plain = next(iter(rows_of(study, records, "plain")), None)
    if plain is None:
        return []
    loss, vio = _values(records, plain.name, "experts/0/switch_loss"), _values(records, plain.name, "experts/0/max_vio")
    found = [
        Check(
            f"degenerate balance with {plain.name}: loss at most 1.05 and MaxVio at least 1.5 in layer 0",
            f"{told(loss, digits=3)} and {told(vio)}",
            mean(loss) <= 1.05 and mean(vio) >= 1.5,
        )
    ]
    for row in rows_of(study, records, "remedy"):
        now, dead = _values(records, row.name, "experts/0/max_vio"), _dead(records, row.name)
        better = _difference(by_seed(records, row.name, "accuracy"), by_seed(records, plain.name, "accuracy"))
        ratio = mean(now) / mean(vio)
        found += [
            Check(f"{row.name}: MaxVio of layer 0 at most half", f"{told(now)}, {ratio:.2f} of it", ratio <= 0.5),
            Check(f"{row.name}: at most 1 dead expert in any layer", told(dead, digits=1), mean(dead) <= 1),
            Check(
                f"{row.name}: accuracy no worse than 0.5 points",
                f"{told(better, digits=1, scale=100)} points" if better else "—",
                bool(better) and mean(better) >= -0.005,
            ),
        ]
    return found


def _budgets(rows: Sequence[ExpertRow]) -> list[int]:
    return sorted(set.intersection(*(set(row.budgets) for row in rows))) if rows else []


def _budget_table(study: ExpertStudy, records: Sequence[Record]) -> str:
    rows = rows_of(study, records, "matryoshka", "specialist")
    budgets = _budgets(rows)
    head = ["row", "n", *(f"k = {k}" for k in budgets), "area", "nested, k = " + ", ".join(map(str, budgets)), "falls", "training, TFLOP"]
    body = []
    for row in rows:
        runs = [record for record in records if record.row == row.name]
        falls = [float(monotonicity_violations({k: run.figures[f"accuracy@{k}"] for k in budgets})) for run in runs]
        body.append(
            [row.name, str(len(runs))]
            + [told([run.figures[f"accuracy@{k}"] for run in runs], digits=1, scale=100) for k in budgets]
            + [told([area(run, budgets) for run in runs], digits=1, scale=100)]
            + [", ".join(f"{mean(run.figures[f'nested@{k}'] for run in runs):.2f}" for k in budgets)]
            + [told(falls, digits=1), f"{mean(run.figures['train/flops'] for run in runs) / 1e12:.2f}"]
        )
    return _table(head, body)


def _budget_checks(study: ExpertStudy, records: Sequence[Record]) -> list[Check]:
    rows = rows_of(study, records, "matryoshka", "specialist")
    budgets = _budgets(rows)
    found: list[Check] = []
    specialists = rows_of(study, records, "specialist")
    areas = {row.name: {r.seed: area(r, budgets) for r in records if r.row == row.name} for row in rows}
    for row in rows_of(study, records, "matryoshka"):
        for other in specialists:
            k = study.encoder["moe"]["k"] if "k" not in other.moe else other.moe["k"]
            regret = _difference(by_seed(records, other.name, f"accuracy@{k}"), by_seed(records, row.name, f"accuracy@{k}"))
            said = f"{told(regret, digits=1, scale=100)} points" if regret else "—"
            met = bool(regret) and mean(regret) <= 0.01
            found.append(Check(f"{row.name}: regret to {other.name} at k = {k} at most 1 point", said, met))
        if specialists:
            best = max(specialists, key=lambda other: mean(areas[other.name].values()))
            gain = _difference(areas[row.name], areas[best.name])
            met = bool(gain) and mean(gain) > 0
            said = f"{told(gain, digits=1, scale=100)} points above the best, {best.name}" if gain else "—"
            found.append(Check(f"{row.name}: area under accuracy over FLOPs above every fixed k", said, met))
    return found


def _growth_table(study: ExpertStudy, records: Sequence[Record]) -> str:
    head = ["row", "n", "accuracy at the start", "accuracy", "steps", "own training, TFLOP", "MFLOP a picture", "parameters, M"]
    body = []
    for row in rows_of(study, records, "base", "grown", "scratch", "whole", "continued", "sunk", ""):
        runs = [record for record in records if record.row == row.name]
        size = [f"{runs[0].figures[name] / unit:.{digits}f}" for name, unit, digits in
                (("train/steps", 1, 0), ("train/flops", 1e12, 2), ("flops", 1e6, 1), ("parameters", 1e6, 2))]  # fmt: skip
        accuracies = [told(_values(records, row.name, name), digits=1, scale=100) for name in ("start/accuracy", "accuracy")]
        body.append([row.name, str(len(runs)), *accuracies, *size])
    exact = {name: max(r.figures[name] for r in records if name in r.figures) for r in records for name in r.figures if "exact/" in name}
    lines = [[name.removeprefix("exact/").replace("/", ", "), f"{value:.1e}"] for name, value in exact.items()]
    extra = _table(["grown exactly: kind, gate, normalisation", "largest change of a patch"], lines) if lines else ""
    return _table(head, body) + ("\n" + extra if extra else "")


def _growth_checks(study: ExpertStudy, records: Sequence[Record]) -> list[Check]:
    found: list[Check] = []
    grown = rows_of(study, records, "grown")
    for number, row in enumerate(grown):
        for part, wanted in (("scratch", 0.03), ("whole", None), ("continued", None)):
            for other in rows_of(study, records, part):
                gain = _difference(by_seed(records, row.name, "accuracy"), by_seed(records, other.name, "accuracy"))
                met = None if wanted is None or number or not gain else mean(gain) >= wanted
                what = f"{row.name} against {other.name}" + (", at least +3 points" if met is not None else "")
                found.append(Check(what, f"{told(gain, digits=1, scale=100)} points" if gain else "—", met))
    errors = [value for record in records for name, value in record.figures.items() if name.startswith("exact/")]
    if errors:
        found.append(Check("exact growth for every gate, at most 1e-5", f"{max(errors):.1e}", max(errors) <= 1e-5))
    return found
