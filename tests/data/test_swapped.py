"""Training pictures on the backgrounds of other classes: what is taken for the foreground, who lends, and when it is made anew."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.source import TinySource
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dotcbm.data import datamodule, swapped
from dotcbm.data.backgrounds_paint import swap_background
from dotcbm.data.batches import VIEWS, Rows, View
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.features import FeatureCache
from dotcbm.data.foreground import predicted_foregrounds
from dotcbm.data.source import ConceptDataset
from dotcbm.data.swapped import draw_donors, on_other_backgrounds
from dotcbm.structures import PatchFeatures, Preprocessing, ResizeMode

SOURCE = TinySource(size=(48, 72))


class Contrast(nn.Module):
    """Patches are how far a picture's colours are from grey: on `TinySource`, long on the squares and short on the noise."""

    def __init__(self, *, resize: ResizeMode = "squash", trainable: bool = False) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(size=(32, 64), mean=(0.49, 0.49, 0.49), std=(1.0, 1.0, 1.0), resize=resize)
        self.grid: tuple[int, int] = (8, 16)
        self.width = self.global_width = 3
        self.trainable = trainable
        self.num_seen = 0

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        self.num_seen += len(image_B3HW)
        patch_BND = nn.functional.avg_pool2d(image_B3HW.abs(), 4).flatten(2).transpose(1, 2)
        return PatchFeatures(patch_BND=patch_BND, global_BD=patch_BND.mean(1), grid=self.grid)

    def fingerprint(self) -> str:
        return f"contrast {self.preprocessing}"


def module(folder: Path | None, source: TinySource = SOURCE, *, encoder: Contrast | None = None, **settings: Any) -> ConceptDataModule:
    settings = {"batch_size": 8, "val_fraction": 0.0, "cache_dir": None if folder is None else str(folder), **settings}
    data = ConceptDataModule(source, **settings)
    data.use_encoder(encoder or Contrast())
    return data


def cached(data: ConceptDataModule, view: View = "plain", split: str = "train") -> FeatureCache:
    cache = data.cache(split, view=view)
    assert cache is not None
    return cache


def shown(dataset: ConceptDataset, index: int) -> Tensor:
    image = dataset.sample(index, masks=False).image
    assert image is not None
    return image


def foregrounds(dataset: ConceptDataset, plain: FeatureCache) -> list[Tensor]:
    norm_BN = plain.read(range(len(dataset))).patch_BND.float().norm(dim=2)
    masks = predicted_foregrounds(norm_BN, grid=plain.grid, sizes=[dataset.read_size(0)] * len(dataset))
    return [mask for mask in masks if mask is not None]


@pytest.mark.parametrize("size", [(90, 40), (40, 130), (64, 64)])
def test_a_bright_blob_is_found_where_it_lies_in_the_picture(size: tuple[int, int]) -> None:
    norm_hw = torch.ones(10, 8)
    norm_hw[5:9, 1:4] = 5.0
    (mask_HW,) = predicted_foregrounds(norm_hw.view(1, -1), grid=(10, 8), sizes=[size])
    assert mask_HW is not None
    assert mask_HW.shape == size
    blob_HW = torch.zeros(size, dtype=torch.bool)
    top, bottom, left, right = 0.5 * size[0], 0.9 * size[0], size[1] / 8, size[1] / 2
    blob_HW[round(top) : round(bottom), round(left) : round(right)] = True
    assert mask_HW[blob_HW].float().mean() > 0.9
    # Smoothing adds a margin of less than a patch.
    y_X, x_X = (mask_HW & ~blob_HW).nonzero().T + 0.5
    patch_h, patch_w = size[0] / 10, size[1] / 8
    assert ((y_X > top - patch_h) & (y_X < bottom + patch_h) & (x_X > left - patch_w) & (x_X < right + patch_w)).all()


