"""ViT-MoE as an encoder: experts in the chosen blocks of a timm ViT, upcycling, budgets, and what it says of bad settings."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer

from dotcbm.encoders.image import ImageEncoder, MissingWeightsError
from dotcbm.encoders.vit_moe import active_experts, create_vit_moe
from dotcbm.encoders.vit_moe_settings import SIZES, ViTMoESettings, blocks_with_experts, check_budget, settings_of
from dotcbm.moe.layer import MoELayer, moe_layers

DENSE = {"depth": 4, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 16, "img_size": 64}


def encoder_of(size: str = "test", **settings) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(f"vit_moe/{size}", **{"pretrained": False, **settings})


def dense_folder(directory: Path, **arguments) -> Path:
    """A dense ViT with random weights of some size, in timm's format."""
    torch.manual_seed(3)
    arguments = {**DENSE, **arguments}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    directory.mkdir()
    save_file(vit.state_dict(), directory / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": vit.pretrained_cfg}
    (directory / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {**vit.pretrained_cfg, "input_size": [3, 64, 64]}}))
    return directory


def picture(num: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_experts_stand_in_the_chosen_blocks_and_all_else_is_timms():
    vit = create_vit_moe("test", pretrained=False)
    assert isinstance(vit, VisionTransformer)
    assert [isinstance(block.mlp, MoELayer) for block in vit.blocks] == [False, True, False, True]
    assert vit.num_prefix_tokens == 1
    assert [layer.count_prefix for layer in moe_layers(vit).values()] == [1, 1]
    assert vit.patch_embed.grid_size == (4, 4)
    assert [info["module"] for info in vit.feature_info] == [f"blocks.{i}" for i in range(4)]
    assert vit.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    vit.eval()
    last, maps = vit.forward_intermediates(picture(), indices=[1, 3])
    assert [tuple(one.shape) for one in maps] == [(2, 64, 4, 4)] * 2
    assert torch.equal(last, vit.forward_features(picture()))


def test_the_class_token_and_registers_are_not_counted():
    vit = create_vit_moe("test", pretrained=False, moe={"arguments": {"reg_tokens": 2}})
    vit.forward_features(picture())
    for layer in moe_layers(vit).values():
        assert layer.count_prefix == 3
        counted_BN = layer.routing.counted_T.view(2, 19)
        assert not counted_BN[:, :3].any()
        assert counted_BN[:, 3:].all()


def test_features_are_those_of_a_vit_computed_by_hand():
    """The oracle: timm's blocks, and each token through its experts one by one."""
    vit = create_vit_moe("test", pretrained=False, moe={"k": 2, "shared_hidden": 16}).eval()
    with torch.no_grad():
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(picture()))))
        for block in vit.blocks:
            x = x + block.ls1(block.attn(block.norm1(x)))
            z = block.norm2(x)
            if isinstance(block.mlp, Mlp):
                x = x + block.mlp(z)
                continue
            experts, out = block.mlp.experts, torch.zeros_like(z)
            for b in range(z.shape[0]):
                for n in range(z.shape[1]):
                    score_E = (block.mlp.router.weight @ z[b, n]).softmax(0)
                    chosen = score_E.topk(2)
                    for expert, score in zip(chosen.indices, chosen.values):
                        hidden = torch.nn.functional.gelu(z[b, n] @ experts.up_EDH[expert] + experts.up_bias_EH[expert])
                        answer = hidden @ experts.down_EHD[expert] + experts.down_bias_ED[expert]
                        out[b, n] += score / chosen.values.sum() * answer
            x = x + out + block.mlp.shared(z)
        assert torch.allclose(vit.norm(x), vit.forward_features(picture()), atol=1e-5)


@given(depth=st.integers(1, 30), words=st.sampled_from(["all", "every second", "last two odd"]))
def test_words_for_blocks_name_blocks(depth, words):
    if depth == 1 and words != "all":
        with pytest.raises(ValueError, match="without experts"):
            blocks_with_experts(words, depth=depth)
        return
    found = blocks_with_experts(words, depth=depth)
    assert list(found) == sorted(set(found))
    assert all(0 <= block < depth for block in found)
    if words != "all":
        assert all(block % 2 for block in found)
    assert blocks_with_experts([block - depth for block in found], depth=depth) == found
    assert blocks_with_experts(found, depth=depth) == found


