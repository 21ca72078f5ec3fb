"""What an edit's log and its reader are told of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.edit.head import RefitHead
from dotcbm.report.edit.weights import Reweighting

__all__ = ["HeadSettings", "method_of", "notes_of"]

_MOVED = 0.05  # ours: heads that differ by less give the same classes but for single pictures


@dataclass(frozen=True)
class HeadSettings:
    """How a run fitted its head; the defaults are those of `ConceptTask`.

    Attributes:
        l2: Strength, or "auto" for the best on the validation split.
        views: Training pictures as they are, or in all views of the data module.
        fit_on: The concepts that the head is fitted to: as predicted, or the true ones (regime "independent").
        balanced: Weigh pictures by the inverse frequency of their class.
    """

    l2: float | Literal["auto"] = "auto"
    views: Literal["plain", "all"] = "plain"
    fit_on: Literal["predicted", "truth"] = "predicted"
    balanced: bool = False


def method_of(head: HeadSettings, fit: RefitHead, n: int, reweighting: Reweighting | None) -> tuple[tuple[str, str], ...]:
    """Name and value, for the log."""
    rows = [("fitted to", f"{head.fit_on} concepts"), ("training rows", str(n)), ("l2", f"{fit.l2:g}"), ("views", head.views)]
    rows.append(("gradient left", f"{fit.gradient:.1e}"))
    if head.balanced:
        rows.append(("class weights", "balanced"))
    if reweighting is not None:
        rows += [
            ("re-weighting", "p(class) p(pattern) / p(class, pattern) of the removed concepts as predicted (CBDebug, arXiv 2509.21385)"),
            ("information before", f"{reweighting.before:.4f} bits"),
            ("information left", f"{reweighting.left:.4f} bits"),
            ("effective rows", f"{reweighting.effective:.0f}"),
        ]
    return tuple(rows)


def notes_of(model: ConceptModel, removed: Sequence[str], control: RefitHead, reweighting: Reweighting | None) -> tuple[str, ...]:
    """Sentences for the reader; `control` is the refit with all concepts."""
    notes = []
    head = model.bottleneck.head
    moved = float((control.weight_KF - head.weight.detach().cpu().double()).norm() / head.weight.detach().cpu().double().norm())
    if moved > _MOVED:
        notes.append(
            f"Fitted anew with all its concepts, the head already differs from the model's by {100 * moved:.0f} % of its weights' norm: "
            "the model's was trained otherwise. Hold the edit against the refit without an edit, not only against the model before."
        )
    if removed and model.concepts.groups is not None:
        pairs = dict(zip(model.concepts.names, model.concepts.groups, strict=True))
        left = [n for n, g in pairs.items() if g in {pairs[r] for r in removed} and n not in (*removed, *model.removed_concepts)]
        if left:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            notes.append(f"Of the same group as what was removed, and still read by the classes: {shown}. They may say the same.")
    if reweighting is not None:
        notes.append(
            f"Class and removed concepts shared {reweighting.before:.3f} bits in the training pictures, {reweighting.left:.3f} with the "
            f"weights, which are worth {reweighting.effective:.0f} equal ones"
            + (f"; {reweighting.empty} pairs of class and pattern have no picture" if reweighting.empty else "")
            + (f"; the weights of {reweighting.limited} pictures were bounded" if reweighting.limited else "")
            + "."
        )
        if reweighting.num_patterns == 1:
            notes.append("The removed concepts are the same (seen or not) in every training picture: re-weighting had nothing to work on.")
    return tuple(notes)
