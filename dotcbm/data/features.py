"""The features of a split, computed once by a frozen encoder and read from disk ever after.

A cache is a folder `<split>-<key>` with `patches.npy` (n, N, D + L: patches and details side by side), `globals.npy` (n, D_g) and
`meta.json`. The key names the encoder's weights, the preprocessing, the pictures and the view, so another encoder never meets old
features; `meta.json` holds a checksum of each file. The folder is filled under another name and gets its own when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from dotcbm.data.source import ConceptDataset
from dotcbm.structures import ConceptSample, PatchEncoder, PatchFeatures

__all__ = ["DamagedCacheError", "FeatureCache", "FeatureType", "cache_features"]

FeatureType = Literal["float16", "float32"]

_FORMAT = 1  # raised when files or key change their meaning; older caches are then rebuilt
_CHUNK = 1 << 24
_FILES = ("patches.npy", "globals.npy")
_PROGRESS = "progress.json"  # number of rows that survive a crash; gone when the cache is whole
# Measured: an EfficientNet at 448 px takes 0.13 s of one core a picture in batches of 4 and 0.31 s in batches of 32, whose
# feature maps leave the processor's cache; channels-last input saves another fifth.
_CPU_BATCH = 4
_NOTE_SECONDS = 20.0  # how much work a killed process may lose


class DamagedCacheError(ValueError):
    """A feature cache whose files are missing, changed or of another key; the message names the file."""


class FeatureCache:
    """The cached features of one view of one split.

    Attributes:
        path: Its folder.
        meta: What `meta.json` says.
        shapes: (n, N, D + L) of the patches and (n, D_g) of the global tokens.
        grid: (grid_h, grid_w).
        patch_width: D.
        detail_width: L; 0 where the encoder gives no details.
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
        self._map()
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] = (self._patches.shape, self._globals.shape)
        self.grid: tuple[int, int] = tuple(self.meta["grid"])
        self.detail_width: int = self.meta.get("detail_width", 0)
        self.patch_width = self._patches.shape[2] - self.detail_width
        self.global_width = self._globals.shape[1]

    def __len__(self) -> int:
        return self.shapes[0][0]

    def _map(self) -> None:
        self._patches = np.load(self.path / "patches.npy", mmap_mode="r", allow_pickle=False)
        self._globals = np.load(self.path / "globals.npy", mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: pickled for a loader's worker, they would be copied whole."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_patches", "_globals")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def read(self, indices: Sequence[int] | Tensor) -> PatchFeatures:
        """The features of the rows `indices`, in that order, in the precision they are stored in.

        Raises:
            IndexError: A row that the split does not have.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        both_BNX = torch.from_numpy(self._patches[rows])
        return PatchFeatures(
            patch_BND=both_BNX[..., : self.patch_width],
            global_BD=torch.from_numpy(self._globals[rows]),
            grid=self.grid,
            detail_BNL=both_BNX[..., self.patch_width :] if self.detail_width else None,
        )


@dataclass(frozen=True)
class _Layout:
    """What a cache will hold."""

    num_pictures: int
    patch_shape: tuple[int, int]
    global_width: int
    dtype: FeatureType

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two files."""
        return (self.num_pictures, *self.patch_shape), (self.num_pictures, self.global_width)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes a picture in the two files."""
        size = np.dtype(self.dtype).itemsize
        return self.patch_shape[0] * self.patch_shape[1] * size, self.global_width * size


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
    advance: Callable[[int], None] | None = None,
) -> FeatureCache:
    """The features of `dataset`, from `directory` if they lie there, else computed and written there.

    An interrupted run goes on where it stopped. Processes that ask for the same features wait for the first of them.

    Args:
        dataset: One split.
        encoder: A frozen encoder; it is run where its weights are, in eval mode.
        prepare: Sample -> sample whose image is the encoder's input, (3, h, w) float32; called from several threads.
        directory: Where caches lie; made if missing.
        view: A name for what `prepare` does beyond preprocessing ("plain", "flip"); part of the key and of the folder's name.
        batch_size: Pictures that go through the encoder at once; fewer on a CPU, where small batches are faster.
        progress: Print the size and a progress bar (to stderr).
        dtype: "float32" for features beyond the range of float16; twice the size.
        advance: Told how many pictures are encoded, for a bar of the caller's in place of ours.

    Raises:
        ValueError: An empty split, or features that are not finite or too large for `dtype`.
        BadPictureError: A picture that cannot be decoded; its file is named.
        OSError: Too little room on the disk. Nothing half-written is left under the cache's name.
    """
    if len(dataset) == 0:
        raise ValueError(f"the split {dataset.split!r} is empty: there are no features to cache")
    key = _key(dataset, encoder=encoder, view=view, dtype=dtype)
    path = Path(directory) / f"{dataset.split}-{view}-{key[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with _locked(lock, shared=True), suppress(DamagedCacheError):  # verifying takes seconds, and many processes may do it at once
        return FeatureCache(path, key=key)
    with _locked(lock):
        if path.exists():
            try:
                return FeatureCache(path, key=key)
            except DamagedCacheError as error:
                warnings.warn(f"a feature cache cannot be used and is computed again: {error}", stacklevel=2)
        detail_width = getattr(encoder, "detail_width", 0)
        layout = _Layout(
            num_pictures=len(dataset),
            patch_shape=(encoder.grid[0] * encoder.grid[1], encoder.width + detail_width),
            global_width=encoder.global_width,
            dtype=dtype,
        )
        partial = path.with_name(f".{path.name}.partial")
        partial.mkdir(exist_ok=True)
        try:
            writer = _Writer(partial, layout)
            _check_room(path.parent, layout, done=writer.num_rows, split=dataset.split, progress=progress)
            writer.write(
                _encode(
                    dataset,
                    encoder=encoder,
                    prepare=prepare,
                    start=writer.num_rows,
                    batch_size=batch_size,
                    progress=progress and advance is None,
                    advance=advance,
                )
            )
            meta = {
                "format": _FORMAT,
                "key": key,
                "split": dataset.split,
                "view": view,
                "grid": list(encoder.grid),
                "dtype": dtype,
                "detail_width": detail_width,
                "shapes": {"patches": [len(dataset), *layout.patch_shape], "globals": [len(dataset), layout.global_width]},
                "checksums": {name: _checksum(partial / name) for name in _FILES},
                "encoder": getattr(encoder, "settings", {}),
                "encoder_fingerprint": encoder.fingerprint(),
                "preprocessing": encoder.preprocessing.to_dict(),
                "data_fingerprint": dataset.fingerprint(),
                "made_with": {package: version(package) for package in ("torch", "timm", "numpy")},
            }
            (partial / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
            (partial / _PROGRESS).unlink()
            if path.exists():
                shutil.rmtree(path)
            partial.replace(path)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
            raise
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


def _check_room(directory: Path, layout: _Layout, *, done: int, split: str, progress: bool) -> None:
    free = shutil.disk_usage(directory).free
    needed = (layout.num_pictures - done) * sum(layout.row_bytes)
    text = (
        f"features of {layout.num_pictures} pictures ({split}), {layout.patch_shape[0]} patches of width {layout.patch_shape[1]} "
        f"in {layout.dtype}: {_size(layout.num_pictures * sum(layout.row_bytes))}"
    )
    if needed > free:
        raise OSError(f"{directory}: no room for the {text}; {_size(free)} are free. Free some, or set another cache folder")
    if progress:
        resumed = f", {done} of them done before" if done else ""
        Console(stderr=True).print(f"Caching {text}{resumed}; {_size(free)} free in {directory}", highlight=False, markup=False)


def _encode(
    dataset: ConceptDataset,
    *,
    encoder: PatchEncoder,
    prepare: Callable[[ConceptSample], ConceptSample],
    start: int,
    batch_size: int,
    progress: bool,
    advance: Callable[[int], None] | None,
) -> Iterator[PatchFeatures]:
    """The features of the rows from `start` on, batch by batch, without gradients, on the CPU."""
    module = encoder if isinstance(encoder, nn.Module) else None
    weight = next(module.parameters(), None) if module else None
    device = weight.device if weight is not None else torch.device("cpu")
    if device.type == "cpu":
        batch_size = min(batch_size, _CPU_BATCH)
    was_training = module is not None and module.training
    if module:
        module.eval()

    def load(row: int) -> Tensor:
        picture = prepare(dataset.sample(row, masks=False)).image
        if picture is None:
            raise ValueError(f"{dataset.names[row]}: prepare gave no picture")
        return picture

    batches = [range(i, min(i + batch_size, len(dataset))) for i in range(start, len(dataset), batch_size)]
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))  # pictures are decoded while the encoder works
    if advance is not None and start:
        advance(start)
    try:
        coming = [pool.submit(load, row) for row in batches[0]] if batches else []
        description = f"Encoding {dataset.split}"
        for i, _ in enumerate(track(batches, description=description, disable=not progress, console=Console(stderr=True))):
            pictures = torch.stack([future.result() for future in coming]).to(device, memory_format=torch.channels_last)
            coming = [pool.submit(load, row) for row in batches[i + 1]] if i + 1 < len(batches) else []
            with torch.no_grad():
                features = encoder(pictures).to("cpu", torch.float32)
            yield features
            if advance is not None:
                advance(len(features.global_BD))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if module:
            module.train(was_training)


class _Writer:
    """Appends rows to the two files, and notes how many of them are safely on the disk.

    Written through a file handle, not through a memory map: a full disk is an OSError here and a killed process there.
    """

    def __init__(self, folder: Path, layout: _Layout) -> None:
        self.folder = folder
        self.layout = layout
        try:
            self.num_rows = min(int(json.loads((folder / _PROGRESS).read_text())), layout.num_pictures)
        except (FileNotFoundError, ValueError, TypeError):
            self.num_rows = 0
        self._headers = [_header(shape, layout.dtype) for shape in layout.shapes]
        for name, header, row_bytes in zip(_FILES, self._headers, layout.row_bytes):
            path = folder / name
            if not path.is_file() or path.stat().st_size < len(header) + self.num_rows * row_bytes:
                self.num_rows = 0

    def write(self, batches: Iterator[PatchFeatures]) -> None:
        """Append the features of `batches`, cutting what a killed process wrote beyond the noted rows.

        Raises:
            ValueError: Features that the type cannot hold.
        """
        with ExitStack() as stack:
            stack.callback(batches.close) if isinstance(batches, Generator) else None
            files = []
            for name, header, row_bytes in zip(_FILES, self._headers, self.layout.row_bytes):
                file = stack.enter_context((self.folder / name).open("r+b" if self.num_rows else "wb"))
                if not self.num_rows:
                    file.write(header)
                file.seek(len(header) + self.num_rows * row_bytes)
                file.truncate()
                files.append(file)
            noted = time.monotonic()
            try:
                for features in batches:
                    detail_BNL = features.detail_BNL
                    patch_BNX = features.patch_BND if detail_BNL is None else torch.cat([features.patch_BND, detail_BNL], 2)
                    for file, values in zip(files, (patch_BNX, features.global_BD)):
                        self._check_range(values)
                        file.write(np.ascontiguousarray(values.numpy().astype(self.layout.dtype)).data)
                    self.num_rows += len(features.global_BD)
                    if time.monotonic() - noted > _NOTE_SECONDS:
                        self._note(files)
                        noted = time.monotonic()
            finally:
                self._note(files)

    def _note(self, files: list[BinaryIO]) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        (self.folder / _PROGRESS).write_text(str(self.num_rows))

    def _check_range(self, values: Tensor) -> None:
        largest, limit = float(values.abs().max()), float(np.finfo(self.layout.dtype).max)
        if largest <= limit:
            return
        advice = "cache them as float32" if largest < float("inf") else "check the encoder's weights and preprocessing"
        rows = f"{self.num_rows} to {self.num_rows + len(values) - 1}"
        raise ValueError(f"features of the pictures {rows} reach {largest:g}, {self.layout.dtype} holds up to {limit:g}; {advice}")


def _header(shape: tuple[int, ...], dtype: FeatureType) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@contextmanager
def _locked(lock: Path, *, shared: bool = False) -> Iterator[None]:
    """Only one process at a time is inside, or only those that share, where the system has flock; the lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with lock.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


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
