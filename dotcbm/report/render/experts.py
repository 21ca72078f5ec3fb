"""What the page shows of expert layers: loads as bars, what each expert serves, tables, example pictures and maps.

Experts are numbered from 0, as in the weights. In maps the seven experts with the most patches have colours of Okabe and Ito's set, each
also its number in the cells, so that no map is read by colour alone; the others are grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from dotcbm.report.record import AuditRecord
from dotcbm.report.record_experts import ExpertLayer, ExpertLink, ExpertMap, ExpertPicture, ExpertRow, ExpertTable
from dotcbm.report.render.heat import outline
from dotcbm.report.render.numbers import number

__all__ = ["Cell", "LayerView", "MapView", "PictureView", "Served", "TableView", "expert_views", "lift_text", "load_chart"]

_COLOURS = 7  # that can be told apart; style classes x0 to x6, and xr for the rest
_MOST_ROWS, _MOST_NAMES = 24, 3
_DEEPEST = 8.0  # lift of the deepest colour
_NUMBERED = 20  # columns of patches up to which each cell is wide enough for a number
_KINDS = {"part": "parts", "concept": "concepts", "class": "classes"}
_SOURCES = {
    "plan": "how much of a concept is in a patch says the transport plan, in pictures that show the concept",
    "labels": "every patch of a picture counts as one of what the picture is labelled with",
    "masks": "exact masks",
    "key points": "the patch of each visible key point",
}


@dataclass(frozen=True)
class Served:
    """What an expert serves above chance, for one kind: the largest lifts, and how many more."""

    kind: str
    links: tuple[tuple[str, ExpertLink], ...]
    num_more: int


@dataclass(frozen=True)
class PictureView:
    """An example: `veil` covers the other patches, `outline` runs about the expert's, in units of cells; `surest` is one cell."""

    id: str
    picture: ExpertPicture
    name: str
    class_name: str
    veil: str
    outline: str
    surest: str


@dataclass(frozen=True)
class ExpertView:
    """A row of the table of experts."""

    expert: int
    row: ExpertRow
    served: tuple[Served, ...]
    pictures: tuple[PictureView, ...]


@dataclass(frozen=True)
class Cell:
    """A lift; `shade` of its colour in [0, 1], by its logarithm; `link` if it is above chance."""

    lift: float | None
    shade: float
    link: ExpertLink | None


@dataclass(frozen=True)
class TableView:
    """Rows of a table, those with the largest lifts above chance first; at most `_MOST_ROWS`."""

    table: ExpertTable
    title: str
    source: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    num_linked: int


@dataclass(frozen=True)
class MapView:
    """A map: for each colour a path, the cells' numbers as (x, y, text), and the legend as (style class, words)."""

    id: str
    shown: ExpertMap
    name: str
    class_name: str
    paths: tuple[tuple[str, str], ...]
    numbers: tuple[tuple[float, float, str], ...]
    legend: tuple[tuple[str, str], ...]
    said: str


@dataclass(frozen=True)
class LayerView:
    """One layer."""

    layer: ExpertLayer
    even: float
    chart: str
    experts: tuple[ExpertView, ...]
    tables: tuple[TableView, ...]
    maps: tuple[MapView, ...]
    num_links: int
    has_background: bool


def expert_views(record: AuditRecord) -> tuple[LayerView, ...]:
    """All layers; images are numbered as in the record, "experts-0" being the first of the first layer."""
    views, number_of = [], 0
    for layer in record.experts:
        experts = []
        for e, row in enumerate(layer.experts):
            pictures = tuple(_picture(record, layer, shown, f"experts-{number_of + i}") for i, shown in enumerate(row.pictures))
            number_of += len(pictures)
            experts.append(ExpertView(e, row, _served(layer, e), pictures))
        maps = tuple(_map(record, layer, shown, f"experts-{number_of + i}") for i, shown in enumerate(layer.maps))
        number_of += len(maps)
        views.append(
            LayerView(
                layer=layer,
                even=layer.active / len(layer.experts),
                chart=load_chart(layer),
                experts=tuple(experts),
                tables=tuple(_table(table) for table in layer.tables),
                maps=maps,
                num_links=sum(len(table.links) for table in layer.tables),
                has_background=any(row.background.value is not None for row in layer.experts),
            )
        )
    return tuple(views)


