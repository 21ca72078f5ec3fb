"""What the pages of comparisons and edits share with the page of an audit: its style, its numbers, and a frame without script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dotcbm.report.compare.difference_plot import beyond_chance, key_mark
from dotcbm.report.render import charts, numbers

__all__ = ["page"]

_TEMPLATES = Path(__file__).parents[1] / "templates"
_STYLES = ("page.css", "charts.css", "compare.css")


def page(template: str, values: dict[str, Any]) -> str:
    """A template of `templates/` with everything escaped but the SVGs made here, which escape what they are given.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; says how to install it.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing an HTML page needs jinja2: pip install 'dotcbm[audit]'") from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        number=numbers.number,
        signed=numbers.signed,
        with_unit=numbers.with_unit,
        span=numbers.span,
        cases=numbers.cases,
        icon=lambda name: Markup(charts.icon(name)),
        key_mark=lambda index: Markup(key_mark(index)),
        beyond_chance=beyond_chance,
        markup=Markup,
    )
    style = "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _STYLES)
    return environment.get_template(template).render(**values, style=style)
