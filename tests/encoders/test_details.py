"""What encoders tell of their early stages, beside the same patches as without it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dotcbm.encoders.image import ImageEncoder

MODELS = ["timm/test_vit", "timm/test_vit4", "timm/test_resnet", "timm/test_efficientnet", "timm/test_convnext", "timm/test_mambaout"]


def encoder(name: str, **settings) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(name, pretrained=False, **settings)


def pictures(of: ImageEncoder) -> torch.Tensor:
    return torch.randn(2, 3, *of.preprocessing.size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_patches_are_those_of_the_encoder_without_details(name):
    with_details, without = encoder(name), encoder(name, detail=False)
    features, plain = with_details(pictures(with_details)), without(pictures(without))
    assert torch.equal(features.patch_BND, plain.patch_BND)
    assert torch.equal(features.global_BD, plain.global_BD)
    assert plain.detail_BNL is None
    assert features.detail_BNL is not None
    assert features.detail_BNL.shape == (2, features.patch_BND.shape[1], with_details.detail_width)
    assert with_details.fingerprint() != without.fingerprint()


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_gives_what_two_give(name):
    of = encoder(name)
    of.tower.in_one_pass = not of.tower.in_one_pass
    other = of(pictures(of))
    of.tower.in_one_pass = not of.tower.in_one_pass
    features = of(pictures(of))
    torch.testing.assert_close(other.detail_BNL, features.detail_BNL)


def test_an_efficientnet_is_read_in_one_pass():
    assert encoder("timm/test_efficientnet").tower.in_one_pass


def test_details_are_means_and_mean_squares_of_the_stages():
    of = encoder("timm/test_resnet")
    layers = of.tower.detail_layers
    strides = [stage["reduction"] for stage in of.tower.model.feature_info]
    assert [strides[i] for i in layers] == [8, 16]
    stages = of.tower.model.forward_intermediates(pictures(of), indices=list(layers), intermediates_only=True)
    height, width = of.grid
    fine = torch.cat([functional.adaptive_avg_pool2d(stage, (2 * height, 2 * width)) for stage in stages], 1)
    blocks = fine.unflatten(3, (width, 2)).unflatten(2, (height, 2))  # (B, L, h, 2, w, 2)
    expected = torch.cat([blocks.mean((3, 5)), blocks.square().mean((3, 5))], 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(of(pictures(of)).detail_BNL, expected)


def test_an_encoder_that_learns_gives_none():
    of = encoder("timm/test_resnet", trainable=True)
    assert of.detail_width == 0
    assert of(pictures(of)).detail_BNL is None
