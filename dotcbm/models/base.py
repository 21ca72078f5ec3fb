"""What every bottleneck offers: features in, concepts and classes out, and its own settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["Bottleneck"]


class Bottleneck(nn.Module, ABC):
    """A map from patch features to concepts, and from concepts to classes by one linear `head`.

    Subclasses take a `Problem` first and plain JSON values after it by keyword, and hand the latter on as `settings`, so
    that a saved model can be built again by `type(bottleneck)(problem, **bottleneck.settings)`.
    """

    head: nn.Linear

    def __init__(self, problem: Problem, *, settings: dict[str, Any]) -> None:
        super().__init__()
        self.problem = problem
        self.settings = settings

    @abstractmethod
    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """Concepts and classes of a batch of features."""

    def head_input(self, features: PatchFeatures, output: ConceptOutput) -> Tensor:
        """(B, F) what the class head reads: the concept probabilities, unless a bottleneck says otherwise."""
        del features
        return output.concept_BM
