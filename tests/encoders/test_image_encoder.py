"""ImageEncoder on timm models and local folders: layout, freezing, fingerprints, and what it says when it cannot go on."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dotcbm.encoders.image import ImageEncoder, MissingWeightsError

TINY = ["timm/test_vit", "timm/test_vit4", "timm/test_resnet", "timm/test_efficientnet", "timm/test_convnext", "timm/test_mambaout"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection or to resolve a name fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a connection was attempted: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hugging Face and torch caches in a fresh folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def tiny(name: str = "timm/test_vit", **settings: object) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(name, pretrained=False, **settings)  # pyright: ignore[reportArgumentType]


def saved(directory: Path, architecture: str = "test_efficientnet", *, seed: int = 0, **model_args: object) -> Path:
    """A folder in timm's format with random weights."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=7, **model_args)
    directory.mkdir(parents=True)
    save_file(model.state_dict(), directory / "model.safetensors")
    config = {"architecture": architecture, "num_classes": 7, "model_args": model_args, "pretrained_cfg": model.pretrained_cfg}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def impulse(encoder: ImageEncoder, row: int, column: int) -> tuple[int, int]:
    """Where the features change most when the pixels of one patch change."""
    height, width = encoder.preprocessing.size
    grid_h, grid_w = encoder.grid
    torch.manual_seed(1)
    plain = torch.randn(1, 3, height, width) * 0.1
    touched = plain.clone()
    ys, xs = height // grid_h, width // grid_w
    touched[:, :, row * ys : (row + 1) * ys, column * xs : (column + 1) * xs] += 3.0
    with torch.no_grad():
        change_N = (encoder(touched).patch_BND - encoder(plain).patch_BND)[0].norm(dim=-1)
    return divmod(int(change_N.argmax()), grid_w)


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("name", TINY)
def test_patches_lie_row_by_row_from_the_top_left(name: str, layer: int | None) -> None:
    encoder = tiny(name, layer=layer)
    bottom, right = encoder.grid[0] - 1, encoder.grid[1] - 1
    slack = 0 if "vit" in name else 1  # receptive fields of convolutions overlap
    for row, column in ((0, 0), (0, right), (bottom, 0), (1, right)):
        found = impulse(encoder, row, column)
        assert max(abs(found[0] - row), abs(found[1] - column)) <= slack


@pytest.mark.parametrize("name", TINY)
def test_promised_shapes_are_the_given_shapes(name: str) -> None:
    encoder = tiny(name, image_size=192)
    features = encoder(torch.randn(2, 3, 192, 192))
    assert encoder.preprocessing.size == (192, 192)
    assert features.grid == encoder.grid
    assert features.patch_BND.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert features.global_BD.shape == (2, encoder.global_width)
    assert features.patch_BND.isfinite().all()


def test_transformer_gives_timms_tokens_and_its_class_token() -> None:
    encoder = tiny("timm/test_vit")
    model = timm.create_model("test_vit")
    model.load_state_dict(encoder.tower.model.state_dict(), strict=False)
    image = torch.randn(2, 3, 160, 160)
    tokens = model.eval().forward_features(image)
    features = encoder(image)
    assert torch.equal(features.global_BD, tokens[:, 0])
    assert torch.equal(features.patch_BND, tokens[:, model.num_prefix_tokens :])


def test_register_tokens_are_no_patches() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", reg_tokens=3)
    from dotcbm.encoders.timm_tower import TimmTower

    image = torch.randn(1, 3, 160, 160)
    for tower in (TimmTower(model.eval()), TimmTower(model.eval(), layer=-1)):
        features = tower(image)
        tokens = model.forward_features(image)
        assert torch.allclose(features.patch_BND, tokens[:, 4:], atol=1e-6)
        assert torch.allclose(features.global_BD, tokens[:, 0], atol=1e-6)


def test_without_class_token_the_global_token_is_the_mean_patch() -> None:
    for name in ("timm/test_efficientnet", "timm/test_resnet"):
        features = tiny(name)(torch.randn(2, 3, 160, 160))
        assert torch.allclose(features.global_BD, features.patch_BND.mean(1), atol=1e-6)


def test_layer_is_timms_intermediate() -> None:
    image = torch.randn(1, 3, 160, 160)
    vit = tiny("timm/test_vit", layer=2)
    map_BDHW = vit.tower.model.get_intermediate_layers(image, n=[2], reshape=True, norm=True)[0]
    assert torch.allclose(vit(image).patch_BND, map_BDHW.flatten(2).mT, atol=1e-6)
    net = tiny("timm/test_efficientnet", layer=2)
    reference = timm.create_model("test_efficientnet", features_only=True, out_indices=(2,)).eval()
    reference.load_state_dict(net.tower.model.state_dict(), strict=False)
    assert torch.allclose(net(image).patch_BND, reference(image)[0].flatten(2).mT, atol=1e-5)
    assert net.grid == (20, 20)  # stride 8


