"""`dotcbm predict --config`: the pictures of a run's data set, through Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from dotcbm.cli.predictions import Predictions, check_out
from dotcbm.cli.train import ConceptCli
from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet

__all__ = ["PredictCli"]


class _Collect(Callback):
    """Keeps the probabilities of each batch; Lightning itself would keep all maps of all pictures."""

    def __init__(self, concepts: ConceptSet) -> None:
        self.predictions = Predictions(concepts)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ConceptOutput | None,
        batch: ConceptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's hook."""
        del trainer, pl_module, batch_idx, dataloader_idx
        if outputs is not None:
            self.predictions.add(batch.names, outputs)


class PredictCli(ConceptCli):
    """`dotcbm predict --config FILE --out FILE`."""

    command = "predict"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's hook."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help="Ends in .parquet or .csv (default: <run_dir>/predictions.csv)")

    @property
    def out(self) -> Path:
        """The file to write."""
        return Path(self.given.out) if self.given.out else self.run_dir / "predictions.csv"

    def before_instantiate_classes(self) -> None:
        """Lightning's hook."""
        check_out(self.out)
        super().before_instantiate_classes()

    def predict(self, **kwargs: Any) -> None:
        """Predict and write."""
        if self.trainer.world_size > 1:
            raise ValueError("predict writes one file; run it on one device (--trainer.devices 1)")
        collect = _Collect(self.datamodule.concepts)
        self.trainer.callbacks.append(collect)  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.predict(**{**kwargs, "return_predictions": False})
        collect.predictions.write(self.out)
        skipped = self.datamodule.skipped
        left_out = f", {len(skipped)} skipped: {', '.join(skipped[:20])}" if skipped else ""
        print(f"{self.out}: {len(collect.predictions.names)} pictures{left_out}")
