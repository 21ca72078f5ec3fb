"""A config parser that guesses what was meant: near matches for misspelt keys, options and classes, with the place in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from dotcbm.catalog import subclasses
from dotcbm.cli.suggest import nearest
from dotcbm.data.source import ConceptSource
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.text import TextEncoder
from dotcbm.models.base import Bottleneck

__all__ = ["ConfigError", "ConfigParser", "config_files", "where_in"]

# What jsonargparse says, by kind of mistake.
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)|module '[\w.]+' has no attribute '(\w+)'|No module named '([\w.]+)'")
_NO_OPTION = re.compile(r"[Oo]ption '([\w.-]+)' is not accepted|does not accept option '([\w.-]+)'")
_DONE = re.compile(r"there is no option '([^']+)'(?:; did you mean [\w.]+\?)?")
_KEY = re.compile(r'Parser key "([\w.]+)":?')


class ConfigError(SystemExit):
    """A config or command line that cannot be read: leaves with status 2.

    Attributes:
        message: What is wrong, and what was probably meant.
        key: The key at fault, as far as known.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(2)
        self.message = message
        self.key = key


class ConfigParser(LightningArgumentParser):
    """LightningCLI's parser, with short messages that suggest a name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `ConfigError`; or what jsonargparse expects while it tries one of several types."""
        message, key = self._better(message)
        if not self.exit_on_error:
            super().error(message, ex)
        raise ConfigError(message, key=key) from ex

    def _better(self, message: str) -> tuple[str, str | None]:
        """A message with a suggestion, and the word of the config at fault. Parsers of inner classes speak before those around them."""
        key = found.group(1) if (found := _KEY.search(message)) else None
        if found := _DONE.search(message):
            return f"{key}: {found.group(0)}" if key else found.group(0), found.group(1).rpartition(".")[2]
        if found := _NO_OPTION.search(message):
            name = found.group(1) or found.group(2)
            first = name.partition(".")[0]
            at_fault = name.rpartition(".")[2] if first in _firsts(self._options()) else first
            return f"there is no option {name!r}{_nearest_option(name, self._options())}", at_fault
        if found := _NO_CLASS.search(message):
            name = next(filter(None, found.groups()))
            known = known_classes(key or "")
            return f"{key}: there is no class {name!r}{nearest(name.rpartition('.')[2], known)}\n  known: {', '.join(known)}", name
        if message.startswith("unrecognized arguments"):
            words = [word.partition("=")[0] for word in message.partition(": ")[2].split() if word.startswith("--")]
            message += "".join(_nearest_option(word.removeprefix("--"), self._options(), prefix="--") for word in words)
        return _KEY.sub(r"\1:", message), None if key is None else key.rpartition(".")[2]

    def _options(self) -> list[str]:
        parsers = [self, *(getattr(self._subcommands_action, "_name_parser_map", None) or {}).values()]
        return [action.dest for parser in parsers for action in parser._actions if not action.dest.endswith(".help")]


def known_classes(key: str) -> list[str]:
    """The class names that fit a key of a config."""
    if key.endswith("source"):
        return list(subclasses(ConceptSource, package="dotcbm.data"))
    if key.endswith("bottleneck"):
        return list(subclasses(Bottleneck, package="dotcbm.models"))
    if key.endswith("encoder"):
        return [ImageEncoder.__name__]
    if key.endswith("text"):
        return [TextEncoder.__name__]
    base = Logger if "logger" in key else Callback
    return sorted(cls.__name__ for cls in _all_subclasses(base) if not cls.__name__.startswith("_"))


def _all_subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _all_subclasses(cls)


def _nearest_option(name: str, options: Sequence[str], *, prefix: str = "") -> str:
    """The nearest of dotted options; if only their first part is known or near, the nearest first part."""
    first, firsts = name.partition(".")[0], _firsts(options)
    if "." in name and first not in firsts:
        return nearest(first, firsts)
    return nearest(prefix + name, [f"{prefix}{option}" for option in options])


def _firsts(options: Sequence[str]) -> set[str]:
    return {option.partition(".")[0] for option in options}


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that `--config` (or `-c`) names on a command line."""
    found: list[Path] = []
    for i, word in enumerate(arguments):
        if word in ("--config", "-c") and i + 1 < len(arguments):
            found.append(Path(arguments[i + 1]))
        elif word.startswith("--config="):
            found.append(Path(word.partition("=")[2]))
    return found


def where_in(files: Sequence[Path], word: str) -> str | None:
    """ "file, line n" of the first line of the files that has `word` as a key or value; None if it is in none of them."""
    pattern = re.compile(rf"(?<![\w.]){re.escape(word)}(?![\w])")
    for path in files:
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if pattern.search(line.partition("#")[0]):
                    return f"{path}, line {number}"
    return None


def check_yaml(files: Sequence[Path]) -> None:
    """Complain of a file that is missing, no YAML, or no mapping.

    Raises:
        ConfigError: Naming the file, and the line that YAML stumbles over.
    """
    for path in files:
        try:
            values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            raise ConfigError(f"{path}: no such config{nearest(str(path), siblings)}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds a {type(values).__name__}; a config is a mapping with model, data and trainer")