def load_chart(layer: ExpertLayer) -> str:
    """A bar for each expert, the share of the patches that go to it, with its interval, and the even share as a dashed line."""
    loads = [row.load for row in layer.experts]
    num, even = len(loads), layer.active / len(loads)
    top = max([even * 1.25, *(load.high or load.value or 0.0 for load in loads)])
    left, right, upper, lower = 48.0, 356.0, 12.0, 126.0
    step = (right - left) / num
    width = step * (0.7 if num <= 32 else 0.9)

    def y(value: float) -> float:
        return round(lower - (lower - upper) * value / top, 2)

    drawn = [f'<path class="axis" d="M{left} {lower}H{right}"/>']
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, num) if num / n <= 20)
    for e, load in enumerate(loads):
        middle = round(left + step * (e + 0.5), 2)
        value = load.value or 0.0
        if value > 0:
            drawn.append(f'<path class="load" d="M{middle - width / 2:.2f} {lower}V{y(value)}h{width:.2f}V{lower}z"/>')
        else:
            drawn.append(f'<path class="dead" d="M{middle} {lower - 5}m-3 -3l6 6m0 -6l-6 6"/>')
        if load.low is not None and load.high is not None and value > 0:
            drawn.append(f'<path class="ends-of-load" d="M{middle} {y(load.low)}V{y(load.high)}"/>')
        if e % every == 0:
            drawn.append(f'<text x="{middle}" y="{lower + 13}" text-anchor="middle">{e}</text>')
    drawn.append(f'<path class="threshold" d="M{left} {y(even)}H{right}"/>')
    drawn.append(f'<text x="{left - 4}" y="{y(even) + 3.5}" text-anchor="end">{number(even, "percent")}</text>')
    if abs(y(top) - y(even)) > 14:
        drawn.append(f'<text x="{left - 4}" y="{y(top) + 3.5}" text-anchor="end">{number(top, "percent")}</text>')
    drawn.append(f'<text class="axis-label" x="{(left + right) / 2}" y="{lower + 28}" text-anchor="middle">expert</text>')
    drawn.append('<text class="axis-label" transform="translate(12 69) rotate(-90)" text-anchor="middle">patches, %</text>')
    said = "; ".join(f"expert {e}: {number(load.value, 'percent')} %" for e, load in enumerate(loads))
    label = escape(f"Load of the experts of {layer.name}, even share {number(even, 'percent')} %. {said}", quote=True)
    return f'<svg class="chart" viewBox="0 0 360 158" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def lift_text(lift: float | None) -> str:
    """Two decimals, one from 10 on; a dash for what is not defined.

    >>> lift_text(1.0), lift_text(20.13), lift_text(0.002), lift_text(None)
    ('1.00', '20.1', '0.00', '—')
    """
    return "—" if lift is None else f"{lift:.1f}" if lift >= 9.995 else f"{lift:.2f}"


def _served(layer: ExpertLayer, expert: int) -> tuple[Served, ...]:
    served = []
    for table in layer.tables:
        links = [(table.names[link.row], link) for link in table.links if link.expert == expert]
        if links:
            served.append(Served(_KINDS[table.kind], tuple(links[:_MOST_NAMES]), max(len(links) - _MOST_NAMES, 0)))
    return tuple(served)


