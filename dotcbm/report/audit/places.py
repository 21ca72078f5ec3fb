"""Places: do the maps point at the parts that their concepts are seen on? Every figure beside the best map that knows no concept.

N pictures, M concepts, S groups of parts, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dotcbm.metrics.detection import THRESHOLDS, Detections, part_detection
from dotcbm.metrics.part_groups import part_groups
from dotcbm.report.audit.tools import KNOW_NOTHING, PAIRS, Gathered, Section, difference, mean, mean_of_pairs, pair_means, rounded, share
from dotcbm.report.collect.places import CONTROLS
from dotcbm.report.record import Absence, DetectionSweep, Figure, Interval, PartRow

__all__ = ["detection_sweeps", "part_rows", "place_figures", "residual_figures"]

RADII = (0.01, 0.02, 0.05, 0.1)
"""Shares of the picture's diagonal within which a peak counts as on a key point."""

_PAPER = THRESHOLDS.index(0.6)
_MAPS = ("plan", "lift", "evidence", "gradcam")
_NOTHING = torch.full((1, 1), torch.nan, dtype=torch.float64)
_NOT_PLACED = "the data has neither key points nor part masks; give parts to measure where concepts are read"


def place_figures(g: Gathered) -> Section:
    """Pointing, mass, detection and correct parts of each map."""
    section, places = Section(), g.columns.places
    own = [name for name in _MAPS if g.columns.has_maps and any(key.endswith(f"/{name}") for key in places)]
    if not g.columns.has_maps:
        reason = "the model claims no concepts, so there are no maps of them"
        section.absent.append(Absence("parts", "where the maps point", reason))
        return section
    if not g.columns.maps("distance") and not g.columns.maps("in_mask"):
        section.absent.append(Absence("parts", "pointing and part detection", _NOT_PLACED))
    elif not g.columns.maps("in_mask"):
        section.absent.append(
            Absence(
                "parts", "part masks", "only key points are known; boxes of 1 / 1.4 of the object around them stand in for the parts' boxes"
            )
        )
    if "area" not in places:
        section.absent.append(Absence("parts", "share of the maps on the object", "the data has no masks of the object"))
    for name in own:
        section.figures += _pointing(g, name)
        section.figures += _shares(g, name)
        section.figures += _detection(g, name)
    section.figures += _gain(g)
    return section


def _figure(g: Gathered, key: str, label: str, name: str, value: Callable[[str], Tensor | None], *, note: str) -> Figure:
    """Mean over the concepts that are there of what `value` gives for a map, beside the map without concepts that has most of it."""

    def present(name: str) -> Tensor:
        value_NM = value(name)
        return torch.tensor([[torch.nan]]) if value_NM is None else torch.where(g.columns.truth_NM == 1, value_NM.double(), torch.nan)

    control, control_label = g.control_of(lambda name: float(present(name).nanmean()))
    return Figure(
        key,
        label,
        mean_of_pairs(present(name), settings=g.settings),
        control=mean_of_pairs(present(control), settings=g.settings),
        control_label=control_label,
        note=note,
    )


def _pointing(g: Gathered, name: str) -> list[Figure]:
    places, figures = g.columns.places, list[Figure]()
    if f"in_mask/{name}" in places:
        note = "Peak of the map on the exact mask of the concept's part, where the concept is there and the part visible."
        found = _figure(
            g, f"parts/pointing_mask_{name}", f"Peak of the {name} on the part", name, lambda m: places.get(f"in_mask/{m}"), note=note
        )
        figures.append(found)
    if f"distance/{name}" in places:
        for radius in reversed(RADII):

            def within(name: str, radius: float = radius) -> Tensor | None:
                distance_NM = places.get(f"distance/{name}")
                return None if distance_NM is None else torch.where(distance_NM.isnan(), torch.nan, (distance_NM <= radius).double())

            note = "Peak of the map within so many diagonals of a visible key point of the concept's part, where the concept is there."
            figures.append(
                _figure(g, f"parts/pointing_{radius:g}_{name}", f"Pointing of the {name}, r = {radius:g}", name, within, note=note)
            )
    return figures


