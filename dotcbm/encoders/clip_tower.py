"""The image tower of any open_clip model, with its patches in the space that pictures and texts share.

The global token is the tower's own image embedding (not normalised). A patch goes into the joint space as if it were the
whole picture's evidence: it is pooled and projected alone, by the tower's own head.

- Class token or mean pooling: the last norm and the projection, which is what CLIP-style segmentation does.
- Attention pooling (ModifiedResNet, CoCa, SigLIP): attention over one patch gives it weight one whatever the query, so a patch
  passes the value and output projections and skips the rest, as in MaskCLIP (Zhou et al., ECCV 2022). Position embeddings inside
  ModifiedResNet's pooling are left out: they tell where a patch is, not what it shows.
- Trunks from timm: the trunk's and the adapter's heads are applied to each patch alone.

An intermediate `layer` of a transformer changes the patches only; it goes through the same norm and projection.
"""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from dotcbm.encoders.timm_tower import TimmTower
from dotcbm.encoders.tower import Tower, channels, interpolation_of, map_patches
from dotcbm.encoders.weights import MissingWeightsError, cached_on_hub, near_matches
from dotcbm.structures import PatchFeatures, Preprocessing

__all__ = ["ClipTower", "clip_checkpoint", "clip_from_blueprint", "clip_from_directory", "clip_from_name", "read_clip_directory"]

_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip's push_to_hf_hub names them


class ClipTower(nn.Module):
    """An open_clip image tower (`visual`) that gives patches beside the image embedding."""

    def __init__(self, visual: Any, *, layer: int | None = None) -> None:
        """Args:
        visual: VisionTransformer, ModifiedResNet or TimmModel of open_clip.
        layer: None for the last features, else a block of a transformer, from 0 or, negative, from the end.

        Raises:
            ValueError: A layer of a convolutional tower (its width does not fit the projection), or a tower of another kind.
        """
        super().__init__()
        self.visual: Any = visual
        self.layer = layer
        self.kind = type(visual).__name__
        if self.kind not in ("VisionTransformer", "ModifiedResNet", "TimmModel"):
            raise ValueError(f"open_clip's image tower {self.kind} is not supported; choose one with a ViT, ResNet or timm trunk")
        if getattr(visual, "attn_pool_contrastive", None) is not None:
            raise ValueError("open_clip's parallel and cascaded attention pooling are experiments without weights; choose another tower")
        if self.kind == "TimmModel":
            self.trunk = [TimmTower(visual.trunk, layer=layer)]  # in a list: a module may be registered once only
        is_transformer = self.kind == "VisionTransformer" or (self.kind == "TimmModel" and self.trunk[0].is_transformer)
        if layer is not None and not is_transformer:
            raise ValueError("only the last feature map of a convolutional CLIP tower fits its projection; leave layer out (null)")

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        """Normalised pictures to patches and the image embedding, both in the joint space."""
        if self.kind == "TimmModel":
            return self._timm(image_B3HW)
        visual = self.visual
        indices = 1 if self.layer is None else [self.layer]
        found = visual.forward_intermediates(image_B3HW, indices=indices, output_fmt="NCHW")
        (map_BDHW,) = found["image_intermediates"]
        patch_BND = map_patches(map_BDHW)
        if self.kind == "ModifiedResNet":
            pool = visual.attnpool
            patch_BND = pool.c_proj(pool.v_proj(patch_BND))
        else:
            if visual.attn_pool is not None:
                patch_BND = _attend_alone(visual.attn_pool, patch_BND)
            patch_BND = visual.ln_post(patch_BND)
            if visual.proj is not None:
                patch_BND = patch_BND @ visual.proj
        return PatchFeatures(patch_BND=patch_BND, global_BD=found["image_features"], grid=(map_BDHW.shape[2], map_BDHW.shape[3]))

    def _timm(self, image_B3HW: Tensor) -> PatchFeatures:
        visual = self.visual
        tower: TimmTower = self.trunk[0]
        features = visual.trunk.forward_features(image_B3HW)
        global_BD = visual.head(visual.trunk.forward_head(features))
        own = tower(image_B3HW) if self.layer is not None else tower.split(features, size=(image_B3HW.shape[2], image_B3HW.shape[3]))
        b, n, d = own.patch_BND.shape
        alone = own.patch_BND.reshape(b * n, 1, d)
        if not tower.is_transformer:
            alone = alone[:, :, None] if tower.is_nhwc else alone.reshape(b * n, d, 1, 1)
        else:
            # Prefix tokens (class, registers) are replaced by the patch too: whichever token the head reads, it reads the patch.
            alone = alone.expand(-1, tower.num_prefix_tokens + 1, -1)
        patch_BND = visual.head(visual.trunk.forward_head(alone)).reshape(b, n, -1)
        return PatchFeatures(patch_BND=patch_BND, global_BD=global_BD, grid=own.grid)


