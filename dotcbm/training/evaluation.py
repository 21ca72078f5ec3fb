"""What a model scores on a split: classes, concepts, and where its maps point, each beside its control.

Figures of places come from several maps of the same concept, named at the end of a figure's key:

    plan      Q_ij, the transport plan (its peak and mass are those of Q_ij / gamma_j)
    lift      Q_ij / theta_i: the plan with the patch prior taken out
    evidence  what each patch adds to the concept's logit (the class activation map of a vanilla CBM)
    prior     theta_i, one map for every concept: the control. What it scores is not owed to the concepts
    centre    the middle of the picture: the second control, for key points

B pictures, N patches, M concepts, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dotcbm.metrics.classes import accuracy, balanced_accuracy, calibration_error, worst_group_accuracy
from dotcbm.metrics.concepts import all_negative_error, concept_error, macro_auroc, macro_average, macro_average_precision
from dotcbm.metrics.localization import (
    coverage,
    distance_to_parts,
    pointing_distance,
    pointing_in_mask,
    prior_map,
    relevance_mass,
    scored_pairs,
)
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet
from dotcbm.transport.priors import perplexity

__all__ = ["RADII", "Evaluation", "concept_maps", "evaluate"]

RADII = (0.05, 0.1)
"""Shares of the picture's diagonal within which a peak counts as on a key point."""


def concept_maps(output: ConceptOutput) -> dict[str, Tensor]:
    """(B, N, M) maps of an output by kind; see the head of this file. Without "centre", which is no map."""
    maps: dict[str, Tensor] = {}
    if output.plan_BNM is not None:
        maps["plan"] = output.plan_BNM
        if output.theta_BN is not None:
            maps["lift"] = output.plan_BNM / output.theta_BN[..., None].clamp(min=torch.finfo(output.theta_BN.dtype).tiny)
    if output.evidence_BNM is not None:
        maps["evidence"] = output.evidence_BNM
    if output.theta_BN is not None:
        maps["prior"] = prior_map(output.theta_BN, num_concepts=output.concept_logit_BM.shape[1])
    return maps


