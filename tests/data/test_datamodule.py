"""Splits, orders, caches and weights of the data module, and what it says about bad data."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fakes.source import TinySource
from PIL import Image

from dotcbm.data import batches
from dotcbm.data.batches import EpochSampler, mix_seed
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import BadPictureError
from dotcbm.encoders.image import ImageEncoder
from dotcbm.structures import PatchFeatures


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)


def module(source=None, *, encoder=None, **settings) -> ConceptDataModule:
    settings = {"batch_size": 8, "cache_dir": None, **settings}
    data = ConceptDataModule(source or TinySource(), **settings)
    if encoder is not None:
        data.use_encoder(encoder)
    return data


def test_validation_part_is_stratified_disjoint_and_decided_by_the_seed():
    data = module(val_fraction=0.2)
    train, val = data.dataset("train"), data.dataset("val")
    assert not set(train.names) & set(val.names)
    assert set(train.names) | set(val.names) == set(TinySource().load("train").names)
    assert torch.bincount(val.label_N).tolist() == [2, 2, 2, 2]
    assert module(val_fraction=0.2).dataset("val").names == val.names
    assert module(val_fraction=0.2, seed=1).dataset("val").names != val.names


def test_another_seed_carves_another_validation_part_with_its_own_features(encoder, tmp_path):
    def seen(data, split):
        return {name: feature for batch in data.loader(split) for name, feature in zip(batch.names, batch.features.patch_BND)}

    settings = {"val_fraction": 0.2, "encoder": encoder, "in_memory": True, "cache_dir": tmp_path}
    data = module(**settings)
    first = {split: seen(data, split) for split in ("train", "val", "test")}
    test_rows = data.dataset("test")
    data.seed = 1
    fresh = module(**settings, seed=1)
    for split in ("train", "val"):
        found, wanted = seen(data, split), seen(fresh, split)
        assert found.keys() == wanted.keys() != first[split].keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert data.dataset("test") is test_rows
    # Where nothing is carved out there is nothing to read again.
    whole = module(val_fraction=0)
    before = whole.dataset("train")
    whole.seed = 1
    assert whole.dataset("train") is before


def test_the_part_carved_out_can_be_evaluated(encoder):
    data = module(val_fraction=0.2, encoder=encoder, evaluate_splits=["val"])
    (loader,) = data.test_dataloader()
    assert [name for batch in loader for name in batch.names] == list(data.dataset("val").names)
    with pytest.raises(ValueError, match="has no split 'val'"):
        module(val_fraction=0.0, evaluate_splits=["val"])


def test_classes_with_one_picture_stay_in_training():
    data = module(TinySource(counts=(("train", 6), ("test", 4))), val_fraction=0.5)
    assert torch.bincount(data.dataset("train").label_N, minlength=4).tolist() == [1, 1, 1, 1]
    assert torch.bincount(data.dataset("val").label_N, minlength=4).tolist() == [1, 1, 0, 0]


def test_a_source_with_a_validation_split_keeps_it():
    data = module(TinySource(counts=(("train", 12), ("val", 8), ("test", 4))), val_fraction=0.5)
    assert len(data.dataset("train")) == 12
    assert len(data.dataset("val")) == 8


def test_no_validation_fraction_uses_everything(encoder):
    data = module(val_fraction=0, encoder=encoder)
    assert len(data.dataset("train")) == 40
    assert not data.has_validation
    assert data.val_dataloader() == []


@pytest.mark.parametrize(("num_rows", "batch_size", "world"), [(40, 8, 2), (37, 8, 2), (10, 3, 4), (1, 8, 2)])
def test_processes_together_make_the_batches_of_one(num_rows, batch_size, world):
    def batches(world_size, rank, size):
        sampler = EpochSampler(
            range(num_rows), num_rows=num_rows, batch_size=size, num_views=2, shuffle=True, seed=3, world_size=world_size, rank=rank
        )
        sampler.set_epoch(5)
        given = list(sampler)
        assert len(given) == len(sampler)
        return given

    alone = batches(1, 0, batch_size * world)
    shares = [batches(world, rank, batch_size) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    for i, batch in enumerate(alone):
        together = [row for share in shares for row in share[i]]
        assert set(batch) <= set(together)
        padded = -num_rows % world if i == len(alone) - 1 else 0
        assert len(together) == len(batch) + padded
    assert sorted(row for batch in alone for row, _ in batch) == list(range(num_rows))


def test_order_and_views_depend_on_seed_and_epoch_alone():
    def drawn(seed, epoch):
        sampler = EpochSampler(range(200), num_rows=200, batch_size=50, num_views=2, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return [row for batch in sampler for row in batch]

    torch.manual_seed(0)
    first = drawn(0, 0)
    torch.manual_seed(1)
    assert drawn(0, 0) == first
    assert drawn(0, 1) != first
    assert drawn(1, 0) != first
    flipped = sum(view for _, view in first)
    assert 70 <= flipped <= 130  # 200 fair coins: more than 4 deviations from 100 otherwise
    assert len({mix_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_cached_features_are_those_of_the_pictures(encoder, tmp_path):
    views = ["plain", "flip"]
    cached = module(encoder=encoder, cache_dir=str(tmp_path), views=views)
    direct = module(encoder=encoder, views=views)
    resident = module(encoder=encoder, cache_dir=str(tmp_path), views=views, in_memory=True)
    seen = 0
    for batch, pictures, kept in zip(cached.train_dataloader(), direct.train_dataloader(), resident.train_dataloader(), strict=True):
        assert batch.image_B3HW is None
        assert pictures.features is None
        assert batch.names == pictures.names
        assert torch.equal(batch.label_B, pictures.label_B)
        assert torch.equal(batch.concepts_BM.nan_to_num(9), pictures.concepts_BM.nan_to_num(9))
        with torch.no_grad():
            features = encoder(pictures.image_B3HW)
        # Half precision keeps 11 bits.
        assert torch.allclose(batch.features.patch_BND.float(), features.patch_BND, rtol=2e-3, atol=2e-3)
        assert torch.allclose(batch.features.global_BD.float(), features.global_BD, rtol=2e-3, atol=2e-3)
        assert torch.equal(batch.features.patch_BND, kept.features.patch_BND)
        seen += len(batch)
    assert seen == len(cached.dataset("train"))


@pytest.mark.parametrize(("room", "place"), [(True, "meta"), (False, "cpu")])
def test_features_in_memory_lie_where_training_runs_if_there_is_room(encoder, tmp_path, monkeypatch, room, place):
    monkeypatch.setattr(batches, "_fits", lambda kept, device: room)
    data = module(encoder=encoder, cache_dir=str(tmp_path), views=["plain", "flip"], in_memory=True, evaluate_splits=["test"])
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")), world_size=1, global_rank=0)
    batch = next(iter(data.train_dataloader()))
    assert {batch.features.patch_BND.device.type, batch.features.global_BD.device.type} == {place}
    assert next(iter(data.plain_loader("train"))).features.patch_BND.device.type == place
    assert next(iter(data.loader("test"))).features.patch_BND.device.type == "cpu"


def test_a_gpu_must_have_twice_the_room_that_features_take(monkeypatch):
    kept = [PatchFeatures(patch_BND=torch.zeros(10, 4, 8).half(), global_BD=torch.zeros(10, 8).half(), grid=(2, 2))]  # 800 bytes
    for free, fits in ((1600, True), (1599, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**6))
        assert batches._fits(kept, torch.device("cuda")) == fits
    assert batches._fits(kept, torch.device("cpu"))
    assert not batches._fits(kept, torch.device("mps"))


def test_batches_gathered_on_a_gpu_are_those_of_main_memory(encoder, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = {"encoder": encoder, "cache_dir": str(tmp_path), "views": ["plain", "flip"], "in_memory": True}
    there = module(**settings)
    there.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), world_size=1, global_rank=0)
    for batch, expected in zip(there.train_dataloader(), module(**settings).train_dataloader(), strict=True):
        assert batch.features.patch_BND.is_cuda
        assert torch.equal(batch.features.patch_BND.cpu(), expected.features.patch_BND)
        assert torch.equal(batch.features.global_BD.cpu(), expected.features.global_BD)


def test_plain_and_flipped_views_both_come_up(encoder, tmp_path):
    data = module(encoder=encoder, cache_dir=str(tmp_path), views=["plain", "flip"], val_fraction=0)
    plain, flip = data.cache("train", view="plain"), data.cache("train", view="flip")
    counts = [0, 0]
    for batch in data.train_dataloader():
        for row, patch_ND in zip(batch.index_B.tolist(), batch.features.patch_BND):
            which = [torch.equal(patch_ND, cache.read([row]).patch_BND[0]) for cache in (plain, flip)]
            assert any(which)
            counts[which.index(True)] += 1
    assert min(counts) >= 8


def test_evaluation_batches_carry_annotations_without_decoding(encoder, tmp_path):
    data = module(encoder=encoder, cache_dir=str(tmp_path), in_memory=True)
    (loader,) = data.test_dataloader()
    first = list(loader)
    direct = list(module(encoder=encoder).test_dataloader()[0])
    for batch, expected in zip(first, direct, strict=True):
        assert batch.features is not None
        assert torch.equal(batch.points_BP3, expected.points_BP3)
        assert torch.equal(batch.foreground_BHW, expected.foreground_BHW)
    # The cache is there: pictures that cannot be decoded any more do not matter.
    spoilt = module(encoder=encoder, cache_dir=str(tmp_path), in_memory=True)
    spoilt._datasets["test"] = TinySource(bad_rows=tuple(range(16))).load("test")
    again = list(spoilt.test_dataloader()[0])
    assert torch.equal(again[0].features.patch_BND, first[0].features.patch_BND)


def test_pictures_kept_in_memory_are_decoded_once(encoder):
    reads = []

    def counted(data):
        dataset = data.dataset("train")
        read = dataset.read_image
        data._datasets["train"] = replace(dataset, read_image=lambda row: (reads.append(row), read(row))[1])
        return data

    views = ["plain", "flip"]
    kept = counted(module(encoder=encoder, views=views, val_fraction=0, in_memory=True))
    loader, direct = kept.train_dataloader(), module(encoder=encoder, views=views, val_fraction=0).train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        direct.sampler.set_epoch(epoch)
        for a, b in zip(loader, direct, strict=True):
            assert a.names == b.names
            assert torch.equal(a.image_B3HW, b.image_B3HW)
    assert sorted(reads) == list(range(len(kept.dataset("train"))))


def test_workers_give_the_same_batches(encoder, tmp_path):
    alone = module(encoder=encoder, cache_dir=str(tmp_path)).train_dataloader()
    workers = module(encoder=encoder, cache_dir=str(tmp_path), num_workers=1).train_dataloader()
    for a, b in zip(alone, workers, strict=True):
        assert a.names == b.names
        assert torch.equal(a.features.patch_BND, b.features.patch_BND)


def test_weights_against_counts():
    data = module(TinySource(counts=(("train", 41), ("test", 4))), val_fraction=0)
    train = data.dataset("train")
    weight_K = data.class_weights()
    assert float(weight_K[train.label_N].mean()) == pytest.approx(1)
    assert weight_K.tolist() == pytest.approx([41 / (4 * 11), *[41 / (4 * 10)] * 3])
    known = train.concept_NM[:, 4][~train.concept_NM[:, 4].isnan()]
    assert float(data.concept_pos_weights()[4]) == pytest.approx(float((known == 0).sum() / (known == 1).sum()))
    assert float(data.concept_frequency()[4]) == pytest.approx(float(known.mean()))


def test_an_empty_split_is_named():
    with pytest.raises(ValueError, match="split 'train' of TinySource is empty"):
        module(TinySource(counts=(("train", 0), ("test", 4)))).dataset("train")
    with pytest.raises(ValueError, match="split 'test' of TinySource is empty"):
        module(TinySource(counts=(("train", 8), ("test", 0)))).dataset("test")
    with pytest.raises(ValueError, match="split 'val' of TinySource is empty; it is carved out"):
        module(TinySource(counts=(("train", 4), ("test", 4)))).dataset("val")


def test_a_class_without_training_pictures_is_named():
    with pytest.raises(ValueError, match=r"1 of 4 classes of TinySource have no training picture: green left\."):
        module(TinySource(missing_class=2)).dataset("train")


def test_a_bad_picture_is_an_error_in_training(encoder, tmp_path):
    source = TinySource(bad_rows=(3,))
    with pytest.raises(BadPictureError, match=r"train/003\.png"):
        module(source, encoder=encoder, cache_dir=str(tmp_path), val_fraction=0).train_dataloader()
    with pytest.raises(BadPictureError, match=r"train/003\.png"):
        list(module(source, encoder=encoder, val_fraction=0).train_dataloader())


def test_bad_pictures_are_skipped_and_named_in_prediction(encoder, tmp_path):
    for name in ("b.png", "a.png", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    data = module(encoder=encoder, predict_files=[str(tmp_path)], batch_size=2)
    data.setup("predict")
    with pytest.warns(UserWarning, match=r"skipped: .*broken\.png"):
        batches = list(data.predict_dataloader())
    assert [name for batch in batches for name in batch.names] == [str(tmp_path / n) for n in ("a.png", "b.png", "sub/c.jpg")]
    assert batches[0].image_B3HW.shape == (2, 3, 64, 64)


def test_a_folder_without_pictures_is_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="no pictures in"):
        module(encoder=encoder, predict_files=[str(tmp_path)]).setup("predict")


def test_a_batch_of_nothing_but_bad_pictures_is_empty(encoder):
    data = module(TinySource(bad_rows=tuple(range(8))), encoder=encoder)
    data.setup("predict")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(data.predict_dataloader())
    assert [len(batch) for batch in batches] == [0, 8]


def test_loaders_without_an_encoder_say_what_to_do():
    with pytest.raises(ValueError, match="call use_encoder first"):
        module().train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0"),
        ({"views": ["flip"]}, "choose"),
        ({"views": ["plain", "upside_down"]}, "choose"),
        ({"evaluate_splits": ["tset"]}, "has no split 'tset'"),
        ({"predict_split": "tset"}, "has no split 'tset'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        module(**settings)