def _shares(g: Gathered, name: str) -> list[Figure]:
    places, figures = g.columns.places, list[Figure]()
    for key, label, note in (
        ("part_mass", f"Share of the {name} on the part", "Relevance mass accuracy (Arras et al. 2022)."),
        ("part_rank", f"Part found by the highest patches of the {name}", "Relevance rank accuracy (Arras et al. 2022)."),
    ):
        if f"{key}/{name}" in places:
            figures.append(_figure(g, f"parts/{key}_{name}", label, name, lambda m, key=key: places.get(f"{key}/{m}"), note=note))
    if f"background/{name}" in places:

        def on_object(name: str) -> Tensor | None:
            return 1 - places[f"background/{name}"] if f"background/{name}" in places else None

        note = "Mean over the concepts that are there. A uniform map gets the object's share of the picture."
        figures.append(_figure(g, f"parts/foreground_mass_{name}", f"Share of the {name} on the object", name, on_object, note=note))
    return figures


def _gain(g: Gathered) -> list[Figure]:
    """Pointing of the model's map minus that of the control, pair by pair."""
    columns = [g.pointing(name) for name in (g.map_name, g.control_name)]
    hit_NM, control_NM = (None if hit_NM is None else torch.where(g.columns.truth_NM == 1, hit_NM, torch.nan) for hit_NM in columns)
    if hit_NM is None or control_NM is None:
        return []
    (hit_n, count_n), (control_n, _) = pair_means(hit_NM), pair_means(control_NM)
    gain = difference(hit_n, control_n, weight_N=count_n, settings=g.settings, over=PAIRS) if len(hit_n) else Interval(None, over=PAIRS)
    against = KNOW_NOTHING[g.control_name]
    note = f"Share of pairs whose peak is on the part, for the {g.map_name}, minus the share for {against}; pictures are resampled."
    return [Figure("parts/pointing_gain", "Pointing above the control", gain, unit="points", note=note)]


def detections(g: Gathered, name: str, threshold: int) -> Detections | None:
    """The boxes of a map at one of `THRESHOLDS`."""
    places = g.columns.places
    if f"iou/{name}" not in places:
        return None
    iou_NS, score_NS = places[f"iou/{name}"][..., threshold].double(), places[f"score/{name}"].double()
    return Detections(score_BS=score_NS, iou_BS=iou_NS, visible_BS=places["visible"] > 0.5)


def _mean_precision(g: Gathered, name: str) -> float:
    found = detections(g, name, _PAPER)
    return float("nan") if found is None else float(part_detection(found, part_groups(g.model.concepts)).mean_average_precision)


def _right_boxes(g: Gathered, name: str) -> Tensor:
    """(N, S) 1 where a map's box is right, 0 where not, NaN where there is nothing to find; a single NaN for a map without boxes."""
    found = detections(g, name, _PAPER)
    return _NOTHING if found is None else torch.where(found.visible_BS, (found.iou_BS >= 0.5).double(), torch.nan)


def _correct_parts(g: Gathered, name: str) -> Tensor:
    """(N, S) share of a group's queries that are right, NaN where the group is not visible; a single NaN for a map without them."""
    return g.columns.places.get(f"pcp/{name}", _NOTHING).double()


