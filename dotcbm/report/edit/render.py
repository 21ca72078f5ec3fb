"""An edit written down: the model with its log, and what the edit changed as JSON, Markdown and one self-contained HTML page.

A folder of an edit is laid out like a run, so that the edited model can be audited or edited again from its config:

    config.yaml     of the run that the model is from
    model/          the edited model (`dotcbm.hub`), with the log `edits.json`
    edit.json       all rows, by version
    edit.md, edit.html
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from dotcbm.hub import CardInfo, save_pretrained
from dotcbm.report.compare.difference_plot import PlotRow, difference_plot
from dotcbm.report.compare.page import page
from dotcbm.report.compare.render import cell_text, difference_text, table_lines, value_text
from dotcbm.report.edit.figures import ChangeRow
from dotcbm.report.edit.run import Edited
from dotcbm.report.render.numbers import number

__all__ = ["FORMAT", "changed", "edited_to_dict", "html", "markdown", "write_edited"]

FORMAT = 1
_WHOLE = ("all", "balanced", "worst group", "group")
_FEW = 40  # classes on the page; all of them are in the JSON


def write_edited(edited: Edited, folder: str | Path, *, config: str | None = None, card: CardInfo | None = None) -> Path:
    """Write an edit whole or not at all; see the head of this file.

    Args:
        edited: As `edit_model` gives it.
        folder: Must not exist, so that an edit never takes the place of what it was made from.
        config: Text of the run's config.
        card: For the model's card.

    Raises:
        ValueError: The folder exists.
        ModuleNotFoundError: jinja2 is not installed; nothing is written then.
        OSError: The disk is full or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; an edit never replaces anything: give a new folder")
    files = {
        "edit.json": json.dumps(edited_to_dict(edited), ensure_ascii=False, allow_nan=False, indent=1) + "\n",
        "edit.md": markdown(edited),
        "edit.html": html(edited),
    }
    if config is not None:
        files["config.yaml"] = config
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save_pretrained(edited.model, fresh / "model", card=card)
        for name, text in files.items():
            (fresh / name).write_text(text, encoding="utf-8")
        fresh.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def edited_to_dict(edited: Edited) -> dict[str, object]:
    """JSON values; tuples of a row are by version."""
    return {
        "format": FORMAT,
        "edit": asdict(edited.edit),
        "earlier": [asdict(edit) for edit in edited.before.edits],
        "versions": [version.name for version in edited.versions],
        "rows": [asdict(row) for row in edited.rows],
        "notes": list(edited.notes),
    }


def changed(edited: Edited, kind: str = "class") -> tuple[ChangeRow, ...]:
    """Classes (or groups) that the edited model, or silent zeroing, scores otherwise than the model before; the largest loss first."""
    found = [
        row
        for row in edited.rows
        if row.kind == kind and any(d is not None and d.value for name, d in zip(_names(edited), row.differences, strict=True) if name)
    ]
    return tuple(sorted(found, key=lambda row: row.differences[-1].value or 0.0 if row.differences[-1] is not None else 0.0))


def _names(edited: Edited) -> tuple[str, ...]:
    return tuple(version.name for version in edited.versions)


def _beyond(edited: Edited, rate: float = 0.05) -> list[tuple[str, int, int]]:
    """(split, classes that the edited model scores otherwise beyond chance, classes tested)."""
    counts = []
    for split in dict.fromkeys(row.split for row in edited.rows):
        q = [row.q[-1] for row in edited.rows if row.split == split and row.kind == "class"]
        known = [value for value in q if value is not None]
        counts.append((split, sum(value <= rate for value in known), len(known)))
    return counts


def html(edited: Edited) -> str:
    """The page.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; says how to install it.
    """
    names = _names(edited)
    whole = [row for row in edited.rows if row.kind in _WHOLE]
    plot = difference_plot(
        [PlotRow(f"{row.split}: {row.name}", row.differences[1:]) for row in whole],
        [f"{name} - {names[0]}" for name in names[1:]],
        label="Differences to the model before, with 95 % intervals; numbers in the table below",
    )
    return page(
        "edit.html",
        {
            "kind": "edit",
            "title": "What an edit changed",
            "facts": edited.edit.told,
            "sections": [("whole", "All pictures, and groups of them"), ("classes", "Classes"), ("log", "Log")],
            "edited": edited,
            "names": names,
            "whole": whole,
            "classes": changed(edited),
            "num_classes": sum(row.kind == "class" for row in edited.rows),
            "beyond": _beyond(edited),
            "few": _FEW,
            "plot": plot,
            "log": edited.model.edits,
        },
    )


def markdown(edited: Edited) -> str:
    """The edit as Markdown."""
    names = [cell_text(name) for name in _names(edited)]
    lines = ["# What an edit changed", "", cell_text(edited.edit.told), "", *(f"> {cell_text(note)}\n" for note in edited.notes)]
    lines += [f"Accuracy in %, and differences in points to the model {names[0]}, paired over the same pictures, with 95 % intervals; a "]
    lines[-1] += (
        "star marks those that keep clear of zero. The last column is the edited model; *silently zeroed* is what it would be without"
    )
    lines += ["a fit, *refit, unedited* what the fit alone does.", "", "## All pictures, and groups of them", ""]
    lines += _rows([row for row in edited.rows if row.kind in _WHOLE], names)
    found = changed(edited)
    lines += ["## Classes", ""]
    lines += [
        f"{split}: {sure} of {tested} classes differ beyond chance (q <= 0.05, McNemar).\n" for split, sure, tested in _beyond(edited)
    ]
    lines += _rows(found[:_FEW], names) if found else ["No class is scored otherwise.", ""]
    if len(found) > _FEW:
        lines += [f"{len(found) - _FEW} more are in edit.json.", ""]
    lines += ["## Log", "", *(f"- {cell_text(edit.told)}" for edit in edited.model.edits), ""]
    lines += table_lines(["fit", ""], [[cell_text(name), cell_text(value)] for name, value in edited.edit.method])
    return "\n".join(lines)


def _rows(rows: list[ChangeRow] | tuple[ChangeRow, ...], names: list[str]) -> list[str]:
    return table_lines(
        ["split", "figure", names[0], *(f"{name} − {names[0]}" for name in names[1:]), "n"],
        [
            [
                row.split,
                cell_text(row.name),
                value_text(row.values[0], "percent"),
                *(difference_text(d, "percent") for d in row.differences[1:]),
                number(row.values[0].n),
            ]
            for row in rows
        ],
    )
