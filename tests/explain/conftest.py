"""A model small enough to explain by hand: the encoder averages colours over patches, the bottlenecks are the real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fakes.doubled import Doubled
from torch import Tensor, nn
from torch.nn import functional

from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptSet, PatchFeatures, Preprocessing, Problem

NAMES = ("red wing", "blue head", "striped body", "long tail", "yellow legs", "crest")
GROUPS = ("wing", "head", "body", "tail", "legs", "head")
CLASSES = ("Alvin", "Bramble", "Cobbert", "Dapple")


class ColourEncoder(nn.Module):
    """Patches are mean colours, and their squares."""

    name, grid, width, global_width = "colours", (4, 4), 6, 6

    def __init__(self, resize: str = "squash") -> None:
        super().__init__()
        self.preprocessing = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=resize)  # pyright: ignore

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        colour_BND = functional.avg_pool2d(image_B3HW, 8).flatten(2).transpose(1, 2)
        patch_BND = torch.cat([colour_BND, colour_BND**2], -1)
        return PatchFeatures(patch_BND, patch_BND.mean(1), self.grid)

    def fingerprint(self) -> str:
        return "colours"


@pytest.fixture
def doubled() -> type[Bottleneck]:
    return Doubled


@pytest.fixture
def problem() -> Problem:
    return Problem(6, 6, (4, 4), ConceptSet(names=NAMES, class_names=CLASSES, class_concept_KM=torch.eye(4, 6), groups=GROUPS))


@pytest.fixture
def build(problem: Problem) -> Callable[..., ConceptModel]:
    def build(kind: type[Bottleneck], *, resize: str = "squash") -> ConceptModel:
        torch.manual_seed(0)
        bottleneck = kind(problem)
        with torch.no_grad():
            for parameter in bottleneck.head.parameters():
                parameter.normal_(std=2)
        return ConceptModel(ColourEncoder(resize), bottleneck)  # pyright: ignore

    return build


@pytest.fixture
def picture() -> Tensor:
    return torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
