"""Fixtures for all tests, and the rule that tests on real data must run where the data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Read when Triton is imported, by whichever test is first: without a GPU its kernels run in Python, on NumPy arrays.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when POT is: it would start every array library that it finds, and JAX takes three quarters of a GPU's memory.
for name in ("JAX", "TENSORFLOW", "CUPY"):
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")

SHARED = Path(os.environ.get("DOTCBM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real pictures (data/) and pretrained weights (weights/)."""
    if not (SHARED / "data").is_dir() and os.environ.get("DOTCBM_REQUIRE_SHARED"):
        pytest.fail(f"no shared data at {SHARED}, and DOTCBM_REQUIRE_SHARED says that tests on it must run")
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data at {SHARED}; set DOTCBM_SHARED to the folder that holds data/ and weights/")
    return SHARED
