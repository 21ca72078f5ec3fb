"""Growth of a ViT-MoE: what the settings of the larger encoder are, and where each of its tensors comes from.

Position embeddings, class token, patch embedding and the last norm are taken over. Blocks, with their LayerScale, and lists of k go by
the order of growth; drop-path rates are spread anew over the larger depth by timm's own rule, from the rate that was set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dotcbm.encoders.vit_moe_settings import settings_of
from dotcbm.moe.growth import DepthMode, Plan, deepen, depth_order, reindex, unchanged, widen, widen_gate

__all__ = ["GrownViTMoE", "Growth", "grow_vit_moe"]

# What writes into the residual stream of timm's Block: attention, a dense MLP, experts, a shared expert.
_OUTPUTS = ("attn.proj.", "mlp.fc2.", "mlp.experts.down_", "mlp.shared.fc2.")
_BLOCKS = "tower.model.blocks."


@dataclass(frozen=True)
class Growth:
    """How to grow.

    Attributes:
        depth: See `dotcbm.moe.growth`; None for as many blocks as there are.
        keep_first, keep_last: Blocks at both ends that are not doubled.
        width: How many times as many experts.
        grow_k: Multiply k too.
        alpha: Noise on copies of experts, in standard deviations.
        seed: Of the noise.
    """

    depth: DepthMode | None = None
    keep_first: int = 0
    keep_last: int = 0
    width: int = 1
    grow_k: bool = True
    alpha: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError: Nothing to grow."""
        if self.depth is None and self.width == 1:
            raise ValueError("nothing to grow: choose a depth (interpose, stack, zero), a width (2), or both")
        if not self.alpha >= 0:
            raise ValueError(f"alpha is {self.alpha}; it is a share of each tensor's deviation, 0 or more (the paper's is 0.01)")

    @property
    def exact(self) -> bool:
        """Whether the large model gives at first what the small one gave, up to rounding."""
        return self.depth in (None, "zero") and (self.width == 1 or (self.grow_k and self.alpha == 0))


@dataclass(frozen=True)
class GrownViTMoE:
    """The larger encoder, without weights.

    Attributes:
        settings, blueprint: For `ImageEncoder(**settings, blueprint=blueprint)`.
        plan: Where its tensors come from, by the names of its `state_dict`.
        order: The small encoder's block that each block comes from.
        layers: The small encoder's layer of experts that each layer of experts comes from, for lists with one entry a layer.
    """

    settings: dict[str, Any]
    blueprint: dict[str, Any]
    plan: Plan
    order: tuple[int, ...]
    layers: tuple[int, ...]


def grow_vit_moe(settings: Mapping[str, Any], blueprint: Mapping[str, Any], names: Iterable[str], growth: Growth) -> GrownViTMoE:
    """Plan the growth of an encoder.

    Args:
        settings, blueprint: Of the small `ImageEncoder`.
        names: Of its `state_dict`.
        growth: What is wanted.

    Raises:
        ValueError: An encoder without experts, or a growth that is not possible.
    """
    if blueprint.get("library") != "vit_moe":
        raise ValueError(f"the encoder {settings['name']} has no experts; only a vit_moe/<size> can grow")
    moe, plan = dict(blueprint["moe"]), unchanged(names)
    depth = 1 + max(int(name.removeprefix(_BLOCKS).partition(".")[0]) for name in plan if name.startswith(_BLOCKS))
    order = tuple(range(depth))
    if growth.depth is not None:
        order = depth_order(depth, mode=growth.depth, keep_first=growth.keep_first, keep_last=growth.keep_last)
        plan = deepen(plan, order, mode=growth.depth, prefix=_BLOCKS, outputs=_OUTPUTS)
    with_experts = [place for place, block in enumerate(order) if block in moe["blocks"]]
    layers = tuple(moe["blocks"].index(order[place]) for place in with_experts)
    k = [moe["k"]] * len(moe["blocks"]) if isinstance(moe["k"], int) else list(moe["k"])
    if growth.width != 1:
        gate = widen_gate(moe["gate"], moe["normalize"], k, factor=growth.width, grow_k=growth.grow_k)
        prefixes = [f"{_BLOCKS}{place}.mlp." for place in with_experts]
        plan = widen(plan, prefixes, factor=growth.width, scale=gate.scale, bias=gate.bias)
        k = list(gate.k)
        moe |= {"gate": gate.gate, "normalize": gate.normalize, "num_experts": growth.width * moe["num_experts"]}
    moe |= {"blocks": with_experts, "k": k[0] if len(set(k)) == 1 else reindex(k, layers)}
    grown_blueprint = {**blueprint, "arguments": {**blueprint["arguments"], "depth": len(order)}, "moe": moe}
    return GrownViTMoE(_settings(settings, moe, depth=len(order), order=order), grown_blueprint, plan, order, layers)


def _settings(settings: Mapping[str, Any], moe: Mapping[str, Any], *, depth: int, order: tuple[int, ...]) -> dict[str, Any]:
    """Settings that say the same as the blueprint, for a config: the dense base gives an architecture and no weights any more."""
    small = settings_of(settings["name"].partition("/")[2], settings["moe"])
    told = {**small.to_dict(), **moe}
    told["arguments"] = {**small.arguments, "depth": depth}
    layer = settings["layer"]
    if layer is not None:
        block = layer % (max(order) + 1)
        layer = len(order) - 1 - order[::-1].index(block)
    return {**settings, "moe": told, "layer": layer, "pretrained": False, "budget": None}
