"""The image-text model behind a label-free bottleneck: any open_clip model as a `dotcbm.data.teacher.Teacher`.

In a config, as the teacher of a source:

    source:
      class_path: TaughtConcepts
      init_args:
        source: {class_path: CUB, init_args: {root: path/to/CUB_200_2011}}
        teacher:
          class_path: dotcbm.training.clip_teacher.ClipTeacher
          init_args: {name: open_clip/ViT-B-16@openai}

It lives here because data sets know no encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dotcbm.data.teacher import Teacher
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.text import TextEncoder
from dotcbm.structures import Preprocessing, ResizeMode

__all__ = ["ClipTeacher"]


class ClipTeacher(Teacher):
    """Cosines of open_clip's image embedding and the embeddings of the concept names. Weights are read when they are first needed."""

    def __init__(
        self,
        name: str,
        *,
        templates: list[str] | None = None,
        image_size: int | None = None,
        resize: ResizeMode = "crop",
        allow_download: bool = False,
        device: str = "cpu",
    ) -> None:
        """Args:
        name: "open_clip/<arch>@<tag>", or "local-dir:<path>" of a folder in open_clip's format; both towers come from it.
        templates: Each with one "{}" for a concept's name; ["a photo of {}"] by default.
        image_size: Side of the input; the model's own by default.
        resize: "crop" shows the middle of the picture, as the models were trained; "squash" all of it.
        allow_download: Fetch weights that are in no local cache.
        device: Where the image tower runs, such as "cuda".

        Raises:
            ValueError: A name of another kind, or a template without one "{}".
        """
        if not name.startswith(("open_clip/", "local-dir:")):
            raise ValueError(f"no image-text model is called {name!r}; names are open_clip/<arch>@<tag> or local-dir:<path>")
        self.name = name
        self.templates = ("a photo of {}",) if templates is None else tuple(templates)
        self.image_size = image_size
        self.resize: ResizeMode = resize
        self.allow_download = allow_download
        self.device = device
        self._text = TextEncoder(name, templates=self.templates, allow_download=allow_download)
        self._known: tuple[tuple[str, ...], Tensor] | None = None

    def __repr__(self) -> str:
        return f"ClipTeacher({self.name!r}, templates={list(self.templates)!r}, image_size={self.image_size}, resize={self.resize!r})"

    @property
    def preprocessing(self) -> Preprocessing:
        return self._encoder.preprocessing

    def similarities(self, image_B3HW: Tensor, names: Sequence[str]) -> Tensor:
        text_MD = self._embedded(tuple(names))
        with torch.no_grad():
            global_BD = self._encoder(image_B3HW.to(self.device)).global_BD.float().cpu()
        if global_BD.shape[1] != text_MD.shape[1]:
            raise ValueError(
                f"{self.name}: pictures become vectors of width {global_BD.shape[1]} and names of width {text_MD.shape[1]}; "
                "this is no image-text model with one space for both"
            )
        return F.normalize(global_BD, dim=-1) @ text_MD.T

    def fingerprint(self) -> str:
        told = {"image": self._encoder.fingerprint(), "text": self._text.fingerprint(), "templates": list(self.templates)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _encoder(self) -> ImageEncoder:
        encoder = ImageEncoder(self.name, image_size=self.image_size, resize=self.resize, allow_download=self.allow_download, detail=False)
        return encoder.to(self.device).eval()

    def _embedded(self, names: tuple[str, ...]) -> Tensor:
        if self._known is None or self._known[0] != names:
            self._known = (names, self._text.encode(names))
        return self._known[1]
