"""What a family of encoders (timm, open_clip) hands to `ImageEncoder`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from dotcbm.structures import Preprocessing

__all__ = ["Tower", "channels", "interpolation_of", "map_patches"]


@dataclass(frozen=True)
class Tower:
    """An image tower and what its makers say of its input.

    Attributes:
        module: (B, 3, H, W) -> PatchFeatures.
        preprocessing: The makers' preprocessing, cropped as they evaluate it.
        blueprint: JSON values from which the same architecture is built again, with random weights and without any file.
    """

    module: nn.Module
    preprocessing: Preprocessing
    blueprint: dict[str, Any]


def map_patches(map_BDHW: Tensor) -> Tensor:
    """(B, H * W, D) patches of a feature map, row by row."""
    return map_BDHW.flatten(2).transpose(1, 2)


def channels(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean or standard deviation of the three channels.

    Raises:
        ValueError: Another number of channels.
    """
    if len(values) != 3:
        raise ValueError(f"the encoder reads {len(values)} channels; pictures have 3 (RGB)")
    return float(values[0]), float(values[1]), float(values[2])


def interpolation_of(kinds: Sequence[str] | str, *, name: str) -> Literal["bilinear", "bicubic", "nearest"]:
    """The interpolation that an encoder's config asks for; bicubic, with a warning, for one that tensors cannot be resized with."""
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if kind not in ("bilinear", "bicubic", "nearest"):
        warnings.warn(f"{name} was trained with {kind!r} interpolation, which is not offered; bicubic is used", stacklevel=2)
        return "bicubic"
    return cast("Literal['bilinear', 'bicubic', 'nearest']", kind)
