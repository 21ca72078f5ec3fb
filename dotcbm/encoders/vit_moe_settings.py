"""What describes a ViT with sparse experts: its dense base, where its experts stand and how they are chosen; and the named sizes.

Sources: V-MoE (Riquelme et al., NeurIPS 2021) for experts in every second or the last two odd blocks; ViMoE (Han et al., 2024) for
shared experts. Sizes below ViT-S are ours, for tests and small pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from dotcbm.encoders.weights import near_matches
from dotcbm.moe.experts import Backend
from dotcbm.moe.router import Gate, Normalize

__all__ = ["SIZES", "ViTMoESettings", "blocks_with_experts", "check_budget", "settings_of", "vit_moe_names"]


@dataclass(frozen=True)
class ViTMoESettings:
    """A ViT-MoE without its weights.

    Attributes:
        base: The dense ViT: a timm name with or without a tag, or "local-dir:<path>" of a folder in timm's format.
        stem: A convolutional network whose features take the place of the patches (`dotcbm.encoders.stem`): a timm name or
            "local-dir:<path>". The pretrained weights are then the stem's, and the ViT starts from random ones. None for plain patches.
        stem_layer: Its stage, from 0 or, negative, from the end; None for its last features.
        stem_trainable: Train it with the rest; else it keeps its weights and batch statistics.
        arguments: Arguments of timm's `VisionTransformer` that differ from the base: depth, embed_dim, num_heads, patch_size, mlp_ratio,
            drop_path_rate, init_values and so on.
        image_size: Side of the input in pixels; None for the base's own, or the stem's.
        num_experts: E.
        k: Active experts of a token, one number or one for each layer of experts.
        blocks: Which blocks have experts: "all", "every second" (1, 3, 5 ...), "last two odd", or their numbers from 0 or, negative,
            from the end.
        hidden: Width inside an expert; None for that of the dense MLP.
        gate, normalize: See `dotcbm.moe.router`.
        shared_hidden: Width inside an expert that every token goes through; 0 for none.
        jitter: Of the router's input in training, see `dotcbm.moe.router`.
        bias: Experts have biases, as the MLPs of a ViT do.
        backend: How experts are computed, see `dotcbm.moe.experts`.
        upcycle_noise: Noise on each copy of the dense MLP, in standard deviations of the copied tensor.
    """

    base: str = "vit_tiny_patch16_224"
    stem: str | None = None
    stem_layer: int | None = None
    stem_trainable: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    num_experts: int = 8
    k: int | tuple[int, ...] = 2
    blocks: str | tuple[int, ...] = "every second"
    hidden: int | None = None
    gate: Gate = "softmax"
    normalize: Normalize = "detached"
    shared_hidden: int = 0
    jitter: float = 0.0
    bias: bool = True
    backend: Backend = "auto"
    upcycle_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check what can be checked without the base.

        Raises:
            ValueError: A setting out of range.
        """
        for name, allowed in (("gate", get_args(Gate)), ("normalize", get_args(Normalize)), ("backend", get_args(Backend))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {list(allowed)}{near_matches(str(value), allowed)}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}; there must be one expert at least")
        for k in (self.k,) if isinstance(self.k, int) else self.k:
            if not 1 <= k <= self.num_experts:
                raise ValueError(f"k is {k}, with {self.num_experts} experts; choose 1 to {self.num_experts}, or raise num_experts")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; it must be a positive width, or None for that of the dense MLP")
        if self.shared_hidden < 0 or self.jitter < 0 or self.upcycle_noise < 0:
            raise ValueError(
                f"shared_hidden is {self.shared_hidden}, jitter {self.jitter} and upcycle_noise {self.upcycle_noise}; none may be negative"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `settings_of` makes the same settings."""
        told = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


# Widths and depths of "tiny" and larger are timm's. Experts of "_e8" are as wide as the dense MLP, those of the others a fraction of it.
SIZES: dict[str, ViTMoESettings] = {
    "test": ViTMoESettings(
        arguments={"depth": 4, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0}, image_size=64, num_experts=8, k=2, hidden=64
    ),
    "nano": ViTMoESettings(
        arguments={"depth": 6, "embed_dim": 128, "num_heads": 4, "patch_size": 8},
        image_size=64,
        num_experts=32,
        k=1,
        hidden=128,
        blocks="all",
    ),
    "tiny": ViTMoESettings(num_experts=16, k=2, hidden=384),
    "small_e8": ViTMoESettings(base="vit_small_patch16_224", num_experts=8, k=1),
    "small_e32": ViTMoESettings(base="vit_small_patch16_224", num_experts=32, k=4, hidden=384),
    "base_e8": ViTMoESettings(base="vit_base_patch16_224", num_experts=8, k=2),
    "base_e64": ViTMoESettings(base="vit_base_patch16_224", num_experts=64, k=4, hidden=768),
}


def vit_moe_names() -> list[str]:
    """The names that `ImageEncoder` knows them by."""
    return [f"vit_moe/{size}" for size in SIZES]


def settings_of(size: str, moe: Mapping[str, Any] | None = None) -> ViTMoESettings:
    """The settings of a named size, with some replaced.

    Args:
        size: A key of `SIZES`.
        moe: Fields of `ViTMoESettings`, as JSON values. `arguments` are added to those of the size, unless there is a `base` too. With
            a `stem` each place of its map is a patch (patch_size 1), unless `arguments` say otherwise.

    Raises:
        ValueError: An unknown size or field (with near matches), or a value out of range.
    """
    if size not in SIZES:
        raise ValueError(f"no ViT-MoE has the size {size!r}{near_matches(size, list(SIZES))}; the sizes are {', '.join(SIZES)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in (moe or {}).items()}
    known = [entry.name for entry in fields(ViTMoESettings)]
    for name in given:
        if name not in known:
            raise ValueError(f"moe has no setting {name!r}{near_matches(name, known)}; the settings are {', '.join(known)}")
    plain = {entry.name: getattr(SIZES[size], entry.name) for entry in fields(ViTMoESettings)}
    if "arguments" in given:
        if not isinstance(given["arguments"], Mapping):
            raise ValueError(f"arguments is {given['arguments']!r}; give arguments of timm's VisionTransformer by name")
        given["arguments"] = {**({} if "base" in given else plain["arguments"]), **given["arguments"]}
    elif "base" in given:
        given["arguments"] = {}
    if "base" in given:
        given = {"image_size": None, "hidden": None, **given}
    if given.get("stem") is not None:
        own = given.get("arguments", plain["arguments"])
        patch_size = ((moe or {}).get("arguments") or {}).get("patch_size", 1)
        given = {"image_size": None, **given, "arguments": {**own, "patch_size": patch_size}}
    try:
        return ViTMoESettings(**{**plain, **given})
    except TypeError as error:
        raise ValueError(f"moe is {dict(moe or {})}: a value has another type than its setting ({error})") from error


def blocks_with_experts(blocks: str | Sequence[int], *, depth: int) -> tuple[int, ...]:
    """The numbers of the blocks with experts, ascending.

    Args:
        blocks: See `ViTMoESettings`.
        depth: Number of blocks.

    Raises:
        ValueError: An unknown word, a block that is not there or is named twice, or no block at all.
    """
    words = {
        "all": tuple(range(depth)),
        "every second": tuple(range(1, depth, 2)),
        "last two odd": tuple(range(1, depth, 2))[-2:],
    }
    if isinstance(blocks, str):
        if blocks not in words:
            hint = near_matches(blocks, list(words))
            raise ValueError(f"blocks is {blocks!r}{hint}; choose one of {list(words)}, or give the numbers of the blocks")
        found = words[blocks]
    else:
        if strange := [block for block in blocks if not -depth <= block < depth]:
            raise ValueError(f"blocks names {strange[0]}, and the ViT has {depth} blocks: 0 to {depth - 1}, or -{depth} to -1 from the end")
        found = tuple(sorted(block % depth for block in blocks))
        if len(set(found)) < len(found):
            raise ValueError(f"blocks is {list(blocks)}, which names a block twice; name each once")
    if not found:
        raise ValueError(f"blocks is {blocks!r}, which leaves a ViT of {depth} blocks without experts; name one block at least")
    return found


def check_budget(budget: int | Sequence[int], *, num_experts: int, num_layers: int, what: str = "budget") -> list[int]:
    """The number of active experts of each layer.

    Args:
        budget: One for all layers, or one for each.
        num_experts: E.
        num_layers: Of layers of experts.
        what: The setting's name, for messages.

    Raises:
        ValueError: More experts than there are, or a list of another length.
    """
    given = [budget] * num_layers if isinstance(budget, int) else list(budget)
    if len(given) != num_layers:
        raise ValueError(f"{what} has {len(given)} numbers, and {num_layers} blocks have experts; give one for each, or a single number")
    for k in given:
        if not 1 <= k <= num_experts:
            raise ValueError(f"{what} is {budget}; each token has 1 to {num_experts} of the {num_experts} experts: choose from these")
    return given
