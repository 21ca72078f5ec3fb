"""What makes a drawn creature's class: the code of the classes, the words that creatures spell, and the vocabulary."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dotcbm.data.synthetic_creature import ATTRIBUTES, PARTS
from dotcbm.structures import ConceptSet

__all__ = ["CLASS_NAMES", "NUM_RULE", "class_from_concepts", "class_rule", "draw_word", "rule_words", "vocabulary"]

CLASS_NAMES = (
    *("Alvin", "Bramble", "Cobbert", "Dapple", "Elgrim", "Fennick", "Gorlo", "Hickory"),
    *("Ivory", "Jumbel", "Kettle", "Lommer", "Mirrow", "Nimbus", "Orlop", "Pindle"),
)
NUM_RULE = 7  # the first seven attributes make the class, the others are free
_MARGIN = 2  # so many more of its own concepts than of any other class does a creature have

# Each attribute pairs the eight classes off in its own way, as the seven rounds of a tournament do: any two classes share
# exactly one concept, and no two concepts come together in two classes.
_CODES_8 = ("0000000", "1101111", "2210221", "3022122", "2332310", "3113303", "0321233", "1233032")
# The points of the affine plane over four elements. Five attributes are its five families of parallel lines, the other two
# part the points into sets of four of which no line holds three: any two classes share one concept or two.
_CODES_16 = (
    *("0000000", "1011111", "2112012", "3103123", "3022232", "1130220", "1223033", "0232101"),
    *("2320103", "3331031", "3210322", "0121310", "2033330", "0313221", "1302313", "2201202"),
)


def class_rule(num_classes: int = 8) -> Tensor:
    """(K, M) in {0, 1}: the seven concepts that make each class. See `class_from_concepts`."""
    codes = (_CODES_8 if num_classes <= len(_CODES_8) else _CODES_16)[:num_classes]
    rule_KM = torch.zeros(num_classes, sum(len(a.values) for a in ATTRIBUTES))
    for k, code in enumerate(codes):
        for g, value in enumerate(code):
            rule_KM[k, sum(len(a.values) for a in ATTRIBUTES[:g]) + int(value)] = 1
    return rule_KM


def class_from_concepts(concept_NM: Tensor, *, num_classes: int = 8) -> Tensor:
    """The class of each row of concepts: the one with most of its seven rule concepts present.

    A creature may have strayed from its class in some attributes (`Synthetic.variation`), but it has at least two concepts
    more of its own class than of any other. So the label is exact, and stays exact when any one concept is missing.

    Args:
        concept_NM: (N, M) in {0, 1}.
        num_classes: As given to `Synthetic`.

    Returns:
        (N,) long.
    """
    return (concept_NM.float() @ class_rule(num_classes).T).argmax(dim=1)


@lru_cache
def rule_words(num_classes: int, variation: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All words (W, 7) that a creature's rule attributes can spell, and (K, W) how probable each is in each class."""
    sizes = [len(a.values) for a in ATTRIBUTES[:NUM_RULE]]
    word_WG = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1).astype(np.int64)
    code_KG = class_rule(num_classes)[:, : sum(sizes)].reshape(num_classes, NUM_RULE, -1).argmax(-1).numpy()
    match_KW = (word_WG[None] == code_KG[:, None]).sum(-1)
    probability_KW = (1 - variation) ** match_KW * (variation / 3) ** (NUM_RULE - match_KW)
    for k in range(num_classes):
        rival_W = np.delete(match_KW, k, axis=0).max(axis=0)
        probability_KW[k, match_KW[k] - rival_W < _MARGIN] = 0
    return word_WG, probability_KW / probability_KW.sum(axis=1, keepdims=True)


@lru_cache
def vocabulary(num_classes: int, variation: float) -> ConceptSet:
    word_WG, probability_KW = rule_words(num_classes, variation)
    shares = [np.stack([probability_KW[:, word_WG[:, g] == v].sum(1) for v in range(4)], axis=1) for g in range(NUM_RULE)]
    shares += [np.full((num_classes, len(a.values)), 1 / len(a.values)) for a in ATTRIBUTES[NUM_RULE:]]
    return ConceptSet(
        names=tuple(v for a in ATTRIBUTES for v in a.values),
        class_names=CLASS_NAMES[:num_classes],
        class_concept_KM=torch.from_numpy(np.concatenate(shares, axis=1)).float().clamp(0, 1),
        groups=tuple(a.name for a in ATTRIBUTES for _ in a.values),
        part_names=PARTS,
        parts=tuple((a.part,) for a in ATTRIBUTES for _ in a.values),
    )


@lru_cache
def _cumulative(num_classes: int, variation: float) -> NDArray[np.float64]:
    return rule_words(num_classes, variation)[1].cumsum(axis=1)


def draw_word(label: int, uniform: float, *, num_classes: int, variation: float) -> tuple[int, ...]:
    """The values of the rule's attributes of a creature of class `label`, drawn by one number in [0, 1)."""
    word = np.searchsorted(_cumulative(num_classes, variation)[label], uniform * (1 - 1e-9), side="right")  # the last sum may be 1 - 1e-16
    return tuple(rule_words(num_classes, variation)[0][word].tolist())
