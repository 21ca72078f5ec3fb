"""What is asked for, checked: concepts by the names that people type, factors, and who asks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from dotcbm.data.source import ConceptSource
from dotcbm.data.synthetic import SCENES, Synthetic
from dotcbm.data.waterbirds import GROUP_NAMES, Waterbirds
from dotcbm.models.concept_model import ConceptModel

__all__ = ["asked", "concept_named", "known_group_names"]


def concept_named(name: str, known: Sequence[str]) -> str:
    """The concept of that name; upper and lower case count as alike.

    Raises:
        ValueError: There is none; the nearest names are in the message.

    >>> concept_named("Red Wing", ["red wing", "long tail"])
    'red wing'
    """
    by_lower = {other.lower(): other for other in known}
    if name in known:
        return name
    if name.strip().lower() in by_lower:
        return by_lower[name.strip().lower()]
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    containing = [other for low, other in by_lower.items() if name.strip().lower() in low] if name.strip() else []
    shown = list(dict.fromkeys([*(by_lower[low] for low in near), *containing]))[:3]
    hint = f"did you mean {', '.join(map(repr, shown))}?" if shown else f"it has {len(known)}, {known[0]!r} for one"
    raise ValueError(f"the model has no concept {name!r}; {hint}")


def known_group_names(source: ConceptSource) -> tuple[str, ...]:
    """What a source calls its sub-populations, in the order of their numbers; empty where it has no names for them."""
    if isinstance(source, Waterbirds):
        return GROUP_NAMES
    if isinstance(source, Synthetic):
        return tuple(f"{name} on {scene}" for name in source.concepts.class_names for scene in SCENES)
    return ()


def asked(
    model: ConceptModel, remove: Sequence[str], scale: Mapping[str, float], *, by: str, reason: str, reweight: bool
) -> tuple[list[str], dict[str, float]]:
    """What to remove and to scale, named as in the vocabulary.

    Raises:
        ValueError: See `dotcbm.report.edit.run.edit_model`.
    """
    if not by.strip() or not reason.strip():
        raise ValueError("an edit is logged with who made it and why; give both (by, reason)")
    if not remove and not scale:
        raise ValueError("nothing to edit: name concepts to remove or to scale")
    known = model.concepts.names
    removed = [concept_named(name, known) for name in remove]
    scaled = {concept_named(name, known): factor for name, factor in scale.items()}
    for name in (*removed, *scaled):
        if name in model.removed_concepts:
            entry = next(edit for edit in model.edits if name in edit.removed)
            raise ValueError(f"{name!r} was removed before ({entry.when}, {entry.by}); edit the model from before that instead")
    if doubled := sorted({name for name in removed if removed.count(name) > 1} | (set(removed) & set(scaled))):
        raise ValueError(f"{doubled[0]!r} is named twice; remove or scale a concept once")
    for name, factor in scaled.items():
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"{name!r} is to be scaled by {factor}; a factor is positive (to take a concept out, remove it)")
    if reweight and not (removed or model.removed_concepts):
        raise ValueError("re-weighting makes the class independent of removed concepts, and none is removed; leave it out, or remove one")
    return removed, scaled
