"""Batches that are copied ahead are the same batches, and a GPU never computes on one that has not arrived."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import cast

import pytest
import torch
from fakes.source import TinySource

from dotcbm.data.batches import Rows, make_loader
from dotcbm.data.copy_ahead import CopyAheadLoader, copied_ahead
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.structures import ConceptBatch, PatchFeatures


def batch(rows: int) -> ConceptBatch:
    """Features, labels, and a mask."""
    drawn = torch.Generator().manual_seed(rows)
    patch = torch.rand(rows, 4, 8, generator=drawn)
    return ConceptBatch(
        concepts_BM=torch.rand(rows, 5, generator=drawn),
        label_B=torch.arange(rows),
        index_B=torch.arange(rows) + 7,
        names=tuple(f"{row}.png" for row in range(rows)),
        size_B2=torch.full((rows, 2), 32),
        features=PatchFeatures(patch, patch.mean(1), (2, 2)),
        foreground_BHW=torch.rand(rows, 6, 6, generator=drawn) > 0.5,
    )


def assert_same(a: ConceptBatch, b: ConceptBatch) -> None:
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, PatchFeatures):
            torch.testing.assert_close((x.patch_BND.cpu(), x.global_BD.cpu()), (y.patch_BND.cpu(), y.global_BD.cpu()), rtol=0, atol=0)
        elif isinstance(x, torch.Tensor):
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


def test_on_a_processor_batches_pass_one_by_one():
    taken = []

    def source():
        for rows in (3, 1, 2):
            taken.append(rows)
            yield batch(rows)

    found = copied_ahead(source(), torch.device("cpu"))
    for rows in (3, 1, 2):
        assert_same(next(found), batch(rows))
        assert taken[-1] == rows
    assert next(found, None) is None
    assert list(copied_ahead([], torch.device("cpu"))) == []


def test_an_error_in_reading_reaches_the_reader():
    def source():
        yield batch(2)
        raise OSError("the disk is gone")

    found = copied_ahead(source(), torch.device("cpu"))
    next(found)
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workers_that_read_features_for_a_gpu_copy_ahead(tmp_path, device, workers):
    with torch.random.fork_rng():
        encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
    data = ConceptDataModule(TinySource(), batch_size=8, cache_dir=str(tmp_path))
    data.use_encoder(encoder)
    rows = cast(Rows, data.train_dataloader().dataset)
    assert rows.reads_features
    loader = make_loader(rows, batch_size=8, num_workers=workers, device=torch.device(device))
    assert isinstance(loader, CopyAheadLoader) == (device == "cuda" and workers > 0)
    without = ConceptDataModule(TinySource(), batch_size=8, cache_dir=None)
    without.use_encoder(encoder)
    assert not cast(Rows, without.train_dataloader().dataset).reads_features  # pictures, which the encoder takes longer for


def test_every_tensor_of_a_batch_of_cached_features_can_be_pinned(tmp_path, monkeypatch):
    """CUDA refuses memory that several elements share; the size of the pictures was expanded, and training with workers failed at once."""

    def pin(tensor):
        assert 0 not in tensor.stride() or tensor.numel() < 2
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with torch.random.fork_rng():
        encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
    data = ConceptDataModule(TinySource(), batch_size=8, cache_dir=str(tmp_path))
    data.use_encoder(encoder)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        found = next(iter(loader))
        assert_same(found.pin_memory(), found)
    expanded = replace(batch(3), size_B2=torch.tensor([64, 64]).expand(3, 2))
    assert_same(expanded.pin_memory(), expanded)


def test_a_gpu_computes_on_what_has_arrived():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, source = torch.device("cuda"), [torch.full((1 << 22,), float(i)).pin_memory() for i in range(12)]
    sums = []
    for x in copied_ahead(source, device):
        for _ in range(20):  # work that the next copies must not disturb
            x = x * 1.0
        sums.append(x.sum())
    assert [float(total) for total in sums] == [float(i) * (1 << 22) for i in range(12)]
    for moved, rows in zip(copied_ahead([batch(3).pin_memory(), batch(2).pin_memory()], device), (3, 2), strict=True):
        assert moved.label_B.is_cuda
        assert_same(moved, batch(rows))
