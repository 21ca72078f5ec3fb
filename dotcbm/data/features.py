"""The features of a split, computed once by a frozen encoder and read from disk ever after.

A cache is a folder `<split>-<key>` with `patches.npy` (n, N, D), `globals.npy` (n, D_g) and `meta.json`. The key names the
encoder's weights, the preprocessing, the pictures and the view, so another encoder never meets old features; `meta.json`
is written last and holds a checksum of each file, and the folder gets its name when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dotcbm.data.source import ConceptDataset
from dotcbm.structures import ConceptSample, PatchEncoder, PatchFeatures

__all__ = ["DamagedCacheError", "FeatureCache", "FeatureType", "cache_features"]

FeatureType = Literal["float16", "float32"]

_FORMAT = 1  # raised when files or key change their meaning; older caches are then rebuilt
_CHUNK = 1 << 24
_FILES = ("patches.npy", "globals.npy")


class DamagedCacheError(ValueError):
    """A feature cache whose files are missing, changed or of another key; the message names the file."""


class FeatureCache:
    """The cached features of one view of one split.

    Attributes:
        path: Its folder.
        meta: What `meta.json` says.
        shapes: (n, N, D) of the patches and (n, D_g) of the global tokens.
        grid: (grid_h, grid_w).
        patch_width: D.
        global_width: D_g.
    """

    def __init__(self, path: Path, *, key: str | None = None) -> None:
        """Open and verify a cache; every byte is read once.

        Args:
            path: Its folder.
            key: What it must have been made for; None takes any.

        Raises:
            DamagedCacheError: A file is missing or differs from its checksum, or the key differs.
        """
        self.path = Path(path)
        self.meta = _read_meta(self.path / "meta.json")
        if key is not None and self.meta["key"] != key:
            raise DamagedCacheError(f"{self.path}: made for another encoder, preprocessing, view or set of pictures")
        for name in _FILES:
            _verify(self.path / name, self.meta["checksums"][name])
        self._patches = np.load(self.path / "patches.npy", mmap_mode="r", allow_pickle=False)
        self._globals = np.load(self.path / "globals.npy", mmap_mode="r", allow_pickle=False)
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] = (self._patches.shape, self._globals.shape)
        self.grid: tuple[int, int] = tuple(self.meta["grid"])
        self.patch_width = self._patches.shape[2]
        self.global_width = self._globals.shape[1]

    def __len__(self) -> int:
        return self.shapes[0][0]

    def read(self, indices: Sequence[int] | Tensor) -> PatchFeatures:
        """The features of the rows `indices`, in that order, in the precision they are stored in.

        Raises:
            IndexError: A row that the split does not have.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        return PatchFeatures(
            patch_BND=torch.from_numpy(self._patches[rows]),
            global_BD=torch.from_numpy(self._globals[rows]),
            grid=self.grid,
        )


@dataclass(frozen=True)
class _Layout:
    """What a cache will hold, known from the first picture."""

    num_pictures: int
    patch_shape: tuple[int, int]
    global_width: int
    grid: tuple[int, int]
    dtype: FeatureType

    @property
    def num_bytes(self) -> int:
        values = self.patch_shape[0] * self.patch_shape[1] + self.global_width
        return self.num_pictures * values * np.dtype(self.dtype).itemsize


