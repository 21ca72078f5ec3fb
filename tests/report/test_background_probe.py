"""The background probe finds a planted shortcut and nothing where there is none, and never reads the object."""

from __future__ import annotations

import pytest
import torch
from fakes.source import TinySource
from hypothesis import given, settings
from hypothesis import strategies as st

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.synthetic import Synthetic
from dotcbm.metrics.intervals import wilson
from dotcbm.report.audit.background_probe import background_colours, probe_background


def probed(shortcut: float, seed: int):
    source = Synthetic(size=64, num_train=320, num_val=8, num_test=160, num_classes=4, shortcut=shortcut, seed=seed)
    found = probe_background(ConceptDataModule(source), split="test", seed=seed)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_shortcut_is_seen_and_its_absence_too(seed):
    planted, none = probed(0.9, seed), probed(0.0, seed)
    assert float(planted.correct_N.double().mean()) > 0.8
    _, low, _ = wilson(int(none.correct_N.sum()), len(none.correct_N))
    assert low < none.largest_share + 0.05
    assert none.largest_share == pytest.approx(0.25)
    assert none.num_train == 320


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_object_is_not_read(seed):
    drawn = torch.Generator().manual_seed(seed)
    picture = torch.randint(256, (3, 40, 60), generator=drawn, dtype=torch.uint8)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:30, 15:40] = True
    other = torch.where(mask, torch.randint(256, (3, 40, 60), generator=drawn, dtype=torch.uint8), picture)
    colours, again = background_colours(picture, mask), background_colours(other, mask)
    assert colours is not None
    assert again is not None
    assert torch.equal(colours, again)
    assert float(colours.sum()) == pytest.approx(1)


def test_colours_are_counted_as_by_hand():
    picture = torch.zeros(3, 20, 20, dtype=torch.uint8)
    picture[0, :, :10] = 255
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[:5] = True  # with its margin of one pixel, six rows
    colours = background_colours(picture, mask)
    assert colours is not None
    assert colours[3 * 16] == colours[0] == 0.5


def test_pictures_without_background_masks_or_classes_say_nothing():
    assert background_colours(torch.zeros(3, 20, 20, dtype=torch.uint8), torch.ones(20, 20, dtype=torch.bool)) is None
    few = TinySource(counts=(("train", 8), ("test", 8)))
    assert probe_background(ConceptDataModule(few), split="test") is None


def test_the_same_seed_draws_the_same_pictures():
    a, b = probed(0.5, 3), probed(0.5, 3)
    assert torch.equal(a.rows_N, b.rows_N)
    assert torch.equal(a.correct_N, b.correct_N)
