"""Names that people type, found among those that there are; and a model put into eval mode for a while."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

__all__ = ["class_index", "evaluating", "index_of"]


def index_of(name: str, names: Sequence[str], *, what: str) -> int:
    """The place of a name.

    Raises:
        ValueError: There is no such name; the nearest are given.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or list(names[:3])
        raise ValueError(f"there is no {what} {name!r} among the {len(names)}; did you mean one of {near}?")
    return names.index(name)


def class_index(target_class: int | str, class_names: Sequence[str]) -> int:
    """The index of a class that was given by name or index.

    Raises:
        ValueError: There is no such class.
    """
    if isinstance(target_class, str):
        return index_of(target_class, class_names, what="class")
    if not 0 <= target_class < len(class_names):
        raise ValueError(f"there is no class {target_class}; the {len(class_names)} classes are numbered from 0")
    return target_class


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards, also after an error, every submodule is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