def _table(table: ExpertTable) -> TableView:
    links = {(link.row, link.expert): link for link in table.links}
    linked = list(dict.fromkeys(link.row for link in table.links))  # the largest lift first
    order = [*linked, *(x for x in range(len(table.names)) if x not in linked)][:_MOST_ROWS]
    rows = tuple(
        (table.names[x], tuple(Cell(lift, _shade(lift), links.get((x, e))) for e, lift in enumerate(table.lift_XE[x]))) for x in order
    )
    title = f"{_KINDS[table.kind].capitalize()} by experts"
    return TableView(table, title, _SOURCES[table.source], rows, len(linked))


def _shade(lift: float | None) -> float:
    """0 for a lift of 1, 1 for `_DEEPEST` and more.

    >>> _shade(1.0), _shade(8.0), _shade(None)
    (0.0, 1.0, 0.0)
    """
    if lift is None or lift <= 1:
        return 0.0
    return round(min(math.log(lift) / math.log(_DEEPEST), 1.0), 3)


def _picture(record: AuditRecord, layer: ExpertLayer, picture: ExpertPicture, id: str) -> PictureView:
    height, width = layer.grid
    mine = [0] * (height * width)
    for cell in picture.cells:
        mine[cell] = 1
    alone = [int(cell == picture.surest) for cell in range(height * width)]
    return PictureView(
        id=id,
        picture=picture,
        name=record.pictures.name[picture.row],
        class_name=record.class_names[record.pictures.label[picture.row]],
        veil=_cells([1 - value for value in mine], width=width),
        outline=outline(mine, width=width, share=1.0),
        surest=outline(alone, width=width, share=1.0),
    )


def _map(record: AuditRecord, layer: ExpertLayer, shown: ExpertMap, id: str) -> MapView:
    width = layer.grid[1]
    used = [row.load.value or 0.0 for row in layer.experts]
    ranked = sorted(range(len(used)), key=lambda e: (-used[e], e))
    style = {e: f"x{place}" if place < _COLOURS else "xr" for place, e in enumerate(ranked)}
    here = [e for e in ranked if e in set(shown.expert_P)]
    paths = [(style[e], _cells([int(value == e) for value in shown.expert_P], width=width)) for e in here]
    num = len(shown.expert_P)
    coloured = [e for e in here if style[e] != "xr"]
    others = [e for e in here if style[e] == "xr"]
    legend = [(style[e], f"expert {e}: {number(shown.expert_P.count(e) / num, 'percent')} %") for e in coloured]
    if others:
        share = sum(shown.expert_P.count(e) for e in others) / num
        legend.append(("xr", f"{len(others)} other{'s' if len(others) > 1 else ''}: {number(share, 'percent')} %"))
    return MapView(
        id=id,
        shown=shown,
        name=record.pictures.name[shown.row],
        class_name=record.class_names[record.pictures.label[shown.row]],
        paths=tuple(paths),
        numbers=tuple(_numbers(shown.expert_P, width=width)),
        legend=tuple(legend),
        said="; ".join(f"expert {e} has {shown.expert_P.count(e)} of {num} patches" for e in here),
    )


def _numbers(expert_P: Sequence[int], *, width: int) -> list[tuple[float, float, str]]:
    """One number for each run of a row; on fine grids only where three cells are wide enough for it."""
    least = 1 if width <= _NUMBERED else 3
    found = []
    for y in range(len(expert_P) // width):
        x = 0
        for e, run in groupby(expert_P[y * width : (y + 1) * width]):
            num = len(list(run))
            if num >= least:
                found.append((x + num / 2, y + 0.5, str(e)))
            x += num
    return found


def _cells(mask: Sequence[int], *, width: int) -> str:
    """A path that fills the cells of a mask, one rectangle for each run of a row.

    >>> _cells([1, 1, 0, 1], width=2)
    'M0 0h2v1h-2zM1 1h1v1h-1z'
    """
    drawn = []
    for y in range(len(mask) // width):
        x = 0
        for on, run in groupby(mask[y * width : (y + 1) * width]):
            num = len(list(run))
            if on:
                drawn.append(f"M{x} {y}h{num}v1h-{num}z")
            x += num
    return "".join(drawn)
