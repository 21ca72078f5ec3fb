"""A larger model from a trained one: more layers, more experts (orthogonal growth, arXiv 2510.08008).

Growth is a plan: for each tensor of the large model, which tensor of the small one it comes from and what happens to it on the way. The
same plan grows weights, moving means of weights and the moments of Adam, and is the manifest. Nothing here knows of trainers or pictures;
what belongs to an architecture (names of blocks, of outputs) is an argument.

    depth   "interpose"  each layer is followed by its copy: 0 0 1 1 2 2
            "stack"      the whole stack twice: 0 1 2 0 1 2
            "zero"       like "interpose", the outputs of the copies zeroed, so that each is the identity at first: exact
    width   E experts become F E and k becomes F k; the copies, their router rows among them, get noise N(0, (alpha sigma)^2), sigma the
            deviation of the copied tensor. Exact at alpha = 0.

Departures from the paper, so that growth is exact for every gate. Raw sigmoid gates would grow the output F times: their router's `scale`
is divided by F. Softmax scores shrink F times: selection biases are divided by F there, and taken over for sigmoid. Gates that are
normalised "always" keep the raw score at k = 1 and would lose it at k = F: they become "never", which gives the same output. First and
last layers can be left alone. Adam's moments can be duplicated, where the paper drops them.

Letters: E experts, F factor.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dotcbm.moe.router import Gate, Normalize

__all__ = [
    "DepthMode",
    "Origin",
    "Plan",
    "WidenedGate",
    "deepen",
    "depth_order",
    "grow_moments",
    "grow_tensors",
    "reindex",
    "unchanged",
    "widen",
    "widen_gate",
]

DepthMode = Literal["interpose", "stack", "zero"]
T = TypeVar("T")

# Tensors of a `MoELayer` with a row for each expert. A shared expert has none and stays as it is.
_BIAS, _SCALE = "router.selection_bias", "router.scale"
_PER_EXPERT = ("router.weight", _BIAS, "experts.")


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the large model comes from.

    Attributes:
        source: Name of the tensor of the small model.
        copies: How often its rows are repeated; the first E rows are the old experts.
        zeroed: It starts at zero.
        factor: What it is multiplied by.
        noisy: The repeated rows get noise.
    """

    source: str
    copies: int = 1
    zeroed: bool = False
    factor: float = 1.0
    noisy: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the source, and what differs from a plain copy."""
        told: dict[str, Any] = {"from": self.source}
        if self.copies > 1:
            told["rows"] = f"repeated {self.copies} times"
        if self.noisy:
            told["noise"] = "on repeated rows"
        if self.factor != 1.0:
            told["multiplied_by"] = self.factor
        if self.zeroed:
            told["zeroed"] = True
        return told


Plan = dict[str, Origin]


@dataclass(frozen=True)
class WidenedGate:
    """How a layer with more experts chooses among them, so that it gives what the small one gave.

    Attributes:
        gate, normalize: See `dotcbm.moe.router`.
        k: Active experts of each layer.
        scale: What `router.scale` is multiplied by.
        bias: What `router.selection_bias` is multiplied by.
    """

    gate: Gate
    normalize: Normalize
    k: tuple[int, ...]
    scale: float = 1.0
    bias: float = 1.0


def unchanged(names: Iterable[str]) -> Plan:
    """The plan that leaves everything as it is."""
    return {name: Origin(name) for name in names}


def depth_order(depth: int, *, mode: DepthMode, keep_first: int = 0, keep_last: int = 0) -> tuple[int, ...]:
    """The small model's layer that each layer of the large one comes from.

    >>> depth_order(3, mode="interpose"), depth_order(4, mode="stack", keep_last=1)
    ((0, 0, 1, 1, 2, 2), (0, 1, 2, 0, 1, 2, 3))

    Args:
        depth: Layers of the small model.
        mode: See the head of this file.
        keep_first, keep_last: Layers at both ends that are not doubled.

    Raises:
        ValueError: Another mode, or no layer left to double.
    """
    if mode not in ("interpose", "stack", "zero"):
        raise ValueError(f"depth mode is {mode!r}; choose 'interpose', 'stack' or 'zero'")
    if keep_first < 0 or keep_last < 0 or keep_first + keep_last >= depth:
        raise ValueError(f"{keep_first} first and {keep_last} last of {depth} layers are to stay single; leave one at least to be doubled")
    first, middle, last = range(keep_first), range(keep_first, depth - keep_last), range(depth - keep_last, depth)
    doubled = [*middle, *middle] if mode == "stack" else [layer for layer in middle for _ in range(2)]
    return (*first, *doubled, *last)


def reindex(values: Sequence[T], order: Sequence[int]) -> list[T]:
    """A list with one entry for each layer (k, drop-path rates, start values of a schedule) for the deeper model.

    >>> reindex([8, 4, 1], depth_order(3, mode="interpose"))
    [8, 8, 4, 4, 1, 1]

    Raises:
        ValueError: Another number of entries than the small model has layers.
    """
    if len(values) != max(order) + 1:
        raise ValueError(f"{list(values)} has {len(values)} entries, and the small model {max(order) + 1} layers; give one for each")
    return [values[layer] for layer in order]


def deepen(plan: Plan, order: Sequence[int], *, mode: DepthMode, prefix: str, outputs: Sequence[str]) -> Plan:
    """The plan with more layers.

    Args:
        plan: Its names below `prefix` go on with the number of a layer and a dot ("blocks.3.attn.proj.weight").
        order: From `depth_order`.
        mode: "zero" zeroes the outputs of the second layer of each pair.
        prefix: What stands before the number ("blocks."). Everything else is taken over, position embeddings among it.
        outputs: How names within a layer start whose tensors write into the residual stream ("attn.proj.").

    Raises:
        ValueError: Layers that are missing; or "zero" where a layer has no such output.
    """
    grown = {name: origin for name, origin in plan.items() if not name.startswith(prefix)}
    seen: set[int] = set()
    for place, layer in enumerate(order):
        inside = {name.removeprefix(f"{prefix}{layer}."): origin for name, origin in plan.items() if name.startswith(f"{prefix}{layer}.")}
        if not inside:
            raise ValueError(f"there is no layer {prefix}{layer}; the model has other layers than the plan of growth")
        is_identity = mode == "zero" and layer in seen
        if is_identity and not any(name.startswith(tuple(outputs)) for name in inside):
            raise ValueError(f"layer {prefix}{layer} has none of the outputs {list(outputs)}; it cannot start as the identity")
        for name, origin in inside.items():
            grown[f"{prefix}{place}.{name}"] = replace(origin, zeroed=origin.zeroed or (is_identity and name.startswith(tuple(outputs))))
        seen.add(layer)
    return grown


def widen_gate(gate: Gate, normalize: Normalize, k: Sequence[int], *, factor: int = 2, grow_k: bool = True) -> WidenedGate:
    """What becomes of k, normalisation and scale where experts are repeated `factor` times.

    Args:
        gate, normalize: Of the small model.
        k: Of each layer of the small model.
        factor: F.
        grow_k: Multiply k too. Otherwise the output changes, by 40 to 90 % in our measurements, and a warning says so.

    Raises:
        ValueError: A factor below 2; or gates normalised "always" with k = 1 in some layers only, for which no setting is exact.
    """
    if factor < 2:
        raise ValueError(f"width is {factor}; give 2 for twice as many experts, or more")
    bias = 1.0 if gate == "sigmoid" else 1 / factor
    if not grow_k:
        warnings.warn(
            f"{factor} times as many experts with k as it was: a token now reaches copies of fewer different experts, which changes the "
            "output by 40 to 90 %; let k grow too, unless that is what you study",
            stacklevel=2,
        )
        return WidenedGate(gate, normalize, tuple(k), bias=bias)
    raw = gate != "softmax_kept" and normalize == "never"
    if normalize == "always" and 1 in k:
        if any(one != 1 for one in k):
            raise ValueError(
                f"k is {list(k)} with gates normalised 'always': layers with k = 1 keep the raw score and would lose it as they grow, the "
                "others would not. Train with normalize 'detached' or 'never', or with one k for all layers"
            )
        raw, normalize = True, "never"
        gate = "sigmoid" if gate == "sigmoid" else "softmax"  # normalised, "softmax_kept" is "softmax"
    return WidenedGate(gate, normalize, tuple(factor * one for one in k), scale=1 / factor if raw and gate == "sigmoid" else 1.0, bias=bias)


def widen(plan: Plan, layers: Sequence[str], *, factor: int = 2, scale: float = 1.0, bias: float = 1.0) -> Plan:
    """The plan with more experts.

    Args:
        plan: May have been deepened.
        layers: What stands before the names of each `MoELayer` in the large model ("blocks.1.mlp.").
        factor: F.
        scale, bias: From `widen_gate`.

    Raises:
        ValueError: There is no layer of experts at one of the places.
    """
    grown = dict(plan)
    for layer in layers:
        if f"{layer}router.weight" not in plan:
            raise ValueError(f"there are no experts at {layer!r}; the model has experts in other layers than the plan of growth")
        for name, origin in plan.items():
            inside = name.removeprefix(layer)
            if name.startswith(layer) and inside.startswith(_PER_EXPERT):
                is_bias = inside == _BIAS
                grown[name] = replace(
                    origin, copies=factor * origin.copies, noisy=not is_bias, factor=(bias if is_bias else 1.0) * origin.factor
                )
            elif name == f"{layer}{_SCALE}":
                grown[name] = replace(origin, factor=scale * origin.factor)
    return grown


@torch.no_grad()
def grow_tensors(tensors: Mapping[str, Tensor], plan: Plan, *, alpha: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """The large model's tensors.

    Args:
        tensors: The small model's, under the names that the plan reads.
        plan: What becomes of them.
        alpha: Noise on repeated rows, in standard deviations of the small tensor; the paper's is 0.01.
        seed: Of the noise, which depends on the tensor's name besides and on nothing else.

    Raises:
        ValueError: A negative alpha, or a tensor that the plan reads and the small model lacks.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it is a share of each tensor's deviation, 0 or more")
    grown = {}
    for name, origin in plan.items():
        value = _repeated(tensors, origin)
        if origin.noisy and alpha:
            source = tensors[origin.source]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32) * (alpha * source.float().std())
            noise[: len(source)] = 0  # the old experts stay what they are
            value = value + noise.to(value)
        if origin.factor != 1.0:
            value = value * origin.factor
        grown[name] = torch.zeros_like(value) if origin.zeroed else value
    return grown


def grow_moments(moments: Mapping[str, Mapping[str, Any]], plan: Plan) -> dict[str, dict[str, Any]]:
    """The state of Adam for the large model: every copy goes on with the moments of what it is a copy of.

    Args:
        moments: By the small model's parameter: exp_avg, exp_avg_sq, step. Parameters without are left out.
        plan: What becomes of the parameters. Noise, zeroing and scaling are of weights and not of moments.
    """
    grown = {}
    for name, origin in plan.items():
        if origin.source in moments:
            entry = moments[origin.source]
            grown[name] = {key: _repeated({key: value}, replace(origin, source=key)) for key, value in _tensors(entry)}
            grown[name] |= {key: value for key, value in entry.items() if key not in grown[name]}
    return grown


def _tensors(entry: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.ndim:  # `step` is a scalar
            yield key, value


def _repeated(tensors: Mapping[str, Tensor], origin: Origin) -> Tensor:
    if origin.source not in tensors:
        raise ValueError(f"the small model has no {origin.source}, which the plan of growth reads; it is another model")
    value = tensors[origin.source].detach()
    return torch.cat([value] * origin.copies) if origin.copies > 1 else value.clone()
