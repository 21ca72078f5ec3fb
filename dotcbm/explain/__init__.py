"""Where a concept was read from, and what follows from it.

The package can be called: `dotcbm.explain(model, picture)` is `dotcbm.explain.explanation.explain`. Python puts the package
under that name as soon as anything inside it is imported, so the package itself has to answer. Its public names are loaded on
first touch (PEP 562).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Attribution": "attribution",
    "Contrast": "contrast",
    "Explanation": "explanation",
    "MutedRegion": "regions",
    "Neighbours": "neighbours",
    "Occlusion": "occlusion",
    "PredictionTable": "neighbours",
    "attribute": "attribution",
    "concepts_in_box": "regions",
    "mute_region": "regions",
    "nearest_pictures": "neighbours",
    "occlude": "occlusion",
    "predict_table": "neighbours",
    "read_table": "neighbours",
    "surest_pictures": "neighbours",
}

__all__ = [
    "Attribution",
    "Contrast",
    "Explanation",
    "MutedRegion",
    "Neighbours",
    "Occlusion",
    "PredictionTable",
    "attribute",
    "concepts_in_box",
    "mute_region",
    "nearest_pictures",
    "occlude",
    "predict_table",
    "read_table",
    "surest_pictures",
]

if TYPE_CHECKING:
    from dotcbm.explain.attribution import Attribution, attribute
    from dotcbm.explain.contrast import Contrast
    from dotcbm.explain.explanation import Explanation
    from dotcbm.explain.heatmaps import View
    from dotcbm.explain.neighbours import Neighbours, PredictionTable, nearest_pictures, predict_table, read_table, surest_pictures
    from dotcbm.explain.occlusion import Occlusion, occlude
    from dotcbm.explain.regions import MutedRegion, concepts_in_box, mute_region
    from dotcbm.models.concept_model import ConceptModel, Picture


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dotcbm.explain' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"dotcbm.explain.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _CallablePackage(ModuleType):
    def __call__(
        self, model: ConceptModel, image: Picture, *, target_class: int | str | None = None, view: View | None = None
    ) -> Explanation:
        from dotcbm.explain.explanation import explain

        return explain(model, image, target_class=target_class, view=view)


sys.modules[__name__].__class__ = _CallablePackage
