"""Two processes with half of the tokens each against one with all of them: counts, losses, gradients, statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from dotcbm.moe.balance import LoadWindow, expert_load, switch_loss, top1_loss
from dotcbm.moe.layer import MoELayer, moe_layers
from dotcbm.moe.matryoshka import BudgetDraws
from dotcbm.moe.statistics import RoutingStatistics

STEPS = 2  # micro-batches


def model_and_tokens() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Layers with different numbers of experts, and (micro-batch, picture, token, width) tokens with classes."""
    torch.manual_seed(0)
    model = nn.Sequential(MoELayer(8, 16, 6, 2), MoELayer(8, 16, 4, 1, count_prefix=1))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, torch.randn(STEPS, 6, 5, 8), torch.arange(STEPS * 6).view(STEPS, 6) % 3


def run(pictures: slice) -> dict[str, torch.Tensor]:
    """What a process has after `STEPS` micro-batches of its pictures."""
    model, x_SBND, class_SB = model_and_tokens()
    layers, window, statistics = moe_layers(model), LoadWindow(), RoutingStatistics(num_classes=3)
    for x_BND, class_B in zip(x_SBND[:, pictures], class_SB[:, pictures], strict=True):
        BudgetDraws(k_max=4, seed=1).apply(model, 0)
        model(x_BND)
        routings = {name: layer.routing for name, layer in layers.items()}
        load = window.add({name: expert_load(routing) for name, routing in routings.items()})
        loss = sum(switch_loss(routings[name], load[name]) + top1_loss(routings[name], over_ranks=True) for name in layers)
        loss.backward()
        statistics.update(layers, class_B=class_B)
    statistics.gather()
    found = {f"load {name}": load_E for name, load_E in load.items()}
    found |= {f"grad {name}": layer.router.weight.grad for name, layer in layers.items()}
    found |= {"k": torch.tensor([layer.k for layer in layers.values()])}
    for name, seen in statistics.compute().items():
        found |= {f"count {name}": seen.count_E, f"p {name}": seen.p_E, f"class {name}": seen.class_KE}
        found |= {f"numbers {name}": torch.tensor([seen.max_vio, seen.min_vio, seen.entropy, seen.switch_loss, seen.num_tokens])}
    return found


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = run(slice(3 * rank, 3 * rank + 3))
    for name, value in found.items():
        if name.startswith("grad"):  # as DDP does
            distributed.all_reduce(value)
            value /= 2
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_balance_as_one(tmp_path):
    multiprocessing.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    alone = run(slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(found) == set(alone)
        for name, value in alone.items():
            exact = name.startswith(("load", "count", "class", "k"))
            torch.testing.assert_close(
                found[name], value, **({"rtol": 0, "atol": 0} if exact else {}), msg=lambda said, name=name: f"{name}: {said}"
            )