@dataclass
class Evaluation:
    """Takes batches, gives figures. Kept by picture, so that pictures that several processes saw count once.

    Attributes:
        concepts: The vocabulary.
        places: Compute the figures of places; they need annotations beyond labels.
    """

    concepts: ConceptSet
    places: bool = True
    _columns: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    def update(self, output: ConceptOutput, batch: ConceptBatch) -> None:
        """Take the output of one batch."""
        output = output.detach().to("cpu")
        batch = batch.to("cpu")
        row: dict[str, Tensor] = {
            "index": batch.index_B,
            "label": batch.label_B,
            "class": output.class_BK.float(),
            "concept": output.concept_logit_BM.float(),
            "target": batch.concepts_BM.float(),
        }
        if batch.group_B is not None:
            row["group"] = batch.group_B
        if output.residual_B is not None:
            row["residual"] = output.residual_B.float()
        if output.theta_BN is not None:
            row["theta_perplexity"] = perplexity(output.theta_BN.float())
        if self.places:
            for name, value_BM in self._places(output, batch).items():
                counts_BM = scored_pairs(value_BM, batch.concepts_BM)
                pair_B2 = torch.stack([torch.where(counts_BM, value_BM, 0.0).sum(1), counts_BM.sum(1)], 1)
                row[f"place {name}"] = pair_B2.double()
        for name, value in row.items():
            self._columns.setdefault(name, []).append(value)

    def _places(self, output: ConceptOutput, batch: ConceptBatch) -> dict[str, Tensor]:
        part_mask_MP = self.concepts.part_mask_MP()
        has_parts = bool(part_mask_MP.any())
        values: dict[str, Tensor] = {}
        covered_BHW = None
        if batch.foreground_BHW is not None:
            # On the grid already, the mask's own share of each patch is what `relevance_mass` computes from it: once for all maps.
            covered_BHW = coverage(batch.foreground_BHW, grid=output.grid).unflatten(1, output.grid)
        for kind, map_BNM in concept_maps(output).items():
            map_BNM = map_BNM.float()
            if has_parts and batch.points_BP3 is not None:
                distance_BM = pointing_distance(
                    map_BNM, grid=output.grid, points_BP3=batch.points_BP3, part_mask_MP=part_mask_MP, size_B2=batch.size_B2
                )
                values.update(_within(distance_BM, kind))
            if has_parts and batch.part_masks_BPHW is not None:
                values[f"pointing_mask_{kind}"] = pointing_in_mask(
                    map_BNM, grid=output.grid, part_masks_BPHW=batch.part_masks_BPHW, part_mask_MP=part_mask_MP
                )
            if covered_BHW is not None:
                values[f"foreground_mass_{kind}"] = relevance_mass(map_BNM, grid=output.grid, mask_BHW=covered_BHW)
        if has_parts and batch.points_BP3 is not None and values:
            centre_BM2 = torch.full((*batch.concepts_BM.shape, 2), 0.5)
            distance_BM = distance_to_parts(centre_BM2, points_BP3=batch.points_BP3, part_mask_MP=part_mask_MP, size_B2=batch.size_B2)
            values.update(_within(distance_BM, "centre"))
        return values

    def gather(self) -> Evaluation:
        """The pictures of all processes together, each once."""
        columns = {name: torch.cat(values) for name, values in self._columns.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            everyone: list[dict[str, Tensor] | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, columns)
            names = list(dict.fromkeys(name for share in everyone if share for name in share))
            columns = {name: torch.cat([share[name] for share in everyone if share and name in share]) for name in names}
        if "index" in columns:
            index = columns["index"]
            order = index.argsort(stable=True)
            first = torch.ones(len(index), dtype=torch.bool)
            first[1:] = index[order][1:] != index[order][:-1]
            kept = order[first]
            # A column that some batches lack (no mask in any of their pictures) is only summed up.
            columns = {name: value[kept] if len(value) == len(index) else value for name, value in columns.items()}
        return Evaluation(self.concepts, self.places, {name: [value] for name, value in columns.items()})

    def compute(self) -> dict[str, float]:
        """The figures; those for which something is missing are left out.

        num_pictures; accuracy, balanced_accuracy, calibration_error, worst_group_accuracy; concept_auroc, concept_ap,
        concept_error, all_negative_error (macro, over the concepts that vary, errors over the known ones);
        pointing_<r>_<map> (peak within r diagonals of a visible key point), pointing_mask_<map> (peak in the part's mask),
        foreground_mass_<map> (share of the map inside the object), over the pairs of picture and concept with target 1 and a
        visible part, `num_pointed` of them; transport_residual (mean and largest), theta_perplexity.
        """
        columns = {name: torch.cat(values) for name, values in self._columns.items()}
        if not len(columns.get("label", ())):
            raise ValueError("there is no picture to evaluate; check that the split is not empty")
        label, scores, concept, target = columns["label"], columns["class"], columns["concept"], columns["target"]
        figures: dict[str, Tensor] = {
            "num_pictures": torch.tensor(len(label)),
            "accuracy": accuracy(scores, label),
            "balanced_accuracy": balanced_accuracy(scores, label),
            "calibration_error": calibration_error(scores, label),
            "concept_auroc": macro_auroc(concept, target),
            "concept_ap": macro_average_precision(concept, target),
            "concept_error": macro_average(concept_error(concept.sigmoid(), target)),
            "all_negative_error": macro_average(all_negative_error(target)),
        }
        if "group" in columns:
            figures["worst_group_accuracy"] = worst_group_accuracy(scores, label, group_N=columns["group"])
        if "residual" in columns:
            figures["transport_residual"] = columns["residual"].mean()
            figures["transport_residual_max"] = columns["residual"].max()
        if "theta_perplexity" in columns:
            figures["theta_perplexity"] = columns["theta_perplexity"].mean()
        for name, pair_N2 in columns.items():
            if name.startswith("place "):
                total, count = pair_N2.sum(0)
                figures[name.removeprefix("place ")] = total / count
                if "pointing" in name:
                    figures["num_pointed"] = count
        return {name: float(value) for name, value in figures.items() if not value.isnan()}


@torch.no_grad()
def evaluate(model: ConceptModel, dataloader: Iterable[ConceptBatch], concepts: ConceptSet, *, places: bool = True) -> dict[str, float]:
    """The figures of `Evaluation.compute` for all batches of a loader, in eval mode; the model's mode is restored.

    Args:
        model: Run where its bottleneck's weights are.
        dataloader: Batches with annotations (`ConceptDataModule.plain_loader(split, annotations="all")`).
        concepts: The vocabulary.
        places: Compute the figures of places.
    """
    device = next(model.bottleneck.parameters()).device
    was_training = model.training
    model.eval()
    try:
        evaluation = Evaluation(concepts, places)
        for batch in dataloader:
            moved = batch.to(device)
            evaluation.update(model.forward_batch(moved), moved)
    finally:
        model.train(was_training)
    return evaluation.compute()


def _within(distance_BM: Tensor, kind: str) -> dict[str, Tensor]:
    return {f"pointing_{r:g}_{kind}": torch.where(distance_BM.isnan(), torch.nan, (distance_BM <= r).double()) for r in RADII}
