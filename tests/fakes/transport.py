"""Problems and devices for the tests of the transport solvers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEVICE", "RELAX", "SOLVERS", "distance", "problem", "tangent"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SOLVERS = ("torch", "triton", "pot")
RELAX = [(None, None), (0.3, None), (None, 0.2), (0.3, 0.2)]


def problem(seed: int, B: int = 3, N: int = 12, M: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine costs of unit vectors that have something in common, and random marginals."""
    rng = torch.Generator().manual_seed(seed)
    patch, concept, common = (torch.randn(*shape, 16, generator=rng, dtype=torch.float64) for shape in ((B, N), (M,), (1,)))
    patch, concept = (torch.nn.functional.normalize(x + 0.5 * common, dim=-1) for x in (patch, concept))
    theta = torch.randn(B, N, generator=rng, dtype=torch.float64).softmax(-1)
    gamma = torch.randn(B, M, generator=rng, dtype=torch.float64).softmax(-1)
    return tuple(x.to(DEVICE, dtype) for x in (1 - patch @ concept.T, theta, gamma))  # pyright: ignore[reportReturnType]


def tangent(gradient: Tensor) -> Tensor:
    """Marginals of balanced transport can only move with their sum fixed, so that a constant in their gradient means nothing."""
    return gradient - gradient.mean(-1, keepdim=True)


def distance(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double() - expected).norm() / expected.norm())
