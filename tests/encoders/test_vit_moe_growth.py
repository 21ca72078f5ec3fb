"""Growth of whole encoders: the same features where it is exact, and settings that say what the blueprint says."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.vit_moe import active_experts
from dotcbm.encoders.vit_moe_growth import Growth, grow_vit_moe
from dotcbm.moe.growth import grow_tensors, reindex


def encoder_of(**settings) -> ImageEncoder:
    """With large random weights, so that every block matters."""
    torch.manual_seed(0)
    moe = {"num_experts": 4, "hidden": 32, "blocks": "every second", **settings.pop("moe", {})}
    moe["arguments"] = {"embed_dim": 32, "depth": 4, **moe.get("arguments", {})}
    encoder = ImageEncoder("vit_moe/test", pretrained=False, **{"trainable": True, "moe": moe, **settings})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, value in encoder.named_buffers():
            if name.endswith("selection_bias"):
                value.normal_(std=0.1)
    return encoder.eval()


def grown(small: ImageEncoder, growth: Growth) -> ImageEncoder:
    plan = grow_vit_moe(small.settings, small.blueprint, small.state_dict(), growth)
    large = ImageEncoder(**plan.settings, blueprint=plan.blueprint)
    large.load_state_dict(grow_tensors(small.state_dict(), plan.plan, alpha=growth.alpha, seed=growth.seed))
    assert ImageEncoder(**plan.settings).blueprint == plan.blueprint  # a config alone says the same
    return large.eval()


@torch.no_grad()
def difference(small: ImageEncoder, large: ImageEncoder) -> float:
    picture = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before, after = small(picture), large(picture)
    scale = before.patch_BND.abs().max()
    return float(max((after.patch_BND - before.patch_BND).abs().max(), (after.global_BD - before.global_BD).abs().max()) / scale)


@pytest.mark.parametrize(
    ("gate", "normalize", "k"), list(product(("softmax", "softmax_kept", "sigmoid"), ("never", "always", "detached"), (1, 2)))
)
def test_wider_and_deeper_encoders_give_the_same_features(gate, normalize, k):
    small = encoder_of(moe={"gate": gate, "normalize": normalize, "k": k, "shared_hidden": 16})
    large = grown(small, Growth(depth="zero", width=2, alpha=0))
    assert Growth(depth="zero", width=2, alpha=0).exact
    assert active_experts(large) == [2 * k] * 4
    assert difference(small, large) < 1e-5


@pytest.mark.parametrize("arguments", [{"init_values": 0.5}, {"reg_tokens": 2}, {"drop_path_rate": 0.2}, {"global_pool": "avg"}])
def test_kinds_of_vits(arguments):
    small = encoder_of(moe={"arguments": {**arguments, **({"class_token": False} if "global_pool" in arguments else {})}})
    large = grown(small, Growth(depth="zero", keep_last=1))
    assert difference(small, large) < 1e-5
    vit = large.tower.model
    assert len(vit.blocks) == len(vit.feature_info) == 7
    if "drop_path_rate" in arguments:  # timm's rule, from nothing to the rate that was set
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
        assert rates == pytest.approx([0.2 * i / 6 for i in range(7)])
    if "init_values" in arguments:
        for place, block in enumerate([0, 0, 1, 1, 2, 2, 3]):
            assert torch.equal(vit.blocks[place].ls2.gamma, small.tower.model.blocks[block].ls2.gamma)


def test_position_embeddings_are_taken_over_once():
    small = encoder_of()
    large = grown(small, Growth(depth="stack", width=2))
    for name in ("pos_embed", "cls_token", "patch_embed.proj.weight", "norm.weight"):
        assert torch.equal(large.tower.model.get_parameter(name), small.tower.model.get_parameter(name))


@pytest.mark.parametrize(
    ("mode", "blocks", "k"),
    [("interpose", [2, 3, 6, 7], [1, 1, 3, 3]), ("zero", [2, 3, 6, 7], [1, 1, 3, 3]), ("stack", [1, 3, 5, 7], [1, 3, 1, 3])],
)
def test_blocks_and_lists_of_k_go_by_the_order(mode, blocks, k):
    small = encoder_of(moe={"k": [1, 3]})
    plan = grow_vit_moe(small.settings, small.blueprint, small.state_dict(), Growth(depth=mode))
    assert plan.blueprint["moe"]["blocks"] == blocks
    assert plan.blueprint["moe"]["k"] == k
    assert reindex([1, 3], plan.layers) == k  # what to do with the start values of a schedule
    assert plan.blueprint["arguments"]["depth"] == 8


def test_ends_can_stay_single():
    small = encoder_of(moe={"blocks": "all"})
    plan = grow_vit_moe(small.settings, small.blueprint, small.state_dict(), Growth(depth="interpose", keep_first=1, keep_last=2))
    assert plan.order == (0, 1, 1, 2, 3)
    assert plan.layers == plan.order


@pytest.mark.parametrize(("layer", "mode", "expected"), [(1, "zero", 3), (-1, "zero", 7), (-3, "stack", 5)])
def test_an_intermediate_layer_stays_the_layer_that_it_was(layer, mode, expected):
    small = encoder_of(layer=layer)
    large = grown(small, Growth(depth=mode))
    assert large.settings["layer"] == expected
    if mode == "zero":
        assert difference(small, large) < 1e-5


def test_growing_twice():
    small = encoder_of()
    large = grown(grown(small, Growth(width=2, alpha=0)), Growth(width=2, depth="zero", alpha=0))
    assert large.blueprint["moe"]["num_experts"] == 16
    assert active_experts(large) == [8] * 4
    assert difference(small, large) < 1e-5


def test_noise_changes_the_features_a_little():
    small = encoder_of()
    growth = Growth(width=2, alpha=0.01)
    assert not growth.exact
    assert 1e-5 < difference(small, grown(small, growth)) < 0.2


def test_the_order_of_depth_modes_is_not_exact():
    for mode in ("interpose", "stack"):
        assert not Growth(depth=mode).exact
        assert difference(encoder_of(), grown(encoder_of(), Growth(depth=mode))) > 0.05


def test_what_cannot_grow_is_named():
    with pytest.raises(ValueError, match="nothing to grow"):
        Growth()
    with pytest.raises(ValueError, match="alpha is -1"):
        Growth(width=2, alpha=-1)
    dense = ImageEncoder("timm/test_vit", pretrained=False, image_size=64)
    with pytest.raises(ValueError, match="timm/test_vit has no experts"):
        grow_vit_moe(dense.settings, dense.blueprint, dense.state_dict(), Growth(width=2))
    small = encoder_of(moe={"k": [1, 2], "normalize": "always"})
    with pytest.raises(ValueError, match="one k for all layers"):
        grow_vit_moe(small.settings, small.blueprint, small.state_dict(), Growth(width=2))
