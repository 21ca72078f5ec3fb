"""`dotcbm fit`, `validate` and `test` (and `predict --config`): LightningCLI with a run folder, a result table and near matches.

A run lives in one folder, `runs/<name of the config>` unless `--run_dir` says otherwise:

    config.yaml              all settings, defaults included: enough to run it again
    metrics.csv              what was logged
    checkpoints/last.ckpt    to resume from, written after each epoch
    checkpoints/model.ckpt   the finished training run
    model/                   the finished model (`dotcbm.hub`), for `dotcbm explain`, `predict` and `export`
    test.json                what `dotcbm test` measured
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

import dotcbm
from dotcbm.catalog import subclasses
from dotcbm.cli.config_parser import ConfigError, ConfigParser, check_yaml, config_files, where_in
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptSource
from dotcbm.hub import CardInfo, save_pretrained
from dotcbm.models.base import Bottleneck
from dotcbm.training.checkpoints import Checkpoints
from dotcbm.training.evaluation import evaluate
from dotcbm.training.sharded import whole_model
from dotcbm.training.task import ConceptTask

__all__ = ["ConceptCli", "FitCli", "TestCli", "ValidateCli", "figure_table", "launch", "run"]


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    return launch({"fit": FitCli, "validate": ValidateCli, "test": TestCli}[command], arguments)


# What Lightning says of things that are so on purpose, or that no user can change.
_KNOWN = (
    ".*treespec, LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*module\\(s\\) in eval mode.*",  # a frozen encoder
    ".*Previous log files in this directory.*",  # they were put aside
    ".*callbacks used to create the checkpoint.*",
    ".*does not have many workers.*",
)


def launch(cli: type[ConceptCli], arguments: Sequence[str]) -> int:
    """Parse, build and run; the exit status."""
    files = config_files(arguments)
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertising)
    try:
        check_yaml(files)
        # So that jsonargparse knows the short names of all sources and bottlenecks.
        subclasses(ConceptSource, package="dotcbm.data")
        subclasses(Bottleneck, package="dotcbm.models")
        cli([cli.command, *arguments])
    except ConfigError as error:
        place = where_in(files, error.key) if error.key else None
        print(f"dotcbm {cli.command}: {f'{place}: ' if place else ''}{error.message}", file=sys.stderr)
        return 2
    return 0


def _no_advertising(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "TPU available" not in record.getMessage()


_OF_ONE_START = ("resume", "overwrite", "ckpt_path")  # how a run was started once; the other commands read its config too


class _SaveConfig(SaveConfigCallback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config of training runs; measuring a model must not change what is written of its training."""
        if stage == "fit":
            self.config = self.config.clone()
            for name in _OF_ONE_START:
                self.config.pop(name, None)
            super().setup(trainer, pl_module, stage)


