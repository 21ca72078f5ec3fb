"""A timm ViT whose MLPs are sparse experts: `dotcbm.moe.layer.MoELayer` in the place of `mlp` in chosen blocks, all else timm's own.

So whatever reads a timm ViT reads this one: forward_features, forward_intermediates, num_prefix_tokens, feature_info, patch_embed.

Upcycling (Komatsuzaki et al., ICLR 2023) starts from a dense ViT's weights: each expert is a copy of the dense MLP, the router is fresh.
Where the gates of a token sum to 1 (normalize "detached"; "always" with k > 1; gate "softmax_kept") the model then gives what the dense
one gives. A shared expert starts with an output of zero, which keeps that so.

Where no pretrained ViT is at hand, a pretrained convolutional network can be the patch embedding (`dotcbm.encoders.stem`).

>>> vit = create_vit_moe("test", pretrained=False)
>>> vit.forward_features(torch.zeros(2, 3, 64, 64)).shape
torch.Size([2, 17, 64])
>>> active_experts(vit)
[2, 2]
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dotcbm.encoders.stem import stem_from_blueprint, stem_from_name
from dotcbm.encoders.timm_tower import TimmTower, timm_from_blueprint, timm_from_directory, timm_from_name
from dotcbm.encoders.tower import Tower
from dotcbm.encoders.vit_moe_settings import ViTMoESettings, blocks_with_experts, check_budget, settings_of
from dotcbm.encoders.weights import near_matches
from dotcbm.moe.layer import MoELayer, moe_layers

__all__ = ["active_experts", "create_vit_moe", "put_experts", "vit_moe_from_blueprint", "vit_moe_from_name"]


def create_vit_moe(
    size: str, *, moe: Mapping[str, Any] | None = None, image_size: int | None = None, pretrained: bool = True, allow_download: bool = False
) -> VisionTransformer:
    """A ViT-MoE without classifier.

    Args:
        size: A key of `SIZES`.
        moe: Settings that replace the size's, see `ViTMoESettings`.
        image_size: Side of the input in pixels; None takes the size's.
        pretrained: Upcycle the dense weights of its base; else all weights are drawn from torch's global generator (seed it first).
        allow_download: Fetch dense weights that are in no local cache.

    Raises:
        ValueError: An unknown size, or settings that do not fit together.
        MissingWeightsError: Dense weights that are not on this machine.
    """
    tower = vit_moe_from_name(size, moe=moe, image_size=image_size, layer=None, pretrained=pretrained, allow_download=allow_download)
    return cast(VisionTransformer, cast(TimmTower, tower.module).model)


def vit_moe_from_name(
    size: str, *, moe: Mapping[str, Any] | None, image_size: int | None, layer: int | None, pretrained: bool, allow_download: bool
) -> Tower:
    """The tower of `create_vit_moe`; for the arguments see there and `TimmTower`."""
    settings = settings_of(size, moe)
    image_size = image_size or settings.image_size
    arguments = dict(settings.arguments)
    known = list(inspect.signature(VisionTransformer).parameters)
    if strange := next((name for name in arguments if name not in known), None):
        raise ValueError(f"arguments has {strange!r}, which is none of timm's VisionTransformer{near_matches(strange, known)}")
    if settings.stem is not None:
        return _hybrid(settings, image_size=image_size, layer=layer, pretrained=pretrained, allow_download=allow_download)
    try:
        if settings.base.startswith("local-dir:"):
            directory = Path(settings.base.removeprefix("local-dir:")).expanduser()
            dense = timm_from_directory(directory, image_size=image_size, layer=layer, pretrained=pretrained, arguments=arguments)
        else:
            dense = timm_from_name(
                settings.base.removeprefix("timm/"),
                image_size=image_size,
                layer=layer,
                pretrained=pretrained,
                allow_download=allow_download,
                arguments=arguments,
            )
    except RuntimeError as error:
        raise ValueError(
            f"vit_moe/{size}: the weights of {settings.base} do not fit a ViT with {arguments} ({error}); "
            "leave these arguments out, or start from random weights (pretrained: false)"
        ) from error
    vit = _vit(dense, base=settings.base)
    settings = put_experts(vit, settings, upcycle=pretrained)
    return replace(dense, blueprint=_blueprint(dense, settings))


def _hybrid(settings: ViTMoESettings, *, image_size: int | None, layer: int | None, pretrained: bool, allow_download: bool) -> Tower:
    """A ViT of random weights on a stem."""
    if settings.base.startswith("local-dir:"):
        raise ValueError(f"base is {settings.base}, whose weights belong to its own patches and not to a stem; leave base or stem out")
    stem = stem_from_name(
        cast(str, settings.stem),
        layer=settings.stem_layer,
        trainable=settings.stem_trainable,
        image_size=image_size,
        pretrained=pretrained,
        allow_download=allow_download,
    )
    weights = {name: value.clone() for name, value in stem.module.state_dict().items()}
    bare = dict(settings.arguments)
    size = stem.preprocessing.size[0]
    try:
        dense = timm_from_name(
            settings.base.removeprefix("timm/"),
            image_size=size,
            layer=layer,
            pretrained=False,
            allow_download=False,
            arguments={**bare, **stem.arguments},
        )
    except ValueError as error:
        if error.__cause__ is None:  # an unknown base
            raise
        raise ValueError(
            f"no ViT with {bare} can stand on {settings.stem} for pictures of {size} pixels; choose another image_size, stem_layer or "
            "patch_size, which must divide the sides of the stem's map"
        ) from error.__cause__
    stem.module.load_state_dict(weights)  # timm draws the weights of everything within a ViT anew
    told = {name: value for name, value in dense.blueprint["arguments"].items() if name not in stem.arguments}
    blueprint = {**dense.blueprint, "arguments": told, "preprocessing": stem.preprocessing.to_dict(), "stem": stem.blueprint}
    dense = replace(dense, preprocessing=stem.preprocessing, blueprint=blueprint)
    settings = put_experts(_vit(dense, base=settings.base), settings, upcycle=False)
    return replace(dense, blueprint=_blueprint(dense, settings))


def vit_moe_from_blueprint(blueprint: dict[str, Any], *, layer: int | None, moe: Mapping[str, Any] | None = None) -> Tower:
    """The architecture of a blueprint, with random weights.

    Args:
        blueprint: As `vit_moe_from_name` wrote it.
        layer: See `TimmTower`.
        moe: Settings that the model was made with; what is no architecture (`backend`) is read from them.
    """
    embedding = stem_from_blueprint(blueprint["stem"]).arguments if "stem" in blueprint else {}
    dense = timm_from_blueprint({**blueprint, "arguments": {**blueprint["arguments"], **embedding}}, layer=layer)
    told: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in blueprint["moe"].items()}
    settings = replace(ViTMoESettings(**told), backend=(moe or {}).get("backend", "auto"))
    put_experts(_vit(dense, base=blueprint["architecture"]), settings, upcycle=False)
    return replace(dense, blueprint=blueprint)


def put_experts(vit: VisionTransformer, settings: ViTMoESettings, *, upcycle: bool) -> ViTMoESettings:
    """Put experts in the place of the MLPs of the chosen blocks.

    Args:
        vit: Changed in place.
        settings: Of the experts; base, arguments and image_size are not read.
        upcycle: Copy the MLP into each expert; else experts are drawn from torch's global generator.

    Returns:
        The settings with numbers for words: `blocks`, `hidden` and, where it was a list, `k`.

    Raises:
        ValueError: Blocks that are not there, a MLP of another kind than timm's plain one, or a width that cannot be upcycled.
    """
    depth = len(vit.blocks)
    blocks = blocks_with_experts(settings.blocks, depth=depth)
    k_of_layer = check_budget(settings.k, num_experts=settings.num_experts, num_layers=len(blocks), what="k")
    hidden = settings.hidden
    for block, k in zip(blocks, k_of_layer):
        mlp = _plain_mlp(vit.blocks[block], number=block)
        hidden = settings.hidden or cast(nn.Linear, mlp.fc1).out_features
        layer = MoELayer(
            vit.embed_dim,
            hidden,
            settings.num_experts,
            k,
            gate=settings.gate,
            normalize=settings.normalize,
            jitter=settings.jitter,
            shared_hidden=settings.shared_hidden,
            bias=settings.bias,
            backend=settings.backend,
            count_prefix=vit.num_prefix_tokens,
        )
        if upcycle:
            _upcycle(layer, mlp, noise=settings.upcycle_noise)
        vit.blocks[block].mlp = layer
    return replace(settings, blocks=blocks, hidden=hidden)


def active_experts(module: nn.Module) -> list[int]:
    """k of each layer of experts, first to last.

    Raises:
        ValueError: There is none.
    """
    return [layer.k for layer in moe_layers(module).values()]


def _vit(dense: Tower, *, base: str) -> VisionTransformer:
    vit = cast(TimmTower, dense.module).model
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{base} is a {type(vit).__name__}; experts go into timm's VisionTransformer, such as vit_small_patch16_224")
    return vit


def _blueprint(dense: Tower, settings: ViTMoESettings) -> dict[str, Any]:
    # Told by the blueprints of ViT and stem, or no architecture.
    apart = ("base", "stem", "stem_layer", "stem_trainable", "arguments", "image_size", "backend", "upcycle_noise")
    told = {name: value for name, value in settings.to_dict().items() if name not in apart}
    return {**dense.blueprint, "library": "vit_moe", "moe": told}


def _plain_mlp(block: nn.Module, *, number: int) -> Mlp:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, Mlp) or type(mlp) is not Mlp or not isinstance(mlp.fc1, nn.Linear) or not _is_plain(mlp):
        found = "no mlp" if mlp is None else f"the mlp {' '.join(str(mlp).split())}"
        raise ValueError(f"block {number} has {found}; experts take the place of timm's Mlp with GELU: choose another base")
    if mlp.drop1.p or mlp.drop2.p:
        raise ValueError("experts have no dropout; leave proj_drop_rate out of the arguments (drop_path_rate is fine)")
    return mlp


def _is_plain(mlp: Mlp) -> bool:
    return isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none" and isinstance(mlp.norm, nn.Identity)


@torch.no_grad()
def _upcycle(layer: MoELayer, mlp: Mlp, *, noise: float) -> None:
    fc1, fc2, experts = cast(nn.Linear, mlp.fc1), cast(nn.Linear, mlp.fc2), layer.experts
    num_experts, _, hidden = experts.up_EDH.shape
    if hidden != fc1.out_features:
        raise ValueError(
            f"hidden is {hidden}, and upcycling copies dense MLPs, which are {fc1.out_features} wide; "
            "leave hidden out (null), or start from random weights (pretrained: false)"
        )
    if (fc1.bias is not None or fc2.bias is not None) and experts.up_bias_EH is None:
        raise ValueError("the dense MLPs have biases, which experts without cannot copy; leave bias out of moe")

    def fill(target: Tensor | None, source: Tensor | None) -> None:
        if target is None:
            return
        if source is None:
            target.zero_()
            return
        target.copy_(source.expand_as(target))
        if noise:
            target.add_(torch.randn(target.shape, dtype=target.dtype) * (noise * source.std()))

    fill(experts.up_EDH, fc1.weight.T.expand(num_experts, -1, -1))
    fill(experts.up_bias_EH, fc1.bias)
    fill(experts.down_EHD, fc2.weight.T.expand(num_experts, -1, -1))
    fill(experts.down_bias_ED, fc2.bias)
    if layer.shared is not None:
        for parameter in layer.shared.fc2.parameters():
            parameter.zero_()
