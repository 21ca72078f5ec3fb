"""A comparison as JSON, Markdown and one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path

from dotcbm.report.compare.difference_plot import PlotRow, beyond_chance, difference_plot
from dotcbm.report.compare.page import page
from dotcbm.report.compare.record import ComparedRow, Comparison, comparison_to_dict
from dotcbm.report.record import Interval, Unit
from dotcbm.report.record_file import write_whole
from dotcbm.report.render.numbers import number, signed, span, with_unit

__all__ = ["cell_text", "difference_text", "html", "markdown", "table_lines", "value_text", "write_comparison"]

_SHOWN = 60  # pictures listed on the page; all of them are in the JSON
_FEW = 20  # of anything in the Markdown
_MEASURES = {
    "concepts": (("auroc", "AUROC", "DeLong's test"), ("error", "Error at probability 0.5", "McNemar's exact test")),
    "classes": (("recall", "Recall", "McNemar's exact test"),),
}


def write_comparison(comparison: Comparison, folder: str | Path) -> tuple[Path, ...]:
    """Write compare.json, compare.md and compare.html, each whole or not at all.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; nothing is written then.
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    text = json.dumps(comparison_to_dict(comparison), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    files = {"compare.json": text, "compare.md": markdown(comparison), "compare.html": html(comparison)}  # all drawn before one is written
    return tuple(write_whole(folder / name, content.encode("utf-8")) for name, content in files.items())


def html(comparison: Comparison) -> str:
    """The page.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; says how to install it.
    """
    others = [i for i in range(len(comparison.names)) if i != comparison.against]
    names = [f"{comparison.names[i]} - {comparison.names[comparison.against]}" for i in others]
    rows = [
        PlotRow(figure.label, tuple(figure.differences[i] for i in others))
        for figure in comparison.figures
        if figure.unit in ("percent", "points") and any(d is not None and d.low is not None for d in figure.differences)
    ]
    sections = [("figures", "Figures"), ("findings", "Findings"), ("method", "How this was computed")]
    if comparison.paired:
        sections[1:1] = [("concepts", "Concepts that differ"), ("classes", "Classes that differ")]
        sections.insert(-1, ("pictures", "Pictures they disagree on"))
    tested = [
        (key, rows_of, [(measure, heading, test) for measure, heading, test in _MEASURES[key]])
        for key, rows_of in (("concepts", comparison.concepts), ("classes", comparison.classes))
    ]
    return page(
        "compare.html",
        {
            "kind": "compare",
            "title": " · ".join(comparison.names),
            "facts": _facts(comparison),
            "sections": sections,
            "c": comparison,
            "names": comparison.names,
            "against": comparison.against,
            "others": others,
            "plot": difference_plot(rows, names, label="Differences of the figures with 95 % intervals; numbers in the table below"),
            "tested": tested,
            "shown": _SHOWN,
            "method": _method(comparison),
        },
    )


def _facts(c: Comparison) -> str:
    data = " / ".join(dict.fromkeys(f"{data}, split {split}" for data, split in zip(c.data, c.split, strict=True)))
    return f"{data} · {number(c.num_pictures[c.against])} pictures · {'paired' if c.paired else 'not paired'}"


def _method(c: Comparison) -> str:
    level = f"{100 * c.level:g} %"
    if not c.paired:
        return (
            f"Differences of figures of which only the {level} intervals are known carry intervals as of different pictures (Zou and "
            "Donner 2008). Nothing is paired."
        )
    return (
        f"Paired differences: {c.num_draws} bootstrap draws of the pictures (seed {c.seed}), the same for all models; percentile intervals "
        f"at {level}. Only figures that can be computed again from what the records say of each picture are paired; the others carry "
        "intervals from the two intervals alone (Zou and Donner 2008), which are wider than they need to be, or none. Concepts' AUROC is "
        "tested by DeLong's test with at least 5 positives and negatives, errors and recalls by McNemar's exact test; q-values are "
        f"Benjamini and Hochberg's (1995), and a row is called different at q of at most {c.false_discovery_rate:g}."
    )


def value_text(interval: Interval, unit: Unit) -> str:
    """Value with interval in a table cell: "73.3 % [70.1 to 76.5]"."""
    if interval.value is None:
        return "—"
    ends = span(interval, unit)
    return with_unit(interval.value, unit) + (f" [{ends}]" if ends else "")


def difference_text(difference: Interval | None, unit: Unit) -> str:
    """Signed difference with interval; a star where the interval keeps clear of zero."""
    if difference is None or difference.value is None:
        return "—"
    shown: Unit = "points" if unit == "percent" else unit
    ends = span(difference, shown)
    star = " *" if beyond_chance(difference) else ""
    return signed(difference.value, shown) + (f" [{ends}]{star}" if ends else "")


def cell_text(text: str) -> str:
    """Text that cannot end a cell of a Markdown table or start markup."""
    for mark in "\\|<>*_`[]":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return " ".join(text.split())


def table_lines(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; cells must be safe."""
    return [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |", *(f"| {' | '.join(row)} |" for row in rows), ""]


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown; lists are cut after 20 entries, and say so."""
    c, names = comparison, [cell_text(name) for name in comparison.names]
    first = names[c.against]
    others = [i for i in range(len(names)) if i != c.against]
    lines = [f"# {' · '.join(names)}", "", cell_text(_facts(c)), "", *(f"> {cell_text(note)}\n" for note in c.notes), "## Figures", ""]
    lines += [f"Differences are to {first}; a star marks an interval that keeps clear of zero.", ""]
    lines += table_lines(
        ["figure", *names, *(f"{names[i]} − {first}" for i in others), "interval of the difference"],
        [
            [
                f"{cell_text(row.label)} (`{row.key}`)",
                *(value_text(value, row.unit) for value in row.values),
                *(difference_text(row.differences[i], row.unit) for i in others),
                row.how,
            ]
            for row in c.figures
        ],
    )
    if c.paired:
        for key, rows in (("concepts", c.concepts), ("classes", c.classes)):
            lines += [f"## {key.capitalize()} that differ beyond chance (false discovery rate {c.false_discovery_rate:g})", ""]
            for measure, heading, test in _MEASURES[key]:
                for i in others:
                    lines += _differing(c, rows, i, measure, f"{heading}, {names[i]} against {first} ({test})")
    lines += ["## Findings", ""]
    lines += table_lines(
        ["finding", *names],
        [
            [f"`{row.key}`", *("—" if s is None else f"{s}: {cell_text(t or '')}" for s, t in zip(row.severities, row.titles, strict=True))]
            for row in c.findings
        ],
    )
    if c.paired:
        lines += [f"## Pictures ({len(c.disagreements)} are not given the same class by all)", ""]
        lines += table_lines(
            [f"against {first}", "right only here", "wrong only here", "wrong otherwise", "p (McNemar, exact)"],
            [[cell_text(t.name), str(t.gained), str(t.lost), str(t.otherwise), f"{t.p:.2g}"] for t in c.turned],
        )
        lines += table_lines(
            ["picture", "true class", *(f"{name}: class given, probability of the true one in %" for name in names)],
            [
                [
                    cell_text(row.name),
                    cell_text(row.label),
                    *(f"{cell_text(k)}, {number(p, 'percent')}" for k, p in zip(row.predicted, row.true_probability, strict=True)),
                ]
                for row in c.disagreements[:_FEW]
            ],
        )
        if len(c.disagreements) > _FEW:
            lines += [f"{len(c.disagreements) - _FEW} more are in compare.json.", ""]
    return "\n".join([*lines, "## How this was computed", "", _method(c), ""])


def _differing(c: Comparison, rows: tuple[ComparedRow, ...], i: int, measure: str, heading: str) -> list[str]:
    found = c.different(rows, i, measure)
    lines = [f"### {heading}", "", f"{len(found)} of {c.tested(rows, i, measure)} differ.", ""]
    if found:
        lines += table_lines(
            ["name", "reference, %", "here, %", "difference, points", "q", "n"],
            [
                [
                    cell_text(row.name),
                    number(row.values[c.against], "percent"),
                    number(row.values[i], "percent"),
                    difference_text(row.differences[i], "percent"),
                    f"{row.q[i]:.2g}",
                    str(row.n),
                ]
                for row in found[:_FEW]
            ],
        )
    return [*lines, f"{len(found) - _FEW} more are in compare.json.", ""] if len(found) > _FEW else lines
