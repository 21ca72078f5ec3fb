"""Training of an encoder with sparse experts: how many are active in each step, what spreads tokens over them, and what is told of them.

T tokens, E experts, K experts per token, L layers of experts. Each layer's balance term counts with `balance_weight` and its z-loss with
`z_weight`; what is logged is their mean over layers, so that `train/balance_loss` is 1 where the load is even, however many layers.

Active experts are a function of the global step, and are set for the forward pass of a training step alone: validation, the fit of the
head and saving see the number that the encoder was built with. Nothing here has a state that outlives an optimizer step, and biases
are buffers of the routers, so a resumed run goes on as it would have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dotcbm.encoders.image import ImageEncoder
from dotcbm.moe.balance import LoadWindow, expert_load, switch_loss, top1_loss, update_selection_bias, z_loss
from dotcbm.moe.layer import MoELayer, moe_layers
from dotcbm.moe.matryoshka import BudgetDraws, at_budget
from dotcbm.moe.router import Routing
from dotcbm.moe.sparsify import Sparsification
from dotcbm.moe.statistics import RoutingStatistics

__all__ = ["Balance", "ExpertFigures", "ExpertTraining", "ExpertWork"]

Balance = Literal["none", "switch", "global", "top1", "bias"]


@dataclass(frozen=True)
class ExpertTraining:
    """How experts are trained. The formulas are those of `dotcbm.moe.balance`.

    Attributes:
        balance: "switch" is the Switch loss over the pictures of one process and micro-batch; "global" the same with the loads of all
            processes and of the optimizer step so far; "top1" the loss of Sigma-MoE-Tiny for one active expert, over all processes; "bias"
            no loss, but a selection bias that moves after each optimizer step.
        balance_weight: Of each layer's term, >= 0. Switch and Sigma-MoE-Tiny take 1e-2.
        top1_tau: > 0, temperature of "top1".
        top1_switch: >= 0, times this the "global" loss is added to that of "top1", which has no gradient left for an expert that no token
            comes near. Ours; 0 is the paper's, 10 at a balance_weight of 0.02 left no expert without tokens (reports/experts.md).
        bias_step: > 0, how far "bias" moves in a step.
        z_weight: Of each layer's z-loss, >= 0; ST-MoE takes 1e-3.
        sparsify: Begin with more active experts; its target must be the encoder's k.
        draws: Draw the number of active experts anew in each step, for a model that is good at any.
    """

    balance: Balance = "global"
    balance_weight: float = 1e-2
    top1_tau: float = 0.1
    top1_switch: float = 0.0
    bias_step: float = 1e-3
    z_weight: float = 0.0
    sparsify: Sparsification | None = None
    draws: BudgetDraws | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for settings out of range or that exclude each other."""
        if self.balance not in get_args(Balance):
            raise ValueError(f"balance is {self.balance!r}; choose one of {list(get_args(Balance))}")
        if not self.balance_weight >= 0 or not self.z_weight >= 0:
            raise ValueError(f"balance_weight is {self.balance_weight} and z_weight {self.z_weight}; neither may be negative")
        if not self.top1_switch >= 0:
            raise ValueError(f"top1_switch is {self.top1_switch}; it may not be negative (0 leaves the Switch loss out)")
        if self.top1_switch and self.balance != "top1":
            raise ValueError(f"top1_switch is {self.top1_switch}, and balance is {self.balance!r}; it belongs to balance: top1")
        if not self.top1_tau > 0 or not self.bias_step > 0:
            raise ValueError(f"top1_tau is {self.top1_tau} and bias_step {self.bias_step}; both must be positive")
        if self.sparsify is not None and self.draws is not None:
            raise ValueError("sparsify and draws both say how many experts are active in a step; leave one of them out")


