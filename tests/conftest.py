"""Fixtures for all tests, and the rule that tests on real data must run where the data is."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Read when Triton is imported, by whichever test is first: without a GPU its kernels run in Python, on NumPy arrays.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when POT is: it would start every array library that it finds, and JAX takes three quarters of a GPU's memory.
for name in ("JAX", "TENSORFLOW", "CUPY"):
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")

# Machines are slow now and then; a test that hangs meets pytest's own limit.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

# The longest files, in seconds. They come first, so that in the end no worker waits for another one's.
LONGEST = (
    "test_notebooks.py",  # 183
    "test_audit.py",  # 173
    "test_solvers.py",  # 138
    "test_triton_experts.py",  # 130
    "test_cli_commands.py",  # 78
    "test_audit_experts.py",  # 74
    "test_expert_training_ranks.py",  # 73
    "test_render_browser.py",  # 66
    "test_study.py",  # 64
    "test_parts_of_birds.py",  # 60
)

SHARED = Path(os.environ.get("DOTCBM_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real pictures (data/) and pretrained weights (weights/)."""
    if not (SHARED / "data").is_dir() and os.environ.get("DOTCBM_REQUIRE_SHARED"):
        pytest.fail(f"no shared data at {SHARED}, and DOTCBM_REQUIRE_SHARED says that tests on it must run")
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data at {SHARED}; set DOTCBM_SHARED to the folder that holds data/ and weights/")
    return SHARED
