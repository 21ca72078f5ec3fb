"""Any timm model as patches and a global token.

A transformer gives its tokens, a convolutional network its last feature map (for EfficientNets: after the 1x1 head
convolution, as their classifier reads it), row by row from the top left. The global token is the class token where the
model has one, and the mean of the patches elsewhere: also where timm pools by attention, so that <global, patch> compares
vectors of one space.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import timm
import timm.models
import torch
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, hub, nn
from torch.nn import functional

from dotcbm.encoders.tower import Tower, channels, interpolation_of, map_patches
from dotcbm.encoders.weights import MissingWeightsError, cached_on_hub, near_matches
from dotcbm.structures import PatchFeatures, Preprocessing

__all__ = ["TimmTower", "timm_from_blueprint", "timm_from_directory", "timm_from_name"]

_DETAIL_STRIDES = (8, 16)  # pixels a patch


class TimmTower(nn.Module):
    """A timm model without its classifier."""

    def __init__(self, model: nn.Module, *, layer: int | None = None) -> None:
        """Args:
        model: A timm model.
        layer: None for its last features; else an intermediate one, from 0 or, negative, from the end: a block of a
            transformer (normalised by the model's last norm) or a stage of a network with stages (as it is).

        Raises:
            ValueError: A layer is asked for of a model that gives none.
        """
        super().__init__()
        self.model = model
        self.layer = layer
        self.detail_layers: tuple[int, ...] = ()  # none, until `give_details`
        self.in_one_pass = False
        self.is_transformer = hasattr(model, "num_prefix_tokens")
        self.is_nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
        has_cls = getattr(model, "cls_token", None) is not None
        self.num_prefix_tokens: int = getattr(model, "num_prefix_tokens", int(has_cls))
        self.has_cls = has_cls and self.num_prefix_tokens > 0
        self.intermediate_arguments: dict[str, Any] = {}
        if layer is not None:
            give_intermediates = getattr(model, "forward_intermediates", None)
            if give_intermediates is None:
                raise ValueError(f"{type(model).__name__} gives no intermediate layers; leave layer out (null)")
            known = inspect.signature(give_intermediates).parameters
            if self.num_prefix_tokens and "return_prefix_tokens" in known:
                self.intermediate_arguments["return_prefix_tokens"] = True
            # As DINOv2's get_intermediate_layers does it. Stages of a hierarchy have other widths than the last norm.
            if self.is_transformer and "norm" in known:
                self.intermediate_arguments["norm"] = True

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        """Normalised pictures to patches and a global token.

        Raises:
            ValueError: The model's features are no single map and no grid of tokens.
        """
        if not self.detail_layers:
            return self._patches(image_B3HW)
        if self.in_one_pass:
            last, maps = self.model.forward_intermediates(  # pyright: ignore[reportCallIssue]
                image_B3HW, indices=list(self.detail_layers), output_fmt="NCHW"
            )
            features = self.split(last, size=(image_B3HW.shape[2], image_B3HW.shape[3]))
        else:
            features = self._patches(image_B3HW)
            maps = self.model.forward_intermediates(  # pyright: ignore[reportCallIssue]
                image_B3HW, indices=list(self.detail_layers), stop_early=True, intermediates_only=True, output_fmt="NCHW"
            )
        return replace(features, detail_BNL=_details(maps, features.grid))

    @torch.no_grad()
    def give_details(self, size: tuple[int, int]) -> None:
        """Add `PatchFeatures.detail_BNL` from now on, if the model has stages or blocks that are early enough.

        Of stages of 8 and 16 pixels a patch (finer ones see edges, coarser ones the object), of a transformer the blocks at a quarter
        and at half of its depth: the mean of each channel over a patch, and the mean of its square. Stages are first averaged to
        twice the grid, so that the squares say how much a channel varies within a patch.

        Where a model's intermediates come with the very features that it gives without them, both are had from one pass.

        Args:
            size: (height, width) of the pictures that it is going to read.
        """
        layers = self._early_layers()
        if layers and self.layer is None:
            mode = self.model.training
            self.model.eval()
            picture_13HW = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
            last, _ = self.model.forward_intermediates(  # pyright: ignore[reportCallIssue]
                picture_13HW, indices=list(layers), output_fmt="NCHW"
            )
            alone = self.model.forward_features(picture_13HW)  # pyright: ignore[reportCallIssue]
            self.in_one_pass = isinstance(alone, Tensor) and last.shape == alone.shape and torch.equal(last, alone)
            self.model.train(mode)
        self.detail_layers = layers

    def _patches(self, image_B3HW: Tensor) -> PatchFeatures:
        if self.layer is None:
            features = self.model.forward_features(image_B3HW)  # pyright: ignore[reportCallIssue]
            return self.split(features, size=(image_B3HW.shape[2], image_B3HW.shape[3]))
        (found,) = self.model.forward_intermediates(  # pyright: ignore[reportCallIssue]
            image_B3HW, indices=[self.layer], stop_early=True, intermediates_only=True, output_fmt="NCHW", **self.intermediate_arguments
        )
        map_BDHW, prefix_BPD = found if isinstance(found, tuple) else (found, None)
        return self._of_map(map_BDHW, prefix_BPD)

    def _early_layers(self) -> tuple[int, ...]:
        if not hasattr(self.model, "forward_intermediates"):
            return ()
        if self.is_transformer:
            blocks = getattr(self.model, "blocks", None)
            depth = len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else 0
            last = depth - 1 if self.layer is None or not depth else self.layer % depth
            return tuple(sorted({depth // 4, depth // 2} & set(range(max(last, 0)))))
        stages = getattr(self.model, "feature_info", None) or []
        strides = [int(stage["reduction"]) for stage in stages] if isinstance(stages, list) else list(stages.reduction())
        last = len(strides) - 1 if self.layer is None or not strides else self.layer % len(strides)
        return tuple(i for i, stride in enumerate(strides[: max(last, 0)]) if stride in _DETAIL_STRIDES)

    def split(self, features: Tensor, *, size: tuple[int, int]) -> PatchFeatures:
        """What the model's `forward_features` gave for pictures of (height, width) `size`, as patches and a global token.

        Raises:
            ValueError: It is no single map and no grid of tokens.
        """
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            kind = type(self.model).__name__
            raise ValueError(f"{kind} gives no single feature map or token sequence; choose another encoder or a layer")
        if features.ndim == 4:
            return self._of_map(features.permute(0, 3, 1, 2) if self.is_nhwc else features, None)
        prefix_BPD, patch_BND = features.tensor_split([self.num_prefix_tokens], dim=1)
        return self._of_patches(patch_BND, prefix_BPD, _grid_of(patch_BND.shape[1], size=size))

    def _of_map(self, map_BDHW: Tensor, prefix_BPD: Tensor | None) -> PatchFeatures:
        return self._of_patches(map_patches(map_BDHW), prefix_BPD, (map_BDHW.shape[2], map_BDHW.shape[3]))

    def _of_patches(self, patch_BND: Tensor, prefix_BPD: Tensor | None, grid: tuple[int, int]) -> PatchFeatures:
        global_BD = prefix_BPD[:, 0] if self.has_cls and prefix_BPD is not None else patch_BND.mean(1)
        return PatchFeatures(patch_BND=patch_BND, global_BD=global_BD, grid=grid)


def _details(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """(B, N, L) of (B, L_i, h_i, w_i) early features; see `TimmTower.give_details`."""
    maps = [functional.adaptive_avg_pool2d(map_BLHW.float(), (2 * grid[0], 2 * grid[1])) for map_BLHW in maps]
    map_BLHW = torch.cat(maps, 1)
    return map_patches(functional.avg_pool2d(torch.cat([map_BLHW, map_BLHW.square()], 1), 2))


def timm_from_name(
    name: str,
    *,
    image_size: int | None,
    layer: int | None,
    pretrained: bool,
    allow_download: bool,
    arguments: Mapping[str, Any] | None = None,
) -> Tower:
    """The timm model `name` ("resnet50", "vit_small_patch14_dinov2.lvd142m"), with further `arguments` of timm's own.

    Raises:
        ValueError: No such model or tag, or an image size that it cannot take.
        MissingWeightsError: Weights that are not in the local caches, without `allow_download`.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}{near_matches(architecture, timm.list_models())}")
    config = timm.models.get_pretrained_cfg(architecture)
    if tag:
        known = timm.models.get_arch_pretrained_cfgs(architecture)
        if name not in known:
            tags = ", ".join(full.partition(".")[2] for full in known)
            raise ValueError(f"timm's {architecture} has no pretrained tag {tag!r}; it has {tags or 'none'}")
        config = known[name]
    overlay: dict[str, Any] = {}
    if pretrained:
        if config is None or not config.has_weights:
            raise MissingWeightsError.of(f"timm/{name}", ["timm's list of published weights, which has none for it"])
        path, looked_at = _cached_weights(config)
        if path is not None:
            # The file format of a custom loader belongs to the file, and timm forgets it when it is given another file.
            overlay = {"file": str(path), "custom_load": bool(config.custom_load) if path.suffix in (".npz", ".npy") else False}
        elif not allow_download:
            raise MissingWeightsError.of(f"timm/{name}", looked_at)
    arguments = {**(arguments or {}), **_size_arguments(config.to_dict() if config else {}, image_size)}
    model = _create(name, arguments, pretrained=pretrained, pretrained_cfg_overlay=overlay)
    return _tower(model, architecture=architecture, arguments=arguments, image_size=image_size, layer=layer)


