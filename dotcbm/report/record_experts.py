"""What an audit's record says of an encoder's expert layers; see `dotcbm.report.record`.

P patches of a picture, E experts of a layer, X rows of a table. Lifts, and which of them are above chance, are those of
`dotcbm.moe.association`: against the same places of other pictures, corrected for all tables of the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dotcbm.report.record_interval import Interval

__all__ = ["ExpertLayer", "ExpertLink", "ExpertMap", "ExpertPicture", "ExpertRow", "ExpertTable"]


@dataclass(frozen=True)
class ExpertLink:
    """An expert that gets more of a thing than chance explains.

    Attributes:
        row: In the names of the table.
        expert: From 0.
        lift: How many times as much of the thing it gets as the same places of other pictures would give it.
        share: Of the thing's mass, how much goes to the expert; `expected` is what other pictures would give.
        p: Corrected for all tables.
    """

    row: int
    expert: int
    lift: Interval
    share: float
    expected: float
    p: float


@dataclass(frozen=True)
class ExpertTable:
    """Things that experts may serve, by experts.

    Attributes:
        kind: Of the things.
        source: What says how much of a thing is in a patch: the transport "plan" of the pictures that show the concept, "labels" of the
            whole picture, exact "masks", or "key points".
        names: X names; "background" stands for all that is not the object.
        lift_XE: None where thing or expert never occurs.
        links: Those above chance, the largest lift first.
    """

    kind: Literal["concept", "part", "class"]
    source: Literal["plan", "labels", "masks", "key points"]
    names: tuple[str, ...]
    lift_XE: tuple[tuple[float | None, ...], ...]
    links: tuple[ExpertLink, ...]


@dataclass(frozen=True)
class ExpertPicture:
    """A picture with the patches that went to an expert.

    Attributes:
        row: In `AuditRecord.pictures`.
        why: "surest": it holds the patch that the router gave to the expert with the highest score, or the next ones; "drawn at random":
            from the pictures of which the expert got any patch.
        image, width, height, region: As in `PictureCard`.
        cells: Patches of the expert, numbered row by row.
        surest: The one with the highest score.
    """

    row: int
    why: str
    image: str
    width: int
    height: int
    region: tuple[float, float, float, float]
    cells: tuple[int, ...]
    surest: int


@dataclass(frozen=True)
class ExpertMap:
    """A picture with the expert of each patch: `expert_P`, the router's first choice; the rest as in `PictureCard`."""

    row: int
    image: str
    width: int
    height: int
    region: tuple[float, float, float, float]
    expert_P: tuple[int, ...]


@dataclass(frozen=True)
class ExpertRow:
    """One expert.

    Attributes:
        load: Share of the patches that go to it; the even share is K / E.
        probability: Mean of the router's softmax.
        background: Share of its patches that is not on the object.
        background_expected: What the same places of other pictures would have.
        pictures: Examples, where it serves something.
    """

    load: Interval
    probability: float
    background: Interval
    background_expected: float | None
    pictures: tuple[ExpertPicture, ...] = ()


@dataclass(frozen=True)
class ExpertLayer:
    """One layer of experts, over all patches of the audited pictures; class token and registers do not count.

    Attributes:
        name: "block 3", or its place in the encoder.
        active: K, experts for each patch.
        grid: (grid_h, grid_w) of the patches.
        max_vio, min_vio: The fullest and the emptiest expert against the mean load, minus 1.
        num_dead: Experts that got no patch.
        entropy: Mean over patches, of the router's softmax, in nats; at most log E.
        experts: E of them.
        tables: Of parts, concepts and classes, as far as known.
        maps: The same pictures in each layer.
    """

    name: str
    active: int
    grid: tuple[int, int]
    num_patches: int
    max_vio: float
    min_vio: float
    num_dead: int
    entropy: float
    experts: tuple[ExpertRow, ...]
    tables: tuple[ExpertTable, ...]
    maps: tuple[ExpertMap, ...]
