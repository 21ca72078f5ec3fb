"""A ViT-MoE on a convolutional network: what the stem gives, what stays frozen, and that a saved one needs no other folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch

from dotcbm.cli import main
from dotcbm.encoders.image import ImageEncoder, MissingWeightsError
from dotcbm.encoders.stem import Stem
from dotcbm.encoders.vit_moe_growth import Growth, grow_vit_moe
from dotcbm.encoders.vit_moe_settings import settings_of
from dotcbm.hub import from_pretrained
from dotcbm.moe.growth import grow_tensors

MOE = {"num_experts": 4, "arguments": {"depth": 2, "embed_dim": 32}}
CONF = str(Path(__file__).parents[1] / "conf" / "moe.yaml")


@pytest.fixture
def network(tmp_path) -> Path:
    """A small network with random weights and batch statistics of some size, as a folder."""
    torch.manual_seed(5)
    model = timm.create_model("test_efficientnet", num_classes=10)
    model.train()
    model(torch.randn(8, 3, 64, 64) * 2 + 1)
    timm.models.save_for_hf(model, tmp_path / "network", safe_serialization=True)
    return tmp_path / "network"


def hybrid(stem: Path | str, *, trainable: bool = True, image_size: int | None = 64, **moe) -> ImageEncoder:
    torch.manual_seed(0)
    stem = f"local-dir:{stem}" if isinstance(stem, Path) else stem
    return ImageEncoder("vit_moe/test", trainable=trainable, image_size=image_size, moe={**MOE, "stem": stem, **moe})


def stem_of(encoder: ImageEncoder) -> Stem:
    (stem,) = (module for module in encoder.modules() if isinstance(module, Stem))
    return stem


def picture(num: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [None, 2, -2])
def test_its_patches_are_the_networks_map(network, layer):
    encoder = hybrid(network, stem_layer=layer)
    alone = ImageEncoder(f"local-dir:{network}", image_size=64, layer=layer, detail=False)
    with torch.no_grad():
        # The same up to rounding: weights that are trained lie in another order in memory.
        assert torch.allclose(stem_of(encoder)(picture()).flatten(2).transpose(1, 2), alone(picture()).patch_BND, atol=1e-5)
    assert encoder.grid == alone.grid
    assert encoder.preprocessing == alone.preprocessing
    vit = encoder.tower.model
    assert vit.pos_embed.shape == (1, 1 + alone.grid[0] * alone.grid[1], 32)
    assert vit.patch_embed.proj.kernel_size == (1, 1)


def test_what_comes_after_the_stage_is_cut_off(network):
    whole, part = (sum(p.numel() for p in stem_of(hybrid(network, stem_layer=layer)).parameters()) for layer in (None, 1))
    assert part < whole / 2


def steps(encoder: ImageEncoder) -> ImageEncoder:
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder.train()
    for _ in range(2):
        optimizer.zero_grad()
        encoder(picture()).patch_BND.square().mean().backward()
        optimizer.step()
    return encoder


def test_a_frozen_stem_keeps_weights_and_statistics(network):
    before = hybrid(network)
    after = steps(hybrid(network))
    stem = stem_of(after)
    assert not any(module.training for module in stem.modules())
    assert all(torch.equal(value, stem.state_dict()[name]) for name, value in stem_of(before).state_dict().items())
    vit = after.tower.model
    assert not torch.equal(vit.patch_embed.proj.weight, before.tower.model.patch_embed.proj.weight)
    assert vit.training
    assert vit.blocks[1].mlp.experts.up_EDH.grad.abs().sum() > 0


def test_a_trainable_stem_learns_every_weight_that_is_left(network):
    before, after = hybrid(network, stem_trainable=True, stem_layer=1), steps(hybrid(network, stem_trainable=True, stem_layer=1))
    assert all(parameter.grad is not None for parameter in stem_of(after).parameters())
    name = "tower.model.bn1.running_mean"
    assert not torch.equal(stem_of(before).state_dict()[name], stem_of(after).state_dict()[name])


def test_it_takes_the_size_of_the_network_and_a_patch_of_several_places(network):
    alone = ImageEncoder(f"local-dir:{network}")
    encoder = hybrid(network, image_size=None)
    assert encoder.preprocessing.size == alone.preprocessing.size
    coarse = hybrid(network, stem_layer=-3, arguments={"patch_size": 2})
    fine = hybrid(network, stem_layer=-3)
    assert [2 * side for side in coarse.grid] == list(fine.grid)
    assert settings_of("nano", {"stem": "resnet18"}).arguments["patch_size"] == 1  # not the 8 pixels of plain patches
    assert settings_of("nano", {"stem": "resnet18"}).image_size is None
    settings = settings_of("nano", {"stem": "resnet18", "arguments": {"patch_size": 2}})
    assert settings_of("nano", settings.to_dict()) == settings


def test_built_again_without_the_folder(network):
    encoder = hybrid(network, stem_layer=-2)
    shutil.rmtree(network)
    again = ImageEncoder(**encoder.settings, blueprint=encoder.blueprint)
    again.load_state_dict(encoder.state_dict())
    assert again.fingerprint() == encoder.fingerprint()
    assert not encoder.has_source
    assert str(network) not in str(encoder.blueprint)
    with torch.no_grad():
        assert torch.equal(again.eval()(picture()).patch_BND, encoder.eval()(picture()).patch_BND)
    assert not any(parameter.requires_grad for parameter in stem_of(again).parameters())


def test_it_grows(network):
    small = hybrid(network).eval()
    growth = Growth(depth="zero", width=2, alpha=0.0)
    grown = grow_vit_moe(small.settings, small.blueprint, small.state_dict(), growth)
    large = ImageEncoder(**grown.settings, blueprint=grown.blueprint).eval()
    large.load_state_dict(grow_tensors(small.state_dict(), grown.plan, alpha=0.0, seed=0))
    with torch.no_grad():
        assert torch.allclose(small(picture()).patch_BND, large(picture()).patch_BND, atol=1e-5)
    assert ImageEncoder(**grown.settings).blueprint == grown.blueprint  # what a config says of it


def test_from_fit_to_a_model_of_its_own(network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", CONF, "--model.encoder.pretrained=true", "--model.encoder.image_size=64"]
    arguments += [f"--model.encoder.moe.stem=local-dir:{network}", "--model.encoder.moe.stem_layer=-2"]
    assert main(arguments) == 0
    assert main(["test", "--config", "runs/moe/config.yaml", "--model.encoder.budget=1"]) == 0
    assert main(["test", "--config", "runs/moe/config.yaml", "--model.encoder.moe.stem_layer=-1"]) == 1
    assert "it has stem {" in capsys.readouterr().err
    shutil.rmtree(network)
    folder, checkpoint = (from_pretrained(f"runs/moe/{name}") for name in ("model", "checkpoints/model.ckpt"))
    with torch.no_grad():
        assert torch.allclose(folder.encoder(picture()).patch_BND, checkpoint.encoder(picture()).patch_BND, atol=1e-5)


@pytest.mark.parametrize(
    ("stem", "moe", "message"),
    [
        ("test_vit", {}, "VisionTransformer gives tokens and no feature map"),
        ("resnet19", {}, "timm has no model 'resnet19'; did you mean"),
        ("test_resnet", {"stem_layer": 7}, "stem_layer is 7, and the stem has 5 stages"),
        ("test_resnet", {"arguments": {"patch_size": 3}}, "patch_size, which must divide the sides of the stem's map"),
        ("test_resnet", {"base": "local-dir:somewhere"}, "leave base or stem out"),
        ("test_resnet", {"base": "vit_tinny_patch16_224"}, "timm has no model 'vit_tinny_patch16_224'"),
    ],
)
def test_what_it_says_of_bad_stems(stem, moe, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder("vit_moe/test", pretrained=False, image_size=64, moe={**MOE, "stem": stem, **moe})


def test_a_stem_whose_weights_are_nowhere(tmp_path):
    with pytest.raises(MissingWeightsError, match="nowhere"):
        hybrid(tmp_path / "nowhere")