def timm_from_directory(
    directory: Path, *, image_size: int | None, layer: int | None, pretrained: bool, arguments: Mapping[str, Any] | None = None
) -> Tower:
    """A model saved in timm's folder format: `config.json` (architecture, pretrained_cfg, model_args) and `model.safetensors`.

    Further `arguments` go before those of the file.

    Raises:
        MissingWeightsError: The folder or one of its files is missing.
        ValueError: A file that is damaged or fits no timm model.
    """
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    for path in (config_path, *([weights_path] if pretrained else [])):
        if not path.is_file():
            raise MissingWeightsError.of(f"local-dir:{directory}", [f"{path} (no such file; timm's save_for_hf writes it)"])
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path}: no valid JSON ({error}); write it with timm's save_for_hf") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f'{config_path}: no "architecture" with the name of a timm model; write the file with timm\'s save_for_hf')
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        raise ValueError(f"{config_path}: timm has no model {architecture!r}{near_matches(architecture, timm.list_models())}")
    pretrained_cfg = dict(config.get("pretrained_cfg") or {k: v for k, v in config.items() if k not in ("architecture", "model_args")})
    pretrained_cfg["num_classes"] = config.get("num_classes", pretrained_cfg.get("num_classes", 1000))
    arguments = dict(config.get("model_args") or {}) | dict(arguments or {}) | _size_arguments(pretrained_cfg, image_size)
    arguments.setdefault("num_classes", pretrained_cfg["num_classes"])
    overlay: dict[str, Any] = {}
    if pretrained:
        try:
            # timm takes unknown files for pickles; these weights are read as safetensors or not at all.
            overlay = {"state_dict": load_file(weights_path), "custom_load": False}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{weights_path}: cannot be read as safetensors ({error}); copy the file again") from error
    try:
        model = _create(architecture, arguments, pretrained=pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{weights_path}: these are not the weights of {architecture} as {config_path.name} describes it ({error})"
        ) from error
    arguments.pop("num_classes")
    return _tower(model, architecture=architecture, arguments=arguments, image_size=image_size, layer=layer)