def test_the_norms_are_smoothed_standardised_and_cut_as_written_out() -> None:
    # At the grid's own size upsampling changes nothing, so a loop over the patches gives the mask.
    norm_BN = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    masks = predicted_foregrounds(norm_BN, grid=(3, 4), sizes=[(3, 4)] * 5)
    for norm_N, mask_HW in zip(norm_BN.double(), masks, strict=True):
        grid = norm_N.view(3, 4)
        smooth = torch.stack([grid[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean() for r in range(3) for c in range(4)])
        expected = (smooth - smooth.mean()) / ((smooth - smooth.mean()) ** 2).mean().sqrt() > 0.8
        assert mask_HW is not None
        assert torch.equal(mask_HW.flatten(), expected)


def test_the_median_cuts_where_the_deviations_leave_nothing() -> None:
    # A dark edge of an even map: the bulk lies less than half a deviation above the mean. Each picture for itself, not for its batch.
    norm_hw = torch.ones(8, 16) + 1e-4 * torch.arange(16)
    norm_hw[:, 0] = 0.0
    edge_HW, flat = predicted_foregrounds(torch.stack([norm_hw.flatten(), torch.full((128,), 0.1)]), grid=(8, 16), sizes=[(8, 16)] * 2)
    assert flat is None
    assert edge_HW is not None
    assert not edge_HW[:, :7].any()  # column 7 is the median itself
    assert edge_HW[:, 8:].all()
    assert predicted_foregrounds(torch.zeros(1, 64), grid=(8, 8), sizes=[(20, 30)]) == [None]
    assert predicted_foregrounds(torch.ones(1, 1), grid=(1, 1), sizes=[(20, 30)]) == [None]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    power=st.integers(-6, 6),
    sharpness=st.sampled_from([0.0, 0.1, 1.0, 8.0]),
)
def test_a_mask_has_both_values_and_does_not_know_the_unit(
    seed: int, grid: tuple[int, int], size: tuple[int, int], power: int, sharpness: float
) -> None:
    norm_BN = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)) ** sharpness
    masks = predicted_foregrounds(norm_BN, grid=grid, sizes=[size] * 2)
    for mask_HW, other_HW in zip(masks, predicted_foregrounds(norm_BN * 2.0**power, grid=grid, sizes=[size] * 2), strict=True):
        if mask_HW is None:
            assert other_HW is None
            continue
        assert mask_HW.shape == size
        assert mask_HW.dtype == torch.bool
        assert mask_HW.any()
        assert not mask_HW.all()
        assert other_HW is not None
        assert torch.equal(mask_HW, other_HW)


def test_norms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the norms are \(2, 5\); expected \(B, 6\) for the grid \(2, 3\)"):
        predicted_foregrounds(torch.ones(2, 5), grid=(2, 3), sizes=[(4, 4)] * 2)
    with pytest.raises(ValueError, match="norms of 2 pictures and sizes of 1"):
        predicted_foregrounds(torch.ones(2, 6), grid=(2, 3), sizes=[(4, 4)])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30).filter(lambda labels: len(set(labels)) > 1))
def test_a_donor_is_of_another_class_and_always_the_same(labels: list[int]) -> None:
    dataset = replace(TinySource(counts=(("train", len(labels)),)).load("train"), label_N=torch.tensor(labels))
    donor_N = draw_donors(dataset)
    assert (dataset.label_N[donor_N] != dataset.label_N).all()
    state = torch.random.get_rng_state()
    assert torch.equal(draw_donors(dataset), donor_N)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_donors_are_drawn_evenly() -> None:
    dataset = TinySource(counts=(("train", 400),)).load("train")
    donor_N = draw_donors(dataset)
    count_KK = torch.zeros(4, 4)
    count_KK.index_put_((dataset.label_N, dataset.label_N[donor_N]), torch.ones(400), accumulate=True)
    off = count_KK[~torch.eye(4, dtype=torch.bool)]
    assert (off - 100 / 3).abs().max() < 4 * (100 * 1 / 3 * 2 / 3) ** 0.5
    assert len(donor_N.unique()) > 200  # about 1 - 1/e of 400


def test_the_object_stays_and_its_background_is_the_donors(tmp_path: Path) -> None:
    data = module(tmp_path)
    dataset, plain = data.dataset("train"), cached(data)
    changed, donor_N = on_other_backgrounds(dataset, plain=plain), draw_donors(dataset)
    masks = foregrounds(dataset, plain)
    for index in range(len(dataset)):
        before, after, donor = shown(dataset, index), shown(changed, index), int(donor_N[index])
        assert torch.equal(after[:, masks[index]], before[:, masks[index]])
        outside = nn.functional.max_pool2d(masks[index][None].float(), 5, 1, 2)[0] == 0
        assert (after != before).any(0)[outside].float().mean() > 0.99
        assert torch.equal(after, swap_background(before, masks[index], shown(dataset, donor), masks[donor]))
        square = dataset.sample(index).foreground_HW
        assert square is not None
        assert masks[index][square].float().mean() > 0.8
        assert torch.equal(square, changed.sample(index).foreground_HW)  # pyright: ignore


