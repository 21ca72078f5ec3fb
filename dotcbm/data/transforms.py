"""From a picture as read to an encoder's input, with points, boxes and masks moving along.

Every geometry is made of the same steps, done by torchvision v2 on pictures, masks, key points and boxes alike: resize, with
"crop" take the centre, mirror if asked to. A coarse picture loses detail first and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, KeyPoints

from dotcbm.structures import ConceptBatch, ConceptSample, Preprocessing

__all__ = ["COARSE", "collate", "prepare_picture", "prepare_sample"]

COARSE = 3 / 7
"""A coarse picture is first reduced until its longer side is at most this share of the input's: 96 of 224 px, 192 of 448."""


def prepare_picture(picture_3HW: Tensor, *, preprocessing: Preprocessing) -> Tensor:
    """A picture as an encoder wants it.

    Args:
        picture_3HW: (3, H, W) uint8 RGB.
        preprocessing: Size, resize mode and channel statistics.

    Returns:
        (3, h, w) float32, normalised.

    Raises:
        ValueError: A tensor that is no (3, H, W) uint8 picture.
    """
    if picture_3HW.ndim != 3 or picture_3HW.shape[0] != 3 or picture_3HW.dtype != torch.uint8 or 0 in picture_3HW.shape:
        raise ValueError(f"a picture must be (3, H, W) uint8, got {tuple(picture_3HW.shape)} {picture_3HW.dtype}")
    height, width = picture_3HW.shape[1:]
    geometry = _Geometry((height, width), preprocessing)
    return _normalised(geometry.picture(picture_3HW), preprocessing)


def prepare_sample(sample: ConceptSample, *, preprocessing: Preprocessing, flip: bool = False, coarse: bool = False) -> ConceptSample:
    """A sample whose picture is an encoder's input and whose points, box and masks still lie on the same things.

    Names of parts stay as they are when the picture is mirrored: a mirrored left wing is still the bird's left wing.

    Args:
        sample: As read; its picture may be missing.
        preprocessing: Of the encoder.
        flip: Mirror left and right.
        coarse: Show it with the detail of a small picture, so that a model meets both.

    Returns:
        Image (3, h, w) float32, masks at (h, w), points and box as fractions of what the encoder sees. With resize mode
        "crop", points outside it count as invisible, the box is clamped, and `size` is the part seen in original pixels.
    """
    geometry = _Geometry(sample.size, preprocessing, flip=flip, coarse=coarse)
    seen = geometry.seen_size
    return replace(
        sample,
        image=None if sample.image is None else _normalised(geometry.picture(sample.image), preprocessing),
        size=(round(seen[0]), round(seen[1])),
        points_P3=None if sample.points_P3 is None else geometry.points(sample.points_P3),
        box_4=None if sample.box_4 is None else geometry.box(sample.box_4),
        foreground_HW=None if sample.foreground_HW is None else geometry.masks(sample.foreground_HW[None])[0],
        part_masks_PHW=None if sample.part_masks_PHW is None else geometry.masks(sample.part_masks_PHW),
    )


