"""Where an audit keeps what it has measured so far, so that one that was stopped goes on.

Each piece is a file of tensors, written beside its place and moved there: it is whole or not there. Pieces lie in a folder named by a hash
of everything they depend on, so that another model, split or setting never meets them.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Store", "digest", "weights_digest"]

Tensors = dict[str, Tensor]


class Store:
    """Pieces of one audit on disk, or nowhere.

    Attributes:
        folder: Of the pieces; None keeps nothing.
    """

    def __init__(self, directory: Path | None, *, key: str) -> None:
        """Args:
        directory: Folder for the pieces of all audits; None keeps nothing.
        key: Hash of what the pieces depend on.
        """
        self.folder = None if directory is None else Path(directory) / key[:16]
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """The piece of that name, from disk if it is there; else computed and written."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.pt"
        found = _read(path)
        if found is not None:
            return found
        made = compute()
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as opened:
                torch.save({key: value.contiguous() for key, value in made.items()}, opened)
                opened.flush()
                os.fsync(opened.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return made

    def clear(self) -> None:
        """Remove the pieces, and their folder's parent if nothing else is in it."""
        if self.folder is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def _read(path: Path) -> Tensors | None:
    """None for a piece that is not there, or was damaged by other hands than ours."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
        return None


def digest(parts: Iterable[str | bytes | Tensor]) -> str:
    """SHA-256 of texts and tensors, each preceded by its length."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            total.update(f"{part.dtype} {tuple(part.shape)};".encode())
            raw = part.reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b""
        else:
            raw = part.encode() if isinstance(part, str) else part
        total.update(f"{len(raw)};".encode())
        total.update(raw)
    return total.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, with their names."""
    parts: list[str | Tensor] = []
    for name, value in sorted(module.state_dict().items()):
        parts += [name, value]
    return digest(parts)
