"""Pictures to patches and a global token, by any timm or open_clip model.

>>> encoder = ImageEncoder("timm/test_vit", pretrained=False)
>>> encoder.grid, encoder.width, encoder.preprocessing.size
((10, 10), 64, (160, 160))
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dotcbm.encoders.stem import Stem
from dotcbm.encoders.timm_tower import TimmTower, timm_from_blueprint, timm_from_directory, timm_from_name
from dotcbm.encoders.tower import Tower
from dotcbm.encoders.vit_moe import active_experts, vit_moe_from_blueprint, vit_moe_from_name
from dotcbm.encoders.vit_moe_settings import check_budget
from dotcbm.encoders.weights import MissingWeightsError, weights_digest
from dotcbm.moe.matryoshka import set_budget
from dotcbm.structures import PatchFeatures, Preprocessing, ResizeMode

__all__ = ["ImageEncoder", "MissingWeightsError"]


class ImageEncoder(nn.Module):
    """A frozen (or trainable) image tower with its preprocessing.

    Attributes:
        name: As given.
        preprocessing: What its input must have gone through (`dotcbm.data.transforms.prepare_picture` does it).
        grid: (grid_h, grid_w) of the patches.
        width: D of the patches.
        global_width: D of the global token.
        detail_width: L of the details; 0 without any.
        trainable: Whether its weights learn.
        settings: The arguments it was built with, as JSON values.
        blueprint: JSON values that describe the architecture without its weights. `ImageEncoder(**settings,
            blueprint=blueprint)` builds it again on a machine that has neither the folder nor the cache that the weights
            came from; `load_state_dict` then brings the weights.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | None = None,
        resize: ResizeMode = "squash",
        layer: int | None = None,
        pretrained: bool = True,
        allow_download: bool = False,
        trainable: bool = False,
        detail: bool = True,
        moe: dict[str, Any] | None = None,
        budget: int | list[int] | None = None,
        blueprint: dict[str, Any] | None = None,
    ) -> None:
        """Args:
        name: "timm/<model>[.tag]", "open_clip/<arch>[@tag]", or "local-dir:<path>" of a folder in timm's format
            (config.json, model.safetensors) or open_clip's (open_clip_config.json, open_clip_model.safetensors); or "vit_moe/<size>", a
            ViT with sparse experts (`dotcbm.encoders.vit_moe`), whose pretrained weights are those of its dense base, upcycled, or those
            of the convolutional network that it stands on.
        image_size: Side of the input in pixels; None takes the model's own. Position embeddings are resampled.
        resize: "squash" shows the encoder the whole picture; "crop" the part that the model was evaluated on.
        layer: None for the last features; else an intermediate block or stage, from 0 or, negative, from the end.
        pretrained: Load weights; else they are drawn from torch's global generator (seed it first).
        allow_download: Fetch weights that are in no local cache. Without it no connection is opened.
        trainable: Let the weights learn. Otherwise they need no gradients, and the encoder stays in eval mode
            whatever mode its parent is in, so that batch statistics and dropout stay as they are.
        moe: Settings of a "vit_moe/<size>", see `dotcbm.encoders.vit_moe_settings`.
        budget: Active experts, see `set_budget`.
        detail: Give what the early stages see too (`PatchFeatures.detail_BNL`), where a frozen timm model has such stages; `DotCBM` finds
            and reads parts by them.
        blueprint: Build this architecture with random weights and read no file; see above.

        Raises:
            ValueError: An unknown name (with near matches), a size or layer that the model does not have, or a damaged folder.
            MissingWeightsError: Weights that are not on this machine, or cannot be downloaded.
        """
        super().__init__()
        if resize not in ("squash", "crop"):
            raise ValueError(f"resize is {resize!r}; it must be 'squash' or 'crop'")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be a positive number of pixels")
        self.name = name
        self.trainable = trainable
        self.settings: dict[str, Any] = {
            "name": name,
            "image_size": image_size,
            "resize": resize,
            "layer": layer,
            "pretrained": pretrained,
            "allow_download": allow_download,
            "trainable": trainable,
            "detail": detail,
            "moe": None if moe is None else json.loads(json.dumps(dict(moe))),
            "budget": budget,
        }
        if not name.startswith("vit_moe/") and (moe is not None or budget is not None):
            raise ValueError(f"{name} has no experts, which moe and budget are settings of; leave both out (null) or name a vit_moe/<size>")
        if blueprint is not None:
            tower = _from_blueprint(blueprint, layer=layer, moe=moe)
        else:
            try:
                tower = _from_name(name, image_size=image_size, layer=layer, pretrained=pretrained, allow_download=allow_download, moe=moe)
            except OSError as error:
                if not allow_download or isinstance(error, MissingWeightsError):
                    raise
                raise MissingWeightsError.unreachable(name, error) from error
        self.blueprint = tower.blueprint
        self.preprocessing: Preprocessing = tower.preprocessing
        if resize == "squash":
            self.preprocessing = replace(tower.preprocessing, resize="squash", crop_fraction=1.0)
        self.tower = tower.module
        self._trained_k = active_experts(self.tower) if name.startswith("vit_moe/") else []
        if budget is not None:
            self.set_budget(budget)
        self.requires_grad_(trainable)
        for module in self.modules():
            if isinstance(module, Stem):
                module.freeze()
        if trainable:
            self.tower.to(memory_format=torch.channels_last)  # convolutions train nearly twice as fast so
        self.grid, self.width, self.global_width, self.detail_width = self._probe()
        self.train(trainable)
        self._forget()
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        """Patches and global token of prepared pictures.

        A frozen encoder still passes gradients to its input, if that asks for them, for attribution.

        Args:
            image_B3HW: (B, 3, h, w) float, normalised, of the size in `preprocessing`.

        Raises:
            ValueError: Pictures of another shape.
        """
        if tuple(image_B3HW.shape[1:]) != (3, *self.preprocessing.size):
            height, width = self.preprocessing.size
            raise ValueError(
                f"{self.name} reads pictures of shape (B, 3, {height}, {width}), got {tuple(image_B3HW.shape)}; "
                "prepare them with its preprocessing"
            )
        return self.tower(image_B3HW)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Training mode, which a frozen encoder never enters."""
        super().train(mode and self.trainable)
        return self

    @property
    def has_source(self) -> bool:
        """Whether its weights can be had again: not if they were trained here, drawn at random or, like a fresh router, partly so."""
        return not self.trainable and self.settings["pretrained"] and not self._trained_k

    @property
    def has_experts(self) -> bool:
        """Whether it is a ViT-MoE."""
        return bool(self._trained_k)

    def set_budget(self, budget: int | list[int] | None) -> None:
        """Choose the number of active experts of each token, of a "vit_moe/<size>".

        Args:
            budget: One number for all layers of experts, or one for each; None for as many as it has in training.

        Raises:
            ValueError: More experts than there are, a list of another length, or an encoder without experts.
        """
        if not self._trained_k:
            raise ValueError(f"{self.name} has no experts to choose from; budget is a setting of a vit_moe/<size>")
        num_experts = self.blueprint["moe"]["num_experts"]
        set_budget(
            self.tower,
            self._trained_k if budget is None else check_budget(budget, num_experts=num_experts, num_layers=len(self._trained_k)),
        )
        self.settings["budget"] = budget

    def fingerprint(self, *, any_budget: bool = False) -> str:
        """A sha256 over architecture, layers, preprocessing and every weight; not over the name or the folder they came from.

        Args:
            any_budget: Of the encoder at its own number of active experts, whatever `budget` is. A model is the same model at every budget;
                its features are not.
        """
        told = {
            "blueprint": {key: value for key, value in self.blueprint.items() if key != "preprocessing"},
            "layer": self.settings["layer"],
            "preprocessing": self.preprocessing.to_dict(),
        }
        layers = getattr(self.tower, "detail_layers", ())
        if layers:
            told["detail"] = list(layers)
        if self._trained_k and not any_budget and (active := active_experts(self.tower)) != self._trained_k:
            told["budget"] = active
        return weights_digest(self.tower.state_dict(), told=told)

    def _forget(self) -> None:
        """Drop what modules derived from older weights: timm's LeViT family keeps attention biases until it is in training mode."""
        mode = self.training
        self.tower.train()
        self.train(mode)

    def _probe(self) -> tuple[tuple[int, int], int, int, int]:
        height, width = self.preprocessing.size
        self.tower.eval()
        try:
            with torch.no_grad():
                features: PatchFeatures = self.tower(torch.zeros(1, 3, height, width))
                if self.settings["detail"] and not self.trainable and isinstance(self.tower, TimmTower):
                    self.tower.give_details((height, width))
                    features = self.tower(torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.name} cannot read pictures of {height} x {width} pixels at layer {self.settings['layer']}: {error}"
            ) from error
        detail_width = 0 if features.detail_BNL is None else features.detail_BNL.shape[2]
        return features.grid, features.patch_BND.shape[2], features.global_BD.shape[1], detail_width