def collate(samples: Sequence[ConceptSample]) -> ConceptBatch:
    """Prepared samples as one batch.

    A field that no sample has is None. A foreground mask that only some samples have is empty for the others, which
    metrics leave out.

    Raises:
        ValueError: No samples, or a field other than the foreground that only some samples have.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")

    def stacked(field: str, read: Callable[[ConceptSample], Tensor | None]) -> Tensor | None:
        values = [read(sample) for sample in samples]
        given = [value for value in values if value is not None]
        if not given:
            return None
        if len(given) < len(values):
            if field != "foreground_HW":
                lacking = next(sample.name for sample, value in zip(samples, values) if value is None)
                raise ValueError(f"{lacking} has no {field} while other pictures of its batch have one; a data set must give it for all")
            values = [torch.zeros_like(given[0]) if value is None else value for value in values]
        return torch.stack([value for value in values if value is not None])

    return ConceptBatch(
        concepts_BM=torch.stack([sample.concepts_M for sample in samples]),
        label_B=torch.tensor([sample.label for sample in samples]),
        index_B=torch.tensor([sample.index for sample in samples]),
        names=tuple(sample.name for sample in samples),
        size_B2=torch.tensor([sample.size for sample in samples]),
        image_B3HW=stacked("image", lambda s: s.image),
        points_BP3=stacked("points_P3", lambda s: s.points_P3),
        box_B4=stacked("box_4", lambda s: s.box_4),
        foreground_BHW=stacked("foreground_HW", lambda s: s.foreground_HW),
        part_masks_BPHW=stacked("part_masks_PHW", lambda s: s.part_masks_PHW),
        group_B=stacked("group", lambda s: None if s.group is None else torch.tensor(s.group)),
    )


def _normalised(picture_3HW: Tensor, preprocessing: Preprocessing) -> Tensor:
    picture = F.to_dtype(picture_3HW, torch.float32, scale=True)
    return F.normalize(picture, mean=list(preprocessing.mean), std=list(preprocessing.std))


def _key_points(xy_P2: Tensor, canvas: tuple[int, int]) -> Tensor:
    return KeyPoints(xy_P2, canvas_size=canvas)  # pyright: ignore[reportCallIssue]  # its stubs describe Tensor.__init__


def _boxes(box_X4: Tensor, canvas: tuple[int, int]) -> Tensor:
    return BoundingBoxes(box_X4, format=BoundingBoxFormat.XYXY, canvas_size=canvas)  # pyright: ignore[reportCallIssue]  # as above


@dataclass(frozen=True)
class _Geometry:
    """Where the pixels of a picture of size `canvas` (height, width) go."""

    canvas: tuple[int, int]
    preprocessing: Preprocessing
    flip: bool = False
    coarse: bool = False

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) after resizing, before the crop."""
        height, width = self.preprocessing.size
        if self.preprocessing.resize == "squash":
            return height, width
        # The smallest size with the picture's proportions that covers the input divided by the crop's share.
        fraction = self.preprocessing.crop_fraction
        scale = max(int(height / fraction) / self.canvas[0], int(width / fraction) / self.canvas[1])
        return max(round(self.canvas[0] * scale), height), max(round(self.canvas[1] * scale), width)

    @property
    def seen_size(self) -> tuple[float, float]:
        """(height, width) in original pixels of what the encoder sees."""
        (h, w), (rh, rw) = self.preprocessing.size, self.resized
        return self.canvas[0] * h / rh, self.canvas[1] * w / rw

    def picture(self, picture_3HW: Tensor) -> Tensor:
        mode = InterpolationMode(self.preprocessing.interpolation)
        scale = COARSE * max(self.preprocessing.size) / max(self.canvas)
        if self.coarse and scale < 1:
            small = [max(round(side * scale), 1) for side in self.canvas]
            picture_3HW = F.resize(picture_3HW, small, interpolation=mode, antialias=True)
        return self._pixels(picture_3HW, mode)

    def masks(self, mask_XHW: Tensor) -> Tensor:
        # torchvision's kernel for masks takes the pixel half a step to the top left ("nearest"); this one takes the nearest.
        if tuple(mask_XHW.shape[1:]) != self.canvas:
            raise ValueError(f"a mask of {tuple(mask_XHW.shape[1:])} pixels for a picture of {self.canvas}: give it the picture's size")
        return self._pixels(mask_XHW.to(torch.uint8), InterpolationMode.NEAREST_EXACT).bool()

    def _pixels(self, value_XHW: Tensor, mode: InterpolationMode) -> Tensor:
        value = F.resize(value_XHW, list(self.resized), interpolation=mode, antialias=True)
        if self.preprocessing.resize == "crop":
            value = F.center_crop(value, list(self.preprocessing.size))
        return F.horizontal_flip(value) if self.flip else value

    def points(self, points_P3: Tensor) -> Tensor:
        """Fractions of the picture to fractions of the input."""
        height, width = self.canvas
        pixels = points_P3[:, :2] * points_P3.new_tensor([width, height])
        value = F.resize(_key_points(pixels, self.canvas), list(self.resized))
        if self.preprocessing.resize == "crop":
            value = F.center_crop(value, list(self.preprocessing.size))
        if self.flip:
            # torchvision resizes points as places but mirrors them as pixel numbers (x -> width - 1 - x).
            value = F.horizontal_flip(_key_points(value.as_subclass(Tensor) - 0.5, self.preprocessing.size)) + 0.5
        h, w = self.preprocessing.size
        xy_P2 = value.as_subclass(Tensor) / points_P3.new_tensor([w, h])
        visible_P = points_P3[:, 2]
        if self.preprocessing.resize == "crop":
            visible_P = visible_P * ((xy_P2 >= 0) & (xy_P2 <= 1)).all(1)
        return torch.cat([xy_P2, visible_P[:, None].to(xy_P2.dtype)], 1)

    def box(self, box_4: Tensor) -> Tensor:
        """Fractions of the picture to fractions of the input, clamped to it."""
        height, width = self.canvas
        pixels = box_4.float() * box_4.new_tensor([width, height, width, height])
        value = F.resize(_boxes(pixels[None], self.canvas), list(self.resized))
        if self.preprocessing.resize == "crop":
            value = F.center_crop(value, list(self.preprocessing.size))
        if self.flip:
            value = F.horizontal_flip(value)
        h, w = self.preprocessing.size
        return (value.as_subclass(Tensor)[0] / box_4.new_tensor([w, h, w, h])).clamp(0, 1)
