"""The feature cache: right values, one computation, and no use of anything damaged, stale or half-written."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dotcbm.data.features import FeatureCache, cache_features
from dotcbm.data.source import BadPictureError, ConceptDataset, read_picture
from dotcbm.encoders.image import ImageEncoder
from dotcbm.structures import ConceptSample, ConceptSet, PatchFeatures, Preprocessing

N = 11


class Patches(nn.Module):
    """Patch means times a weight: an encoder whose features are known in closed form."""

    def __init__(self, *, scale: float = 1.0, width: int = 3, fail_at_batch: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, width) * scale, requires_grad=False)
        self.preprocessing = Preprocessing(size=(8, 12), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.grid = (2, 3)
        self.width = width
        self.global_width = width
        self.num_seen = 0
        self.num_batches = 0
        self.fail_at_batch = fail_at_batch

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        self.num_batches += 1
        if self.num_batches == self.fail_at_batch:
            raise KeyboardInterrupt
        self.num_seen += len(image_B3HW)
        mean_BN = nn.functional.avg_pool2d(image_B3HW, 4).mean(1).flatten(1)
        patch_BND = mean_BN[..., None] * self.weight
        return PatchFeatures(patch_BND=patch_BND, global_BD=patch_BND.mean(1), grid=self.grid)

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.weight.tolist()).encode()).hexdigest()


def prepare(sample: ConceptSample) -> ConceptSample:
    assert sample.image is not None
    return replace(sample, image=sample.image.float() / 255)


def pictures(n: int = N, *, read: Callable[[int], Tensor] | None = None, key: str = "") -> ConceptDataset:
    drawn = torch.randint(0, 256, (n, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ConceptDataset(
        concepts=ConceptSet(names=("a",), class_names=("x", "y"), class_concept_KM=torch.zeros(2, 1)),
        split="train",
        names=tuple(f"{i}.png" for i in range(n)),
        label_N=torch.zeros(n, dtype=torch.long),
        concept_NM=torch.zeros(n, 1),
        read_image=read or (lambda row: drawn[row]),
        read_size=lambda row: (8, 12),
        source_key=key,
    )


def cached(directory: Path, encoder: Patches | None = None, **settings: object) -> FeatureCache:
    arguments: dict[str, object] = {"dataset": pictures(), "batch_size": 4, "progress": False, **settings}
    return cache_features(arguments.pop("dataset"), encoder=encoder or Patches(), prepare=prepare, directory=directory, **arguments)  # pyright: ignore


def expected(encoder: Patches) -> PatchFeatures:
    images = torch.stack([prepare(pictures().sample(i)).image for i in range(N)])  # pyright: ignore
    with torch.no_grad():
        return encoder(images)


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_cached_features_are_the_encoders_features(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    truth = expected(Patches())
    features = cache.read(range(N))
    assert features.patch_BND.dtype == features.global_BD.dtype == torch.float16
    assert torch.equal(features.patch_BND, truth.patch_BND.half())
    assert torch.equal(features.global_BD, truth.global_BD.half())
    assert (len(cache), cache.grid, cache.patch_width, cache.global_width) == (N, (2, 3), 3, 3)
    assert cache.shapes == ((N, 6, 3), (N, 3))
    picked = cache.read(torch.tensor([7, 0, 7]))
    assert torch.equal(picked.patch_BND, truth.patch_BND[[7, 0, 7]].half())
    with pytest.raises(IndexError):
        cache.read([N])


def test_files_are_plain_numpy(tmp_path: Path) -> None:
    cache = cached(tmp_path, dtype="float32")
    assert np.array_equal(np.load(cache.path / "patches.npy"), expected(Patches()).patch_BND.numpy())
    assert cache.read([1]).patch_BND.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batch_size_changes_nothing(tmp_path: Path, batch_size: int) -> None:
    assert torch.equal(cached(tmp_path, batch_size=batch_size).read(range(N)).patch_BND, expected(Patches()).patch_BND.half())


def test_second_call_encodes_nothing_and_knows_its_data(tmp_path: Path) -> None:
    cached(tmp_path)
    encoder = Patches()
    with no_warning():
        cache = cached(tmp_path, encoder)
    assert encoder.num_seen == 0
    assert cache.meta["preprocessing"]["size"] == [8, 12]
    assert set(cache.meta["made_with"]) == {"torch", "timm", "numpy"}


def test_whatever_changes_the_features_changes_the_cache(tmp_path: Path) -> None:
    other_preprocessing = Patches()
    other_preprocessing.preprocessing = replace(other_preprocessing.preprocessing, mean=(0.1, 0.0, 0.0))
    caches = [
        cached(tmp_path),
        cached(tmp_path, view="flip"),
        cached(tmp_path, Patches(scale=1.001)),
        cached(tmp_path, other_preprocessing),
        cached(tmp_path, dataset=pictures(N - 1)),
        cached(tmp_path, dataset=pictures(key="another root")),
        cached(tmp_path, dataset=pictures().subset(list(range(N))[::-1])),
        cached(tmp_path, dtype="float32"),
    ]
    assert len({cache.path for cache in caches}) == len(caches)


def test_size_is_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(tmp_path, progress=True)
    told = " ".join(capsys.readouterr().err.split())
    assert "features of 11 pictures (train), 6 patches of width 3 in float16: 0.0 MiB" in told
    assert told.index("Caching") < told.index("Encoding train")


@pytest.mark.parametrize("name", ["patches.npy", "globals.npy"])
def test_one_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    path = cached(tmp_path).path / name
    content = bytearray(path.read_bytes())
    content[len(content) - 5] ^= 1
    path.write_bytes(content)
    encoder = Patches()
    with pytest.warns(UserWarning, match=rf"computed again.*{name}: its content differs"):
        cache = cached(tmp_path, encoder)
    assert encoder.num_seen == N
    assert torch.equal(cache.read(range(N)).patch_BND, expected(encoder).patch_BND.half())
    with no_warning():
        cached(tmp_path)


@pytest.mark.parametrize("name", ["patches.npy", "globals.npy", "meta.json"])
def test_missing_or_unreadable_files_are_noticed(tmp_path: Path, name: str) -> None:
    path = cached(tmp_path).path / name
    path.unlink()
    with pytest.warns(UserWarning, match=rf"{name}: no such file"):
        cached(tmp_path)
    path.write_bytes(b"{")
    with pytest.warns(UserWarning, match=name):
        cached(tmp_path)
    with no_warning():
        cached(tmp_path)


def test_stale_caches_are_not_used(tmp_path: Path) -> None:
    path = cached(tmp_path).path / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "key": "0" * 64}))
    with pytest.warns(UserWarning, match="another encoder, preprocessing, view or set of pictures"):
        cached(tmp_path)
    path.write_text(json.dumps({**meta, "format": 0}))
    with pytest.warns(UserWarning, match="another version"):
        cached(tmp_path)


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    needed = N * (6 * 3 + 3) * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    encoder = Patches()
    with pytest.raises(OSError, match="no room for the features of 11 pictures"):
        cached(tmp_path, encoder)
    assert encoder.num_seen == 0
    assert folders(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    cached(tmp_path, encoder)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError):
            cached(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(tmp_path) == []
    assert len(cached(tmp_path)) == N


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, Patches(fail_at_batch=3))
    (partial,) = folders(tmp_path)
    assert partial.startswith(".")
    with (tmp_path / partial / "patches.npy").open("ab") as opened:
        opened.write(b"half a row, by a process that was killed")
    encoder = Patches()
    cache = cached(tmp_path, encoder)
    assert encoder.num_seen == N - 8
    assert torch.equal(cache.read(range(N)).patch_BND, expected(encoder).patch_BND.half())
    assert torch.equal(cache.read(range(N)).global_BD, expected(encoder).global_BD.half())
    assert folders(tmp_path) == [cache.path.name]
    assert not (cache.path / "progress.json").exists()


@pytest.mark.parametrize("damage", ["short file", "no file", "no number"])
def test_an_interrupted_run_that_cannot_go_on_starts_again(tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, Patches(fail_at_batch=3))
    partial = tmp_path / folders(tmp_path)[0]
    if damage == "short file":
        (partial / "globals.npy").write_bytes(b"")
    elif damage == "no file":
        (partial / "patches.npy").unlink()
    else:
        (partial / "progress.json").write_text("x")
    encoder = Patches()
    cache = cached(tmp_path, encoder)
    assert encoder.num_seen == N
    assert torch.equal(cache.read(range(N)).patch_BND, expected(encoder).patch_BND.half())


@pytest.mark.parametrize("how", ["read by another", "another is written"])
def test_nobody_waits_for_a_process_that_reads_the_same_or_writes_something_else(tmp_path: Path, how: str) -> None:
    """The processes of a study came one by one, each verifying gigabytes while the others waited."""
    fcntl = pytest.importorskip("fcntl")
    cached(tmp_path)
    (lock,) = tmp_path.glob(".*lock")
    other = {"dataset": pictures(key="other")} if how == "another is written" else {}
    done: list[FeatureCache] = []
    thread = threading.Thread(target=lambda: done.append(cached(tmp_path, **other)), daemon=True)
    with lock.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX if other else fcntl.LOCK_SH)
        thread.start()
        thread.join(timeout=60)
        assert len(done) == 1


def test_two_callers_compute_once(tmp_path: Path) -> None:
    encoder = Patches()
    caches: list[FeatureCache] = []
    threads = [threading.Thread(target=lambda: caches.append(cached(tmp_path, encoder))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches) == 3
    assert encoder.num_seen == N


def test_a_bad_picture_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (12, 8)).save(good)
    bad.write_bytes(good.read_bytes()[:40])
    data = pictures(read=lambda row: read_picture(bad if row == 6 else good))
    with pytest.raises(BadPictureError, match=r"bad\.png: cannot be decoded"):
        cached(tmp_path / "cache", dataset=data)
    assert all(name.startswith(".") for name in folders(tmp_path / "cache"))
    good_again = cached(tmp_path / "cache", dataset=pictures(read=lambda row: read_picture(good)))
    assert not good_again.read(range(N)).patch_BND.any()


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    encoder = Patches(scale=2e5)
    with pytest.raises(ValueError, match=r"pictures 0 to 3 reach .*float16 holds up to 65504; cache them as float32"):
        cached(tmp_path, encoder)
    assert torch.equal(cached(tmp_path, encoder, dtype="float32").read(range(N)).patch_BND, expected(encoder).patch_BND)
    with pytest.raises(ValueError, match="check the encoder's weights"):
        cached(tmp_path, Patches(scale=float("nan")))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'train' is empty"):
        cached(tmp_path, dataset=pictures(0))


def test_pickles_carry_no_features(tmp_path: Path) -> None:
    cache = cached(tmp_path, Patches(width=2000))
    sent = pickle.dumps(cache)
    assert len(sent) < 5000 < N * 2000
    assert torch.equal(pickle.loads(sent).read([3]).patch_BND, cache.read([3]).patch_BND)


def test_encoder_mode_is_restored_and_eval_is_used(tmp_path: Path) -> None:
    modes: list[bool] = []
    encoder = Patches()
    encoder.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    encoder.train()
    cached(tmp_path, encoder)
    assert not any(modes)
    assert encoder.training


def test_with_a_real_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder("timm/test_vit", pretrained=False, image_size=64)
    drawn = torch.rand(3, 3, 64, 64)
    data = pictures(3)
    cache = cache_features(
        data, encoder=encoder, prepare=lambda s: replace(s, image=drawn[s.index]), directory=tmp_path, progress=False, batch_size=2
    )
    assert torch.allclose(cache.read([0, 1, 2]).patch_BND.float(), encoder(drawn).patch_BND, atol=2e-3)
    assert cache.meta["encoder"]["name"] == "timm/test_vit"