def clip_from_name(name: str, *, image_size: int | None, layer: int | None, pretrained: bool, allow_download: bool) -> Tower:
    """The image tower of open_clip's "<arch>[@tag]"; the tag names the weights.

    Raises:
        ValueError: No such architecture or tag; no tag where weights are asked for.
        MissingWeightsError: Weights that are not in the local caches, without `allow_download`.
    """
    model_cfg, tag_cfg, path = clip_checkpoint(name, pretrained=pretrained, allow_download=allow_download)
    return _tower(model_cfg, tag_cfg, path, image_size=image_size, layer=layer, name=f"open_clip/{name}")


def clip_from_directory(directory: Path, *, image_size: int | None, layer: int | None, pretrained: bool) -> Tower:
    """The image tower of a model saved in open_clip's folder format (see `read_clip_directory`)."""
    model_cfg, preprocess_cfg, path = read_clip_directory(directory, pretrained=pretrained)
    return _tower(model_cfg, preprocess_cfg, path, image_size=image_size, layer=layer, name=f"local-dir:{directory}")


def clip_from_blueprint(blueprint: dict[str, Any], *, layer: int | None) -> Tower:
    """The architecture of a blueprint, with random weights."""
    visual = _build(blueprint["model_cfg"])
    if blueprint["image_size"] is not None:
        _resize(visual, blueprint["image_size"])
    return Tower(ClipTower(visual, layer=layer), Preprocessing.from_dict(blueprint["preprocessing"]), blueprint)


def clip_checkpoint(name: str, *, pretrained: bool, allow_download: bool) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """(model config, preprocessing, weights file or None) of open_clip's "<arch>[@tag]".

    Raises:
        ValueError, MissingWeightsError: As `clip_from_name`.
    """
    import open_clip
    from open_clip import pretrained as published

    architecture, _, tag = name.partition("@")
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise ValueError(f"open_clip has no architecture {architecture!r}{near_matches(architecture, open_clip.list_models())}")
    tags = published.list_pretrained_tags_by_model(architecture)
    tag_cfg = published.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not tag_cfg:
        raise ValueError(f"open_clip has no weights {tag!r} of {architecture}; it has {', '.join(tags) or 'none'}")
    model_cfg["quick_gelu"] = model_cfg.get("quick_gelu", False) or tag_cfg.get("quick_gelu", False)
    if not pretrained:
        return model_cfg, tag_cfg, None
    if not tag:
        some = f"one of {', '.join(tags)}" if tags else "none are published"
        raise ValueError(f"open_clip/{architecture} needs a tag that names its weights (open_clip/{architecture}@tag): {some}")
    repo, _, file_name = tag_cfg.get("hf_hub", "").rpartition("/")
    looked_at: list[str] = []
    if repo:
        stem = file_name or _WEIGHTS[1]
        safe = _WEIGHTS[0] if stem == _WEIGHTS[1] else str(Path(stem).with_suffix(".safetensors"))
        path, looked_at = cached_on_hub(repo, list(dict.fromkeys([safe, stem])))
        if path is not None:
            return model_cfg, tag_cfg, path
    if url := tag_cfg.get("url"):
        path = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
        if path.is_file():
            return model_cfg, tag_cfg, path
        looked_at.append(str(path))
    if not allow_download:
        raise MissingWeightsError.of(f"open_clip/{name}", looked_at)
    return model_cfg, tag_cfg, Path(open_clip.download_pretrained(tag_cfg))


