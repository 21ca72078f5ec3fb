"""What an encoder sees early: features of few pixels, on the grid of its patches.

The last features of an encoder say what the whole object is, in every patch on it. Its early stages know colour and texture of a
small place and nothing else, which is what tells parts apart (`dotcbm.models.parts`).
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.timm_tower import TimmTower
from dotcbm.encoders.tower import map_patches
from dotcbm.structures import PatchFeatures

__all__ = ["DetailEncoder", "detail_encoder"]

_DETAIL = 1  # part of the fingerprint; raised when other features are given
_STRIDES = (8, 16)  # pixels a patch of the stages that are read: finer ones see edges, coarser ones the object


class DetailEncoder(nn.Module):
    """An `ImageEncoder`'s early stages as a `PatchEncoder`: the mean of each channel over a patch, and the mean of its square.

    Stages are first averaged to twice the grid, so that the squares say how much a channel varies within a patch.

    Attributes:
        preprocessing, grid: Those of the encoder.
        width: Twice the channels of the stages.
        global_width: The same; the global token is the mean over the patches.
    """

    def __init__(self, encoder: ImageEncoder, *, layers: tuple[int, ...]) -> None:
        """Args:
        encoder: A timm model with intermediate features.
        layers: Their numbers.
        """
        super().__init__()
        assert isinstance(encoder.tower, TimmTower)
        self.tower = encoder.tower
        self.layers = layers
        self.preprocessing = encoder.preprocessing
        self.grid = encoder.grid
        self._of = encoder.fingerprint()
        height, width = self.preprocessing.size
        weight = next(self.tower.parameters())
        with torch.no_grad():
            self.width = self(torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)).patch_BND.shape[2]
        self.global_width = self.width

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        """Details of prepared pictures."""
        height, width = self.grid
        maps = self.tower.intermediates(image_B3HW, self.layers)
        maps = [F.adaptive_avg_pool2d(map_BLHW.float(), (2 * height, 2 * width)) for map_BLHW in maps]
        map_BLHW = torch.cat(maps, 1)
        patch_BNL = map_patches(F.avg_pool2d(torch.cat([map_BLHW, map_BLHW.square()], 1), 2))
        return PatchFeatures(patch_BND=patch_BNL, global_BD=patch_BNL.mean(1), grid=self.grid)

    def fingerprint(self) -> str:
        """Of the encoder and of which stages are read."""
        return hashlib.sha256(f"detail-{_DETAIL} {self.layers} {self._of}".encode()).hexdigest()


def detail_encoder(encoder: object) -> DetailEncoder | None:
    """The early stages of a frozen timm encoder; None where it has none that are finer than its patches."""
    if not isinstance(encoder, ImageEncoder) or not isinstance(encoder.tower, TimmTower):
        return None
    layers = encoder.tower.early_layers(_STRIDES)
    return DetailEncoder(encoder, layers=layers) if layers else None
