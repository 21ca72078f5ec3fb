"""`dotcbm doctor`: what is installed, where models can run, what is cached, and what is missing for which command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import dotcbm
from dotcbm.cli.parser import Parser

__all__ = ["run"]

# Extra -> (what it is for, packages as pip names them). The packages without an extra come with dotcbm.
_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "": ("predict, explain", ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "matplotlib", "rich", "pyyaml")),
    "train": ("fit, validate, test, demo, Parquet", ("lightning", "jsonargparse", "torchmetrics", "pyarrow")),
    "clip": ("open_clip encoders and texts", ("open-clip-torch",)),
    "text": ("sentence encoders for concept names", ("sentence-transformers",)),
    "pot": ("the reference transport solver", ("pot",)),
    "attribution": ("captum attributions", ("captum",)),
    "audit": ("audit, compare, edit", ("jinja2", "scikit-learn")),
    "pdf": ("dotcbm audit --pdf", ("weasyprint",)),
    "export": ("dotcbm export --format onnx", ("onnx", "onnxruntime", "onnxscript")),
    "notebook": ("notebooks", ("ipykernel", "nbclient", "nbformat")),
}


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file. Status 1 if a package that dotcbm cannot do without is missing."""
    parser = Parser(command, "Say what is installed, where models can run, what is cached and what is missing.")
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), metavar="DIR", help="folder of the feature cache (default: %(default)s)"
    )
    given = parser.parse(arguments)
    console = Console()
    console.print(
        f"dotcbm {dotcbm.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}", highlight=False
    )
    absent = _packages(console)
    _devices(console)
    _caches(console, given.cache)
    if not absent:
        console.print("\nNothing is missing.")
        return 0
    console.print("\nMissing:")
    for extra, names in absent.items():
        target = f"dotcbm[{extra}]" if extra else "dotcbm"
        console.print(f'  {", ".join(names)} (for {_EXTRAS[extra][0]}): pip install "{target}"', highlight=False, markup=False)
    return 1 if "" in absent else 0


def _packages(console: Console) -> dict[str, list[str]]:
    absent: dict[str, list[str]] = {}
    table = Table(title="Packages", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("extra", "package", "version", "for"):
        table.add_column(heading)
    for extra, (purpose, names) in _EXTRAS.items():
        for i, name in enumerate(names):
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                version = "missing"
                absent.setdefault(extra, []).append(name)
            table.add_row(extra if i == 0 else "", name, version, purpose if i == 0 else "")
    console.print(table)
    return absent


def _devices(console: Console) -> None:
    console.print("\nDevices")
    console.print(f"  cpu: {os.cpu_count()} cores", highlight=False)
    try:
        import torch
    except ImportError as error:
        console.print(f"  torch cannot be imported: {error}", highlight=False, markup=False)
        return
    for i in range(torch.cuda.device_count()):
        console.print(f"  cuda:{i}: {torch.cuda.get_device_name(i)}", highlight=False, markup=False)
    if torch.backends.mps.is_available():
        console.print("  mps: available")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        console.print("  no graphics processor that torch can use; frozen encoders run once and are cached, the rest is quick on a CPU")


def _caches(console: Console, cache: Path) -> None:
    console.print("\nCached")
    features = [path for path in cache.rglob("*") if path.is_file()] if cache.is_dir() else []
    try:
        from dotcbm.cli.weights import cached_models, hub_cache, readable_size, torch_cache

        places = f"{hub_cache()}, {torch_cache()}"
        found = list(cached_models())
    except ImportError as error:
        console.print(f"  cannot look for weights: {error}", highlight=False, markup=False)
        return
    size = readable_size(sum(path.stat().st_size for path in features))
    console.print(f"  features: {size} in {cache}" if features else f"  features: none in {cache}", highlight=False, soft_wrap=True)
    console.print(f"  weights: {len(found) or 'none'} in {places}", highlight=False, soft_wrap=True)
    for name, weight_size in found:
        console.print(f"    {name}, {weight_size}", highlight=False, soft_wrap=True)
    nearest = next(folder for folder in [cache.resolve(), *cache.resolve().parents] if folder.exists())
    console.print(f"  room on the disk: {readable_size(shutil.disk_usage(nearest).free)}", highlight=False)
