"""One model for any number of active experts: Matryoshka MoE (arXiv 2509.26520).

L expert layers, T tokens, K experts per token. In training every layer draws its k anew in each step, so that the first experts of a
token's ranking learn to do without the later ones; afterwards `set_budget` takes any k, or one for each layer.

A draw is a function of (seed, step, layer): a counter goes into Philox (Salmon et al. 2011), no generator has a state. Ranks draw the same
without talking, and a resumed run draws what it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dotcbm.moe.layer import moe_layers
from dotcbm.moe.router import check_k

__all__ = [
    "Allocation",
    "BudgetDraws",
    "Scope",
    "area_under_flops",
    "at_budget",
    "greedy_allocation",
    "monotonicity_violations",
    "nestedness",
    "regret",
    "set_budget",
]

Scope = Literal["layer", "batch"]


@dataclass(frozen=True)
class BudgetDraws:
    """k(layer, step), drawn from {k_min, ..., k_max}.

    Example:
        >>> draws = BudgetDraws(k_min=1, k_max=6, seed=0)
        >>> draws.k(2, 100) == BudgetDraws(k_min=1, k_max=6, seed=0).k(2, 100)
        True
    """

    k_max: int
    k_min: int = 1
    scope: Scope = "layer"
    """"layer": each layer draws on its own, the paper's best; "batch": one k for all layers."""
    tau: float | None = None
    """None: uniform; else P(k) proportional to k^(1/tau), the capacity-aware variant, which the paper runs at 2."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        if not 1 <= self.k_min <= self.k_max:
            raise ValueError(f"k_min is {self.k_min} and k_max {self.k_max}; 1 <= k_min <= k_max is needed")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope is {self.scope!r}; choose one of {list(get_args(Scope))}")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau is {self.tau}; it must be positive (the paper takes 2), or None for uniform draws")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2^64)")

    @property
    def probabilities(self) -> np.ndarray:
        """Of k_min, ..., k_max."""
        weight = np.arange(self.k_min, self.k_max + 1) ** (1 / self.tau if self.tau is not None else 0.0)
        return weight / weight.sum()

    def k(self, layer: int, step: int) -> int:
        """The active experts of expert layer `layer` (counted from 0) in global step `step`."""
        # Philox counts up in the first word as more is drawn. The last word keeps the draws of batches apart from those of layers.
        counter = [0, layer, step, 0] if self.scope == "layer" else [0, 0, step, 1]
        word = int(np.random.Philox(key=np.array([self.seed, 0], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)).random_raw())
        uniform = (word >> 11) * 2.0**-53
        place = int(np.searchsorted(self.probabilities.cumsum(), uniform, side="right"))
        return min(self.k_min + place, self.k_max)  # a cumulative sum may end below 1

    def check(self, module: nn.Module, *, max_steps: int | None = None) -> None:
        """To be called before the first step; draws fit any number of steps.

        Raises:
            ValueError: A layer has fewer than k_max experts.
        """
        for name, layer in moe_layers(module).items():
            if self.k_max > layer.num_experts:
                raise ValueError(f"k_max is {self.k_max}, and {name} has {layer.num_experts} experts; lower it")

    def apply(self, module: nn.Module, step: int) -> None:
        """Set every expert layer of the model to its draw for global step `step`."""
        for i, layer in enumerate(moe_layers(module).values()):
            layer.set_k(self.k(i, step))


def set_budget(module: nn.Module, budget: int | Sequence[int]) -> None:
    """Give every expert layer its number of active experts; nothing changes where one does not fit.

    Args:
        module: A model with expert layers.
        budget: One k for all of them, or one for each, lowest layer first.

    Raises:
        ValueError: No expert layers, a list of another length, or a k that is not in [1, E].
    """
    layers = moe_layers(module)
    ks = [budget] * len(layers) if isinstance(budget, int) else list(budget)
    if len(ks) != len(layers):
        raise ValueError(f"the budget has {len(ks)} entries, and the model {len(layers)} expert layers; give one for each, or one number")
    for layer, k in zip(layers.values(), ks, strict=True):
        check_k(k, layer.num_experts)
    for layer, k in zip(layers.values(), ks, strict=True):
        layer.set_k(k)


@contextmanager
def at_budget(module: nn.Module, budget: int | Sequence[int]) -> Iterator[None]:
    """`set_budget` within a `with` block; afterwards, also after an error, the layers have the k that they had."""
    before = [layer.k for layer in moe_layers(module).values()]
    set_budget(module, budget)
    try:
        yield
    finally:
        set_budget(module, before)


@dataclass(frozen=True)
class Allocation:
    """One point of the path of `greedy_allocation`."""

    budget: tuple[int, ...]
    """The active experts of each layer."""
    loss: float
    cost: float
    """The sum over layers of active experts times the cost of one."""


def greedy_allocation(
    loss_at: Callable[[tuple[int, ...]], float], num_layers: int, *, k_min: int, k_max: int, cost: float | Sequence[float] = 1.0
) -> list[Allocation]:
    """From k_min everywhere to k_max everywhere, one expert at a time: always to the layer where it lowers the loss most per FLOP.

    Needs about L^2 (k_max - k_min) / 2 evaluations.

    Args:
        loss_at: The validation loss with these active experts in each layer.
        num_layers: L.
        k_min: >= 1, in all layers at first.
        k_max: >= k_min, in all layers at last.
        cost: > 0, FLOPs of one active expert, the same or by layer.

    Returns:
        The L (k_max - k_min) + 1 points passed; take the last whose cost is still affordable.

    Raises:
        ValueError: An argument out of its range.
    """
    costs = [float(cost)] * num_layers if isinstance(cost, int | float) else [float(c) for c in cost]
    if num_layers < 1 or len(costs) != num_layers or min(costs) <= 0:
        raise ValueError(f"num_layers is {num_layers} and cost {cost}; at least one layer, and a positive cost for each, are needed")
    if not 1 <= k_min <= k_max:
        raise ValueError(f"k_min is {k_min} and k_max {k_max}; 1 <= k_min <= k_max is needed")
    budget = (k_min,) * num_layers
    path = [Allocation(budget, loss_at(budget), k_min * sum(costs))]
    while min(budget) < k_max:
        here = path[-1]
        raised = {i: (*budget[:i], budget[i] + 1, *budget[i + 1 :]) for i in range(num_layers) if budget[i] < k_max}
        loss = {i: loss_at(candidate) for i, candidate in raised.items()}
        best = max(raised, key=lambda i: (here.loss - loss[i]) / costs[i])
        budget = raised[best]
        path.append(Allocation(budget, loss[best], here.cost + costs[best]))
    return path


def regret(specialist: Mapping[int, float], ours: Mapping[int, float]) -> dict[int, float]:
    """By k, the accuracy of the model trained for that k minus ours at it, for every k that has a specialist.

    Raises:
        ValueError: Ours was not evaluated at one of them.
    """
    missing = sorted(set(specialist) - set(ours))
    if missing:
        raise ValueError(f"there are specialists for k = {missing}, at which the model was not evaluated; evaluate it there")
    return {k: specialist[k] - ours[k] for k in specialist}


def area_under_flops(flops: Sequence[float], accuracy: Sequence[float]) -> float:
    """The mean accuracy over the range of FLOPs, by the trapezoidal rule.

    Raises:
        ValueError: Fewer than two points, not as many of both, or two points with the same FLOPs.
    """
    if len(flops) != len(accuracy) or len(set(flops)) != len(flops) or len(flops) < 2:
        raise ValueError(f"flops is {list(flops)} and accuracy {list(accuracy)}; give at least two points, with different FLOPs")
    x, y = (np.array(side, dtype=float) for side in zip(*sorted(zip(flops, accuracy, strict=True)), strict=True))
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def nestedness(index_TK: Tensor, full_TX: Tensor) -> float:
    """The mean over tokens of |chosen at budget K and at the full budget| / K: 1 where lower budgets only leave experts out.

    In the first expert layer that is always so. In later ones it says how far the tokens that arrive have drifted.

    Args:
        index_TK: (T, K) experts at the budget K.
        full_TX: (T, X) experts of the same tokens at the full budget, X >= K.
    """
    shared_TK = (index_TK[:, :, None] == full_TX[:, None]).any(-1)
    return float(shared_TK.to(torch.float64).mean())


def monotonicity_violations(accuracy: Mapping[int, float], *, tolerance: float = 0.0) -> int:
    """How often the accuracy falls by more than `tolerance` from one k to the next larger one."""
    values = [accuracy[k] for k in sorted(accuracy)]
    return sum(after < before - tolerance for before, after in pairwise(values))
