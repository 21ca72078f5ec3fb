"""The records that travel through dotcbm, from a picture on disk to an explanation.

Shape letters, here and everywhere else:

    B pictures in a batch     N patches of a picture (grid_h * grid_w, row by row)
    M concepts                K classes
    D features                P parts
    H W height and width in pixels

Every coordinate of a point is a fraction of the picture: x to the right, y down, (0, 0) the top left corner, (1, 1) the
bottom right one. So a point stays right when the picture is resized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "ConceptBatch",
    "ConceptOutput",
    "ConceptSample",
    "ConceptSet",
    "PatchEncoder",
    "PatchFeatures",
    "Preprocessing",
    "Problem",
]

ResizeMode = Literal["squash", "crop"]


@dataclass(frozen=True)
class ConceptSet:
    """The vocabulary of a data set: its concepts, its classes, and which class has which concept.

    Attributes:
        names: The M concept names, unique, readable ("hooked bill").
        class_names: The K class names, unique.
        class_concept_KM: (K, M) in [0, 1]; how often a class shows a concept. NaN where nobody knows.
        groups: For each concept the name of its group of (nearly) exclusive values ("bill shape"), or None.
        part_names: The P parts that key points and part masks speak of ("beak", "left wing").
        parts: For each concept the parts it can be seen on; an empty tuple means anywhere on the object.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    class_concept_KM: Tensor
    groups: tuple[str, ...] | None = None
    part_names: tuple[str, ...] = ()
    parts: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        m, k = len(self.names), len(self.class_names)
        for what, names in (("concept", self.names), ("class", self.class_names), ("part", self.part_names)):
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise ValueError(f"the {what} names {doubled[:5]} appear more than once; {what} names must be unique")
        if tuple(self.class_concept_KM.shape) != (k, m):
            raise ValueError(
                f"class_concept_KM has shape {tuple(self.class_concept_KM.shape)}; {k} classes and {m} concepts need ({k}, {m})"
            )
        known = self.class_concept_KM[~self.class_concept_KM.isnan()]
        if known.numel() and (known.min() < 0 or known.max() > 1):
            raise ValueError(
                f"class_concept_KM holds values from {known.min():g} to {known.max():g}; they must lie in [0, 1] "
                "(divide percentages by 100)"
            )
        if self.groups is not None and len(self.groups) != m:
            raise ValueError(f"{len(self.groups)} groups for {m} concepts; give one group name for each concept")
        if self.parts is not None:
            if len(self.parts) != m:
                raise ValueError(f"{len(self.parts)} part lists for {m} concepts; give one tuple of parts for each concept")
            unknown = sorted({part for row in self.parts for part in row} - set(self.part_names))
            if unknown:
                raise ValueError(f"concepts refer to the parts {unknown[:5]}, which are not among part_names {list(self.part_names)}")

    @property
    def num_concepts(self) -> int:
        """M."""
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def part_mask_MP(self) -> Tensor:
        """(M, P) bool: which parts a concept can be seen on; a row of False where no part is known."""
        mask = torch.zeros(len(self.names), len(self.part_names), dtype=torch.bool)
        for j, row in enumerate(self.parts or ()):
            for part in row:
                mask[j, self.part_names.index(part)] = True
        return mask

    def group_index_M(self) -> Tensor:
        """(M,) long: the number of each concept's group, in order of first appearance; one group a concept if there are none."""
        groups = self.groups or self.names
        order = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        return torch.tensor([order[name] for name in groups], dtype=torch.long)


