"""open_clip towers: the image embedding is open_clip's own, and patches go into the joint space by the tower's own head."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dotcbm.encoders.image import ImageEncoder, MissingWeightsError

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 3}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit mean": {**VIT, "pool_type": "avg"},
    "vit mean, norm last": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "coca": {**VIT, "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "output_tokens": True},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "timm cnn": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160},
    "timm vit": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    "timm vit mean": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160},
    "timm siglip": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "timm rotary": {"timm_model_name": "test_efficientnet", "timm_pool": "rot_attn", "timm_proj": "", "image_size": 160},
}
GRIDS = {"resnet": (2, 2), "timm cnn": (5, 5), "timm rotary": (5, 5)}


def model_of(kind: str) -> tuple[dict[str, Any], Any]:
    dim = {"timm siglip": 96}.get(kind, 24)
    config: dict[str, Any] = {"embed_dim": dim, "vision_cfg": TOWERS[kind], "text_cfg": TEXT}
    torch.manual_seed(0)
    if kind == "coca":
        coca_cfg = {**config, "multimodal_cfg": {**TEXT, "dim_head": 8, "n_queries": 5}}
        coca_cfg["text_cfg"] = {**TEXT, "embed_cls": True, "output_tokens": True}
        model: Any = open_clip.CoCa(**coca_cfg)
        config = coca_cfg
    elif kind.startswith("timm"):
        model = open_clip.CustomTextCLIP(**config)
        config = {**config, "custom_text": True}
    else:
        model = open_clip.CLIP(**config)
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            if parameter.ndim == 1 or "bn3" in name or "gamma" in name:  # fresh biases, scales and norms hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return config, model.eval()


def saved(directory: Path, kind: str) -> tuple[Path, Any]:
    config, model = model_of(kind)
    directory.mkdir(parents=True)
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"}})
    )
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    return directory, model


def lone_patch(kind: str, visual: Any, image: Tensor, index: int) -> Tensor:
    """The head's answer to patch `index` alone, written out with the parts of each tower."""
    if kind == "resnet":
        map_BDHW = visual.forward_intermediates(image, indices=1)["image_intermediates"][0]
        pool = visual.attnpool
        return pool.c_proj(pool.v_proj(map_BDHW.flatten(2)[:, :, index]))
    if kind.startswith("timm"):
        features = visual.trunk.forward_features(image)
        if kind == "timm rotary":
            pool = visual.head.pool
            return pool.proj(pool.qkv(features.flatten(2)[:, :, index]).chunk(3, dim=1)[2])
        if features.ndim == 4:
            return visual.head(visual.trunk.forward_head(features.flatten(2)[:, :, index, None, None]))
        patch = features[:, visual.trunk.num_prefix_tokens + index]
        if kind == "timm siglip":
            return visual.head(visual.trunk.fc_norm(visual.trunk.attn_pool(patch[:, None])))
        return visual.head(visual.trunk.fc_norm(patch))
    patch = visual.forward_intermediates(image, indices=1, output_fmt="NLC")["image_intermediates"][0][:, index]
    if kind == "coca":
        patch = visual.attn_pool(patch[:, None])[:, 0]
    return visual.ln_post(patch) @ visual.proj


@pytest.mark.parametrize("kind", TOWERS)
def test_global_token_is_open_clips_and_patches_go_through_its_head(tmp_path: Path, kind: str) -> None:
    directory, model = saved(tmp_path / "model", kind)
    encoder = ImageEncoder(f"local-dir:{directory}")
    size = encoder.preprocessing.size
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = encoder(image)
        encoded = model.visual(image)
    embedding = encoded[0] if isinstance(encoded, tuple) else encoded
    assert torch.allclose(features.global_BD, embedding, atol=1e-5)
    assert features.grid == encoder.grid == GRIDS.get(kind, (4, 4) if size == (64, 64) else (10, 10))
    assert features.patch_BND.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert encoder.width == encoder.global_width == embedding.shape[1]
    with torch.no_grad():
        for index in (0, 1, features.patch_BND.shape[1] - 1):
            assert torch.allclose(features.patch_BND[:, index], lone_patch(kind, model.visual, image, index), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit mean", "timm vit mean"])
def test_with_mean_pooling_the_patches_average_to_the_embedding(tmp_path: Path, kind: str) -> None:
    encoder = ImageEncoder(f"local-dir:{saved(tmp_path / 'model', kind)[0]}")
    features = encoder(torch.randn(2, 3, *encoder.preprocessing.size))
    assert torch.allclose(features.patch_BND.mean(1), features.global_BD, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "vit mean", "resnet", "timm cnn", "timm vit"])
def test_other_sizes(tmp_path: Path, kind: str) -> None:
    directory, _ = saved(tmp_path / "model", kind)
    native = ImageEncoder(f"local-dir:{directory}")
    side = native.preprocessing.size[0]
    doubled = ImageEncoder(f"local-dir:{directory}", image_size=2 * side)
    assert doubled.grid == (2 * native.grid[0], 2 * native.grid[1])
    assert doubled(torch.randn(1, 3, 2 * side, 2 * side)).patch_BND.isfinite().all()
    same = ImageEncoder(f"local-dir:{directory}", image_size=side)
    image = torch.randn(1, 3, side, side)
    assert torch.allclose(same(image).patch_BND, native(image).patch_BND, atol=1e-5)


