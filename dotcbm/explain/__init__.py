"""Where a concept was read from, and what follows from it.

The package can be called: `dotcbm.explain(model, picture)` is `dotcbm.explain.explanation.explain`. Python puts the package
under that name as soon as anything inside it is imported, so the package itself has to answer.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dotcbm.explain.explanation import Explanation
    from dotcbm.explain.heatmaps import View
    from dotcbm.models.concept_model import ConceptModel, Picture


class _CallablePackage(ModuleType):
    def __call__(
        self, model: ConceptModel, image: Picture, *, target_class: int | str | None = None, view: View | None = None
    ) -> Explanation:
        from dotcbm.explain.explanation import explain

        return explain(model, image, target_class=target_class, view=view)


sys.modules[__name__].__class__ = _CallablePackage
