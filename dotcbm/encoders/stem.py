"""A convolutional network as the patch embedding of a ViT: what timm calls a hybrid (Dosovitskiy et al. 2021, arXiv 2010.11929).

Its feature map, 1 x 1 projected by timm's `HybridEmbed`, takes the place of the patches, so that a few transformer blocks that start from
random weights stand on features that do not. It is frozen unless asked otherwise, batch statistics included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from timm.layers.hybrid_embed import HybridEmbed
from torch import Tensor, nn

from dotcbm.encoders.timm_tower import TimmTower, timm_from_blueprint, timm_from_directory, timm_from_name
from dotcbm.encoders.tower import Tower
from dotcbm.structures import Preprocessing

__all__ = ["PlannedStem", "Stem", "stem_from_blueprint", "stem_from_name"]


class Stem(nn.Module):
    """(B, 3, H, W) pictures to a (B, C, h, w) feature map."""

    def __init__(self, tower: TimmTower, *, trainable: bool) -> None:
        """Args:
        tower: A convolutional network, at the layer that is wanted. What comes after it is cut off.
        trainable: Let its weights and batch statistics learn.

        Raises:
            ValueError: A transformer, or a stage that the network does not have.
        """
        super().__init__()
        if tower.is_transformer:
            raise ValueError(f"a {type(tower.model).__name__} gives tokens and no feature map; choose a convolutional network as the stem")
        if tower.layer is not None:
            num_stages = len(cast(Any, tower.model).feature_info)
            if not -num_stages <= tower.layer < num_stages:
                raise ValueError(
                    f"stem_layer is {tower.layer}, and the stem has {num_stages} stages: 0 to {num_stages - 1}, or from the end"
                )
            tower.layer %= num_stages
            cut = getattr(tower.model, "prune_intermediate_layers", None)
            if cut is not None:
                cast(Callable[..., Any], cut)([tower.layer], prune_head=True)
        self.tower = tower
        self.trainable = trainable
        self.freeze()

    def freeze(self) -> None:
        """Take the weights out of training, unless they learn; to be called after `requires_grad_` of a module around this one."""
        if not self.trainable:
            self.requires_grad_(False)
            self.eval()

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """See the class."""
        features = self.tower(image_B3HW)
        return features.patch_BND.transpose(1, 2).unflatten(2, features.grid)

    def train(self, mode: bool = True) -> Stem:
        """Training mode, which a frozen stem leaves at once."""
        super().train(mode)
        if not self.trainable:
            super().train(False)
        return self


@dataclass(frozen=True)
class PlannedStem:
    """A stem that no ViT stands on yet.

    Attributes:
        module: With its weights.
        preprocessing: What its input must have gone through.
        blueprint: JSON values from which `stem_from_blueprint` builds the architecture again.
    """

    module: Stem
    preprocessing: Preprocessing
    blueprint: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of timm's `VisionTransformer`."""
        return {"embed_layer": partial(HybridEmbed, backbone=self.module)}


def stem_from_name(
    name: str, *, layer: int | None, trainable: bool, image_size: int | None, pretrained: bool, allow_download: bool
) -> PlannedStem:
    """A stem by the name of its network.

    Args:
        name: A timm name with or without a tag, or "local-dir:<path>" of a folder in timm's format.
        layer: None for the last features; else a stage, from 0 or, negative, from the end.
        trainable: See `Stem`.
        image_size: Side of the input in pixels; None for the network's own.
        pretrained: Load its weights.
        allow_download: Fetch weights that are in no local cache.

    Raises:
        ValueError: An unknown network, a transformer, or a stage that it does not have.
        MissingWeightsError: Weights that are not on this machine.
    """
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:")).expanduser()
        tower = timm_from_directory(directory, image_size=image_size, layer=layer, pretrained=pretrained)
    else:
        short = name.removeprefix("timm/")
        tower = timm_from_name(short, image_size=image_size, layer=layer, pretrained=pretrained, allow_download=allow_download)
    return _planned(tower, layer=layer, trainable=trainable)


def stem_from_blueprint(blueprint: Mapping[str, Any]) -> PlannedStem:
    """The architecture of a stem's blueprint, with random weights."""
    network = {name: blueprint[name] for name in ("library", "architecture", "arguments", "preprocessing")}
    layer = blueprint["layer"]
    return _planned(timm_from_blueprint(network, layer=layer), layer=layer, trainable=blueprint["trainable"])


def _planned(tower: Tower, *, layer: int | None, trainable: bool) -> PlannedStem:
    stem = Stem(cast(TimmTower, tower.module), trainable=trainable)
    return PlannedStem(stem, tower.preprocessing, {**tower.blueprint, "layer": layer, "trainable": trainable})
