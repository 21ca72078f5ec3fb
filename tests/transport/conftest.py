"""Leaves Triton's tests out where its interpreter does not work."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton before 3.7 turns arrays of one element into Python numbers, which NumPy refuses from 2.4 on."""

    def number(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version(package).split(".")[:2])

    if torch.cuda.is_available() or not torch.version.cuda or number("triton") >= (3, 7) or number("numpy") < (2, 4):
        return
    for item in items:
        if "triton" in item.name:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter before 3.7 needs numpy < 2.4"))
