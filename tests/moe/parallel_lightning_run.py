"""The run that test_parallel.py makes under Lightning's ModelParallelStrategy, in one process and in two."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from parallel_run import batch, model
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from dotcbm.moe.parallel import parallelize_experts, shard


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vit = model()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            parallelize_experts(self.vit, mesh)
            shard(self.vit, mesh, blocks=list(self.vit.blocks))

    def train_dataloader(self) -> DataLoader:
        # Lightning's own sampler shuffles; this one gives two processes the same pictures in a step that one has.
        pictures, num_ranks = TensorDataset(torch.cat([batch(0), batch(1)])), self.trainer.world_size
        sampler = DistributedSampler(pictures, num_ranks, self.global_rank, shuffle=False)
        return DataLoader(pictures, batch_size=4 // num_ranks, sampler=sampler)

    def training_step(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return self.vit(rows[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(folder: Path, *, devices: int, accelerator: str) -> dict[str, torch.Tensor]:
    """Weights after two steps of four pictures."""
    strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(Module())
    trainer.save_checkpoint(folder / "done.ckpt")
    return torch.load(folder / "done.ckpt", weights_only=True, map_location="cpu")["state_dict"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), devices=2, accelerator=sys.argv[2])
