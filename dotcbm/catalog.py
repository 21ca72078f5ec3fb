"""What there is to choose from: found by importing the packages that hold it, not by a list kept by hand."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TypeVar

__all__ = ["first_line", "load_all", "subclasses"]

T = TypeVar("T")

# Need packages of the extra [train]; whoever looks for sources or models needs them not.
_RIM = ("dotcbm.data.batches", "dotcbm.data.datamodule", "dotcbm.metrics.accumulators")


def load_all(package: str) -> list[ModuleType]:
    """Every module of a package that needs no extra."""
    root = import_module(package)
    names = sorted(f"{package}.{found.name}" for found in pkgutil.iter_modules(root.__path__))
    return [import_module(name) for name in names if not name.startswith(_RIM)]


def subclasses(base: type[T], *, package: str) -> dict[str, type[T]]:
    """The concrete subclasses of `base` in a package, by name, sorted."""
    load_all(package)
    found: dict[str, type[T]] = {}
    waiting = list(base.__subclasses__())
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if cls.__module__.startswith(f"{package}.") and not inspect.isabstract(cls):
            found[cls.__name__] = cls
    return dict(sorted(found.items()))


def first_line(thing: object) -> str:
    """The first sentence of a docstring, or "" """
    text = inspect.getdoc(thing) or ""
    return text.strip().partition("\n\n")[0].replace("\n", " ")
