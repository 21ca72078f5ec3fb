"""Points, boxes and masks must land where the picture's pixels land."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from dotcbm.data.transforms import collate, prepare_picture, prepare_sample
from dotcbm.structures import ConceptSample, Preprocessing

PLAIN = Preprocessing(size=(48, 64), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear")


def drawn(height: int, width: int, x: int, y: int, *, side: int = 9) -> ConceptSample:
    """A white square of `side` pixels around pixel (x, y) of a black picture, annotated in every way there is."""
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    r = side // 2
    picture[:, y - r : y + r + 1, x - r : x + r + 1] = 255
    mask = picture[0] > 0
    box = torch.tensor([(x - r) / width, (y - r) / height, (x + r + 1) / width, (y + r + 1) / height])
    return ConceptSample(
        image=picture,
        label=0,
        concepts_M=torch.zeros(1),
        index=0,
        name="dot",
        size=(height, width),
        points_P3=torch.tensor([[(x + 0.5) / width, (y + 0.5) / height, 1.0]]),
        box_4=box,
        foreground_HW=mask,
        part_masks_PHW=mask[None],
    )


@settings(max_examples=60)
@given(
    height=st.integers(70, 160),
    width=st.integers(70, 160),
    fx=st.floats(0, 1),
    fy=st.floats(0, 1),
    resize=st.sampled_from(["squash", "crop"]),
    fraction=st.sampled_from([1.0, 0.875]),
    flip=st.booleans(),
)
def test_everything_moves_with_the_picture(height, width, fx, fy, resize, fraction, flip):
    x, y = 5 + int(fx * (width - 11)), 5 + int(fy * (height - 11))
    preprocessing = replace(PLAIN, resize=resize, crop_fraction=fraction if resize == "crop" else 1.0)
    sample = prepare_sample(drawn(height, width, x, y), preprocessing=preprocessing, flip=flip)
    h, w = preprocessing.size
    assert sample.image is not None
    assert sample.image.shape == (3, h, w)
    bright = sample.image[0]
    px, py, visible = sample.points_P3[0].tolist()
    rows, columns = torch.arange(h)[:, None] + 0.5, torch.arange(w)[None] + 0.5
    margin = 0.15
    if margin < px < 1 - margin and margin < py < 1 - margin:  # the whole square is inside
        mass = bright.sum()
        assert visible == 1
        assert float((bright * columns).sum() / mass) == pytest.approx(px * w, abs=0.15)
        assert float((bright * rows).sum() / mass) == pytest.approx(py * h, abs=0.15)
        x0, y0, x1, y1 = sample.box_4.tolist()
        assert (x0 + x1) / 2 == pytest.approx(px, abs=1e-5)
        assert (y0 + y1) / 2 == pytest.approx(py, abs=1e-5)
        assert float(mass) == pytest.approx((x1 - x0) * w * (y1 - y0) * h, rel=0.05)
        mask = sample.foreground_HW
        centre = mask.nonzero().float().mean(0) + 0.5
        assert centre.tolist() == pytest.approx([py * h, px * w], abs=0.6)
        assert (bright[mask] > 0.2).all()  # a corner pixel of the mask is at least half covered both ways
        assert torch.equal(sample.part_masks_PHW[0], mask)
    if not (0 <= px <= 1 and 0 <= py <= 1):
        assert resize == "crop"
        assert visible == 0


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("flip", [False, True])
def test_annotations_are_the_same_without_the_picture(resize, flip):
    preprocessing = replace(PLAIN, resize=resize)
    sample = drawn(90, 120, 40, 30)
    whole = prepare_sample(sample, preprocessing=preprocessing, flip=flip)
    bare = prepare_sample(replace(sample, image=None), preprocessing=preprocessing, flip=flip)
    assert bare.image is None
    assert bare.size == whole.size
    for name in ("points_P3", "box_4", "foreground_HW", "part_masks_PHW"):
        assert torch.equal(getattr(bare, name), getattr(whole, name))


def test_flipping_twice_gives_the_picture_back():
    same = replace(PLAIN, size=(90, 120))
    once = prepare_sample(drawn(90, 120, 40, 30), preprocessing=same, flip=True)
    twice = prepare_sample(replace(once, image=(once.image * 255).to(torch.uint8)), preprocessing=same, flip=True)
    plain = prepare_sample(drawn(90, 120, 40, 30), preprocessing=same)
    assert torch.equal(twice.image, plain.image)
    assert torch.equal(twice.foreground_HW, plain.foreground_HW)
    assert torch.allclose(twice.points_P3, plain.points_P3, atol=1e-6)
    assert torch.allclose(twice.box_4, plain.box_4, atol=1e-6)


def test_crop_is_that_of_timm():
    transforms = pytest.importorskip("timm.data.transforms_factory")
    from PIL import Image

    picture = torch.randint(0, 255, (3, 90, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preprocessing = Preprocessing((56, 56), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), interpolation="bicubic", resize="crop", crop_fraction=0.875)
    theirs = transforms.transforms_imagenet_eval(
        img_size=56, crop_pct=0.875, interpolation="bicubic", mean=preprocessing.mean, std=preprocessing.std
    )(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    ours = prepare_picture(picture, preprocessing=preprocessing)
    # PIL and torchvision round bicubic weights differently by a grey level or two.
    assert (ours - theirs).abs().max() < 4 / 255 / 0.2


def test_values_are_normalised():
    preprocessing = Preprocessing((8, 8), (0.5, 0.4, 0.3), (0.1, 0.2, 0.5))
    prepared = prepare_picture(torch.full((3, 20, 30), 255, dtype=torch.uint8), preprocessing=preprocessing)
    assert prepared.dtype == torch.float32
    assert prepared.mean((1, 2)).tolist() == pytest.approx([5.0, 3.0, 1.4], rel=1e-5)


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(3, 0, 8, dtype=torch.uint8)]
)
def test_a_tensor_that_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match=r"must be \(3, H, W\) uint8"):
        prepare_picture(picture, preprocessing=PLAIN)


def test_a_mask_of_another_size_is_refused():
    sample = replace(drawn(90, 120, 40, 30), foreground_HW=torch.zeros(80, 120, dtype=torch.bool))
    with pytest.raises(ValueError, match="give it the picture's size"):
        prepare_sample(sample, preprocessing=PLAIN)


def test_collate_fills_missing_foregrounds_and_refuses_other_gaps():
    one = prepare_sample(drawn(90, 120, 40, 30), preprocessing=PLAIN)
    without = replace(one, foreground_HW=None)
    batch = collate([one, without])
    assert batch.foreground_BHW is not None
    assert batch.foreground_BHW[0].any()
    assert not batch.foreground_BHW[1].any()
    assert collate([without]).foreground_BHW is None
    assert batch.image_B3HW.shape == (2, 3, 48, 64)
    assert batch.size_B2.tolist() == [[90, 120], [90, 120]]
    assert batch.group_B is None
    with pytest.raises(ValueError, match="dot has no box_4"):
        collate([one, replace(one, box_4=None)])
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_a_coarse_picture_has_the_detail_of_a_small_one_and_the_same_geometry() -> None:
    picture = torch.randint(0, 256, (3, 200, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = ConceptSample(
        image=picture, label=0, concepts_M=torch.zeros(1), index=0, name="a", size=(200, 320), points_P3=torch.tensor([[0.3, 0.6, 1.0]])
    )
    preprocessing = Preprocessing((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    fine = prepare_sample(sample, preprocessing=preprocessing)
    coarse = prepare_sample(sample, preprocessing=preprocessing, coarse=True)
    by_hand = resize(picture, [60, 96], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert coarse.image is not None
    assert fine.image is not None
    assert torch.equal(coarse.image, prepare_picture(by_hand, preprocessing=preprocessing))
    assert coarse.image.diff(dim=2).abs().mean() < 0.3 * fine.image.diff(dim=2).abs().mean()
    assert fine.points_P3 is not None
    assert coarse.points_P3 is not None
    assert torch.equal(coarse.points_P3, fine.points_P3)


def test_a_small_picture_is_not_made_coarser() -> None:
    picture = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = ConceptSample(image=picture, label=0, concepts_M=torch.zeros(1), index=0, name="a", size=(60, 80))
    preprocessing = Preprocessing((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    fine, coarse = (prepare_sample(sample, preprocessing=preprocessing, coarse=coarse).image for coarse in (False, True))
    assert fine is not None
    assert coarse is not None
    assert torch.equal(fine, coarse)