def _detection(g: Gathered, name: str) -> list[Figure]:
    figures = list[Figure]()
    found = detections(g, name, _PAPER)
    if found is not None and bool(found.visible_BS.any()):
        num = int(found.visible_BS.sum())
        over = "visible parts"
        control, control_label = g.control_of(lambda name: _mean_precision(g, name))
        figures.append(
            Figure(
                f"parts/detection_map_{name}",
                f"Part detection by the {name}, mean AP",
                Interval(rounded(_mean_precision(g, name)), n=num, over=over),
                control=Interval(rounded(_mean_precision(g, control)), n=num, over=over),
                control_label=control_label,
                note="One box around what is above 0.6 of the maximum, right at IoU 0.5, ranked by the concept's probability.",
            )
        )
        control, control_label = g.control_of(lambda name: float(_right_boxes(g, name).nanmean()))
        figures.append(
            Figure(
                f"parts/detection_correct_{name}",
                f"Boxes of the {name} with IoU of at least 0.5",
                mean_of_pairs(_right_boxes(g, name), settings=g.settings),
                control=mean_of_pairs(_right_boxes(g, control), settings=g.settings),
                control_label=control_label,
                note="Share of the visible parts. One box around what is above 0.6 of the map's maximum.",
            )
        )
    if f"pcp/{name}" in g.columns.places:
        control, control_label = g.control_of(lambda name: float(_correct_parts(g, name).nanmean(0).nanmean()))
        pcp, pcp_control = _correct_parts(g, name), _correct_parts(g, control)
        figures.append(
            Figure(
                f"parts/pcp_{name}",
                f"Percentage of correct parts by the {name}",
                Interval(rounded(pcp.nanmean(0).nanmean()), n=int((~pcp.isnan()).sum()), over="visible groups of parts"),
                control=Interval(
                    rounded(pcp_control.nanmean(0).nanmean()), n=int((~pcp_control.isnan()).sum()), over="visible groups of parts"
                ),
                control_label=control_label,
                note="APN protocol: boxes of 1 / 1.4 of the bird around peak and nearest key point, right above IoU 0.5.",
            )
        )
    return figures


def part_rows(g: Gathered) -> tuple[PartRow, ...]:
    """One row a group of parts: detection, and correct parts where the key points are CUB's."""
    name, groups = g.map_name, part_groups(g.model.concepts)
    if name is None:
        return ()
    rows: list[PartRow] = []
    found = detections(g, name, _PAPER)
    if found is not None:
        right_NS, control_NS = _right_boxes(g, name), _right_boxes(g, g.control_of(lambda name: float(_right_boxes(g, name).nanmean()))[0])
        precision_S = part_detection(found, groups).average_precision_S
        for s, part in enumerate(groups.names):
            right = share(right_NS[found.visible_BS[:, s], s])
            rows.append(PartRow(part, "part", rounded(precision_S[s]), right, rounded(control_NS[:, s].nanmean())))
    if f"pcp/{name}" in g.columns.places:
        pcp_NS = _correct_parts(g, name)
        control_NS = _correct_parts(g, g.control_of(lambda name: float(_correct_parts(g, name).nanmean(0).nanmean()))[0])
        for s, part in enumerate(groups.names):
            correct = mean(pcp_NS[:, s], settings=g.settings)
            rows.append(PartRow(part, "group", None, correct, rounded(control_NS[:, s].nanmean())))
    return tuple(rows)


def detection_sweeps(g: Gathered) -> tuple[DetectionSweep, ...]:
    """Detection at all thresholds, of the model's maps and of the controls."""
    groups, sweeps = part_groups(g.model.concepts), list[DetectionSweep]()
    names = [name for name in (*_MAPS, *CONTROLS) if f"iou/{name}" in g.columns.places]
    for name in names if g.columns.has_maps else ():
        found = [detections(g, name, t) for t in range(len(THRESHOLDS))]
        scores = [part_detection(d, groups) for d in found if d is not None]
        sweeps.append(
            DetectionSweep(
                map=name,
                thresholds=THRESHOLDS,
                mean_average_precision=tuple(rounded(score.mean_average_precision) for score in scores),
                share_correct=tuple(rounded(score.share_correct) for score in scores),
                num_boxes=int(g.columns.places["visible"].sum()),
            )
        )
    return tuple(sweeps)


def residual_figures(g: Gathered) -> Section:
    """What the transport solver left over."""
    section, residual_N = Section(), g.columns.residual_N
    if residual_N is not None:
        note = "L1 violation of the marginals, whose masses sum to 1: how far the plan is from a transport plan."
        section.figures.append(
            Figure(
                "parts/transport_residual",
                "Residual of the plan, mean",
                mean(residual_N, settings=g.settings),
                "number",
                "lower",
                note=note,
            )
        )
        worst = Interval(rounded(residual_N.max()), n=len(residual_N))
        section.figures.append(Figure("parts/transport_residual_max", "Residual of the plan, largest", worst, "number", "lower", note=note))
    return section
