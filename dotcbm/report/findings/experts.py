"""Rules about an encoder's experts: those that get nothing, one that gets everything, and those that look past the object.

E experts, K for each patch.
"""

from __future__ import annotations

from collections.abc import Callable

from dotcbm.report.findings.rule import LEAST, listed
from dotcbm.report.record import AuditRecord, Finding
from dotcbm.report.record_experts import ExpertLayer, ExpertRow
from dotcbm.report.record_interval import Interval

__all__ = ["EXPERT_RULES"]

_BACKGROUND = "background"  # the name of that row in the tables of parts
_MOST, _OUTSIDE, _USED = 0.5, 0.8, 0.1


def _dead(record: AuditRecord) -> list[Finding]:
    layers = [layer for layer in record.experts if layer.num_dead]
    if not layers or record.card.num_pictures < LEAST:
        return []
    worst = max(layers, key=lambda layer: layer.num_dead / len(layer.experts))
    where = listed(tuple(f"{layer.num_dead} of {len(layer.experts)} in {layer.name}" for layer in layers))
    return [
        Finding(
            "experts/dead",
            "warning",
            f"Experts are dead: {where}.",
            "No patch of any audited picture goes to them: their weights are carried and never used. Train with a balance term, or begin "
            f"with more experts for each patch. The figure is that of {worst.name}.",
            Interval(float(worst.num_dead), n=len(worst.experts), over="experts"),
            "number",
            0.0,
            "more than 0 experts of a layer without any patch",
            verdict="confirmed",
            section="experts",
        )
    ]


def _one_for_most(record: AuditRecord) -> list[Finding]:
    found: list[tuple[float, ExpertLayer, int]] = []
    for layer in record.experts:
        threshold = max(_MOST, 2 * _even(layer))
        fullest = max(range(len(layer.experts)), key=lambda e: layer.experts[e].load.value or 0.0)
        load = layer.experts[fullest].load
        if load.n >= LEAST and load.low is not None and load.low > threshold:
            found.append((load.value or 0.0, layer, fullest))
    if not found:
        return []
    _, layer, expert = max(found, key=lambda row: row[0])
    names = listed(tuple(layer.name for _, layer, _ in found))
    return [
        Finding(
            "experts/one_for_most",
            "warning",
            f"One expert takes most patches in {names}.",
            f"The others of the layer do little: it is nearly a dense one. The figure is that of expert {expert} of {layer.name}.",
            layer.experts[expert].load,
            "percent",
            round(max(_MOST, 2 * _even(layer)), 6),
            f"lower end of the interval above {_MOST:.0%}, and above twice the even share",
            Interval(round(_even(layer), 6)),
            "an even share",
            "confirmed",
            "experts",
        )
    ]


def _background(record: AuditRecord) -> list[Finding]:
    held: list[tuple[ExpertLayer, int, ExpertRow]] = []
    for layer in record.experts:
        for e, row in enumerate(layer.experts):
            if row.background.n >= LEAST and row.background.low is not None and row.background.low > _OUTSIDE:
                held.append((layer, e, row))
    if not held:
        return []
    beyond = [entry for entry in held if _serves_background(entry[0], entry[1])]
    layer, expert, row = max(beyond or held, key=lambda entry: entry[2].background.value or 0.0)
    names = listed(tuple(f"{e} of {layer.name}" for layer, e, _ in beyond or held))
    return [
        Finding(
            "experts/background",
            "note",
            f"Mostly background goes to {'an expert' if len(beyond or held) == 1 else f'{len(beyond or held)} experts'}: {names}.",
            "Share of an expert's patches that is not on the object; patches of one picture hang together, so pictures are resampled. Such "
            f"experts do no harm by themselves: see whether concepts are read there. The figure is that of expert {expert} of {layer.name}"
            + (", and the test says that it looks for the background." if beyond else "; where it takes its patches explains it."),
            row.background,
            "percent",
            _OUTSIDE,
            f"lower end of the interval above {_OUTSIDE:.0%}; confirmed if the permutation test marks the pair",
            None if row.background_expected is None else Interval(row.background_expected),
            "the same places of other pictures" if row.background_expected is not None else "",
            "confirmed" if beyond else "refuted",
            "experts",
        )
    ]


def _all_used(record: AuditRecord) -> list[Finding]:
    """A check that was passed: no expert of any layer is far below its share."""
    rows = [(row.load, _even(layer)) for layer in record.experts for row in layer.experts]
    if not rows or any(load.n < LEAST or load.low is None or load.low <= _USED * even for load, even in rows):
        return []
    load, even = min(rows, key=lambda row: (row[0].value or 0.0) / row[1])
    return [
        Finding(
            "experts/used",
            "good",
            "Every expert of every layer is used.",
            "Share of the patches that go to the emptiest expert.",
            load,
            "percent",
            round(_USED * even, 6),
            f"lower end of the interval of each expert above {_USED:.0%} of its even share",
            Interval(round(even, 6)),
            "an even share",
            "confirmed",
            "experts",
        )
    ]


def _even(layer: ExpertLayer) -> float:
    return layer.active / len(layer.experts)


def _serves_background(layer: ExpertLayer, expert: int) -> bool:
    tables = [table for table in layer.tables if table.kind == "part"]
    return any(table.names[link.row] == _BACKGROUND and link.expert == expert for table in tables for link in table.links)


EXPERT_RULES: tuple[Callable[[AuditRecord], list[Finding]], ...] = (_dead, _one_for_most, _background, _all_used)
