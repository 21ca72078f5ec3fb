"""Vision models that explain themselves by construction.

The public names are loaded on first touch (PEP 562), so that `import dotcbm` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "ConceptBatch": "dotcbm.structures",
    "ConceptModel": "dotcbm.models.concept_model",
    "ConceptOutput": "dotcbm.structures",
    "ConceptSet": "dotcbm.structures",
    "DotCBM": "dotcbm.models.dot_cbm",
    "Explanation": "dotcbm.explain.explanation",
    "ImageEncoder": "dotcbm.encoders.image",
    "explain": "dotcbm.explain.explanation",
    "from_pretrained": "dotcbm.hub",
    "save_pretrained": "dotcbm.hub",
    "sinkhorn": "dotcbm.transport.sinkhorn",
}

__all__ = [
    "ConceptBatch",
    "ConceptModel",
    "ConceptOutput",
    "ConceptSet",
    "DotCBM",
    "Explanation",
    "ImageEncoder",
    "explain",
    "from_pretrained",
    "save_pretrained",
    "sinkhorn",
]

if TYPE_CHECKING:
    from dotcbm.encoders.image import ImageEncoder
    from dotcbm.explain.explanation import Explanation, explain
    from dotcbm.hub import from_pretrained, save_pretrained
    from dotcbm.models.concept_model import ConceptModel
    from dotcbm.models.dot_cbm import DotCBM
    from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet
    from dotcbm.transport.sinkhorn import sinkhorn


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dotcbm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