class ExpertWork:
    """The experts of an encoder in training."""

    def __init__(self, settings: ExpertTraining | None, encoder: ImageEncoder) -> None:
        """Args:
        settings: How to train them; None for an encoder without experts, or for experts without balance and with as many active as
            they have. There is nothing to do then.
        encoder: Trainable, with experts, if there are settings.

        Raises:
            ValueError: An encoder that has no experts or is frozen.
        """
        self.encoder = encoder
        self.layers: dict[str, MoELayer] = {}
        self._window = LoadWindow()
        if settings is None:
            self.settings = ExpertTraining(balance="none")
            return
        if not encoder.has_experts:
            raise ValueError(f"experts says how to train them, and {encoder.name} has none; leave experts out, or name a vit_moe/<size>")
        if not encoder.trainable:
            raise ValueError(f"experts says how to train them, and {encoder.name} is frozen; set trainable to true, or leave experts out")
        self.settings = settings
        self.layers = moe_layers(encoder)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of `terms`, which are means over layers; empty where there are none."""
        if not self.layers:
            return {}
        return {"balance": self.settings.balance_weight * len(self.layers), "z": self.settings.z_weight * len(self.layers)}

    def check(self, *, max_steps: float) -> None:
        """To be called before the first step.

        Args:
            max_steps: Optimizer steps of the whole training; infinite if it has no end.

        Raises:
            ValueError: More active experts than there are, a list that does not fit the layers, a schedule that ends after training, or
                a number of active experts that is validated and saved but not trained.
        """
        at_rest = [layer.k for layer in self.layers.values()]
        if (sparsify := self.settings.sparsify) is not None:
            sparsify.check(self.encoder, max_steps=sys.maxsize if max_steps == float("inf") else int(max_steps))
            if set(at_rest) != {sparsify.target}:
                raise ValueError(
                    f"sparsify ends at {sparsify.target} active experts, and the encoder is validated and saved with k = {at_rest}; "
                    f"set k of its moe to {sparsify.target} and leave budget out"
                )
        if (draws := self.settings.draws) is not None:
            draws.check(self.encoder)
            if strange := [k for k in at_rest if not draws.k_min <= k <= draws.k_max]:
                raise ValueError(
                    f"draws are from {draws.k_min} to {draws.k_max} active experts, and the encoder is validated and saved with "
                    f"{strange[0]}, at which it is not trained; set k of its moe to one of these"
                )

    def active(self, step: int) -> list[int]:
        """The active experts of each layer in the forward pass of this global step."""
        schedule = self.settings.sparsify or self.settings.draws
        return [layer.k if schedule is None else schedule.k(place, step) for place, layer in enumerate(self.layers.values())]

    @contextmanager
    def at_step(self, step: int) -> Iterator[None]:
        """Within the block the layers have the active experts of this global step, afterwards those that they had before."""
        with at_budget(self.encoder, self.active(step)) if self.layers else nullcontext():
            yield

    def terms(self) -> dict[str, Tensor]:
        """The losses of the forward pass just made, as means over layers: "balance" and "z", where they are asked for.

        Every process must call it, once for each micro-batch.
        """
        settings = self.settings
        routing = {name: layer.routing for name, layer in self.layers.items() if layer.routing is not None}
        seen: dict[str, Tensor] = {}
        if settings.balance in ("global", "bias") or settings.top1_switch:
            seen = self._window.add({name: expert_load(made) for name, made in routing.items()})
        terms: dict[str, Tensor] = {}
        if settings.balance not in ("none", "bias") and settings.balance_weight:
            terms["balance"] = torch.stack([self._balance(made, seen.get(name)) for name, made in routing.items()]).mean()
        if settings.z_weight:
            terms["z"] = torch.stack([z_loss(made) for made in routing.values()]).mean()
        return terms

    def _balance(self, routing: Routing, load_E: Tensor | None) -> Tensor:
        if self.settings.balance == "top1":
            loss = top1_loss(routing, tau=self.settings.top1_tau, over_ranks=True)
            return loss if load_E is None else loss + self.settings.top1_switch * switch_loss(routing, load_E)
        return switch_loss(routing, load_E)

    def end_step(self) -> None:
        """To be called after each step of the optimizer: move the biases, and begin to count anew."""
        if self.settings.balance == "bias":
            for name, load_E in self._window.loads.items():
                update_selection_bias(self.layers[name].router.selection_bias, load_E, u=self.settings.bias_step)
        self._window.reset()


class ExpertFigures:
    """How evenly the experts of an encoder are used, over a whole split."""

    def __init__(self, encoder: ImageEncoder) -> None:
        """Args:
        encoder: One without experts, or whose features come from a cache, has no figures.
        """
        self._layers = moe_layers(encoder) if encoder.has_experts and encoder.trainable else {}
        self._statistics = RoutingStatistics()

    def update(self) -> None:
        """Take the forward pass just made."""
        self._statistics.update(self._layers)

    def compute(self) -> dict[str, float]:
        """ "experts/<layer>/<figure>", layers counted from 0, over the pictures of all processes, which must all call it, once."""
        if not self._layers:
            return {}
        self._statistics.gather()
        found: dict[str, float] = {}
        for place, told in enumerate(self._statistics.compute().values()):
            figures = {
                "max_vio": told.max_vio,
                "min_vio": told.min_vio,
                "dead": float(told.num_dead),
                "entropy": told.entropy,
                "bias_spread": told.bias_spread,
                "switch_loss": told.switch_loss,
            }
            found |= {f"experts/{place}/{name}": value for name, value in figures.items()}
        return found
