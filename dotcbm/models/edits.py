"""The log of what was changed in a model by hand: by whom, when and why. It lies with the model as `edits.json`.

K classes, F inputs of the class head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

__all__ = ["FORMAT", "Edit", "check_removed", "edits_from_dict", "edits_to_dict"]

FORMAT = 1


@dataclass(frozen=True)
class Edit:
    """One edit of the class head, as `dotcbm.report.edit.edit_model` makes it.

    Attributes:
        by: Who decided it.
        reason: Why, in a sentence.
        when: UTC, ISO 8601, to the second.
        removed: Concepts that no class reads any more. They are still predicted.
        removed_inputs: The columns of the head that belonged to them, which hold zeros.
        scaled: Concept and factor: its weights are the former ones times the factor, and were held while the rest was fitted.
        reweighted: Whether training pictures were weighted so that the class does not depend on the removed concepts.
        method: How the rest of the head was fitted, name and value.
        data: What it was fitted to, as the source prints.
        figures: Name and value, before and after.
        version: Of dotcbm.
    """

    by: str
    reason: str
    when: str
    removed: tuple[str, ...] = ()
    removed_inputs: tuple[int, ...] = ()
    scaled: tuple[tuple[str, float], ...] = ()
    reweighted: bool = False
    method: tuple[tuple[str, str], ...] = ()
    data: str = ""
    figures: tuple[tuple[str, float], ...] = ()
    version: str = ""

    @property
    def told(self) -> str:
        """One line: what, who, when and why."""
        done = [f"removed {', '.join(map(repr, self.removed))}"] if self.removed else []
        done += [f"scaled {name!r} by {factor:g}" for name, factor in self.scaled]
        how = ", with re-weighted training pictures" if self.reweighted else ""
        return f"{self.when}, {self.by}: {'; '.join(done)}{how}. Reason: {self.reason}"


def edits_to_dict(edits: Sequence[Edit]) -> dict[str, Any]:
    """JSON values."""
    return {"format": FORMAT, "edits": [asdict(edit) for edit in edits]}


def edits_from_dict(values: Any, *, where: str) -> tuple[Edit, ...]:
    """The inverse of `edits_to_dict`.

    Args:
        values: As read from JSON.
        where: The file, for messages.

    Raises:
        ValueError: A newer format, or something that `edits_to_dict` does not give.
    """
    found = values.get("format") if isinstance(values, Mapping) else None
    if not isinstance(found, int):
        raise ValueError(f"{where}: has no format number; expected the log that `dotcbm edit` writes")
    if found > FORMAT:
        raise ValueError(f"{where}: has format {found}; this dotcbm reads formats up to {FORMAT}. Install a newer dotcbm")
    edits = []
    for number, row in enumerate(values.get("edits", ()), 1):
        try:
            edit = Edit(
                **{
                    **row,
                    "removed": tuple(row["removed"]),
                    "removed_inputs": tuple(row["removed_inputs"]),
                    "scaled": tuple((str(name), float(factor)) for name, factor in row["scaled"]),
                    "method": tuple((str(name), str(value)) for name, value in row["method"]),
                    "figures": tuple((str(name), float(value)) for name, value in row["figures"]),
                }
            )
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{where}: edit {number} cannot be read ({error!r}); expected the log that `dotcbm edit` writes") from error
        if not all(isinstance(text, str) for text in (edit.by, edit.reason, edit.when, *edit.removed)) or any(
            not isinstance(j, int) for j in edit.removed_inputs
        ):
            raise ValueError(f"{where}: edit {number} holds values of the wrong type; expected the log that `dotcbm edit` writes")
        if any(not math.isfinite(factor) for _, factor in edit.scaled):
            raise ValueError(f"{where}: edit {number} scales by {dict(edit.scaled)}; factors are finite numbers")
        edits.append(edit)
    return tuple(edits)


def check_removed(head: nn.Linear, edits: Sequence[Edit], *, where: str) -> None:
    """Check that the head still reads none of the concepts that were removed from it.

    Raises:
        ValueError: It does: the weights were changed after the edit, or belong to another model.
    """
    for edit in edits:
        outside = [j for j in edit.removed_inputs if not 0 <= j < head.in_features]
        if outside or bool(head.weight[:, list(edit.removed_inputs)].count_nonzero()):
            raise ValueError(
                f"{where}: the log says that {list(edit.removed)} were removed from the class head ({edit.when}, {edit.by}), but the head "
                "reads them: its weights were changed afterwards. Edit the model again, or set `model.edits = ()` to give up the log"
            )
