"""What a run's config says, for commands that need its data and settings but no trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dotcbm.catalog import subclasses
from dotcbm.cli.config_parser import ConfigError, ConfigParser, check_yaml, where_in
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptSource

__all__ = ["RunConfig", "read_run_config"]


@dataclass(frozen=True)
class RunConfig:
    """A config, read.

    Attributes:
        path: The file.
        text: What it says.
        data: Its data module, built.
        model: The settings of its task, as written; those left out have the defaults of `ConceptTask`.
    """

    path: Path
    text: str
    data: ConceptDataModule
    model: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The run's finished model: `model/` beside the config, or below runs/<name of the config>.

        Raises:
            ValueError: There is none.
        """
        folder = self.path.parent if self.path.name == "config.yaml" else Path("runs") / self.path.stem
        found = next((p for p in (folder / "model", folder / "checkpoints" / "model.ckpt") if p.exists()), None)
        if found is None:
            raise ValueError(
                f"{folder}: holds no finished model (model/ or checkpoints/model.ckpt); train first, or give --checkpoint PATH"
            )
        return found


def read_run_config(path: Path) -> RunConfig:
    """Read a config and build its data.

    Raises:
        ConfigError: The file is missing or no YAML, has no data, or names what does not exist; file and line are in the message.
    """
    if path.is_dir():
        inside = path / "config.yaml"
        raise ConfigError(f"{path}: is a folder; give {inside if inside.is_file() else 'the config.yaml of a run'}")
    check_yaml([path])
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if not isinstance(values.get("data"), dict):
        raise ConfigError(f"{path}: says nothing of the data; give the config.yaml of a run")
    subclasses(ConceptSource, package="dotcbm.data")  # so that jsonargparse knows the short names of all sources
    parser = ConfigParser(prog="dotcbm")
    parser.add_class_arguments(ConceptDataModule, "data")
    try:
        parsed = parser.parse_object({"data": values["data"]})
        data = parser.instantiate_classes(parsed)["data"]
    except ConfigError as error:
        place = where_in([path], error.key) if error.key else None
        raise ConfigError(f"{place or path}: {error.message}", key=error.key) from None
    model = values.get("model")
    return RunConfig(path=path, text=text, data=data, model=model if isinstance(model, dict) else {})
