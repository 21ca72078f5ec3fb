"""What the 312 attributes of CUB-200-2011 are called, on which parts they are seen, and which of them are taken as concepts.

Shape letters: I images, A attributes of the file (312), C classes of the file (200), K classes kept, M concepts.

Which attributes: Koh et al. 2020 ("Concept Bottleneck Models", ICML) let the training images of a class vote on each
attribute and keep those that at least 10 classes have. Their list of 112 is `REFERENCE_IDS`, and it is the default,
because the vote is easy to get wrong and other rules give other lists (see `vote`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dotcbm.structures import ConceptSet

__all__ = [
    "NOT_VISIBLE",
    "PART_NAMES",
    "REFERENCE_IDS",
    "Votes",
    "attribute_group",
    "attribute_name",
    "attribute_parts",
    "chosen_ids",
    "class_title",
    "vocabulary",
    "vote",
]

NOT_VISIBLE = 1  # attributes/certainties.txt: 1 not visible, 2 guessing, 3 probably, 4 definitely

# fmt: off
REFERENCE_IDS: tuple[int, ...] = (
    2, 5, 7, 8, 11, 15, 16, 21, 22, 24, 26, 30, 31, 36, 37, 39, 41, 45, 46, 51, 52, 54, 55, 57, 58, 60, 64, 65, 70, 71, 73, 76,
    81, 85, 91, 92, 94, 100, 102, 107, 111, 112, 117, 118, 120, 126, 127, 132, 133, 135, 146, 150, 152, 153, 154, 158, 159, 164,
    165, 169, 173, 179, 180, 182, 184, 188, 189, 194, 195, 197, 199, 203, 204, 209, 210, 212, 213, 214, 219, 221, 222, 226, 236,
    237, 239, 240, 241, 243, 244, 245, 250, 254, 255, 260, 261, 263, 269, 275, 278, 284, 290, 293, 294, 295, 299, 300, 305, 306,
    309, 310, 311, 312,
)  # 1-based, as in attributes.txt
# fmt: on

PART_NAMES: tuple[str, ...] = (
    "back",
    "beak",
    "belly",
    "breast",
    "crown",
    "forehead",
    "left eye",
    "left leg",
    "left wing",
    "nape",
    "right eye",
    "right leg",
    "right wing",
    "tail",
    "throat",
)

_EYES = ("left eye", "right eye")
_WINGS = ("left wing", "right wing")
_LEGS = ("left leg", "right leg")

# The 28 attribute groups by the words they begin with, longest first. The upper parts of a bird are its back, nape and
# folded wings, the under parts its throat, breast and belly (ornithology's usual meaning). Nothing localises size,
# shape and primary color: they are seen on the whole bird.
_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("upperparts", ("back", "nape", *_WINGS)),
    ("underparts", ("throat", "breast", "belly")),
    ("upper tail", ("tail",)),
    ("under tail", ("tail",)),
    ("forehead", ("forehead",)),
    ("primary", ()),
    ("breast", ("breast",)),
    ("throat", ("throat",)),
    ("shape", ()),
    ("belly", ("belly",)),
    ("crown", ("crown",)),
    ("size", ()),
    ("back", ("back",)),
    ("bill", ("beak",)),
    ("head", ("crown", "forehead", "nape", *_EYES)),
    ("nape", ("nape",)),
    ("tail", ("tail",)),
    ("wing", _WINGS),
    ("eye", _EYES),
    ("leg", _LEGS),
)

# Head patterns that are marks at one place of the head.
_HEAD_PARTS: dict[str, tuple[str, ...]] = {
    "malar": ("beak", "throat"),  # the stripe from the beak down the side of the throat
    "crested": ("crown",),
    "capped": ("crown", "forehead"),
    "masked": _EYES,
    "eyebrow": _EYES,
    "eyering": _EYES,
    "eyeline": _EYES,
}

_NAMES: dict[str, str] = {
    "bill shape::curved (up or down)": "curved bill",
    "bill shape::dagger": "dagger-shaped bill",
    "bill shape::needle": "needle-shaped bill",
    "bill shape::cone": "cone-shaped bill",
    "bill length::about the same as head": "bill about as long as the head",
    "bill length::longer than head": "bill longer than the head",
    "bill length::shorter than head": "bill shorter than the head",
    "head pattern::malar": "malar stripe",
    "head pattern::unique pattern": "unique head pattern",
    "head pattern::eyebrow": "eyebrow stripe",
    "head pattern::eyering": "eye ring",
    "head pattern::eyeline": "eye line",
}


def _split(attribute: str) -> tuple[str, str]:
    """("bill shape", "hooked seabird") from "has_bill_shape::hooked_seabird"."""
    group, found, value = attribute.partition("::")
    if not found or not group or not value:
        raise ValueError(f"attribute {attribute!r} is not of the form has_<group>::<value> (has_bill_shape::hooked)")
    return group.removeprefix("has_").replace("_", " "), value.replace("_", " ")


def attribute_group(attribute: str) -> str:
    """The attribute's group: "bill shape" for "has_bill_shape::hooked"."""
    return _split(attribute)[0]