def test_real_efficientnet_at_448(shared: Path) -> None:
    folder = shared / "weights" / "tf_efficientnet_lite2"
    encoder = ImageEncoder(f"local-dir:{folder}", image_size=448)
    assert (encoder.grid, encoder.width, encoder.global_width) == ((14, 14), 1280, 1280)
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    assert encoder.preprocessing.interpolation == "bicubic"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.rand(1, 3, 448, 448)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(image), pre_logits=True)
    assert torch.allclose(encoder(image).global_BD, expected, atol=1e-5)
    assert ImageEncoder(f"local-dir:{folder}", image_size=448, layer=-2).grid == (28, 28)


def test_resize_decides_whether_the_border_is_seen() -> None:
    assert (tiny().preprocessing.resize, tiny().preprocessing.crop_fraction) == ("squash", 1.0)
    cropped = tiny(resize="crop").preprocessing
    assert (cropped.resize, cropped.crop_fraction) == ("crop", 0.95)


def test_frozen_encoder_stays_frozen_inside_a_training_parent() -> None:
    encoder = tiny("timm/test_resnet")
    parent = nn.Sequential(encoder)
    parent.train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    features = encoder(torch.randn(4, 3, 160, 160))
    assert not any(module.training for module in encoder.modules())
    assert not features.patch_BND.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_frozen_encoder_passes_gradients_to_the_picture() -> None:
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    tiny()(image).patch_BND.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_trainable_encoder_learns() -> None:
    encoder = tiny("timm/test_resnet", trainable=True)
    encoder.train()
    before = encoder.tower.model.bn1.running_mean.clone()
    encoder(torch.randn(4, 3, 160, 160)).global_BD.sum().backward()
    assert not torch.equal(encoder.tower.model.bn1.running_mean, before)
    assert any(parameter.grad is not None for parameter in encoder.parameters())
    encoder.eval()
    assert not any(module.training for module in encoder.modules())


def test_fingerprint_tells_features_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "here")
    shutil.copytree(folder, tmp_path / "there")
    encoder = ImageEncoder(f"local-dir:{folder}")
    same = ImageEncoder(f"local-dir:{tmp_path / 'there'}")
    assert encoder.fingerprint() == same.fingerprint()
    others = [
        ImageEncoder(f"local-dir:{folder}", image_size=192),
        ImageEncoder(f"local-dir:{folder}", resize="crop"),
        ImageEncoder(f"local-dir:{folder}", layer=-1),
    ]
    with torch.no_grad():
        next(same.parameters()).view(-1)[-1] += 1e-6
    prints = [e.fingerprint() for e in (encoder, same, *others)]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_blueprint_rebuilds_without_files(tmp_path: Path, architecture: str, no_network: None) -> None:
    folder = saved(tmp_path / "model", architecture)
    encoder = ImageEncoder(f"local-dir:{folder}", image_size=192)
    told = json.loads(json.dumps({**encoder.settings, "blueprint": encoder.blueprint}))
    shutil.rmtree(folder)
    again = ImageEncoder(**told)
    assert again.fingerprint() != encoder.fingerprint()
    again.load_state_dict(encoder.state_dict())
    assert again.fingerprint() == encoder.fingerprint()
    image = torch.randn(1, 3, 192, 192)
    assert torch.equal(again(image).patch_BND, encoder(image).patch_BND)


def test_loaded_weights_are_used_by_models_that_keep_derived_values() -> None:
    torch.manual_seed(0)
    first, second = (ImageEncoder("timm/levit_128s", pretrained=False) for _ in range(2))
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "attention_biases" in name or parameter.ndim == 1:  # zero in a fresh model, so that its blocks do nothing
                parameter.normal_()
    image = torch.randn(1, 3, 224, 224)
    second(image)
    first.load_state_dict(first.state_dict())  # its weights were set behind its back
    nn.Sequential(second).load_state_dict(nn.Sequential(first).state_dict())
    patch_BND = first(image).patch_BND
    assert torch.allclose(second(image).patch_BND, patch_BND, atol=float(patch_BND.abs().max()) * 1e-5)
    assert not any(module.training for module in second.modules())


def test_weights_come_from_the_local_cache(empty_caches: Path, no_network: None) -> None:
    torch.manual_seed(5)
    state = timm.create_model("test_vit").state_dict()
    repo = empty_caches / "hub" / "models--timm--test_vit.r160_in1k"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    save_file(state, repo / "snapshots" / "abc" / "model.safetensors")
    for name in ("timm/test_vit", "timm/test_vit.r160_in1k"):
        encoder = ImageEncoder(name)
        assert torch.equal(encoder.tower.model.patch_embed.proj.weight, state["patch_embed.proj.weight"])


