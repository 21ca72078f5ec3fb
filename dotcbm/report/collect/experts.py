"""Which expert each patch of the audited pictures goes to, counted while the routing is there: it is too large to keep.

A pass of its own, since pictures whose features are cached do not go through the encoder, and since pictures must come in random order
for the test of `dotcbm.moe.association`.

N pictures, B of a batch, P patches of each, E experts, K active, R parts, M concepts, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from dotcbm.data.batches import Rows, mix_seed
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.metrics.localization import coverage
from dotcbm.models.concept_model import ConceptModel
from dotcbm.moe.association import Association, Associations
from dotcbm.moe.layer import MoELayer
from dotcbm.moe.router import Routing
from dotcbm.moe.statistics import RoutingStatistics
from dotcbm.report.collect.run import Columns, evaluating, run
from dotcbm.report.collect.settings import AuditSettings
from dotcbm.report.collect.store import Store
from dotcbm.structures import ConceptBatch, ConceptOutput, PatchFeatures

__all__ = ["BACKGROUND", "Routed", "RoutedLayer", "collect_experts", "has_experts", "routed_batches"]

BACKGROUND = "background"
"""The name, among the parts, of all that is not on the object."""

_ORDER, _EXCHANGE = 0x0DE2, 0xE8C4  # separate streams of the seed
_AT_ONCE = 16  # pictures that are exchanged with one another, and that go through the encoder together
_DIGITS = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


@dataclass(frozen=True)
class RoutedLayer:
    """One layer of experts over N pictures.

    Attributes:
        count_NE: (N, E) patches of each picture that go to each expert.
        outside_NE: (N, E) how much of those patches is not on the object; NaN for pictures without a mask.
        best_NE: (N, E) the highest score of a patch that went to the expert, -1 where none did.
        probability_E: (E,) mean of the router's softmax.
        entropy: Mean over patches of the softmax's entropy, in nats.
        active: K.
        association: With the things of `Routed`, in their order.
    """

    count_NE: Tensor
    outside_NE: Tensor
    best_NE: Tensor
    probability_E: Tensor
    entropy: float
    active: int
    association: Association


@dataclass(frozen=True)
class Routed:
    """All layers.

    Attributes:
        grid: (grid_h, grid_w) of the patches.
        layers: By name.
        parts, concepts, classes: Names of the things of the tables, in this order.
        parts_from: "masks" or "key points".
        concepts_from: "plan" or "labels".
    """

    grid: tuple[int, int]
    layers: dict[str, RoutedLayer]
    parts: tuple[str, ...]
    concepts: tuple[str, ...]
    classes: tuple[str, ...]
    parts_from: str
    concepts_from: str


def has_experts(model: ConceptModel) -> bool:
    """Whether the encoder has expert layers."""
    return bool(_expert_layers(model.encoder))


def collect_experts(
    model: ConceptModel,
    data: ConceptDataModule,
    columns: Columns,
    *,
    settings: AuditSettings,
    store: Store,
    advance: Callable[[int], None] | None = None,
) -> Routed | None:
    """Pass the pictures of `columns` through the encoder and count.

    Args:
        model: On any device.
        data: Of the pictures.
        columns: What was collected of them; rows of the result are its rows.
        settings: Of the audit; `limit` holds already.
        store: Keeps the whole as one piece.
        advance: Told how many pictures were done.

    Returns:
        None where the encoder has no expert layers that see the patches of its grid.
    """
    if not has_experts(model):
        return None
    dataset = data.dataset(columns.split)
    concepts = model.concepts
    has_masks, has_points = dataset.read_part_masks is not None, dataset.points_NP3 is not None
    parts = concepts.part_names if has_masks or has_points else ()
    parts = (*parts, *((BACKGROUND,) if dataset.read_foreground is not None else ()))
    kept = store.keep("experts", lambda: _counted(model, data, columns, settings=settings, parts=parts, by_mask=has_masks, advance=advance))
    names = [name for i, name in enumerate(_names(model.encoder)) if f"{i}/count_NE" in kept]
    if not names:
        return None
    places = [i for i in range(len(_names(model.encoder))) if f"{i}/count_NE" in kept]
    return Routed(
        grid=(int(kept["grid"][0]), int(kept["grid"][1])),
        layers={name: _layer(kept, i) for name, i in zip(names, places)},
        parts=parts,
        concepts=concepts.names,
        classes=concepts.class_names,
        parts_from="masks" if has_masks or not has_points else "key points",
        concepts_from="plan" if bool(kept["by_plan"]) else "labels",
    )


def routed_batches(
    model: ConceptModel, data: ConceptDataModule, columns: Columns, pictures: Tensor
) -> Iterator[tuple[Tensor, ConceptBatch, ConceptOutput, PatchFeatures, dict[str, Routing]]]:
    """Numbers of pictures, their batch, what the model said, their features, and the routing of each layer of experts.

    Routings hold the patches alone, on the CPU. Layers that do not see the patches of the encoder's grid are left out.

    Args:
        model: In eval mode.
        data: Of the pictures.
        columns: What was collected of them.
        pictures: (n,) numbers, in the order of the result.
    """
    rows = Rows(data.dataset(columns.split), preprocessing=model.preprocessing, caches=None, annotations="all")
    layers = _expert_layers(model.encoder)
    device = next(model.bottleneck.parameters()).device
    for number_B in pictures.split(_AT_ONCE):
        batch = rows[[(int(columns.row_N[n]), 0) for n in number_B.tolist()]]
        for layer in layers:
            layer.routing = None
        output, features = run(model, batch.to(device))
        num_tokens = len(number_B) * features.grid[0] * features.grid[1]
        seen = {name: _of_patches(layer.routing) for name, layer in zip(_names(model.encoder), layers) if layer.routing is not None}
        yield number_B, batch, output, features, {name: routing for name, routing in seen.items() if len(routing.index_TK) == num_tokens}


def _counted(
    model: ConceptModel,
    data: ConceptDataModule,
    columns: Columns,
    *,
    settings: AuditSettings,
    parts: tuple[str, ...],
    by_mask: bool,
    advance: Callable[[int], None] | None,
) -> dict[str, Tensor]:
    layers, names = _expert_layers(model.encoder), _names(model.encoder)
    N = len(columns)
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(mix_seed(settings.seed, _ORDER)))
    associations = Associations(num_permutations=settings.num_permutations, seed=mix_seed(settings.seed, _EXCHANGE))
    statistics = RoutingStatistics()
    kept: dict[str, Tensor] = {}
    by_plan = True
    with evaluating(model):
        for number_B, batch, output, features, routings in routed_batches(model, data, columns, order_N):
            B, P = len(number_B), features.grid[0] * features.grid[1]
            kept["grid"] = torch.tensor(features.grid)
            by_plan = output.plan_BNM is not None and output.plan_BNM.shape[1] == P
            outside_BP = None if batch.foreground_BHW is None else 1 - coverage(batch.foreground_BHW, grid=features.grid).float()
            weight_BPX = _parts(batch, parts, grid=features.grid, outside_BP=outside_BP, by_mask=by_mask)
            present_BM = (columns.truth_NM[number_B] == 1).float()
            weight_BY = torch.nn.functional.one_hot(columns.label_N[number_B], model.concepts.num_classes).float()
            if by_plan:
                assert output.plan_BNM is not None
                weight_BPX = torch.cat([weight_BPX, output.plan_BNM.float().clamp(min=0) * present_BM[:, None]], 2)
            else:
                weight_BY = torch.cat([present_BM, weight_BY], 1)
            chosen = {
                name: (routing.index_TK.view(B, P, -1), layer.num_experts)
                for name, layer in zip(names, layers)
                if (routing := routings.get(name)) is not None
            }
            if not chosen:
                return {}
            associations.update(chosen, weight_BPX=weight_BPX, weight_BY=weight_BY)
            statistics.update({name: layer for name, layer in zip(names, layers) if name in chosen})
            for name, (index_BPK, num_experts) in chosen.items():
                i = names.index(name)
                for what, value_BE in _of_pictures(index_BPK, routings[name].score_TE.view(B, P, num_experts), outside_BP).items():
                    kept.setdefault(f"{i}/{what}", torch.full((N, num_experts), torch.nan))[number_B] = value_BE
                kept[f"{i}/active"] = torch.tensor(index_BPK.shape[2])
            if advance is not None:
                advance(B)
    kept["by_plan"] = torch.tensor(by_plan)
    for name, found in statistics.compute().items():
        kept[f"{names.index(name)}/probability_E"] = found.p_E
        kept[f"{names.index(name)}/entropy"] = torch.tensor(found.entropy)
    for name, association in associations.compute().items():
        for entry in fields(association):
            kept[f"{names.index(name)}/association/{entry.name}"] = getattr(association, entry.name)
    return kept


def _of_pictures(index_BPK: Tensor, score_BPE: Tensor, outside_BP: Tensor | None) -> dict[str, Tensor]:
    chosen_BPE = torch.zeros_like(score_BPE).scatter_(2, index_BPK, 1.0)
    found = {"count_NE": chosen_BPE.sum(1), "best_NE": torch.where(chosen_BPE > 0, score_BPE, -1.0).amax(1)}
    outside_BE = torch.full_like(found["count_NE"], torch.nan)
    if outside_BP is not None:
        on_object_B1 = (outside_BP < 1).any(1, keepdim=True)  # a picture without any object has no mask
        outside_BE = torch.where(on_object_B1, torch.einsum("bp,bpe->be", outside_BP, chosen_BPE), torch.nan)
    return found | {"outside_NE": outside_BE}


def _parts(batch: ConceptBatch, parts: tuple[str, ...], *, grid: tuple[int, int], outside_BP: Tensor | None, by_mask: bool) -> Tensor:
    """(B, P, R) share of each patch that a part covers, or 1 in the patch of its visible key point; the background last, if asked for."""
    B, P = len(batch), grid[0] * grid[1]
    columns: list[Tensor] = []
    num = len(parts) - (BACKGROUND in parts)
    if num and by_mask and batch.part_masks_BPHW is not None:
        columns.append(coverage(batch.part_masks_BPHW.flatten(0, 1), grid=grid).view(B, num, P).transpose(1, 2).float())
    elif num and not by_mask and batch.points_BP3 is not None:
        x_BR, y_BR, visible_BR = batch.points_BP3.unbind(2)
        inside_BR = (visible_BR > 0.5) & (x_BR >= 0) & (x_BR <= 1) & (y_BR >= 0) & (y_BR <= 1)
        column_BR = (x_BR.nan_to_num() * grid[1]).long().clamp(0, grid[1] - 1)
        row_BR = (y_BR.nan_to_num() * grid[0]).long().clamp(0, grid[0] - 1)
        columns.append(torch.zeros(B, P, num).scatter_(1, (row_BR * grid[1] + column_BR)[:, None], inside_BR.float()[:, None]))
    elif num:
        columns.append(torch.zeros(B, P, num))
    if BACKGROUND in parts:
        nothing_BP = torch.zeros(B, P)
        on_object_B1 = nothing_BP[:, :1] > 0 if outside_BP is None else (outside_BP < 1).any(1, keepdim=True)
        columns.append(torch.where(on_object_B1, nothing_BP if outside_BP is None else outside_BP, 0.0)[..., None])
    return torch.cat(columns, 2) if columns else torch.zeros(B, P, 0)


def _of_patches(routing: Routing) -> Routing:
    counted_T = torch.ones_like(routing.index_TK[:, 0], dtype=torch.bool) if routing.counted_T is None else routing.counted_T
    kept = (routing.index_TK, routing.gate_TK, routing.logit_TE, routing.score_TE)
    return Routing(*(value.detach()[counted_T].cpu() for value in kept))


def _layer(kept: dict[str, Tensor], i: int) -> RoutedLayer:
    return RoutedLayer(
        count_NE=kept[f"{i}/count_NE"],
        outside_NE=kept[f"{i}/outside_NE"],
        best_NE=kept[f"{i}/best_NE"],
        probability_E=kept[f"{i}/probability_E"],
        entropy=float(kept[f"{i}/entropy"]),
        active=int(kept[f"{i}/active"]),
        association=Association(**{entry.name: kept[f"{i}/association/{entry.name}"] for entry in fields(Association)}),
    )


def _expert_layers(encoder: object) -> list[MoELayer]:
    return [module for module in encoder.modules() if isinstance(module, MoELayer)] if isinstance(encoder, nn.Module) else []


def _names(encoder: object) -> list[str]:
    """ "block 3" where every layer is in another block, else the modules' names."""
    if not isinstance(encoder, nn.Module):
        return []
    whole = [name for name, module in encoder.named_modules() if isinstance(module, MoELayer)]
    short = [f"block {found[1]}" if (found := _DIGITS.search(name)) else name for name in whole]
    return short if len(set(short)) == len(short) else whole