class _Lines(Callback):
    """A line an epoch, where no progress bar can be drawn."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        del pl_module
        metrics = trainer.callback_metrics  # reduced over processes, which must all ask
        if trainer.is_global_zero:
            shown = (name for name in ("train/loss", "val/concept_auroc", "val/accuracy") if name in metrics)
            told = ", ".join(f"{name} {float(metrics[name]):.4f}" for name in shown)
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {told}", flush=True)


class ConceptCli(LightningCLI):
    """What the commands share. One class a command, so that a command builds no parser but its own.

    Attributes:
        command: Its name.
    """

    command: str

    def __init__(self, arguments: Sequence[str]) -> None:
        """Args:
        arguments: The command and its options.
        """
        self.arguments = list(arguments)
        with warnings.catch_warnings():
            # Lightning warns of `args` beside sys.argv, which here are the same words.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                ConceptTask,
                ConceptDataModule,
                save_config_callback=_SaveConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"log_every_n_steps": 10},
                seed_everything_default=0,
                parser_class=ConfigParser,
                parser_kwargs={"prog": "dotcbm"},
                auto_configure_optimizers=False,
                args=self.arguments,
            )

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride] - static there
        """Lightning's hook: the command, and which arguments of the trainer's method are no options."""
        return {cls.command: set(LightningCLI.subcommands()[cls.command])}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's hook: config files are headed by our version too."""
        return super().init_parser(dump_header=[f"dotcbm=={dotcbm.__version__}"], **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's hook: options of our own."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run (default: runs/<name of the config>)")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's hook: look at the checkpoint before Lightning opens it, and say more than it does."""
        super().parse_arguments(parser, args)
        _check_checkpoint(self.given.ckpt_path)

    @property
    def given(self) -> Any:
        """The parsed options of the command."""
        return self.config[self.command]

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        if self.given.run_dir is not None:
            return Path(self.given.run_dir)
        files = config_files(self.arguments)
        # A config that was saved with a run is called config.yaml, and its folder is the run.
        if files and files[0].name == "config.yaml":
            return files[0].parent
        return Path("runs") / (files[0].stem if files else "unnamed")

    def before_instantiate_classes(self) -> None:
        """Lightning's hook: take the run's own checkpoint where none was named."""
        if self.command != "fit" and self.given.ckpt_path is None:
            found = self.run_dir / "checkpoints" / "model.ckpt"
            if not found.is_file():
                raise ValueError(f"{found}: no checkpoint there; train first (dotcbm fit), or give --ckpt_path FILE")
            self.given.ckpt_path = str(found)
            _check_checkpoint(self.given.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's hook: everything that a trainer writes goes to the run's folder."""
        chosen = self.given.trainer
        if chosen.logger is None:
            kwargs["logger"] = CSVLogger(self.run_dir.parent, name=self.run_dir.name, version="") if self.command == "fit" else False
        if chosen.default_root_dir is None:
            kwargs["default_root_dir"] = str(self.run_dir)
        extra: list[Any] = []
        if chosen.enable_progress_bar is not False and sys.stderr.isatty() and sys.stdout.isatty():
            extra.append(RichProgressBar(leave=False))
        elif chosen.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = False  # a log file is no place for one
            extra.append(_Lines())
        if self.command == "fit":
            extra.append(Checkpoints(str(self.run_dir / "checkpoints")))
        if chosen.enable_model_summary is None:
            kwargs["enable_model_summary"] = False
        self.trainer_defaults["callbacks"] = extra
        return super().instantiate_trainer(**kwargs)


class FitCli(ConceptCli):
    """`dotcbm fit`."""

    command = "fit"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's hook."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--resume", action="store_true", help="Go on from the run's checkpoints/last.ckpt")
        parser.add_argument("--overwrite", action="store_true", help="Train anew in a folder that holds a run")

    def before_instantiate_classes(self) -> None:
        """Lightning's hook: settle where the run starts from, before anything is built or written."""
        run_dir = self.run_dir
        if self.given.resume and self.given.ckpt_path is None:
            last = run_dir / "checkpoints" / "last.ckpt"
            if not last.is_file():
                raise ValueError(f"{last}: nothing to resume from; start without --resume")
            self.given.ckpt_path = str(last)
        elif self.given.ckpt_path is None and (run_dir / "config.yaml").is_file() and not self.given.overwrite:
            raise ConfigError(
                f"{run_dir} holds a run already; go on with it (--resume), train anew in its place (--overwrite), "
                "or choose another folder (--run_dir DIR)"
            )
        super().before_instantiate_classes()
        _keep_metrics(run_dir)

    def fit(self, **kwargs: Any) -> None:
        """Train; with Ctrl-C leave with status 130."""
        handler = signal.getsignal(signal.SIGINT)  # Lightning switches it off for good when it is interrupted
        try:
            self.trainer.fit(**kwargs)
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            raise SystemExit(130) from None  # `Checkpoints` has said how to go on
        finally:
            signal.signal(signal.SIGINT, handler)

    def after_fit(self) -> None:
        """Lightning's hook: measure the finished model on the validation split and write it."""
        if self.given.trainer.fast_dev_run:
            return
        model, data = whole_model(self.model.model), self.datamodule  # of which every process has its share
        if not self.trainer.is_global_zero:
            return
        figures: dict[str, dict[str, float]] = {}
        if data.has_validation:
            home = next(model.bottleneck.parameters()).device
            model.to(self.trainer.strategy.root_device)
            figures["val"] = evaluate(model, data.plain_loader("val", annotations="all"), data.concepts)
            model.to(home)
        card = CardInfo(
            data=f"`{data.source!r}`",
            metrics={f"{split}/{name}": value for split, row in figures.items() for name, value in row.items()},
            command=" ".join(["dotcbm", *self.arguments]),
        )
        self.say(figures, save_pretrained(model, self.run_dir / "model", card=card))

    def say(self, figures: Mapping[str, Mapping[str, float]], folder: Path) -> None:
        """Print what came out and what to do with it."""
        console = Console()
        if figures:
            console.print(figure_table(figures, title="Validation"))
        console.print(f"model: {folder}", highlight=False, soft_wrap=True)
        console.print(f"next: dotcbm explain IMAGE --checkpoint {folder}", highlight=False, soft_wrap=True)


class ValidateCli(ConceptCli):
    """`dotcbm validate`."""

    command = "validate"

    def validate(self, **kwargs: Any) -> None:
        """Measure and print."""
        self.trainer.validate(**{**kwargs, "verbose": False})
        Console().print(figure_table(_by_split(self.trainer.callback_metrics), title=f"{self.given.ckpt_path}"))


class TestCli(ConceptCli):
    """`dotcbm test`."""

    command = "test"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's hook."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help="JSON file with the figures (default: <run_dir>/test.json)")

    def test(self, **kwargs: Any) -> None:
        """Measure, print and write."""
        self.trainer.test(**{**kwargs, "verbose": False})
        if not self.trainer.is_global_zero:
            return
        figures = _by_split(self.trainer.callback_metrics)
        out = Path(self.given.out) if self.given.out else self.run_dir / "test.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        told = {"dotcbm": dotcbm.__version__, "checkpoint": str(self.given.ckpt_path), "splits": figures}
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        console = Console()
        console.print(figure_table(figures, title=f"{self.given.ckpt_path}"))
        console.print(f"written: {out}", highlight=False, soft_wrap=True)


def figure_table(figures: Mapping[str, Mapping[str, float]], *, title: str) -> Table:
    """Figures by split as a table: a row for each figure, a column for each split."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for split in figures:
        table.add_column(split, justify="right")
    for name in dict.fromkeys(name for row in figures.values() for name in row):
        table.add_row(name, *(_shown(row.get(name, math.nan)) for row in figures.values()))
    return table


def _shown(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4f}"


def _by_split(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """ "split/figure": value as figures by split."""
    figures: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        split, _, name = key.partition("/")  # names of figures may have slashes: experts/0/max_vio
        figures.setdefault(split, {})[name] = float(value)
    return figures


def _check_checkpoint(path: str | None) -> None:
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give a .ckpt file of a training run (explain, predict and export take a folder too)")
    if path is not None and not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    if path is not None:
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: cannot be read as a checkpoint ({error}); is it truncated?") from error


def _keep_metrics(run_dir: Path) -> None:
    """Put the log of an earlier start aside: Lightning's CSV logger deletes it."""
    log = run_dir / "metrics.csv"
    if log.is_file():
        number = 1
        while (aside := run_dir / f"metrics-{number}.csv").exists():
            number += 1
        log.rename(aside)
