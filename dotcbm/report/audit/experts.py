"""Experts: how evenly they are used, what each serves beyond chance, and pictures of it.

N pictures, P patches of each, E experts, Z things that experts may serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dotcbm.data.batches import mix_seed
from dotcbm.metrics.intervals import bootstrap_mean
from dotcbm.moe.association import Association
from dotcbm.moe.router import Routing
from dotcbm.moe.statistics import max_vio, min_vio
from dotcbm.report.audit.cards import jpeg, seen_region
from dotcbm.report.audit.tools import Gathered, Section, interval, mean, rounded
from dotcbm.report.collect.experts import BACKGROUND, Routed, RoutedLayer, routed_batches
from dotcbm.report.collect.run import evaluating
from dotcbm.report.record import Absence, Figure
from dotcbm.report.record_experts import ExpertLayer, ExpertLink, ExpertMap, ExpertPicture, ExpertRow, ExpertTable
from dotcbm.report.record_interval import Interval

__all__ = ["LEVEL", "expert_figures", "expert_layers", "with_pictures"]

LEVEL = 0.05
"""The chance that a router which does not look at the pictures gets any mark, in all tables together."""

_DRAWN = 0xE8D2  # separates the pictures drawn from the other uses of the seed
_SHOWN_EXPERTS = 8  # of a layer, with pictures
_MAPS = 2
_SIDE, _QUALITY = 168, 75  # of an example: about 5 KB
_MAP_SIDE, _MAP_QUALITY = 288, 80


def expert_layers(g: Gathered) -> tuple[ExpertLayer, ...]:
    """All layers, without pictures; none where the encoder has no experts."""
    return tuple(_layer(g, name, layer) for name, layer in g.routed.layers.items()) if g.routed else ()


def expert_figures(g: Gathered, layers: Sequence[ExpertLayer]) -> Section:
    """Balance of each layer, and how many pairs are above chance."""
    section = Section()
    if g.routed is None:
        return section
    if not g.routed.parts:
        section.absent.append(Absence("experts", "which parts the experts serve", "the data has neither key points nor masks"))
    elif BACKGROUND not in g.routed.parts:
        section.absent.append(Absence("experts", "which experts serve the background", "the data has no masks of the object"))
    by_layer = [
        _figures(layer, i, routed.association) for i, (layer, routed) in enumerate(zip(layers, g.routed.layers.values(), strict=True))
    ]
    section.figures += [figure for of_kind in zip(*by_layer, strict=True) for figure in of_kind]
    return section


def with_pictures(g: Gathered, layers: Sequence[ExpertLayer]) -> tuple[ExpertLayer, ...]:
    """The layers with example pictures of experts that serve something, and with maps."""
    if g.routed is None:
        return ()
    chosen = [
        _chosen(g, layer, routed, number) for number, (layer, routed) in enumerate(zip(layers, g.routed.layers.values(), strict=True))
    ]
    drawn = torch.randperm(len(g.columns), generator=torch.Generator().manual_seed(mix_seed(g.settings.seed, _DRAWN)))
    maps = drawn[:_MAPS].tolist()
    needed = sorted({n for of_layer in chosen for pictures in of_layer.values() for n, _ in pictures} | set(maps))
    routings: dict[int, dict[str, Routing]] = {}
    with evaluating(g.model):
        for number_B, _, _, features, found in routed_batches(g.model, g.data, g.columns, torch.tensor(needed, dtype=torch.long)):
            P = features.grid[0] * features.grid[1]
            for place, n in enumerate(number_B.tolist()):
                routings[n] = {name: _picture(routing, slice(place * P, (place + 1) * P)) for name, routing in found.items()}
    shots = {n: _shot(g, n, side=_SIDE, quality=_QUALITY) for n in needed}
    large = {n: _shot(g, n, side=_MAP_SIDE, quality=_MAP_QUALITY) for n in maps}
    done: list[ExpertLayer] = []
    for layer, of_layer, name in zip(layers, chosen, g.routed.layers, strict=True):
        rows = list(layer.experts)
        for expert, pictures in of_layer.items():
            made = tuple(_example(n, why, shots[n], routings[n][name], expert) for n, why in pictures)
            rows[expert] = replace(rows[expert], pictures=made)
        shown = tuple(ExpertMap(n, *large[n], tuple(routings[n][name].index_TK[:, 0].tolist())) for n in maps)
        done.append(replace(layer, experts=tuple(rows), maps=shown))
    return tuple(done)


def _layer(g: Gathered, name: str, layer: RoutedLayer) -> ExpertLayer:
    assert g.routed is not None
    count_E, P = layer.count_NE.sum(0), g.routed.grid[0] * g.routed.grid[1]
    tables = _tables(g.routed, layer.association)
    expected_E = [None] * len(count_E)
    if BACKGROUND in g.routed.parts:
        z = g.routed.parts.index(BACKGROUND)
        of_all = layer.outside_NE.nan_to_num().sum() / layer.active  # the mass of the background
        masked_E = torch.where(layer.outside_NE.isnan(), torch.nan, layer.count_NE).nansum(0)
        expected_E = [rounded(value) for value in (layer.association.expected_ZE[z] * of_all / masked_E).tolist()]
    return ExpertLayer(
        name=name,
        active=layer.active,
        grid=g.routed.grid,
        num_patches=len(layer.count_NE) * P,
        max_vio=rounded(max_vio(count_E)) or 0.0,
        min_vio=rounded(min_vio(count_E)) or 0.0,
        num_dead=int((count_E == 0).sum()),
        entropy=rounded(layer.entropy) or 0.0,
        experts=tuple(
            ExpertRow(
                load=mean(layer.count_NE[:, e] / P, settings=g.settings),
                probability=rounded(layer.probability_E[e]) or 0.0,
                background=_background(g, layer, e),
                background_expected=expected_E[e],
            )
            for e in range(len(count_E))
        ),
        tables=tables,
        maps=(),
    )


def _background(g: Gathered, layer: RoutedLayer, e: int) -> Interval:
    count_N, outside_N = layer.count_NE[:, e].double(), layer.outside_NE[:, e].double()
    known_N = (count_N > 0) & ~outside_N.isnan()
    count_n, share_n = count_N[known_N], (outside_N / count_N)[known_N]
    if len(count_n) < 2:
        return Interval(rounded(share_n.sum()) if len(count_n) else None, n=len(count_n))
    triple = bootstrap_mean(share_n, weight_N=count_n, num_draws=g.settings.num_draws, seed=g.settings.seed)
    return interval(triple, n=len(count_n))


def _tables(routed: Routed, association: Association) -> tuple[ExpertTable, ...]:
    """In the order that `collect_experts` lays the things out in: those of patches before those of pictures."""
    tables, start = [], 0
    kinds = (
        ("part", routed.parts_from, routed.parts),
        ("concept", routed.concepts_from, routed.concepts),
        ("class", "labels", routed.classes),
    )
    for kind, source, names in kinds:
        rows = slice(start, start + len(names))
        start += len(names)
        if not names:
            continue
        lift_XE, p_XE = association.lift_ZE[rows], association.p_ZE[rows]
        marked = ((p_XE <= LEVEL) & (lift_XE > 1)).nonzero().tolist()
        links = [_link(association, rows.start + x, x, e) for x, e in marked]
        tables.append(
            ExpertTable(
                kind=kind,  # pyright: ignore[reportArgumentType]
                source=source,  # pyright: ignore[reportArgumentType]
                names=names,
                lift_XE=tuple(tuple(rounded(value, 3) for value in row) for row in lift_XE.tolist()),
                links=tuple(sorted(links, key=lambda link: (-(link.lift.value or 0.0), link.row, link.expert))),
            )
        )
    return tuple(tables)


def _link(association: Association, z: int, x: int, e: int) -> ExpertLink:
    lift = Interval(rounded(association.lift_ZE[z, e]), rounded(association.low_ZE[z, e]), rounded(association.high_ZE[z, e]))
    share, expected = (rounded(value[z, e]) or 0.0 for value in (association.share_ZE, association.expected_ZE))
    return ExpertLink(row=x, expert=e, lift=lift, share=share, expected=expected, p=rounded(association.p_ZE[z, e]) or 0.0)


def _figures(layer: ExpertLayer, number: int, association: Association) -> list[Figure]:
    E, even = len(layer.experts), layer.active / len(layer.experts)
    loads = [row.load for row in layer.experts]
    fullest = max(loads, key=lambda load: load.value or 0.0)
    num_links = sum(len(table.links) for table in layer.tables)
    num_tested = int((~association.p_ZE.isnan()).sum())

    def counted(value: float) -> Interval:
        return Interval(rounded(value), n=layer.num_patches, over="patches")

    return [
        Figure(
            f"experts/fullest_{number}",
            f"Patches of the fullest expert, {layer.name}",
            fullest,
            "percent",
            None,
            Interval(rounded(even)),
            f"an even share, {layer.active} of {E} experts for each patch",
        ),
        Figure(
            f"experts/max_vio_{number}",
            f"MaxVio, {layer.name}",
            counted(layer.max_vio),
            "number",
            "lower",
            note="The fullest expert's load over the mean load, minus 1, over all audited pictures: 0 where all are equal.",
        ),
        Figure(
            f"experts/min_vio_{number}",
            f"MinVio, {layer.name}",
            counted(layer.min_vio),
            "number",
            "higher",
            note="The emptiest expert's load over the mean load, minus 1: −1 where an expert is dead.",
        ),
        Figure(
            f"experts/dead_{number}",
            f"Dead experts, {layer.name}",
            Interval(float(layer.num_dead), n=E, over="experts"),
            "number",
            "lower",
            note="Experts that got no patch of any audited picture.",
        ),
        Figure(
            f"experts/entropy_{number}",
            f"Entropy of the router, {layer.name}",
            counted(layer.entropy),
            "number",
            None,
            Interval(rounded(math.log(E))),
            f"a router that is undecided between {E} experts",
            "Mean over patches of the entropy of the router's softmax, in nats.",
        ),
        Figure(
            f"experts/above_chance_{number}",
            f"Pairs above chance, {layer.name}",
            Interval(float(num_links), n=num_tested, over="pairs of expert and part, concept or class"),
            "number",
            None,
            note="Pairs in which the expert gets more than the same places of other pictures would give it, by a permutation test that is "
            f"corrected for all pairs of all layers: a router that does not look has any with a chance of {100 * LEVEL:g} % at most.",
        ),
    ]


def _chosen(g: Gathered, layer: ExpertLayer, routed: RoutedLayer, number: int) -> dict[int, list[tuple[int, str]]]:
    """Pictures and why, by expert: those it is surest of, and as many drawn; of the experts with the largest lifts."""
    lifts: dict[int, float] = {}
    for table in layer.tables:
        for link in table.links:
            lifts[link.expert] = max(lifts.get(link.expert, 0.0), link.lift.value or 0.0)
    chosen: dict[int, list[tuple[int, str]]] = {}
    for e in sorted(sorted(lifts, key=lambda e: -lifts[e])[:_SHOWN_EXPERTS]):
        best_N = routed.best_NE[:, e]
        surest = [n for n in best_N.argsort(descending=True, stable=True).tolist() if best_N[n] >= 0][
            : (g.settings.num_expert_pictures + 1) // 2
        ]
        drawn = torch.Generator().manual_seed(mix_seed(g.settings.seed, _DRAWN, number, e))
        rest = [n for n in torch.randperm(len(best_N), generator=drawn).tolist() if best_N[n] >= 0 and n not in surest]
        rest = rest[: g.settings.num_expert_pictures - len(surest)]
        chosen[e] = [*((n, "surest") for n in surest), *((n, "drawn at random") for n in rest)]
    return chosen


def _picture(routing: Routing, rows: slice) -> Routing:
    return Routing(routing.index_TK[rows], routing.gate_TK[rows], routing.logit_TE[rows], routing.score_TE[rows])


Shot = tuple[str, int, int, tuple[float, float, float, float]]
"""JPEG, width, height, and the region that the patches cover."""


def _shot(g: Gathered, n: int, *, side: int, quality: int) -> Shot:
    picture = g.data.dataset(g.columns.split).sample(int(g.columns.row_N[n]), masks=False).image
    assert picture is not None
    image, (width, height) = jpeg(picture, side=side, quality=quality)
    return image if g.settings.pictures else "", width, height, seen_region(g.model, picture)


def _example(n: int, why: str, shot: Shot, routing: Routing, expert: int) -> ExpertPicture:
    mine_P: Tensor = (routing.index_TK == expert).any(1)
    surest = int(torch.where(mine_P, routing.score_TE[:, expert], -1.0).argmax())
    return ExpertPicture(n, why, *shot, tuple(mine_P.nonzero()[:, 0].tolist()), surest)