def test_position_embeddings_are_resampled_as_open_clip_does_it(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path / "model", "vit")
    encoder = ImageEncoder(f"local-dir:{directory}", image_size=112)
    reference = open_clip.create_model(f"local-dir:{directory}", force_image_size=112).eval()
    image = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.allclose(encoder(image).global_BD, reference.encode_image(image), atol=1e-5)


def test_layer_changes_the_patches_only(tmp_path: Path) -> None:
    for kind in ("vit", "timm vit"):
        directory, _ = saved(tmp_path / kind, kind)
        last, early, final = (ImageEncoder(f"local-dir:{directory}", layer=layer) for layer in (None, 0, -1))
        image = torch.randn(1, 3, *last.preprocessing.size)
        assert torch.allclose(last(image).global_BD, early(image).global_BD, atol=1e-5)
        assert torch.allclose(last(image).patch_BND, final(image).patch_BND, atol=1e-5)
        assert not torch.allclose(last(image).patch_BND, early(image).patch_BND, atol=1e-2)
        with pytest.raises(ValueError, match=r"at layer 12: .*out of range"):
            ImageEncoder(f"local-dir:{directory}", layer=12)
    for kind in ("resnet", "timm cnn"):
        with pytest.raises(ValueError, match="fits its projection"):
            ImageEncoder(f"local-dir:{saved(tmp_path / kind, kind)[0]}", layer=1)


def test_preprocessing_is_the_models_own(tmp_path: Path) -> None:
    encoder = ImageEncoder(f"local-dir:{saved(tmp_path / 'model', 'vit')[0]}", resize="crop")
    told = encoder.preprocessing
    assert (told.mean, told.std, told.interpolation) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bilinear")
    assert (told.size, told.resize, told.crop_fraction) == ((64, 64), "crop", 1.0)


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm siglip"])
def test_blueprint_rebuilds_without_files(tmp_path: Path, kind: str) -> None:
    directory, _ = saved(tmp_path / "model", kind)
    encoder = ImageEncoder(f"local-dir:{directory}", image_size=96 if kind != "timm siglip" else 192)
    told = json.loads(json.dumps({**encoder.settings, "blueprint": encoder.blueprint}))
    shutil.rmtree(directory)
    again = ImageEncoder(**told)
    again.load_state_dict(encoder.state_dict())
    assert again.fingerprint() == encoder.fingerprint()
    image = torch.randn(1, 3, *encoder.preprocessing.size)
    assert torch.allclose(again(image).patch_BND, encoder(image).patch_BND, atol=1e-6)


def test_frozen_tower_stays_frozen(tmp_path: Path) -> None:
    encoder = ImageEncoder(f"local-dir:{saved(tmp_path / 'model', 'resnet')[0]}")
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(torch.randn(1, 3, 64, 64)).patch_BND.requires_grad


@pytest.fixture
def tiny_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An architecture and a tag of it that open_clip knows, no network, empty caches."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was attempted")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", config)
    tag = {"hf_hub": "somebody/tiny/", "mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"birds": tag})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "open_clip/ViT-tiny"


def test_weights_by_tag_come_from_the_local_cache(tiny_name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT, quick_gelu=True).eval()  # pyright: ignore
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    encoder = ImageEncoder(f"{tiny_name}@birds")
    assert encoder.preprocessing.mean == (0.4, 0.4, 0.4)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder(image).global_BD, model.encode_image(image), atol=1e-5)


def test_missing_weights_say_where_and_how(tiny_name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"(?s)ViT-tiny@birds.*somebody--tiny.*allow_download.*local-dir") as told:
        ImageEncoder(f"{tiny_name}@birds")
    assert str(tmp_path) in str(told.value)
    assert ImageEncoder(tiny_name, pretrained=False).grid == (4, 4)


def test_bad_names_are_named(tiny_name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean .*ViT-tiny"):
        ImageEncoder("open_clip/ViT-tinny", pretrained=False)
    with pytest.raises(ValueError, match="no weights 'bird' of ViT-tiny; it has birds"):
        ImageEncoder(f"{tiny_name}@bird")
    with pytest.raises(ValueError, match=r"needs a tag .*one of birds"):
        ImageEncoder(tiny_name)
    with pytest.raises(ValueError, match="multiple of the patch size 16"):
        ImageEncoder(tiny_name, pretrained=False, image_size=60)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path / "model", "vit")
    weights, config = directory / "open_clip_model.safetensors", directory / "open_clip_config.json"
    state = load_file(weights)
    state.pop("visual.proj")
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"(?s)open_clip_model\.safetensors: not the weights.*proj"):
        ImageEncoder(f"local-dir:{directory}")
    weights.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors: not the weights"):
        ImageEncoder(f"local-dir:{directory}")
    weights.unlink()
    with pytest.raises(MissingWeightsError, match=r"open_clip_model\.safetensors"):
        ImageEncoder(f"local-dir:{directory}")
    config.write_text(json.dumps({"model_cfg": {"embed_dim": 3}}))
    with pytest.raises(ValueError, match=r"open_clip_config\.json: no config of an open_clip model"):
        ImageEncoder(f"local-dir:{directory}", pretrained=False)
