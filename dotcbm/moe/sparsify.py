"""Progressive sparsification: lower layers begin with more active experts and come down to the target in training.

After Sigma-MoE-Tiny (arXiv 2512.16248), which gives no list and no step of the change; both are settings here. k is a function of
layer and step and of nothing else, so ranks agree and a resumed run goes on as it would have. With normalize "detached" the gates sum
to 1 at every k: the scale of the output does not jump where k changes, and the router keeps a task gradient at k = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dotcbm.moe.layer import moe_layers

__all__ = ["Sparsification"]


@dataclass(frozen=True)
class Sparsification:
    """k(layer, step): `start[layer]` before step `begin`, `target` from step `end` on, and even steps down between them.

    Example:
        >>> switch = Sparsification(start=(8, 4), target=1, begin=1000)
        >>> [switch.k(0, step) for step in (0, 999, 1000)]
        [8, 8, 1]
        >>> gradual = Sparsification(start=(4, 2), target=1, begin=100, end=400)
        >>> [[gradual.k(layer, step) for step in (100, 200, 300, 400)] for layer in (0, 1)]
        [[4, 3, 2, 1], [2, 2, 2, 1]]
    """

    start: tuple[int, ...]
    """The active experts of each expert layer at first, lowest layer first."""
    target: int = 1
    begin: int = 0
    """The step from which k may fall; where `end` is None, the step of the one switch."""
    end: int | None = None
    """The step from which every layer is at the target."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no schedule."""
        if not self.start:
            raise ValueError("start is empty; give the active experts of each expert layer, such as (8, 8, 6, 6, 4, 4, 2, 2)")
        if self.target < 1 or min(self.start) < self.target:
            raise ValueError(f"start is {list(self.start)} and target {self.target}; every start must be at least the target, and that 1")
        if self.begin < 0:
            raise ValueError(f"begin is {self.begin}; it must be a step >= 0")
        if self.end is not None and self.end < self.begin:
            raise ValueError(f"begin is {self.begin} and end {self.end}; end must not come first (leave it out for one switch at begin)")

    @property
    def last_change(self) -> int:
        """The step from which k is the target everywhere."""
        return self.begin if self.end is None else self.end

    def k(self, layer: int, step: int) -> int:
        """The active experts of expert layer `layer` (counted from 0, lowest first) in global step `step`."""
        if step >= self.last_change:
            return self.target
        if step < self.begin:
            return self.start[layer]
        fall = self.start[layer] - self.target
        return self.start[layer] - fall * (step - self.begin) // (self.last_change - self.begin)

    def check(self, module: nn.Module, *, max_steps: int) -> None:
        """To be called before the first step.

        Args:
            module: The model.
            max_steps: How many steps it will be trained for.

        Raises:
            ValueError: As many starts as layers are not given, a layer has fewer experts than its start, or training ends before the last
                change, so that the model would not be trained with the k that it is meant for.
        """
        layers = moe_layers(module)
        if len(layers) != len(self.start):
            raise ValueError(f"start has {len(self.start)} entries, and the model {len(layers)} expert layers; give one for each")
        for (name, layer), k in zip(layers.items(), self.start, strict=True):
            if k > layer.num_experts:
                raise ValueError(f"start asks for {k} active experts in {name}, which has {layer.num_experts}; lower it")
        if self.last_change >= max_steps:
            raise ValueError(
                f"the last change of k is at step {self.last_change}, and training ends after {max_steps} steps (0 to {max_steps - 1}); "
                "end the schedule earlier or train longer"
            )

    def apply(self, module: nn.Module, step: int) -> None:
        """Set every expert layer of the model to its k for global step `step`."""
        for i, layer in enumerate(moe_layers(module).values()):
            layer.set_k(self.k(i, step))