def test_given_masks_are_never_read(tmp_path: Path) -> None:
    def unread(row: int) -> Tensor:
        raise AssertionError("a training view must not read masks")

    data = module(tmp_path)
    dataset = data.dataset("train")
    swap = cached(data, "swap").read(range(len(dataset)))
    again = module(tmp_path / "again")
    again._datasets["train"] = replace(dataset, read_foreground=unread)
    assert torch.equal(cached(again, "swap").read(range(len(dataset))).patch_BND, swap.patch_BND)


def test_a_picture_in_which_nothing_stands_out_is_shown_as_it_is(tmp_path: Path) -> None:
    class Blind(Contrast):
        def forward(self, image_B3HW: Tensor) -> PatchFeatures:
            features = super().forward(image_B3HW)
            return replace(features, patch_BND=torch.full_like(features.patch_BND, 0.3))

    data = module(tmp_path, encoder=Blind())
    changed = on_other_backgrounds(data.dataset("train"), plain=cached(data))
    assert torch.equal(shown(changed, 3), shown(data.dataset("train"), 3))


def test_a_part_carved_out_and_a_subset_meet_their_own_donors(tmp_path: Path) -> None:
    data = module(tmp_path, val_fraction=0.2)
    dataset, plain = data.dataset("train"), cached(data)
    assert dataset.rows != tuple(range(len(dataset)))
    changed, masks, donor_N = on_other_backgrounds(dataset, plain=plain), foregrounds(dataset, plain), draw_donors(dataset)
    expected = swap_background(shown(dataset, 9), masks[9], shown(dataset, int(donor_N[9])), masks[int(donor_N[9])])
    assert torch.equal(shown(changed, 9), expected)
    assert torch.equal(shown(changed.subset([9, 2]), 0), expected)
    assert torch.equal(shown(pickle.loads(pickle.dumps(changed)), 9), expected)


def test_each_view_is_cached_and_the_mirrored_one_is_the_mirrored_other(tmp_path: Path) -> None:
    encoder = Contrast()
    data = module(tmp_path, encoder=encoder, views=list(VIEWS))
    data.setup("fit")
    caches = {view: cached(data, view) for view in VIEWS}
    assert len({cache.path for cache in caches.values()}) == len(VIEWS)
    assert encoder.num_seen == 40 * len(VIEWS)
    values = {view: cache.read(range(40)).patch_BND.float() for view, cache in caches.items()}
    for flipped, upright in (("flip", "plain"), ("flip_swap", "swap"), ("flip_swap_coarse", "swap_coarse")):
        mirrored = values[upright].view(40, 8, 16, 3).flip(2).flatten(1, 2)
        assert torch.allclose(values[flipped], mirrored, atol=2e-3), flipped  # half precision keeps 11 bits
    for one, other in (("swap", "plain"), ("swap_coarse", "swap"), ("swap_coarse", "coarse"), ("flip_swap", "flip")):
        assert not torch.allclose(values[one], values[other], atol=2e-3), (one, other)
    again = module(tmp_path, encoder=encoder, views=list(VIEWS))
    again.setup("fit")
    assert encoder.num_seen == 40 * len(VIEWS)
    assert {view: cached(again, view).path for view in VIEWS} == {view: cache.path for view, cache in caches.items()}


def test_the_key_changes_with_all_that_a_picture_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folders(data: ConceptDataModule) -> tuple[str, str]:
        return cached(data).path.name, cached(data, "swap").path.name

    data = module(tmp_path)
    plain, swap = folders(data)
    relabelled = module(tmp_path)
    dataset = relabelled.dataset("train")
    relabelled._datasets["train"] = replace(dataset, label_N=dataset.label_N.roll(1))
    other_plain, other_swap = folders(relabelled)
    assert other_plain == plain  # labels say nothing of the pictures themselves
    assert other_swap != swap
    names = {swap, other_swap, cached(data, "flip_swap").path.name}
    for constant in ("SWAP", "PAINT"):
        with monkeypatch.context() as patched:
            patched.setattr(swapped, constant, 99)
            found_plain, found_swap = folders(module(tmp_path))
        assert found_plain == plain
        names.add(found_swap)
    names.add(folders(module(tmp_path, val_fraction=0.2))[1])
    assert len(names) == 6
    assert folders(module(tmp_path)) == (plain, swap)


