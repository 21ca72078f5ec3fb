"""What a model scores on a split: classes, concepts, and where its maps point, each beside its control.

Figures of places come from several maps of the same concept, named at the end of a figure's key:

    plan      Q_ij, the transport plan (its peak and mass are those of Q_ij / gamma_j)
    lift      Q_ij / theta_i: the plan with the patch prior taken out
    evidence  what each patch adds to the concept's logit (the class activation map of a vanilla CBM)
    prior     theta_i, one map for every concept: the control. What it scores is not owed to the concepts
    centre    the middle of the picture: the second control, for peaks
    random    a peak, or an order of the patches, drawn evenly, or a uniform map: chance, computed and not drawn

B pictures, N patches, M concepts, S groups of parts, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dotcbm.metrics.classes import accuracy, balanced_accuracy, calibration_error, worst_group_accuracy
from dotcbm.metrics.concepts import all_negative_error, concept_error, macro_auroc, macro_average, macro_average_precision
from dotcbm.metrics.detection import Detections, PartGroups, part_detection, part_groups
from dotcbm.metrics.localization import scored_pairs
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet
from dotcbm.training.places import RADII, THRESHOLD, concept_maps, place_figures
from dotcbm.transport.priors import perplexity

__all__ = ["RADII", "THRESHOLD", "Evaluation", "concept_maps", "evaluate"]


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
            places = place_figures(output, batch, part_mask_MP=self.concepts.part_mask_MP(), groups=self._groups)
            for name, value_BM in places.pairs.items():
                counts_BM = scored_pairs(value_BM, batch.concepts_BM)
                pair_B2 = torch.stack([torch.where(counts_BM, value_BM, 0.0).sum(1), counts_BM.sum(1)], 1)
                row[f"place {name}"] = pair_B2.double()
            row |= {f"parts {kind}": value_BS for kind, value_BS in places.correct_parts.items()}
            row |= {f"boxes {kind}": value_BS3 for kind, value_BS3 in places.detections.items()}
        for name, value in row.items():
            self._columns.setdefault(name, []).append(value)

    @cached_property
    def _groups(self) -> PartGroups:
        return part_groups(self.concepts)

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
        transport_residual (mean and largest), theta_perplexity. Over the pairs of picture and concept with target 1 whose part is
        visible, `num_pointed` of them: pointing_<r>_<map> (peak within r diagonals of a key point), pointing_distance_<map> (mean
        distance in diagonals), pointing_mask_<map> (peak in the part's mask), part_mass_<map> and part_rank_<map> (relevance mass and
        rank inside the part's mask), box_share_<map> (share of boxes with IoU of at least 0.5); over those with a mask of the object
        foreground_mass_<map>, foreground_rank_<map> and background_share_<map>. Over pictures and groups of parts
        (`dotcbm.metrics.detection`; with key points only, the true boxes are a proxy): detection_ap_<map> (mean over groups of the
        average precision), detection_share_<map> (share of visible parts found) and pcp_<map> (percentage of correct parts).
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
        for name, column in columns.items():
            if name.startswith("place "):
                total, count = column.sum(0)
                figures[name.removeprefix("place ")] = total / count
                if "pointing" in name:
                    figures["num_pointed"] = count
            elif name.startswith("parts "):
                figures[f"pcp_{name.removeprefix('parts ')}"] = column.nanmean(0).nanmean()
            elif name.startswith("boxes "):
                score_NS, iou_NS, visible_NS = column.unbind(-1)
                scores = part_detection(Detections(score_NS, iou_NS, visible_NS == 1), self._groups)
                kind = name.removeprefix("boxes ")
                figures[f"detection_ap_{kind}"] = torch.tensor(scores.mean_average_precision)
                figures[f"detection_share_{kind}"] = torch.tensor(scores.share_correct)
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
