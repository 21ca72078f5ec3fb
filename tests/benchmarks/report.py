"""What a benchmark command prints and writes: the machine it ran on, tables, and raw numbers."""

from __future__ import annotations

import gc
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .tables import Table

__all__ = ["Report", "device_of", "free"]


class Report:
    """Prints each table as it is found, and writes what there is until then, so that a run that is cut short keeps it."""

    def __init__(self, name: str, args: Sequence[str] | None, *, device: torch.device, packages: Sequence[str], out: str | None) -> None:
        """Args:
        name: Of the module that is the command; files are called <name>_<device>.
        args: Of the command; None for those of this process.
        device: Where it runs.
        packages: Whose versions matter.
        out: Folder to write to; None for none.
        """
        self.console = Console(width=None if sys.stdout.isatty() else 200)
        self.name = name
        self.about = {
            "command": shlex.join(["python", "-m", f"tests.benchmarks.{name}", *(sys.argv[1:] if args is None else args)]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "python": platform.python_version(),
            "versions": ", ".join(f"{package} {_version(package)}" for package in packages),
        }
        self.out = Path(out) / f"{name}_{device.type}" if out else None
        self.tables: list[Table] = []
        self.raw: dict[str, list[dict[str, Any]]] = {}
        self._last = time.perf_counter()
        for key, value in self.about.items():
            self.console.print(f"{key}: {value}", highlight=False, soft_wrap=True)

    def add(self, table: Table) -> None:
        """Print a table, and write it with the next numbers."""
        self.tables.append(table)
        seconds, self._last = time.perf_counter() - self._last, time.perf_counter()
        self.console.print(table.rich(), f"({seconds:.0f} s)\n", highlight=False)

    def keep(self, kind: str, records: Sequence[Any], **where: Any) -> None:
        """Write dataclasses under `kind`, and what is there already."""
        self.raw.setdefault(kind, []).extend({**where, **asdict(record)} for record in records)
        if self.out:
            self._write(self.out)

    def _write(self, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        head = [f"# {self.name.capitalize()}, benchmark", "", *(f"- {key}: {value}" for key, value in self.about.items()), ""]
        text = "\n".join([*head, *(table.markdown() for table in self.tables)])
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        raw = json.dumps({"about": self.about, **self.raw}, indent=1, allow_nan=False)
        out.with_suffix(".json").write_text(raw + "\n", encoding="utf-8")


def device_of(name: str) -> torch.device:
    """The device, if it is there; else the command ends."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs an NVIDIA GPU that torch can see; use --device cpu, or --quick for a trial")
    return device


def free(device: torch.device) -> None:
    """Give back memory that nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _processor() -> str:
    """The processor's model where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, one thread"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