def timm_from_blueprint(blueprint: dict[str, Any], *, layer: int | None) -> Tower:
    """The architecture of a blueprint, with random weights."""
    model = _create(blueprint["architecture"], blueprint["arguments"], pretrained=False)
    return Tower(TimmTower(_without_classifier(model), layer=layer), Preprocessing.from_dict(blueprint["preprocessing"]), blueprint)


def _create(name: str, arguments: dict[str, Any], *, pretrained: bool, **config: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **config, **arguments)
    except (TypeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(
            f"timm/{name} cannot be built with {arguments} ({error}); leave image_size out or choose another encoder"
        ) from error


def _without_classifier(model: nn.Module) -> nn.Module:
    reset = getattr(model, "reset_classifier", None)
    if reset is not None:
        reset(0)
    return model


def _tower(model: nn.Module, *, architecture: str, arguments: dict[str, Any], image_size: int | None, layer: int | None) -> Tower:
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    preprocessing = Preprocessing(
        size=(image_size, image_size) if image_size else (height, width),
        mean=channels(data["mean"]),
        std=channels(data["std"]),
        interpolation=interpolation_of(data["interpolation"], name=architecture),
        resize="crop",
        crop_fraction=float(data["crop_pct"]),
    )
    blueprint = {"library": "timm", "architecture": architecture, "arguments": arguments, "preprocessing": preprocessing.to_dict()}
    return Tower(TimmTower(_without_classifier(model), layer=layer), preprocessing, blueprint)


def _size_arguments(config: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """timm wants to be told the size by models that learn something for each position, and by no others."""
    if not config.get("fixed_input_size"):
        return {}
    return {"img_size": image_size or list(config["input_size"][1:])}


def _cached_weights(config: Any) -> tuple[Path | None, list[str]]:
    looked_at: list[str] = []
    if config.file:
        return Path(config.file), looked_at
    if config.hf_hub_id:
        stem = config.hf_hub_filename or "pytorch_model.bin"
        safe = "model.safetensors" if stem == "pytorch_model.bin" else str(Path(stem).with_suffix(".safetensors"))
        path, looked_at = cached_on_hub(config.hf_hub_id, list(dict.fromkeys([safe, stem])))
        if path is not None:
            return path, looked_at
    if config.url:
        path = Path(hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        if path.is_file():
            return path, looked_at
        looked_at.append(str(path))
    return None, looked_at


def _grid_of(num_patches: int, *, size: tuple[int, int]) -> tuple[int, int]:
    height = round((num_patches * size[0] / size[1]) ** 0.5)
    width = num_patches // max(height, 1)
    if height * width != num_patches:
        raise ValueError(f"{num_patches} tokens of a {size[0]} x {size[1]} picture form no grid; choose another encoder or a layer")
    return height, width