def attribute_name(attribute: str) -> str:
    """A name to read and to put into a text prompt.

    >>> attribute_name("has_upper_tail_color::black"), attribute_name("has_bill_shape::hooked_seabird")
    ('black upper tail', 'hooked seabird bill')
    >>> attribute_name("has_size::medium_(9_-_16_in)"), attribute_name("has_primary_color::red")
    ('medium size (9 - 16 in)', 'mostly red plumage')
    """
    group, value = _split(attribute)
    if known := _NAMES.get(f"{group}::{value}"):
        return known
    if group == "primary color":
        return f"mostly {value} plumage"
    if group == "size":
        word, bracket, inches = value.partition(" (")
        return f"{word} size{bracket}{inches}"
    if group in ("tail shape", "wing shape"):  # the values name the part already: "forked_tail", "rounded-wings"
        return value.replace("-wings", " wings")
    if group in ("bill shape", "head pattern") or group.endswith(" color"):
        return f"{value} {group.rpartition(' ')[0]}"
    return f"{value} {group}"


def attribute_parts(attribute: str) -> tuple[str, ...]:
    """The key points, among `PART_NAMES`, that the attribute is seen at; none for size, shape and primary color."""
    group, value = _split(attribute)
    if group == "head pattern" and value in _HEAD_PARTS:
        return _HEAD_PARTS[value]
    return next((parts for start, parts in _PARTS if group == start or group.startswith(start + " ")), ())


def class_title(name: str) -> str:
    """A class name to read: "Black footed Albatross" for "001.Black_footed_Albatross"."""
    number, dot, rest = name.partition(".")
    return (rest if dot and number.isdigit() else name).replace("_", " ")


@dataclass(frozen=True)
class Votes:
    """What the voting images of each class say of each attribute.

    Attributes:
        share_CA: (C, A) positive votes over all votes; NaN where nobody voted.
        present_CA: (C, A) bool, the outcome.
    """

    share_CA: NDArray[np.float64]
    present_CA: NDArray[np.bool_]


def vote(
    present_IA: NDArray[np.int8],
    *,
    certainty_IA: NDArray[np.int8],
    class_I: NDArray[np.int64],
    num_classes: int,
    ties: Literal["present", "absent"] = "present",
) -> Votes:
    """The majority vote of Koh et al. 2020, as their released code counts it.

    Each image casts one vote for each attribute: present or absent. "Absent, not visible" (certainty 1) is no vote; "present,
    not visible" is one, because the annotator says that the bird has it. More votes for than against make an attribute
    present in the class. A tie makes it present too, also the tie of 0 to 0 (`ties="absent"` for the opposite).

    Counting "not visible" as absent, breaking ties the other way, or letting other images vote gives other lists than the
    published one. (Theirs is the vote of the training images without the fifth that they set aside for validation.)

    Args:
        present_IA: (I, A) in {0, 1}, of the voting images only.
        certainty_IA: (I, A) in {1, 2, 3, 4}.
        class_I: (I,) class indices in [0, num_classes).
        num_classes: C.
        ties: What an equal number of votes means.
    """
    absent = (present_IA == 0) & (certainty_IA != NOT_VISIBLE)
    for_CA = np.zeros((num_classes, present_IA.shape[1]))
    against_CA = np.zeros_like(for_CA)
    np.add.at(for_CA, class_I, present_IA == 1)
    np.add.at(against_CA, class_I, absent)
    total_CA = for_CA + against_CA
    share_CA = np.divide(for_CA, total_CA, out=np.full_like(for_CA, np.nan), where=total_CA > 0)
    return Votes(share_CA=share_CA, present_CA=for_CA >= against_CA if ties == "present" else for_CA > against_CA)


def chosen_ids(
    attributes: Literal["reference", "majority", "percentage"], *, present_CA: NDArray[np.bool_], min_classes: int
) -> tuple[int, ...]:
    """The ids (1-based) of the attributes that become concepts: the reference list, or those that `min_classes` classes have.

    Raises:
        ValueError: The reference list asks for an attribute that is not there, or no attribute is that common.
    """
    num_classes, num_attributes = present_CA.shape
    if attributes == "reference":
        if num_attributes < REFERENCE_IDS[-1]:
            raise ValueError(
                f"attributes.txt lists {num_attributes} attributes, but the reference list asks for id {REFERENCE_IDS[-1]}; "
                "take attributes='percentage' or 'majority'"
            )
        return REFERENCE_IDS
    count_A = present_CA.sum(0)
    ids = tuple(int(a) + 1 for a in np.flatnonzero(count_A >= min_classes))
    if not ids:
        raise ValueError(
            f"no attribute is present in {min_classes} of the {num_classes} classes (the most common one is in {count_A.max()}); "
            "lower min_classes"
        )
    return ids


def vocabulary(
    attributes: Sequence[str], *, class_names: tuple[str, ...], share_KM: NDArray[np.float64], part_names: tuple[str, ...]
) -> ConceptSet:
    """The concepts of M raw attribute names; parts are named where the data set has key points (`part_names` not empty)."""
    known = set(part_names)
    return ConceptSet(
        names=tuple(map(attribute_name, attributes)),
        class_names=class_names,
        class_concept_KM=torch.as_tensor(share_KM, dtype=torch.float32),
        groups=tuple(map(attribute_group, attributes)),
        part_names=part_names,
        parts=tuple(tuple(part for part in attribute_parts(name) if part in known) for name in attributes) if known else None,
    )
