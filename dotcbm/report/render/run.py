"""An audit's record drawn as one HTML file, as Markdown, or as PDF.

The HTML is self-contained: style, script, pictures and the record itself are in it, and a content security policy forbids
everything else. It reads without its script, in print too; the script adds sorting, filters, sliders and keys. Every
picture is stored once: in the record that the page holds, pictures are references to the images that are shown.

Needs the extra `audit` (jinja2); PDF needs the extra `pdf` (weasyprint).
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import ImageFile

from dotcbm.report.record import AuditRecord, Interval, PictureCard
from dotcbm.report.record_experts import ExpertLayer, ExpertMap, ExpertPicture
from dotcbm.report.record_file import record_from_dict, record_to_dict, record_to_json, write_whole
from dotcbm.report.render import charts, numbers, views
from dotcbm.report.render.experts import expert_views, lift_text
from dotcbm.report.render.markdown import markdown

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["html", "markdown", "write_html", "write_markdown", "write_pdf"]

_TEMPLATES = Path(__file__).parents[1] / "templates"
_MOST_CELLS = 16  # classes up to which the confusion matrix is written with numbers
Shown = TypeVar("Shown", ExpertPicture, ExpertMap)
_MOST_LINES = 6  # that markers and colours tell apart


def html(record: AuditRecord) -> str:
    """The page.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; says how to install it.
    """
    return _page(record, script=_style("page.js"))


def write_html(record: AuditRecord, path: str | Path) -> Path:
    """Write the page whole or not at all; errors as in `html`."""
    return write_whole(Path(path), html(record).encode("utf-8"))


def write_markdown(record: AuditRecord, path: str | Path) -> Path:
    """Write the Markdown whole or not at all."""
    return write_whole(Path(path), markdown(record).encode("utf-8"))


def write_pdf(record: AuditRecord, path: str | Path) -> Path:
    """Print the page, without its script, to a PDF.

    Raises:
        ModuleNotFoundError: jinja2 or weasyprint is not installed; says how to install it.
        OSError: The system has no pango, which weasyprint draws with, or the disk is full.
    """
    reads_torn_pictures = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        from weasyprint import HTML
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a PDF needs weasyprint: pip install 'dotcbm[audit,pdf]'; or print the HTML from a browser") from error
    except OSError as error:  # weasyprint loads pango when it is imported
        raise OSError(f"weasyprint lacks a library of the system ({error}); install pango, or print the HTML from a browser") from error
    finally:  # weasyprint turns it on for the whole process, and torn pictures of the user would be read as if they were whole
        ImageFile.LOAD_TRUNCATED_IMAGES = reads_torn_pictures
    page = _page(record, script="").replace("</svg>", f"<style>{_filled(_style('charts.css'))}</style></svg>")
    content = HTML(string=page).write_pdf()
    if content is None:
        raise ValueError(f"weasyprint gave no PDF of {record.title!r}; print the HTML from a browser instead")
    return write_whole(Path(path), content)


def _page(record: AuditRecord, *, script: str) -> str:
    """The page; without a script it holds no record either."""
    record = record_from_dict(record_to_dict(record), name=record.title)  # as a file holds it: the same page from memory and from disk
    errors = tuple(views.card_view(record, card, id=f"errors-{i}") for i, card in enumerate(record.errors))
    cards = tuple(views.card_view(record, card, id=f"cards-{i}") for i, card in enumerate(record.cards))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            record=record,
            sections=views.sections(record),
            headline=views.headline(record),
            key_figures=views.key_figures(record),
            map_trust=views.map_trust(record),
            cards={"errors": errors, "pictures": cards},
            shown=[(j, concept.name) for j, concept in enumerate(record.concepts) if concept.shown],
            small_matrix=len(record.class_names) <= _MOST_CELLS,
            matrix=views.matrix_png(record) if record.confusion.count_KK else "",
            confused=views.confused_pairs(record),
            sweeps=_sweep_charts(record),
            curves=_curve_charts(record),
            expert_layers=expert_views(record),
            num_permutations=int(dict(record.card.audit).get("num_permutations", 0)),
            style="\n".join(_style(name) for name in ("charts.css", "page.css", *(() if script else ("paper.css",)))),
            script=script,
            script_hash=f"'sha256-{digest}'" if script else "'none'",
            data=record_to_json(_with_references(record)) if script else "",
        )
    )


def _style(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _filled(style: str) -> str:
    """The style with the colours of light pages in the place of variables, which drawings of weasyprint do not inherit."""
    colours = dict(re.findall(r"--([a-z0-9-]+): ([^;]+);", _style("page.css").split("}")[0]))
    series = re.findall(r"(\.s\d) { --c: var\(--(s\d)\); }", style)
    own = [
        f"{name} .series {{ stroke: {colours[c]} }} {name} .marker, path.band{name} {{ fill: {colours[c]} }} "
        f"{name} .open {{ stroke: {colours[c]}; fill: none }}"
        for name, c in series
    ]
    tones = {name: colours[name] for name in ("critical", "warning", "note", "good")} | {
        "wrong": colours["critical"],
        "right": colours["good"],
    }
    icons = [f".i-{name} .fill {{ fill: {tone} }} .i-{name} .line {{ stroke: {tone} }}" for name, tone in tones.items()]
    plain = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: colours.get(found[1], "black"), style).replace("currentColor", colours["ink"])
    return re.sub(r"/\*.*?\*/", "", plain) + " ".join(own + icons)


def _with_references(record: AuditRecord) -> AuditRecord:
    """The record with the ids of the page's images in the place of the images."""

    def pointing(cards: Sequence[PictureCard], name: str) -> tuple[PictureCard, ...]:
        return tuple(replace(card, image=f"@{name}-{i}") if card.image else card for i, card in enumerate(cards))

    return replace(
        record,
        errors=pointing(record.errors, "errors"),
        cards=pointing(record.cards, "cards"),
        grid=tuple(replace(thumbnail, image=f"@grid-{i}") for i, thumbnail in enumerate(record.grid)),
        experts=_pointing_experts(record.experts),
    )


