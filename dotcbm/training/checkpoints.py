"""Checkpoints that a run can be resumed from, whatever stops it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from dotcbm.training.guard import check_weights

__all__ = ["CheckpointWriteError", "Checkpoints", "resume_command"]


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the one before it is intact."""


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` before the first step and after each epoch, and `model.ckpt` when training has ended.

    `last.ckpt` holds what resuming needs (weights, optimizer, best weights so far); resumed, a run ends with the weights
    it would have had without the stop. `model.ckpt` holds the finished model: best weights, fitted head. Both are written
    under another name first and then renamed, so that a file under its own name is always whole.

    Attributes:
        folder: Where they lie; known once training has started.
    """

    def __init__(self, directory: str | None = None, *, every: int = 1) -> None:
        """Args:
        directory: Where to write; `checkpoints` in the logger's folder, or in the trainer's root, by default.
        every: Epochs between two writes of `last.ckpt`.
        """
        super().__init__()
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least one epoch")
        self.directory = directory
        self.every = every
        self.folder: Path | None = None
        self.last_model_path = ""
        self.best_model_path = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, the same on all processes."""
        del pl_module
        if stage != "fit":
            return
        self.best_model_path = ""
        home = self.directory or str(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        self.folder = Path(trainer.strategy.broadcast(home))
        if trainer.ckpt_path and Path(trainer.ckpt_path).is_file():
            self.last_model_path = str(trainer.ckpt_path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the first one, unless the run was resumed."""
        del pl_module
        if not trainer.ckpt_path:
            self.last_model_path = self._write(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `last.ckpt`, if the weights are sound."""
        check_weights(pl_module, epoch=trainer.current_epoch, checkpoint=self.last_model_path)
        if (trainer.current_epoch + 1) % self.every == 0 or trainer.current_epoch + 1 == trainer.max_epochs:
            self.last_model_path = self._write(trainer, "last.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `model.ckpt`. Lightning calls checkpoint callbacks last, so the head is fitted by now."""
        del pl_module
        self.best_model_path = self._write(trainer, "model.ckpt")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for a run that was stopped after its last epoch and resumed: Lightning ends it without training."""
        if not self.best_model_path:
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """After Ctrl-C say where the checkpoint is and how to go on."""
        del trainer, pl_module
        if isinstance(exception, KeyboardInterrupt) and self.last_model_path:
            rank_zero_info(f"Stopped. The checkpoint is {self.last_model_path}; go on with\n  {resume_command(self.last_model_path)}")

    def _write(self, trainer: pl.Trainer, name: str) -> str:
        assert self.folder is not None
        path = self.folder / name
        partial = path.with_name(f".{name}.partial")
        try:
            if trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(partial, weights_only=False)
            if trainer.is_global_zero:
                partial.replace(path)
        except (OSError, RuntimeError) as error:
            # torch's zip writer reports a full disk as a RuntimeError.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            partial.unlink(missing_ok=True)
            before = f"the one before it is intact: {path}" if path.exists() else "there is none from before"
            raise CheckpointWriteError(
                getattr(error, "errno", None),
                f"{path}: the checkpoint could not be written ({error}); {before}. Free some room on the disk and resume",
            ) from error
        return str(path)


def resume_command(checkpoint: str) -> str:
    """The command that goes on from a checkpoint: the one that was given, with `--ckpt_path`."""
    program, *arguments = sys.argv
    if Path(program).name != "dotcbm" or "fit" not in arguments:
        return f"trainer.fit(task, data, ckpt_path={checkpoint!r})"
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--ckpt_path":
            skip = True
        elif not argument.startswith("--ckpt_path="):
            kept.append(argument)
    return shlex.join(["dotcbm", *kept, "--ckpt_path", checkpoint])
