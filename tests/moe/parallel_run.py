"""What test_parallel.py runs in two processes: each with half of the tokens, routed as one process routes them all."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dotcbm.encoders.vit_moe import create_vit_moe
from dotcbm.moe.layer import moe_layers
from dotcbm.moe.parallel import parallelize_experts, shard

STEPS = 3


def model(device: str = "cpu", **moe) -> VisionTransformer:
    torch.manual_seed(0)
    vit = create_vit_moe("test", pretrained=False, moe={"k": 2, "shared_hidden": 16, **moe})
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "router" in name:
                parameter.mul_(20)  # far from ties
    return vit.to(device)


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(step))


def loss_of(vit: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return vit(image).square().mean()


def train(vit: nn.Module, *, rank: int, num_ranks: int, replicated: list[nn.Parameter] | None = None) -> dict:
    """Losses, routing and weights of a few steps, in main memory."""
    device = next(vit.parameters()).device
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.05, foreach=False)  # weights in shares and whole ones
    told: dict = {"index": [], "logit": [], "loss": []}
    for step in range(STEPS):
        image = batch(step).tensor_split(num_ranks)[rank].to(device)
        loss = loss_of(vit, image)
        for layer in moe_layers(vit).values():
            told["index"].append(layer.routing.index_TK.cpu().clone())
            told["logit"].append(layer.routing.logit_TE.detach().cpu().clone())
        optimizer.zero_grad()
        loss.backward()
        for parameter in replicated or []:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= num_ranks
        optimizer.step()
        told["loss"].append(loss.detach().cpu())
    state = {name.removeprefix("module."): value for name, value in vit.state_dict().items()}
    told["state"] = {name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu() for name, value in state.items()}
    return told


def run(kind: str, device: str) -> dict:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (num_ranks,))
    vit = model(device)
    if kind == "ddp":
        return train(DistributedDataParallel(vit), rank=rank, num_ranks=num_ranks)
    if kind == "fsdp":
        shard(vit, mesh, blocks=list(vit.blocks))
        return train(vit, rank=rank, num_ranks=num_ranks)
    if kind == "experts":
        parallelize_experts(vit, mesh)
        assert vit.blocks[1].mlp.experts.up_EDH.to_local().shape[0] == 4
        replicated = [parameter for parameter in vit.parameters() if not isinstance(parameter, DTensor)]
        return train(vit, rank=rank, num_ranks=num_ranks, replicated=replicated)
    if kind == "both":
        parallelize_experts(vit, mesh)
        shard(vit, mesh, blocks=list(vit.blocks))
        return train(vit, rank=rank, num_ranks=num_ranks)
    if kind == "half":
        shard(vit, mesh, blocks=list(vit.blocks), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        out = vit(batch(0).to(device))
        out.float().mean().backward()
        return {"logits": str(vit.blocks[1].mlp.routing.logit_TE.dtype), "patches": str(out.dtype)}
    assert kind == "odd"
    try:
        parallelize_experts(model(device, num_experts=7), mesh)
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "nothing"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, device, rank, *kinds = sys.argv[1:]
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=2)
    for kind in kinds:
        torch.save(run(kind, device), f"{folder}/{kind}{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
