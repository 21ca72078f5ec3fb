"""Where tests of two processes run: on processors, which talk through gloo, and on two GPUs, through NCCL, where there are two."""

from __future__ import annotations

import os

import pytest
import torch

__all__ = ["ACCELERATORS", "environment"]

ACCELERATORS = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two processes need two GPUs, one each")),
]


def environment(accelerator: str) -> dict[str, str]:
    """Variables for a process of the pair."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PL_TORCH_DISTRIBUTED_BACKEND": "nccl" if accelerator == "cuda" else "gloo"}
