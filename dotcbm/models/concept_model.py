"""The whole model: an encoder and the bottleneck that stands on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dotcbm.data.source import read_picture
from dotcbm.data.transforms import prepare_picture
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.base import Bottleneck
from dotcbm.models.edits import Edit
from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet, PatchFeatures, Preprocessing
from dotcbm.transport.priors import map_to_grid

__all__ = ["ConceptModel", "Picture", "read_any"]

Picture = str | Path | Image.Image | np.ndarray | Tensor


def read_any(picture: Picture) -> Tensor:
    """A picture in any of the usual forms as (3, H, W) uint8 RGB.

    Args:
        picture: A path, a PIL image, an (H, W, 3) uint8 array, or a (3, H, W) uint8 tensor.

    Raises:
        ValueError: An array or tensor of another shape or type.
        BadPictureError: A file that is missing or cannot be decoded.
    """
    if isinstance(picture, str | Path):
        return read_picture(Path(picture))
    if isinstance(picture, Image.Image):
        picture = np.array(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an array picture must be (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a tensor picture must be (3, H, W) uint8, got {tuple(picture.shape)} {picture.dtype}")
    return picture


class ConceptModel(nn.Module):
    """Pictures in, concepts, classes and the places they were read from out.

    Attributes:
        encoder, bottleneck: Its two parts.
        edits: What was changed in it by hand (`dotcbm edit`), oldest first; saved and read back with the model.
    """

    edits: tuple[Edit, ...]

    def __init__(self, encoder: ImageEncoder, bottleneck: Bottleneck) -> None:
        """Args:
        encoder: Gives patches and a global token.
        bottleneck: Reads concepts and classes from them.

        Raises:
            ValueError: The bottleneck was built for features of another width.
        """
        super().__init__()
        problem = bottleneck.problem
        for what, given, wanted in (
            ("patches", encoder.width, problem.patch_width),
            ("global tokens", encoder.global_width, problem.global_width),
            ("details", encoder.detail_width if problem.detail_width else 0, problem.detail_width),
        ):
            if given != wanted:
                raise ValueError(
                    f"the encoder {encoder.name} gives {what} of width {given}; the bottleneck was built for {wanted}: another encoder"
                )
        self.encoder = encoder
        self.bottleneck = bottleneck
        self.edits = ()

    @property
    def removed_concepts(self) -> tuple[str, ...]:
        """Names of the concepts that are predicted but that no class reads any more (see `edits`)."""
        return tuple(name for edit in self.edits for name in edit.removed)

    @property
    def concepts(self) -> ConceptSet:
        """The vocabulary."""
        return self.bottleneck.problem.concepts

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns a picture into the encoder's input."""
        return self.encoder.preprocessing

    def forward(self, image_B3HW: Tensor) -> ConceptOutput:
        """Prepared pictures (see `prepare`) to concepts and classes."""
        return self.bottleneck(self.encoder(image_B3HW))

    def forward_batch(self, batch: ConceptBatch) -> ConceptOutput:
        """A batch of pictures or of cached features; its foreground mask, if it has one, is the external saliency.

        Raises:
            ValueError: The batch holds neither pictures nor features.
        """
        return self.read(self.features_of(batch), concepts_BM=batch.concepts_BM)

    def features_of(self, batch: ConceptBatch) -> PatchFeatures:
        """What `forward_batch` gives to the bottleneck.

        Raises:
            ValueError: The batch holds neither pictures nor features.
        """
        features = batch.features
        if features is None:
            if batch.image_B3HW is None:
                raise ValueError("the batch holds neither pictures nor features")
            features = self.encoder(batch.image_B3HW)
        if features.saliency_BN is None and batch.foreground_BHW is not None:
            features = replace(features, saliency_BN=map_to_grid(batch.foreground_BHW.float(), features.grid))
        return features

    def read(self, features: PatchFeatures, *, concepts_BM: Tensor) -> ConceptOutput:
        """Concepts and classes of features.

        Args:
            features: Of B pictures.
            concepts_BM: (B, M) their true concepts, NaN where unknown; read in training only, by bottlenecks that `trains_on_truth`.
        """
        if self.training and self.bottleneck.trains_on_truth:
            return self.bottleneck(features, truth_BM=concepts_BM)
        return self.bottleneck(features)

    def prepare(self, pictures: Sequence[Picture]) -> Tensor:
        """(B, 3, h, w) input of `forward`, on the model's device."""
        device = next(self.bottleneck.parameters()).device
        return torch.stack([prepare_picture(read_any(picture), preprocessing=self.preprocessing) for picture in pictures]).to(device)

    @torch.no_grad()
    def predict(self, pictures: Sequence[Picture] | Picture, *, batch_size: int = 32) -> ConceptOutput:
        """Concepts, classes and maps of pictures in any of the usual forms (see `read_any`).

        Args:
            pictures: One or many.
            batch_size: How many go through the encoder at once.

        Returns:
            Tensors on the CPU, one row a picture. The model's mode is restored.
        """
        if isinstance(pictures, str | Path | Image.Image | np.ndarray | Tensor):
            pictures = [pictures]
        if not pictures:
            raise ValueError("no pictures to predict; give at least one")
        was_training = self.training
        self.eval()
        try:
            parts = [self(self.prepare(pictures[i : i + batch_size])).to("cpu") for i in range(0, len(pictures), batch_size)]
        finally:
            self.train(was_training)
        joined = {
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(ConceptOutput)
            if isinstance(getattr(parts[0], f.name), Tensor)
        }
        return replace(parts[0], **joined)