@dataclass(frozen=True)
class Preprocessing:
    """What turns a picture into an encoder's input. Stored with every model and cache, and compared when they are loaded.

    Attributes:
        size: (height, width) of the input in pixels.
        mean, std: Channel statistics of the input in [0, 1] RGB.
        interpolation: "bilinear", "bicubic" or "nearest".
        resize: "squash" maps the whole picture onto the input, so that a heatmap covers the whole picture;
            "crop" resizes the shorter side and takes the centre, as ImageNet models are evaluated.
        crop_fraction: With "crop": the share of the resized picture's side that is kept.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    resize: ResizeMode = "squash"
    crop_fraction: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


@dataclass(frozen=True)
class PatchFeatures:
    """What an image encoder says of a batch of pictures.

    Attributes:
        patch_BND: (B, N, D) patch tokens, row by row from the top left.
        global_BD: (B, D_g) the global token (CLS, or the pooled patches where there is none).
        grid: (grid_h, grid_w) with grid_h * grid_w = N.
        saliency_BN: (B, N) saliency from outside (a mask or a map averaged onto the grid), or None.
        detail_BNL: (B, N, L) what the encoder's early stages say of the pixels below each patch, or None where it tells of none. They
            know colour and texture of a small place, where the patches know the whole object.
        read_BGX: (B, G, X) what a bottleneck has read of the patches already, in place of them (`Bottleneck.condense`), or None.
    """

    patch_BND: Tensor
    global_BD: Tensor
    grid: tuple[int, int]
    saliency_BN: Tensor | None = None
    detail_BNL: Tensor | None = None
    read_BGX: Tensor | None = None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> PatchFeatures:
        """The same on another device or in another precision; `non_blocking` as in `torch.Tensor.to`."""
        return replace(self, **{name: value.to(device, dtype, non_blocking) for name, value in self._tensors().items()})

    def pin_memory(self) -> PatchFeatures:
        """The same in memory from which a GPU copies on its own."""
        return replace(self, **{name: _pinned(value) for name, value in self._tensors().items()})

    def rows(self, index: Tensor) -> PatchFeatures:
        """The pictures `index`, on the device where the features are."""
        index = index.to(self.patch_BND.device)
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(value.nbytes for value in self._tensors().values())

    @staticmethod
    def cat(parts: Sequence[PatchFeatures]) -> PatchFeatures:
        """The pictures of several batches, one after the other; what only some of them have is left out."""
        names = set.intersection(*(set(part._tensors()) for part in parts))
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _tensors(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


class PatchEncoder(Protocol):
    """An image encoder, as data, models and training see it (`dotcbm.encoders.image.ImageEncoder` is one)."""

    preprocessing: Preprocessing
    grid: tuple[int, int]
    width: int
    global_width: int

    def __call__(self, image_B3HW: Tensor) -> PatchFeatures: ...

    def fingerprint(self) -> str:
        """A hash of architecture, weights and preprocessing: equal if and only if the features are equal."""
        ...


@dataclass(frozen=True)
class ConceptSample:
    """One picture with everything known about it. Fields that a data set does not have are None.

    Attributes:
        image: (3, H, W) uint8 as read, or float32 after preprocessing; None when only the annotations were asked for.
        label: Class index.
        concepts_M: (M,) float in {0, 1}, NaN where unknown.
        index: Row in its split.
        name: Its name in the data set (a path below the root), unique within a split.
        size: (height, width) of the original picture in pixels.
        points_P3: (P, 3) x and y as fractions of the picture, and visible in {0, 1}.
        box_4: (4,) x0, y0, x1, y1 of the object as fractions of the picture.
        foreground_HW: (H, W) bool mask of the object.
        part_masks_PHW: (P, H, W) bool masks of the visible parts.
        group: Number of the sub-population (Waterbirds: class and background), or None.
    """

    image: Tensor | None
    label: int
    concepts_M: Tensor
    index: int
    name: str
    size: tuple[int, int]
    points_P3: Tensor | None = None
    box_4: Tensor | None = None
    foreground_HW: Tensor | None = None
    part_masks_PHW: Tensor | None = None
    group: int | None = None


@dataclass(frozen=True)
class ConceptBatch:
    """A batch of samples: pictures or cached features, and what is known about them. See `ConceptSample` for the fields.

    Exactly one of `image_B3HW` and `features` is given. `view` numbers the cached view (0 the plain picture).
    """

    concepts_BM: Tensor
    label_B: Tensor
    index_B: Tensor
    names: tuple[str, ...]
    size_B2: Tensor
    image_B3HW: Tensor | None = None
    features: PatchFeatures | None = None
    points_BP3: Tensor | None = None
    box_B4: Tensor | None = None
    foreground_BHW: Tensor | None = None
    part_masks_BPHW: Tensor | None = None
    group_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_B)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ConceptBatch:
        """The same on another device (Lightning calls this to move a batch); `non_blocking` as in `torch.Tensor.to`."""
        return _changed(self, lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ConceptBatch:
        """The same in memory from which a GPU copies on its own (torch's loader calls this)."""
        return _changed(self, _pinned)


@dataclass(frozen=True)
class Problem:
    """What a bottleneck must know before it can be built: the widths that it reads and the concepts that it names.

    Attributes:
        patch_width: D of the patch tokens.
        global_width: D of the global token.
        grid: (grid_h, grid_w).
        concepts: The vocabulary.
        text_MD: (M, D_t) embeddings of the concept names, or None to learn them.
        concept_frequency_M: (M,) share of the training pictures that show a concept.
        detail_width: L of the details; 0 where there are none.
    """

    patch_width: int
    global_width: int
    grid: tuple[int, int]
    concepts: ConceptSet
    text_MD: Tensor | None = None
    concept_frequency_M: Tensor | None = None
    detail_width: int = 0


@dataclass(frozen=True)
class ConceptOutput:
    """What a bottleneck says of a batch.

    Attributes:
        concept_logit_BM: (B, M); the concept probability is its sigmoid.
        class_logit_BK: (B, K).
        grid: (grid_h, grid_w) of the maps.
        evidence_BNM: (B, N, M) what each patch adds to a concept's logit: summed over the patches (plus the concept's
            bias) it gives concept_logit_BM exactly. None for bottlenecks whose logit is no sum over patches.
        plan_BNM: (B, N, M) transport plan without null rows and columns, or pooling weights as the plan of a transport that leaves the
            patches free (`dotcbm.models.dot_product`); None for bottlenecks that transport nothing.
        theta_BN: (B, N) patch marginal; None where it is free.
        gamma_BM: (B, M) concept marginal, as column sums of the plan.
        residual_B: (B,) L1 violation of the marginals that the solver left.
        context_BX: (B, ...) what the class head reads beside the concept logits (`Bottleneck.head_input`); None where it reads
            the concepts alone.
        auxiliary_BK: (B, K) class logits of a second head that serves the training only.
        losses: Terms that only the bottleneck can compute (orthogonality), by name, unweighted scalars.
    """

    concept_logit_BM: Tensor
    class_logit_BK: Tensor
    grid: tuple[int, int]
    evidence_BNM: Tensor | None = None
    plan_BNM: Tensor | None = None
    theta_BN: Tensor | None = None
    gamma_BM: Tensor | None = None
    residual_B: Tensor | None = None
    context_BX: Tensor | None = None
    auxiliary_BK: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def concept_BM(self) -> Tensor:
        """(B, M) concept probabilities."""
        return self.concept_logit_BM.sigmoid()

    @property
    def class_BK(self) -> Tensor:
        """(B, K) class probabilities."""
        return self.class_logit_BK.softmax(-1)

    def to(self, device: torch.device | str) -> ConceptOutput:
        """The same on another device."""
        return _changed(self, lambda value: value.to(device))

    def detach(self) -> ConceptOutput:
        """The same, cut from the graph."""
        cut: dict[str, Any] = {f.name: v.detach() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **cut, losses={name: loss.detach() for name, loss in self.losses.items()})


def _pinned(value: Any) -> Any:
    # An expanded tensor, whose elements share memory, cannot be pinned.
    return value.contiguous().pin_memory() if isinstance(value, Tensor) else value.pin_memory()


def _changed(record: Any, change: Callable[[Any], Any]) -> Any:
    changes: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Tensor | PatchFeatures):
            changes[f.name] = change(value)
        elif isinstance(value, dict):
            changes[f.name] = {k: change(v) for k, v in value.items()}
    return replace(record, **changes)