def _pointing_experts(layers: Sequence[ExpertLayer]) -> tuple[ExpertLayer, ...]:
    """The layers with the ids that `expert_views` gives in the place of their images."""
    numbers = count()
    pointing = []
    for layer in layers:
        rows = [replace(row, pictures=tuple(_pointing(shown, next(numbers)) for shown in row.pictures)) for row in layer.experts]
        pointing.append(replace(layer, experts=tuple(rows), maps=tuple(_pointing(shown, next(numbers)) for shown in layer.maps)))
    return tuple(pointing)


def _pointing(shown: Shown, number: int) -> Shown:
    return replace(shown, image=f"@experts-{number}") if shown.image else shown


def _sweep_charts(record: AuditRecord) -> list[tuple[str, str]]:
    """(heading, SVG) of both measures; sweeps of one list of thresholds."""
    if not record.sweeps:
        return []
    first = record.sweeps[0]
    rows = [sweep for sweep in record.sweeps if sweep.thresholds == first.thresholds][:_MOST_LINES]
    drawn = []
    for name, heading in (
        ("mean_average_precision", "Mean average precision at IoU 0.5"),
        ("share_correct", "Share of boxes with IoU ≥ 0.5"),
    ):
        chart = charts.line_chart(
            [charts.Series(sweep.map, getattr(sweep, name)) for sweep in rows],
            x_values=first.thresholds,
            x_label="threshold, share of the map's maximum",
            y_label="%",
            label=f"{heading} against the threshold, for the maps {', '.join(sweep.map for sweep in rows)}; numbers in the table below",
            mark_x=first.paper,
            mark_label=f"paper: {first.paper:g}",
        )
        drawn.append((heading, chart))
    return drawn


def _curve_charts(record: AuditRecord) -> list[tuple[str, str, list[str]]]:
    """(split, SVG, policies) for each split."""
    drawn = []
    for split in dict.fromkeys(curve.split for curve in record.interventions):
        rows = [curve for curve in record.interventions if curve.split == split][:_MOST_LINES]
        steps = max(len(curve.accuracy) for curve in rows)
        chart = charts.line_chart(
            [charts.Series(curve.policy, curve.accuracy, curve.spread) for curve in rows],
            x_values=[float(i) for i in range(steps)],
            x_label="groups of concepts corrected",
            y_label="accuracy, %",
            label=f"Accuracy against corrected groups on {split}; numbers in the table below",
            from_zero=False,
        )
        drawn.append((split, chart, [curve.policy for curve in rows]))
    return drawn


def _environment() -> Environment:
    """jinja2 with everything escaped; charts are marked as markup, since they escape what they are given."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing an audit as HTML needs jinja2: pip install 'dotcbm[audit]'") from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        number=numbers.number,
        signed=numbers.signed,
        logit=numbers.logit,
        lift_text=lift_text,
        domain_of=charts.domain_of,
        with_unit=numbers.with_unit,
        span=numbers.span,
        cases=numbers.cases,
        unit_sign=numbers.UNIT_SIGN,
        dot_range=lambda *args, **settings: Markup(charts.dot_range(*args, **settings)),
        icon=lambda name: Markup(charts.icon(name)),
        swatch=lambda index: Markup(charts.swatch(index)),
        reliability_chart=lambda reliability: Markup(charts.reliability_chart(reliability)),
        section_titles={key: title for key, (title, _) in views.SECTIONS.items()},
        sections_that_show=views.SHOWING,
        no_control=numbers.NO_CONTROL,
        chance=Interval(0.5),
        lone=Interval,
        markup=Markup,
        chart_markup=Markup,
        probabilities=_probabilities,
    )
    return environment


def _probabilities(card: PictureCard) -> list[float]:
    """Softmax over the shown classes and the rest."""
    logits = [*card.class_logits, *([] if card.rest is None else [card.rest])]
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers[: len(card.class_logits)]]
