"""`dotcbm list`: what there is to choose from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dotcbm.catalog import first_line, load_all, subclasses
from dotcbm.cli.parser import Parser

__all__ = ["run"]

_TOPICS = ("sources", "encoders", "models", "configs", "metrics")
DEMO_CONFIG = Path(__file__).with_name("demo.yaml")


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parser = Parser(command, "List what there is to choose from.")
    parser.add_argument("topic", nargs="?", choices=_TOPICS, help="what to list (default: everything)")
    parser.add_argument("--find", metavar="WORD", help="with encoders: every timm and open_clip name that holds this word")
    parser.add_argument("--configs", type=Path, default=Path("configs"), metavar="DIR", help="where configs lie (default: %(default)s)")
    given = parser.parse(arguments)
    if given.find is not None and given.topic != "encoders":
        parser.error("--find works with: dotcbm list encoders --find WORD")
    console = Console()
    for topic in [given.topic] if given.topic else _TOPICS:
        table = {
            "sources": _sources,
            "encoders": lambda: _encoders(given.find),
            "models": _models,
            "configs": lambda: _configs(given.configs),
            "metrics": _metrics,
        }[topic]()
        console.print(table)
    return 0


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(headings))
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading)
    return table


def _sources() -> Table:
    from dotcbm.data.source import ConceptSource

    table = _table("Data sources (data.source in a config)", "class", "what it reads", "settings")
    for name, cls in subclasses(ConceptSource, package="dotcbm.data").items():
        table.add_row(name, first_line(cls), _settings(cls))
    return table


def _models() -> Table:
    from dotcbm.models.base import Bottleneck

    table = _table("Bottlenecks (model.bottleneck in a config)", "class", "what it is", "settings")
    for name, cls in subclasses(Bottleneck, package="dotcbm.models").items():
        table.add_row(name, first_line(cls), _settings(cls))
    return table


def _settings(cls: type) -> str:
    known = inspect.signature(cls.__init__).parameters
    return ", ".join(name for name in known if name not in ("self", "problem"))


def _encoders(word: str | None) -> Table:
    import timm

    from dotcbm.cli.weights import cached_models
    from dotcbm.encoders.vit_moe_settings import SIZES, vit_moe_names

    timm_names = [f"timm/{name}" for name in timm.list_models(pretrained=False)]
    clip_names = _clip_names()
    if word is not None:
        table = _table(f"Encoders with {word!r} in their name", "name", "")
        known = [f"timm/{name}" for name in timm.list_pretrained()] + timm_names + (clip_names or []) + vit_moe_names()
        for name in sorted({name for name in known if word.lower() in name.lower()}):
            table.add_row(name, "")
        return table
    table = _table("Encoders (model.encoder.name in a config)", "name", "what it is")
    table.add_row("timm/<model>[.tag]", f"{len(timm_names)} architectures; dotcbm list encoders --find WORD")
    clip = "needs open_clip: pip install 'dotcbm\\[clip]'" if clip_names is None else f"{len(clip_names)} models and tags"
    table.add_row("open_clip/<arch>[@tag]".replace("[", "\\["), clip)
    table.add_row("vit_moe/<size>", f"a ViT with sparse experts; sizes: {', '.join(SIZES)}")
    table.add_row("local-dir:<path>", "a folder in timm's format (config.json, model.safetensors) or open_clip's")
    for name, size in cached_models():
        table.add_row(f"  {name}", f"cached on this machine, {size}")
    return table


def _clip_names() -> list[str] | None:
    try:
        import open_clip
    except ModuleNotFoundError:
        return None
    return [f"open_clip/{architecture}@{tag}" for architecture, tag in open_clip.list_pretrained()]


def _configs(directory: Path) -> Table:
    table = _table("Configs (dotcbm fit --config FILE)", "file", "what it does")
    paths = sorted(directory.glob("*.yaml")) if directory.is_dir() else []
    for path in [*paths, DEMO_CONFIG]:
        comment = next((line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")), "")
        table.add_row(str(path), comment)
    return table


def _metrics() -> Table:
    table = _table("Metrics (functions of dotcbm.metrics; over batches: dotcbm.metrics.accumulators)", "function", "what it measures")
    for module in load_all("dotcbm.metrics"):
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            if inspect.isfunction(found):
                table.add_row(f"{module.__name__.removeprefix('dotcbm.metrics.')}.{name}", first_line(found))
    return table