def read_clip_directory(directory: Path, *, pretrained: bool) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """(model config, preprocessing, weights file or None) of a folder with `open_clip_config.json` and `open_clip_model.safetensors`.

    Raises:
        MissingWeightsError: A file is missing.
        ValueError: A damaged config.
    """
    config_path = directory / "open_clip_config.json"
    if not config_path.is_file():
        raise MissingWeightsError.of(f"local-dir:{directory}", [f"{config_path} (no such file; open_clip's push_to_hf_hub writes it)"])
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg", {})
        if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
            raise ValueError("model_cfg lacks embed_dim, vision_cfg or text_cfg")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_path}: no config of an open_clip model ({error})") from error
    if not pretrained:
        return model_cfg, preprocess_cfg, None
    places = [directory / file_name for file_name in _WEIGHTS]
    for path in places:
        if path.is_file():
            return model_cfg, preprocess_cfg, path
    raise MissingWeightsError.of(f"local-dir:{directory}", [f"{path} (no such file)" for path in places])


def _tower(
    model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], weights: Path | None, *, image_size: int | None, layer: int | None, name: str
) -> Tower:
    from open_clip import constants

    vision_cfg = dict(model_cfg["vision_cfg"], timm_model_pretrained=False)
    needed = {"embed_dim": model_cfg["embed_dim"], "vision_cfg": vision_cfg, "quick_gelu": model_cfg.get("quick_gelu", False)}
    visual = _build(needed)
    if weights is not None:
        _load(visual, weights)
    if image_size is not None:
        _resize(visual, image_size)
    side = image_size or vision_cfg.get("image_size", 224)
    preprocessing = Preprocessing(
        size=(side, side) if isinstance(side, int) else (int(side[0]), int(side[1])),
        mean=channels(preprocess_cfg.get("mean") or constants.OPENAI_DATASET_MEAN),
        std=channels(preprocess_cfg.get("std") or constants.OPENAI_DATASET_STD),
        interpolation=interpolation_of(preprocess_cfg.get("interpolation") or "bicubic", name=name),
        resize="crop",
        crop_fraction=1.0,
    )
    blueprint = {"library": "open_clip", "model_cfg": needed, "image_size": image_size, "preprocessing": preprocessing.to_dict()}
    return Tower(ClipTower(visual, layer=layer), preprocessing, blueprint)


def _build(model_cfg: dict[str, Any]) -> nn.Module:
    # The text tower is not built: it may need files from a hub, and is dead weight here.
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(**deepcopy(model_cfg))


def _load(visual: nn.Module, path: Path) -> None:
    from open_clip.factory import load_state_dict

    try:
        state: dict[str, Tensor] = load_state_dict(str(path))  # pyright: ignore[reportAssignmentType]
        visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")})
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, OSError, EOFError, AttributeError) as error:
        raise ValueError(f"{path}: not the weights of this open_clip model ({error})") from error


@torch.no_grad()
def _resize(visual: Any, image_size: int) -> None:
    """Make a tower ready for another input size: its position embeddings are resampled."""
    kind = type(visual).__name__
    if kind == "TimmModel":
        visual.set_input_size(image_size)
    elif kind == "ModifiedResNet":
        side = image_size // 32
        visual.attnpool.positional_embedding = nn.Parameter(_resample(visual.attnpool.positional_embedding, (side, side)))
        visual.image_size = image_size
    elif kind == "VisionTransformer":
        height, width = visual.patch_size
        if image_size % height or image_size % width:
            raise ValueError(f"image_size is {image_size}; it must be a multiple of the patch size {height} x {width}")
        visual.grid_size = (image_size // height, image_size // width)
        visual.positional_embedding = nn.Parameter(_resample(visual.positional_embedding, visual.grid_size))
        visual.image_size = (image_size, image_size)


def _resample(embedding_ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (one class token, then a square grid) on another grid, as open_clip's resize_pos_embed does it."""
    side = round((len(embedding_ND) - 1) ** 0.5)
    map_1DHW = embedding_ND[1:].T.reshape(1, -1, side, side)
    resampled = functional.interpolate(map_1DHW, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding_ND[:1], resampled[0].flatten(1).T])


def _attend_alone(pooler: Any, patch_BND: Tensor) -> Tensor:
    """Each patch pooled alone by an AttentionalPooler; all its queries give the same, so one is asked."""
    b, n, d = patch_BND.shape
    key = pooler.ln_k(patch_BND.reshape(b * n, 1, d))
    query = pooler.ln_q(pooler.query[:1]).expand(b * n, 1, -1)
    return pooler.attn(query, key, key, need_weights=False)[0].reshape(b, n, -1)