def test_missing_weights_say_where_and_how(empty_caches: Path, no_network: None) -> None:
    with pytest.raises(
        MissingWeightsError, match=r"(?s)test_vit\.r160_in1k.*model\.safetensors.*allow_download.*local-dir.*pretrained: false"
    ) as told:
        ImageEncoder("timm/test_vit")
    assert str(empty_caches) in str(told.value)
    assert isinstance(told.value, ValueError)
    assert isinstance(told.value, FileNotFoundError)
    with pytest.raises(MissingWeightsError, match="published"):
        ImageEncoder("timm/test_maxvit")


def test_weights_in_the_torch_cache_are_found(empty_caches: Path, no_network: None) -> None:
    url = timm.models.get_pretrained_cfg("resnet18").url
    place = empty_caches / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, place)
    assert torch.equal(ImageEncoder("timm/resnet18", image_size=64).tower.model.conv1.weight, state["conv1.weight"])


def test_a_download_happens_only_when_allowed(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo_id: str, filename: str, **_: object) -> str:
        asked.append(repo_id)
        raise ConnectionError("no network in this test\nand much more")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    with pytest.raises(MissingWeightsError):
        ImageEncoder("timm/test_vit")
    assert asked == []
    with pytest.raises(
        MissingWeightsError, match=r"test_vit are not .* could not be downloaded: no network in this test\nCheck .*local-dir"
    ):
        ImageEncoder("timm/test_vit", allow_download=True)
    assert asked == ["timm/test_vit.r160_in1k"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("timm/resnt18", {}, "did you mean .*resnet18"),
        ("timm/resnet18.nope", {}, "no pretrained tag 'nope'; it has a1_in1k"),
        ("resnet18", {}, "names are timm/<model>"),
        ("timm/", {}, "names are timm/<model>"),
        ("timm/test_vit", {"layer": 99}, "at layer 99: .*out of range"),
        ("timm/test_resnet", {"layer": 99}, "at layer 99: .*out of range"),
        ("timm/test_vit", {"image_size": 0}, "image_size is 0"),
        ("timm/test_vit", {"image_size": 8}, "test_vit"),
        ("timm/test_vit", {"resize": "stretch"}, "'squash' or 'crop'"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name, **settings)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads pictures of shape \(B, 3, 160, 160\), got \(1, 3, 96, 96\)"):
        tiny("timm/test_resnet")(torch.zeros(1, 3, 96, 96))


def test_damaged_folders_are_named(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(MissingWeightsError, match=r"nowhere/config\.json"):
        ImageEncoder(f"local-dir:{tmp_path / 'nowhere'}")
    folder = saved(tmp_path / "model")
    config, weights = folder / "config.json", folder / "model.safetensors"
    told, state = json.loads(config.read_text()), load_file(weights)

    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        ImageEncoder(f"local-dir:{folder}")
    lacking: dict[str, Tensor] = dict(state)
    lacking.pop("conv_head.weight")
    save_file(lacking, weights)
    with pytest.raises(ValueError, match=r"(?s)not the weights of test_efficientnet.*conv_head"):
        ImageEncoder(f"local-dir:{folder}")
    weights.unlink()
    with pytest.raises(MissingWeightsError, match=r"model\.safetensors"):
        ImageEncoder(f"local-dir:{folder}")
    config.write_text(json.dumps({**told, "architecture": "test_eficientnet"}))
    with pytest.raises(ValueError, match=r"did you mean .*test_efficientnet"):
        ImageEncoder(f"local-dir:{folder}", pretrained=False)
    config.write_text("{}")
    with pytest.raises(ValueError, match=r'config\.json: no "architecture"'):
        ImageEncoder(f"local-dir:{folder}", pretrained=False)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: no valid JSON"):
        ImageEncoder(f"local-dir:{folder}", pretrained=False)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_efficientnet"])
def test_exports(name: str) -> None:
    encoder = tiny(name)

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
            features = self.encoder(image_B3HW)
            return features.patch_BND, features.global_BD

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Tuple(), (torch.randn(2, 3, 160, 160),), dynamic_shapes=({0: batch},))
    image = torch.randn(5, 3, 160, 160)
    patch_BND, global_BD = program.module()(image)
    expected = encoder(image)
    assert torch.allclose(patch_BND, expected.patch_BND, atol=1e-5)
    assert torch.allclose(global_BD, expected.global_BD, atol=1e-5)
