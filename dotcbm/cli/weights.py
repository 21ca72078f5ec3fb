"""Pretrained weights in the local caches. Nothing here opens a connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["cached_models", "hub_cache", "readable_size", "torch_cache"]

_WEIGHTS = frozenset({".bin", ".npz", ".pt", ".pth", ".safetensors"})


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def torch_cache() -> Path:
    """Where torch.hub keeps weights."""
    from torch import hub

    return Path(hub.get_dir()) / "checkpoints"


def cached_models() -> Iterator[tuple[str, str]]:
    """(name, size) of every model with weights in a cache."""
    for folder in sorted(hub_cache().glob("models--*")):
        files = [path for path in folder.glob("snapshots/*/*") if path.suffix in _WEIGHTS and path.exists()]
        if files:
            yield folder.name.removeprefix("models--").replace("--", "/"), readable_size(sum(path.stat().st_size for path in files))
    for path in sorted(torch_cache().glob("*")):
        if path.suffix in _WEIGHTS:
            yield path.name, readable_size(path.stat().st_size)


def readable_size(num_bytes: float) -> str:
    """1234567 -> "1.2 MB" """
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if num_bytes < 1000:
            break
        num_bytes, unit = num_bytes / 1000, larger
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
