"""What an audit measures how often: every number that its result depends on, besides model and data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

__all__ = ["AuditSettings", "Depth"]

Depth = Literal["full", "figures"]


@dataclass(frozen=True)
class AuditSettings:
    """Settings of an audit. The defaults keep an audit of 2,000 pictures at 448 px below five minutes on two CPU cores.

    Attributes:
        seed: Of every draw: pictures, regions, donors, resamples.
        depth: "figures" leaves out picture cards and the grid.
        pictures: Whether photos are shown; without, cards keep their maps and there is no grid. For data that may not be shown.
        limit: Audit only this many pictures of the split, drawn with the seed; None for all.
        num_draws: Bootstrap resamples of each interval; percentiles of 1,000 move by less than a tenth of the interval's width.
        num_occluded: Pictures of the occlusion test. Each costs two passes through the encoder, 0.15 s each at 448 px.
        num_swapped: Pictures of the background swap, two passes each. 150 birds left open what 300 decide.
        num_errors, num_unsure, num_drawn: Picture cards of mistakes, of the least sure pictures, and of pictures drawn at random.
        num_thumbnails: Pictures of the grid.
        num_strengths: Steps of the elastic-net paths that heads of few concepts are cut from.
        num_shown: Concepts that are drawn; the tables hold all.
        num_permutations: Exchanges of pictures that the experts' tables are tested with; the smallest p-value is 1 / 500.
        num_expert_pictures: Pictures beside each expert that serves something: half of them those it is surest of, half drawn.
        chunk: Pictures between two savings of an audit that can be resumed.
    """

    seed: int = 0
    depth: Depth = "full"
    pictures: bool = True
    limit: int | None = None
    num_draws: int = 1000
    num_occluded: int = 200
    num_swapped: int = 300
    num_errors: int = 24
    num_unsure: int = 8
    num_drawn: int = 12
    num_thumbnails: int = 600
    num_shown: int = 32
    num_strengths: int = 50
    num_permutations: int = 499
    num_expert_pictures: int = 4
    chunk: int = 128

    def __post_init__(self) -> None:
        if self.depth not in get_args(Depth):
            raise ValueError(f"depth is {self.depth!r}; choose 'full' or 'figures' (no picture cards)")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; an audit needs at least one picture")
        for name in ("num_draws", "num_strengths", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_permutations < 19:
            raise ValueError(f"num_permutations is {self.num_permutations}; with fewer than 19 no p-value reaches 5 %")
        for entry in fields(self):
            if entry.name.startswith("num_") and getattr(self, entry.name) < 0:
                raise ValueError(f"{entry.name} is {getattr(self, entry.name)}; it must be 0 or more")

    def told(self) -> tuple[tuple[str, str], ...]:
        """Name and value of each setting, for the model card; `chunk` changes no figure and is left out."""
        return tuple((entry.name, str(getattr(self, entry.name))) for entry in fields(self) if entry.name != "chunk")