def _from_name(
    name: str, *, image_size: int | None, layer: int | None, pretrained: bool, allow_download: bool, moe: dict[str, Any] | None
) -> Tower:
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:")).expanduser()
        if (directory / "open_clip_config.json").is_file():
            from dotcbm.encoders.clip_tower import clip_from_directory

            return clip_from_directory(directory, image_size=image_size, layer=layer, pretrained=pretrained)
        return timm_from_directory(directory, image_size=image_size, layer=layer, pretrained=pretrained)
    library, _, model = name.partition("/")
    if library == "timm" and model:
        return timm_from_name(model, image_size=image_size, layer=layer, pretrained=pretrained, allow_download=allow_download)
    if library == "vit_moe" and model:
        return vit_moe_from_name(model, moe=moe, image_size=image_size, layer=layer, pretrained=pretrained, allow_download=allow_download)
    if library == "open_clip" and model:
        from dotcbm.encoders.clip_tower import clip_from_name

        return clip_from_name(model, image_size=image_size, layer=layer, pretrained=pretrained, allow_download=allow_download)
    known = "timm/<model>[.tag], open_clip/<arch>[@tag], vit_moe/<size> or local-dir:<path>"
    raise ValueError(f"no encoder is called {name!r}; names are {known}")


def _from_blueprint(blueprint: dict[str, Any], *, layer: int | None, moe: dict[str, Any] | None) -> Tower:
    if blueprint.get("library") == "vit_moe":
        return vit_moe_from_blueprint(blueprint, layer=layer, moe=moe)
    if blueprint.get("library") == "open_clip":
        from dotcbm.encoders.clip_tower import clip_from_blueprint

        return clip_from_blueprint(blueprint, layer=layer)
    return timm_from_blueprint(blueprint, layer=layer)