def test_the_blocks_of_v_moe():
    assert blocks_with_experts("last two odd", depth=12) == (9, 11)
    assert blocks_with_experts("every second", depth=12) == (1, 3, 5, 7, 9, 11)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_can_be_built(size):
    with torch.device("meta"):
        settings = settings_of(size)
        depth = settings.arguments.get("depth", 12)
    assert blocks_with_experts(settings.blocks, depth=depth)
    assert settings_of(size, settings.to_dict()) == settings
    if size in ("test", "nano"):
        assert encoder_of(size).grid in ((4, 4), (8, 8))


@pytest.mark.parametrize(
    ("gate", "normalize", "k"),
    [
        ("softmax", "detached", 1),
        ("softmax", "detached", 3),
        ("softmax", "always", 2),
        ("softmax_kept", "never", 1),
        ("softmax_kept", "never", 2),
        ("softmax_kept", "always", 2),
        ("sigmoid", "detached", 1),
        ("sigmoid", "always", 8),
    ],
)
def test_an_upcycled_vit_gives_what_the_dense_one_gives(tmp_path, gate, normalize, k):
    folder = dense_folder(tmp_path / "dense")
    dense = ImageEncoder(f"local-dir:{folder}", detail=False)
    moe = {"base": f"local-dir:{folder}", "gate": gate, "normalize": normalize, "k": k, "shared_hidden": 32}
    sparse = ImageEncoder("vit_moe/test", detail=False, moe=moe)
    assert sparse.preprocessing == dense.preprocessing
    with torch.no_grad():
        expected, found = dense(picture()), sparse(picture())
    assert torch.allclose(found.patch_BND, expected.patch_BND, atol=1e-5)
    assert torch.allclose(found.global_BD, expected.global_BD, atol=1e-5)


def test_upcycling_with_noise_makes_experts_differ(tmp_path):
    folder = dense_folder(tmp_path / "dense")
    torch.manual_seed(0)
    vit = create_vit_moe("test", moe={"base": f"local-dir:{folder}", "upcycle_noise": 0.01})
    dense = timm.create_model(f"local-dir:{folder}", pretrained=True)
    up_EDH, up_DH = vit.blocks[1].mlp.experts.up_EDH, dense.blocks[1].mlp.fc1.weight.T
    assert ((up_EDH - up_DH).std((1, 2)) / up_DH.std()).tolist() == pytest.approx([0.01] * 8, rel=0.1)
    assert not torch.equal(up_EDH[0], up_EDH[1])


def test_the_same_seed_gives_the_same_encoder():
    assert encoder_of().fingerprint() == encoder_of().fingerprint()
    other = encoder_of(moe={"gate": "sigmoid"})
    assert other.fingerprint() != encoder_of().fingerprint()


def test_a_budget_changes_the_features_and_the_fingerprint_but_not_the_model():
    plain, frugal = encoder_of(), encoder_of(budget=1)
    assert active_experts(plain) == [2, 2]
    assert active_experts(frugal) == [1, 1]
    assert plain.fingerprint() != frugal.fingerprint()
    assert plain.fingerprint() == plain.fingerprint(any_budget=True) == frugal.fingerprint(any_budget=True)
    with torch.no_grad():
        before = frugal(picture()).patch_BND
        assert not torch.allclose(plain(picture()).patch_BND, before, atol=1e-4)
        frugal.set_budget([2, 2])
        assert torch.equal(plain(picture()).patch_BND, frugal(picture()).patch_BND)
        assert plain.fingerprint() == frugal.fingerprint()
        frugal.set_budget(8)
        assert active_experts(frugal) == [8, 8]
        frugal.set_budget(None)
    assert active_experts(frugal) == [2, 2]
    assert frugal.settings["budget"] is None


def test_it_is_built_again_from_its_blueprint(tmp_path):
    folder = dense_folder(tmp_path / "dense")
    encoder = ImageEncoder("vit_moe/test", moe={"base": f"local-dir:{folder}", "k": [1, 3], "backend": "loop"}, budget=[2, 1])
    told = json.loads(json.dumps({**encoder.settings, "blueprint": encoder.blueprint}))
    for file in folder.iterdir():
        file.unlink()
    again = ImageEncoder(**told)
    assert active_experts(again) == [2, 1]
    assert [layer.backend for layer in moe_layers(again).values()] == ["loop", "loop"]
    again.load_state_dict(encoder.state_dict())
    assert again.fingerprint() == encoder.fingerprint()
    with torch.no_grad():
        assert torch.equal(again(picture()).patch_BND, encoder(picture()).patch_BND)
    again.set_budget(None)
    assert active_experts(again) == [1, 3]