def cache_features(
    dataset: ConceptDataset,
    *,
    encoder: PatchEncoder,
    prepare: Callable[[ConceptSample], ConceptSample],
    directory: Path,
    view: str = "plain",
    batch_size: int = 32,
    progress: bool = True,
    dtype: FeatureType = "float16",
) -> FeatureCache:
    """The features of `dataset`, from `directory` if they lie there, else computed and written there.

    Args:
        dataset: One split.
        encoder: A frozen encoder; it is run where its weights are.
        prepare: Sample -> sample whose image is the encoder's input, (3, h, w) float32.
        directory: Where caches lie; made if missing.
        view: A name for what `prepare` does beyond preprocessing ("plain", "flip"); part of the key.
        batch_size: Pictures that go through the encoder at once.
        progress: Print the size and a progress bar (to stderr).
        dtype: "float32" for features beyond the range of float16; twice the size.

    Raises:
        ValueError: An empty split, or features that are not finite or too large for `dtype`.
        BadPictureError: A picture that cannot be decoded; its file is named.
        OSError: Too little room on the disk. Nothing half-written is left under the cache's name.
    """
    if len(dataset) == 0:
        raise ValueError(f"the split {dataset.split!r} is empty: there are no features to cache")
    key = _key(dataset, encoder=encoder, view=view, dtype=dtype)
    directory = Path(directory)
    path = directory / f"{dataset.split}-{view}-{key[:16]}"
    if path.exists():
        try:
            return FeatureCache(path, key=key)
        except DamagedCacheError as error:
            warnings.warn(f"the feature cache is damaged and is computed again: {error}", stacklevel=2)
    layout = _Layout(
        num_pictures=len(dataset),
        patch_shape=(encoder.grid[0] * encoder.grid[1], encoder.width),
        global_width=encoder.global_width,
        grid=encoder.grid,
        dtype=dtype,
    )
    directory.mkdir(parents=True, exist_ok=True)
    _check_room(directory, layout, split=dataset.split, progress=progress)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=directory, ignore_cleanup_errors=True) as scratch:
        staging = Path(scratch) / "cache"
        staging.mkdir()
        batches = _encode(dataset, encoder=encoder, prepare=prepare, batch_size=batch_size, progress=progress)
        _write(staging, batches, layout)
        meta = {
            "format": _FORMAT,
            "key": key,
            "split": dataset.split,
            "view": view,
            "grid": list(layout.grid),
            "dtype": dtype,
            "shapes": {"patches": [len(dataset), *layout.patch_shape], "globals": [len(dataset), layout.global_width]},
            "checksums": {name: _checksum(staging / name) for name in _FILES},
            "encoder": getattr(encoder, "settings", {}),
            "encoder_fingerprint": encoder.fingerprint(),
            "preprocessing": encoder.preprocessing.to_dict(),
            "data_fingerprint": dataset.fingerprint(),
            "made_with": {package: version(package) for package in ("torch", "timm", "numpy")},
        }
        (staging / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.replace(staging, path)
    return FeatureCache(path, key=key)


def _key(dataset: ConceptDataset, *, encoder: PatchEncoder, view: str, dtype: str) -> str:
    parts = {
        "format": _FORMAT,
        "encoder": encoder.fingerprint(),
        "preprocessing": encoder.preprocessing.to_dict(),
        "data": dataset.fingerprint(),
        "view": view,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_room(directory: Path, layout: _Layout, *, split: str, progress: bool) -> None:
    free = shutil.disk_usage(directory).free
    text = (
        f"features of {layout.num_pictures} pictures ({split}), "
        f"{layout.patch_shape[0]} patches of width {layout.patch_shape[1]} in {layout.dtype}: {_size(layout.num_bytes)}"
    )
    if layout.num_bytes > free:
        raise OSError(f"{directory}: no room for the {text}; {_size(free)} are free. Free some, or set another cache folder")
    if progress:
        Console(stderr=True).print(f"Caching {text}, {_size(free)} free in {directory}", highlight=False, markup=False)


def _encode(
    dataset: ConceptDataset,
    *,
    encoder: PatchEncoder,
    prepare: Callable[[ConceptSample], ConceptSample],
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[int, PatchFeatures]]:
    """(first row, features of its batch), in order, without gradients, on the CPU."""
    weight = next(encoder.parameters(), None) if isinstance(encoder, torch.nn.Module) else None
    device = weight.device if weight is not None else torch.device("cpu")
    was_training = isinstance(encoder, torch.nn.Module) and encoder.training
    if isinstance(encoder, torch.nn.Module):
        encoder.eval()
    try:
        starts = range(0, len(dataset), batch_size)
        for start in track(starts, description=f"Encoding {dataset.split}", disable=not progress, console=Console(stderr=True)):
            rows = range(start, min(start + batch_size, len(dataset)))
            pictures = [prepare(dataset.sample(row, masks=False)).image for row in rows]
            with torch.no_grad():
                yield start, encoder(torch.stack([p for p in pictures if p is not None]).to(device)).to("cpu", torch.float32)
    finally:
        if isinstance(encoder, torch.nn.Module):
            encoder.train(was_training)


def _write(folder: Path, batches: Iterator[tuple[int, PatchFeatures]], layout: _Layout) -> None:
    n = layout.num_pictures
    files = {
        name: np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.dtype(layout.dtype), shape=shape)
        for name, shape in zip(_FILES, ((n, *layout.patch_shape), (n, layout.global_width)))
    }
    limit = float(np.finfo(layout.dtype).max)
    for start, features in batches:
        for name, values in zip(_FILES, (features.patch_BND, features.global_BD)):
            largest = float(values.abs().max())
            if not largest <= limit:  # also catches NaN
                raise ValueError(
                    f"features of the pictures {start} to {start + len(values) - 1} reach {largest:g}; {layout.dtype} holds finite values "
                    f"up to {limit:g}. " + ("Use float32" if largest < float("inf") else "Check the encoder's weights and preprocessing")
                )
            files[name][start : start + len(values)] = values.numpy().astype(layout.dtype)
    for file in files.values():
        file.flush()


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCacheError(f"{path}: no such file") from None
    except ValueError as error:
        raise DamagedCacheError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT or not {"key", "grid", "checksums"} <= meta.keys():
        raise DamagedCacheError(f"{path}: written by another version of dotcbm")
    return meta


def _verify(path: Path, expected: str) -> None:
    try:
        found = _checksum(path)
    except FileNotFoundError:
        raise DamagedCacheError(f"{path}: no such file") from None
    if found != expected:
        raise DamagedCacheError(f"{path}: its content differs from the checksum in meta.json")


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
