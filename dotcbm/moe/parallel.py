"""Expert layers over several processes, by PyTorch's own DTensor and FSDP2.

    shard            FSDP2 (`fully_shard`): every process computes everything on its own pictures, and holds a share of each weight
    ExpertParallel   a style for `torch.distributed.tensor.parallel.parallelize_module`: every process holds E / P whole experts, and tokens
                     travel to their experts and back (two all-to-alls each way; no capacity, nothing dropped)

Both route as one process would: routers are computed in float32 from whole weights, and each process decides on its own tokens. Gradients
are means over processes, as DDP's are: of a loss that is a mean over as many pictures on each process, they are the whole batch's.

T tokens, D width, E experts, K experts per token, P processes, R = T K rows: one for each token and expert that meet.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.func import functional_call

from dotcbm.moe.dispatch import Order, collect, dispatch
from dotcbm.moe.experts import Backend, Experts
from dotcbm.moe.layer import moe_layers

__all__ = ["ExpertParallel", "check_ranks", "parallelize_experts", "shard"]


def check_ranks(num_experts: int, num_ranks: int) -> None:
    """Raises ValueError: The experts cannot be divided evenly over the processes."""
    if num_experts % num_ranks:
        raise ValueError(
            f"{num_experts} experts cannot be divided evenly over {num_ranks} processes; choose a number of experts that {num_ranks} "
            f"divides, such as {num_ranks * max(1, round(num_experts / num_ranks))}, or another number of processes"
        )


def shard(module: nn.Module, mesh: DeviceMesh, *, blocks: list[nn.Module], mp_policy: MixedPrecisionPolicy | None = None) -> None:
    """Shard a model by FSDP2, in place.

    Args:
        module: The model. Its weights are gathered when it is called, not when another of its methods is. Experts that
            `parallelize_experts` has distributed stay as they are.
        mesh: One dimension, the processes.
        blocks: Modules that are gathered one at a time, such as the blocks of a ViT.
        mp_policy: Mixed precision of everything but the routers, whose rounded logits would choose other experts.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    ours: set[nn.Parameter] = {parameter for parameter in module.parameters() if isinstance(parameter, DTensor)}
    for layer in moe_layers(module).values():
        fully_shard(layer.router, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ours)
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ours)


def parallelize_experts(module: nn.Module, mesh: DeviceMesh) -> None:
    """Distribute the experts of all layers of a model, in place; all else stays on every process.

    Unless `shard` follows, an optimizer of the model needs `foreach=False` on a GPU: PyTorch updates no lists in which some weights
    lie in shares and others are whole.

    Args:
        module: Holds the layers. Its weights must be the same on all processes.
        mesh: One dimension, the processes.

    Raises:
        ValueError: A number of experts that the number of processes does not divide, before anything is changed.
    """
    layers = moe_layers(module)
    for layer in layers.values():
        check_ranks(layer.num_experts, mesh.size())
    parallelize_module(module, mesh, {f"{name}.experts" if name else "experts": ExpertParallel() for name in layers})


class ExpertParallel(ParallelStyle):
    """For `dotcbm.moe.experts.Experts`: process p holds experts p E / P to (p + 1) E / P, as a DTensor sharded by expert."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Experts):
            raise ValueError(f"expert parallelism is of Experts, not of {type(module).__name__}")
        check_ranks(module.num_experts, device_mesh.size())
        for name, parameter in list(module.named_parameters()):
            placed = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))
        module.__class__ = _DistributedExperts  # as `fully_shard` does: names of weights stay what they are
        return module


class _DistributedExperts(Experts):
    """`Experts` whose weights are DTensors, sharded by expert."""

    def forward(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, backend: Backend = "auto") -> Tensor:
        """As `Experts.forward`; every process must call it, each with its own tokens, which may be none."""
        weights = {name: cast(DTensor, parameter) for name, parameter in self.named_parameters()}
        mesh = weights["up_EDH"].device_mesh
        num_experts, num_ranks, group = self.num_experts, mesh.size(), mesh.get_group()
        local = {name: _mean_over(weight.to_local(), num_ranks) for name, weight in weights.items()}
        here = num_experts // num_ranks

        order = Order.of(index_TK, num_experts)  # by expert, so by process
        count_E = torch.bincount(order.expert_R, minlength=num_experts)
        count_PE = torch.empty_like(count_E)
        distributed.all_to_all_single(count_PE, count_E, group=group)
        sent = count_E.view(num_ranks, here).sum(1).tolist()
        received_PE = count_PE.view(num_ranks, here)  # by sender and expert
        received = received_PE.sum(1).tolist()

        x_RD = all_to_all_single_autograd(dispatch(x_TD, order), received, sent, group)
        expert_R = torch.arange(here, device=x_TD.device).repeat(num_ranks).repeat_interleave(received_PE.flatten())
        ones_R1 = gate_TK.new_ones(len(expert_R), 1)
        y_RD = functional_call(
            _Local(self), {f"experts.{name}": value for name, value in local.items()}, (x_RD, expert_R[:, None], ones_R1, backend)
        )
        y_RD = all_to_all_single_autograd(y_RD, sent, received, group)
        return collect(y_RD, gate_TK, order)


class _Local(nn.Module):
    """The plain forward of experts, for `functional_call`."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_RD: Tensor, index_R1: Tensor, gate_R1: Tensor, backend: Backend) -> Tensor:
        return Experts.forward(self.experts, x_RD, index_R1, gate_R1, backend)


def _mean_over(weight: Tensor, num_ranks: int) -> Tensor:
    """The weight, whose gradient, a sum over the tokens of all processes, becomes a mean over processes."""
    if weight.requires_grad:
        weight.register_hook(lambda grad: grad / num_ranks)
    return weight
