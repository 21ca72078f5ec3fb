"""How far the object's core reaches: chosen by what can be predicted within it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dotcbm.models.object_core import CORES, choose_core, core_scores
from dotcbm.models.parts import find_parts
from dotcbm.structures import PatchFeatures

GRID, D, L = (8, 8), 8, 3
N = GRID[0] * GRID[1]


def drawn(*, told_at: str, n: int = 240, seed: int = 0) -> tuple[PatchFeatures, torch.Tensor, torch.Tensor]:
    """An object of 4 x 4 patches with a long feature in its middle and shorter ones at its rim. The details tell the first group's
    concepts in the middle alone or at the rim alone, and the second group's in the middle.
    """
    generator = torch.Generator().manual_seed(seed)
    label_n = torch.arange(n) % 12
    value_n2 = torch.stack([label_n % 2, (label_n // 2) % 2], 1).float()
    patch_nhwD = 0.05 * torch.randn(n, *GRID, D, generator=generator)
    detail_nhwL = torch.randn(n, *GRID, L, generator=generator)
    for i in range(n):
        row, column = (int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
        patch_nhwD[i, row : row + 4, column : column + 4, 0] += 2.0
        patch_nhwD[i, row + 1 : row + 3, column + 1 : column + 3] += 6.0 * torch.eye(D)[1]
        sign, other = (2 * value_n2[i] - 1).tolist()
        told_44 = torch.zeros(4, 4)
        told_44[1:3, 1:3] = 3.0 * sign
        if told_at == "rim":
            told_44 = torch.where(told_44 == 0, 3.0 * sign, 0.0)
        detail_nhwL[i, row : row + 4, column : column + 4, 0] += told_44
        detail_nhwL[i, row + 1 : row + 3, column + 1 : column + 3, 1] += 3.0 * other
    patches = PatchFeatures(patch_nhwD.flatten(1, 2), patch_nhwD.mean((1, 2)), GRID, detail_BNL=detail_nhwL.flatten(1, 2))
    return patches, torch.cat([value_n2, 1 - value_n2], 1), label_n


def scores_of(told_at: str) -> torch.Tensor:
    patches, concept_nM, label_n = drawn(told_at=told_at)
    known = {"concept_nM": concept_nM, "label_n": label_n, "group_M": torch.tensor([0, 1, 0, 1])}
    parts = find_parts(patches, **known, num_parts=2, num_clusterings=1, part_width=4)
    return core_scores(patches, parts, **known, num_parts=2, eps=0.1, softness=0.1, smoothing=3)


def test_what_lies_at_the_rim_is_predicted_within_a_wide_core_only():
    rim = scores_of("rim")
    assert rim[0] < 0.8
    assert rim[-1] > 0.9
    assert choose_core(rim, tolerance=0.03) < CORES[0]


def test_what_lies_in_the_middle_is_predicted_within_the_narrowest_core():
    middle = scores_of("middle")
    assert middle[0] > 0.95
    assert choose_core(middle, tolerance=0.03) == CORES[0]


@given(st.lists(st.floats(0.0, 1.0), min_size=len(CORES), max_size=len(CORES)), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_a_smaller_tolerance_never_narrows_the_core(scores, low, high):
    low, high = sorted((low, high))
    score_R = torch.tensor(scores, dtype=torch.float64)
    if score_R.max() > 0.5 + high:
        assert choose_core(score_R, tolerance=low) <= choose_core(score_R, tolerance=high)
        assert score_R[CORES.index(choose_core(score_R, tolerance=high))] >= score_R.max() - high


@pytest.mark.parametrize("score", [0.52, 0.3])
def test_where_nothing_is_predicted_the_widest_core_leaves_most_to_be_read(score):
    assert choose_core(torch.full((len(CORES),), score), tolerance=0.03) == CORES[-1]
