"""What counts as one part when parts are detected, and which concepts speak of it.

M concepts, P parts, S groups of parts, Q queries (one group of concepts on one group of parts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dotcbm.structures import ConceptSet

__all__ = ["APN_GROUPS", "PartGroups", "part_groups"]

APN_GROUPS: dict[str, tuple[str, ...]] = {
    "head": ("beak", "crown", "forehead", "left eye", "nape", "right eye"),
    "breast": ("breast", "throat"),
    "belly": ("belly",),
    "back": ("back",),
    "wing": ("left wing", "right wing"),
    "tail": ("tail",),
    "leg": ("left leg", "right leg"),
}
"""The 15 key points of CUB in seven groups, as the released code of Xu et al. 2020 (APN, NeurIPS) groups them."""


@dataclass(frozen=True)
class PartGroups:
    """Groups of parts, and the concepts that are seen on them and nowhere else.

    Attributes:
        names: S names.
        part_SP: (S, P) bool.
        concept_SM: (S, M) bool, at least one concept in each row.
        query_QM: (Q, M) bool: the concepts of one group of `ConceptSet.groups` ("bill shape") on one group of parts.
        query_group_Q: (Q,) long: the group of parts of each query.
    """

    names: tuple[str, ...]
    part_SP: Tensor
    concept_SM: Tensor
    query_QM: Tensor
    query_group_Q: Tensor

    def __len__(self) -> int:
        return len(self.names)


def part_groups(concepts: ConceptSet) -> PartGroups:
    """The groups of a vocabulary: the seven of APN where all parts are CUB's key points, else each set of parts that concepts name.

    A concept belongs to the group that holds all of its parts; concepts on parts of several groups (the upper parts of a bird)
    and those without parts belong to none. Groups without a concept are left out.
    """
    part_MP = concepts.part_mask_MP()
    key_points = {part for parts in APN_GROUPS.values() for part in parts}
    apn = bool(concepts.part_names) and set(concepts.part_names) <= key_points
    if apn:
        sets = dict(APN_GROUPS)
    else:
        distinct = dict.fromkeys(parts for parts in concepts.parts or () if parts)
        sets = {" / ".join(parts): parts for parts in distinct}
    rows_SP = [torch.tensor([name in parts for name in concepts.part_names], dtype=torch.bool) for parts in sets.values()]
    part_SP = torch.stack(rows_SP) if rows_SP else torch.zeros(0, part_MP.shape[1], dtype=torch.bool)
    located_M = part_MP.any(1)
    within_SM = ~(part_MP[None] & ~part_SP[:, None]).any(2)
    equal_SM = (part_MP[None] == part_SP[:, None]).all(2)
    # Sets that are not APN's may hold one another ("wing" and "wing / tail"); a concept belongs to its own.
    concept_SM = (within_SM if apn else equal_SM) & located_M
    kept_S = concept_SM.any(1)
    part_SP, concept_SM = part_SP[kept_S], concept_SM[kept_S]
    names = tuple(name for name, kept in zip(sets, kept_S.tolist()) if kept)
    group_M = concepts.group_index_M()
    queries = [(s, concept_M & (group_M == g)) for s, concept_M in enumerate(concept_SM) for g in group_M[concept_M].unique().tolist()]
    return PartGroups(
        names=names,
        part_SP=part_SP,
        concept_SM=concept_SM,
        query_QM=torch.stack([row_M for _, row_M in queries]) if queries else torch.zeros(0, len(concepts.names), dtype=torch.bool),
        query_group_Q=torch.tensor([s for s, _ in queries], dtype=torch.long),
    )
