"""A model whose encoder lies in shares on several processes, under Lightning's ModelParallelStrategy.

    encoder     expert layers by expert, all other weights by FSDP2 (`dotcbm.moe.parallel`); or all weights by FSDP2
    bottleneck  whole on every process, with gradients averaged as DDP does

Checkpoints and saved models hold whole weights: they are the same whatever they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.concept_model import ConceptModel
from dotcbm.moe.parallel import parallelize_experts, shard

__all__ = ["copy_whole", "distribute", "forget_made_up_moments", "is_sharded", "whole", "whole_model"]


def distribute(model: ConceptModel, trainer: pl.Trainer, mesh: DeviceMesh, *, expert_parallel: bool = True) -> None:
    """Divide the model among the processes, in place; without effect where that is done.

    Args:
        model: With weights that are the same on every process.
        trainer: With a `ModelParallelStrategy`.
        mesh: The strategy's.
        expert_parallel: Give each process whole experts, to which tokens travel; else a share of every weight, and no token travels.

    Raises:
        ValueError: An encoder without experts or a frozen one, experts that the processes do not divide (with `expert_parallel`), or
            settings of the strategy that do not go with it.
    """
    if is_sharded(model):
        return
    strategy, encoder = cast(ModelParallelStrategy, trainer.strategy), model.encoder
    if not encoder.has_experts or not encoder.trainable:
        raise ValueError(
            f"ModelParallelStrategy divides a trainable vit_moe/<size>, and the encoder is {encoder.name}, "
            f"{'trainable' if encoder.trainable else 'frozen'}; set trainer.strategy to ddp"
        )
    ranks = mesh["data_parallel"]
    if ranks.size() != trainer.world_size or strategy._save_distributed_checkpoint:
        raise ValueError(
            f"of ModelParallelStrategy set data_parallel_size: {trainer.world_size}, tensor_parallel_size: 1 and "
            "save_distributed_checkpoint: false; every process has its own pictures, and checkpoints hold whole weights"
        )
    encoder.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    if expert_parallel:
        parallelize_experts(encoder, ranks)
    blocks = cast(nn.ModuleList, cast(Any, encoder.tower).model.blocks)
    shard(encoder, ranks, blocks=list(blocks))
    kind = type(model.bottleneck)
    replicate(model.bottleneck, device_mesh=ranks)
    model.bottleneck.__class__ = kind  # what replicates it are hooks; by its class a saved model is known


def is_sharded(module: nn.Module) -> bool:
    """Whether any of its weights lies in shares."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(value: Tensor) -> Tensor:
    """The tensor itself, or all shares of it together; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, where each may be whole or in shares."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def forget_made_up_moments(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Drop the moments of weights that have had no gradient; every process must call it, before its first step.

    To save the state of an optimizer that has made no step, PyTorch 2.14 lets it make one of gradient 0 and rate 0. Adam counts it, and its
    first true step would be a quarter shorter.
    """
    for optimizer in optimizers:
        for parameter, state in list(optimizer.state.items()):
            if "exp_avg_sq" in state and not whole(state["exp_avg_sq"]).any():
                del optimizer.state[parameter]


def whole_model(model: ConceptModel) -> ConceptModel:
    """The model itself, or one with whole weights if they lie in shares; every process must call it."""
    if not is_sharded(model):
        return model
    state: Mapping[str, Tensor] = {name: whole(value).detach() for name, value in model.encoder.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        encoder = ImageEncoder(**model.encoder.settings, blueprint=model.encoder.blueprint)
    encoder.load_state_dict(state)
    gathered = ConceptModel(encoder, model.bottleneck).eval()
    gathered.edits = model.edits
    return gathered