def test_a_trained_one_learns_in_all_its_parts_and_can_be_copied():
    encoder = encoder_of(trainable=True, moe={"k": 1})
    encoder(picture()).patch_BND.square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    for layer in moe_layers(encoder).values():
        assert layer.router.weight.grad.abs().max() > 0
    copied = deepcopy(encoder)  # what an attribution and an export do
    assert copied.fingerprint() == encoder.fingerprint()


def test_a_frozen_one_gives_details_and_its_input_gradients():
    encoder = encoder_of()
    image = picture().requires_grad_()
    features = encoder(image)
    assert encoder.detail_width > 0
    features.patch_BND.sum().backward()
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_intermediate_layers():
    assert encoder_of(layer=1)(picture()).patch_BND.shape == (2, 16, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe": {"k": 9}}, "k is 9, with 8 experts"),
        ({"moe": {"k": 0}}, "k is 0, with 8 experts"),
        ({"moe": {"k": [1, 2, 3]}}, "k has 3 numbers, and 2 blocks have experts"),
        ({"moe": {"num_expert": 8}}, "no setting 'num_expert'; did you mean num_experts"),
        ({"moe": {"gate": "softmx"}}, "gate is 'softmx'.*did you mean softmax"),
        ({"moe": {"normalize": "often"}}, "normalize is 'often'"),
        ({"moe": {"backend": "fast"}}, "backend is 'fast'"),
        ({"moe": {"blocks": "every secnd"}}, "every secnd.*did you mean every second"),
        ({"moe": {"blocks": [4]}}, "blocks names 4, and the ViT has 4 blocks"),
        ({"moe": {"blocks": [1, -3]}}, "names a block twice"),
        ({"moe": {"blocks": []}}, "without experts"),
        ({"moe": {"hidden": 0}}, "hidden is 0"),
        ({"moe": {"jitter": -1.0}}, "none may be negative"),
        ({"moe": {"arguments": {"dpth": 3}}}, "'dpth'.*did you mean depth"),
        ({"moe": {"arguments": {"proj_drop_rate": 0.1}}}, "no dropout"),
        ({"moe": {"arguments": 3}}, "by name"),
        ({"moe": {"k": "two"}}, "k is|another type"),
        ({"moe": {"base": "resnet18"}}, "resnet18 is a ResNet"),
        ({"moe": {"base": "vit_base_patch16_clip_quickgelu_224", "arguments": {"depth": 2}}}, "timm's Mlp with GELU"),
        ({"moe": {"base": "vit_tiny_patch61_224"}}, "did you mean .*vit_tiny_patch16_224"),
        ({"budget": 9}, "budget is 9; each token has 1 to 8"),
        ({"budget": [1, 2, 3]}, "budget has 3 numbers"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        encoder_of(**settings)


def test_an_unknown_size_has_near_matches():
    with pytest.raises(ValueError, match=r"'bass_e8'.*did you mean base_e8"):
        encoder_of("bass_e8")


def test_settings_of_experts_need_experts():
    for settings in ({"moe": {"k": 1}}, {"budget": 1}):
        with pytest.raises(ValueError, match="has no experts"):
            ImageEncoder("timm/test_vit", pretrained=False, **settings)
    with pytest.raises(ValueError, match="no experts to choose from"):
        ImageEncoder("timm/test_vit", pretrained=False, image_size=64).set_budget(1)
    with pytest.raises(ValueError, match="no expert layers"):
        active_experts(torch.nn.Linear(2, 2))


def test_dense_weights_must_fit(tmp_path, monkeypatch):
    folder = dense_folder(tmp_path / "dense")
    base = f"local-dir:{folder}"
    with pytest.raises(ValueError, match="hidden is 64, and upcycling copies dense MLPs, which are 128 wide"):
        encoder_of(pretrained=True, moe={"base": base, "hidden": 64})
    with pytest.raises(ValueError, match="biases"):
        encoder_of(pretrained=True, moe={"base": base, "bias": False})
    with pytest.raises(ValueError, match="not the weights"):
        encoder_of(pretrained=True, moe={"base": base, "arguments": {"depth": 5}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(MissingWeightsError, match="vit_tiny_patch16_224 are not on this machine"):
        encoder_of("tiny", pretrained=True)


def test_budgets_are_one_number_or_one_a_layer():
    assert check_budget(3, num_experts=4, num_layers=2) == [3, 3]
    assert check_budget([1, 4], num_experts=4, num_layers=2) == [1, 4]
    with pytest.raises(ValueError, match="num_experts is 0"):
        ViTMoESettings(num_experts=0)