def test_annotations_of_a_swapped_view_are_the_samples_own(tmp_path: Path) -> None:
    data = module(tmp_path, views=["plain", "swap"])
    for view, same in (("swap", "plain"), ("flip_swap", "flip"), ("flip_swap_coarse", "flip_coarse"), ("swap_coarse", "coarse")):
        loaders = (data.plain_loader("train", annotations="all", view=name) for name in (view, same))  # pyright: ignore
        for batch, expected in zip(*loaders, strict=True):
            assert batch.image_B3HW is None
            for field in ("label_B", "index_B", "points_BP3", "foreground_BHW", "size_B2"):
                assert torch.equal(getattr(batch, field), getattr(expected, field)), (view, field)
            assert torch.equal(batch.concepts_BM.nan_to_num(9), expected.concepts_BM.nan_to_num(9))
            assert not torch.equal(batch.features.patch_BND, expected.features.patch_BND)


def test_training_meets_both_views(tmp_path: Path) -> None:
    data = module(tmp_path, views=["plain", "swap"])
    data.setup("fit")
    plain, swap = cached(data), cached(data, "swap")
    counts = [0, 0]
    for batch in data.train_dataloader():
        for row, patch_ND in zip(batch.index_B.tolist(), batch.features.patch_BND):
            counts[[torch.equal(patch_ND, cache.read([row]).patch_BND[0]) for cache in (plain, swap)].index(True)] += 1
    assert min(counts) >= 8


@pytest.mark.parametrize(
    ("cache", "encoder", "message"),
    [
        (
            True,
            {"trainable": True},
            r"\(swap, flip_swap\) need cached features, .*set cache_dir and a frozen encoder, or leave the view out",
        ),
        (False, {}, r"\(swap, flip_swap\) need cached features, .*set cache_dir and a frozen encoder, or leave the view out"),
        (True, {"resize": "crop"}, r"this one's resize is 'crop'; set the encoder's resize to 'squash', or leave the view out"),
    ],
)
def test_what_the_views_need_is_asked_for_before_anything_is_encoded(
    tmp_path: Path, cache: bool, encoder: dict[str, Any], message: str
) -> None:
    blind = Contrast(**encoder)
    data = module(tmp_path if cache else None, encoder=blind, views=["plain", "swap", "flip_swap"])
    with pytest.raises(ValueError, match=message):
        data.setup("fit")
    for refused in (lambda: data.cache("train", view="swap"), lambda: data.plain_loader("train", view="flip_swap")):
        with pytest.raises(ValueError, match="views with other backgrounds"):
            refused()
    assert blind.num_seen == 0
    data.setup("test")  # which shows the pictures as they are


def test_one_class_has_nobody_to_lend_a_background(tmp_path: Path) -> None:
    data = module(tmp_path)
    data._datasets["train"] = replace(data.dataset("train"), label_N=torch.zeros(40, dtype=torch.long))
    with pytest.raises(ValueError, match="all 40 pictures of the split 'train' are of one class"):
        data.cache("train", view="swap")


def test_features_of_other_pictures_are_refused(tmp_path: Path) -> None:
    data = module(tmp_path)
    for cache in (cached(data, "flip"), cached(data, split="test")):
        with pytest.raises(ValueError, match="holds no plain features of the split 'train'"):
            on_other_backgrounds(data.dataset("train"), plain=cache)
    with pytest.raises(ValueError, match="the view 'swap' needs the plain features of the same pictures"):
        data.cache_pictures(data.dataset("train"), view="swap")
    with pytest.raises(ValueError, match="the view 'swap' is read from cached features only"):
        Rows(data.dataset("train"), preprocessing=Contrast().preprocessing, views=("plain", "swap"))


def test_a_wrong_view_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="'flip_swap_coarse'"):
        datamodule.ConceptDataModule(SOURCE, views=["plain", "swop"])  # pyright: ignore
