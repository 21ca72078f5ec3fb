"""Backgrounds that are tied to the class, or that belong to another: tests of where a model looks.

Koh et al., "Concept Bottleneck Models", ICML 2020 (TravelingBirds) tie the background of a bird to its class in training and
draw it anew at test; DOT-CBM (Xie et al., CVPR 2025) does so with colours, each class's own with probability 0.8 in training
and in-distribution test and 0.3 out of distribution. Xiao et al., "Noise or Signal: The Role of Image Backgrounds in Object
Recognition", ICLR 2021, put objects on backgrounds of other classes and, as the control that has the same seams and paint, on
other backgrounds of their own.

N pictures of a split, K classes.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dotcbm.data.backgrounds_paint import PAINT, blurred_background, coloured_background, swap_background
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.structures import ConceptSet

__all__ = ["BackgroundKind", "Backgrounds", "blurred_background", "class_colours", "coloured_background", "swap_background"]

BackgroundKind = Literal["coloured", "swapped", "blurred"]
_EXTRA: dict[BackgroundKind, tuple[str, ...]] = {
    "coloured": ("test_ood",),
    "swapped": ("test_same", "test_ood"),
    "blurred": ("test_ood",),
}
_STREAMS = {"train": 0, "val": 1, "test": 2, "test_ood": 3, "test_same": 4}


def class_colours(num_classes: int, *, seed: int) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class, spread evenly over the cube of colours, none near black or white.

    The points are the additive sequence of Roberts ("The unreasonable effectiveness of quasirandom sequences", 2018): multiples of
    the powers of 1 / g modulo 1, where g is the real root of g^4 = g + 1.

    Args:
        num_classes: K.
        seed: Of the order, so that neighbouring classes have no neighbouring colours in another study.

    Returns:
        K triples in 20 ... 235.
    """
    root = 1.2207440846057596
    step_3 = np.array([root**-1, root**-2, root**-3])
    point_K3 = (0.5 + np.arange(1, num_classes + 1)[:, None] * step_3) % 1
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, num_classes]))).permutation(num_classes)
    return tuple((int(r), int(g), int(b)) for r, g, b in np.round(20 + 215 * point_K3[order]))


class Backgrounds(ConceptSource):
    """Another source with its objects on changed backgrounds; concepts, points, boxes and masks stay as they are.

    Splits by kind, beside "train", "val" (if the source has it) and "test":

    - "coloured": every picture is the object on one colour, in all splits. Each class has a colour of its own, which a picture gets
      with probability `tie` in train, val and test and `tie_ood` in "test_ood"; else one of the other classes' colours, drawn
      evenly. `group_N` is 1 where the colour is the class's own, else 0.
    - "swapped": train, val and test are the source's pictures. "test_ood" shows the objects of test, each on the background of a
      test picture of another class; "test_same", the control, on that of another test picture of its own class. Donors are drawn
      evenly from the pictures that fit.
    - "blurred": train, val and test are the source's pictures; "test_ood" shows those of test with a blurred background.

    Where a background is changed, and in test for comparison, pictures without a usable mask (none, empty, or over the whole
    picture) are left out, as are with "swapped" those of a class that has no other usable test picture; one warning a split counts
    them. What is drawn for row i of the source's split depends on the seed, the split and i (and for a donor on which rows fit).

    Args:
        source: Where objects and masks come from.
        kind: See above.
        tie: Probability of the class's own colour ("coloured").
        tie_ood: The same in "test_ood".
        blur: Of "blurred", as a share of the shorter side; see `blurred_background`.
        seed: Of colours and donors.
    """

    def __init__(
        self,
        source: ConceptSource,
        *,
        kind: BackgroundKind,
        tie: float = 0.8,
        tie_ood: float = 0.3,
        blur: float = 0.1,
        seed: int = 0,
    ) -> None:
        if kind not in _EXTRA:
            raise ValueError(f"kind is {kind!r}; choose one of {list(_EXTRA)}")
        for name, value in (("tie", tie), ("tie_ood", tie_ood)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; give a probability in [0, 1]")
        if not blur > 0:
            raise ValueError(f"blur is {blur}; give a positive share of the shorter side")
        if seed < 0:
            raise ValueError(f"seed is {seed}; give a whole number from 0 on")
        if kind == "coloured" and source.concepts.num_classes < 2:
            raise ValueError("coloured backgrounds need two classes at least, and the source has one")
        self.source = source
        self.kind: BackgroundKind = kind
        self.tie = tie
        self.tie_ood = tie_ood
        self.blur = blur
        self.seed = seed

    def __repr__(self) -> str:
        own = {"coloured": f", tie={self.tie}, tie_ood={self.tie_ood}", "blurred": f", blur={self.blur}"}.get(self.kind, "")
        return f"Backgrounds({self.source!r}, kind={self.kind!r}{own}, seed={self.seed})"

    @property
    def concepts(self) -> ConceptSet:
        return self.source.concepts

    @property
    def splits(self) -> tuple[str, ...]:
        known = [split for split in ("train", "val", "test") if split in self.source.splits]
        return (*known, *_EXTRA[self.kind])

    def load(self, split: str) -> ConceptDataset:
        if split not in self.splits:
            raise ValueError(f"Backgrounds of kind {self.kind!r} have no split {split!r}, only {', '.join(self.splits)}")
        base = self.source.load("test" if split in _EXTRA[self.kind] else split)
        if self.kind != "coloured" and split in ("train", "val"):
            return base  # the source's pictures, under the source's key: their cached features serve both
        kept, masks_key = self._usable(base, split=split)
        chosen = base.subset(kept, split=split)
        if self.kind != "coloured" and split == "test":
            return chosen
        if self.kind == "coloured":
            colours, own = self._colours(chosen, kept, split=split)
            settings = f"tie={self.tie_ood if split == 'test_ood' else self.tie}"
            return self._changed(chosen, _Coloured(chosen, colours), key=f"{settings} masks={masks_key}", group_N=own)
        if self.kind == "blurred":
            return self._changed(chosen, _Blurred(chosen, self.blur), key=f"blur={self.blur} masks={masks_key}")
        donors = self._donors(chosen, kept, split=split)
        return self._changed(chosen, _Swapped(chosen, donors), key=f"masks={masks_key}")

    def _changed(
        self, dataset: ConceptDataset, read: _Coloured | _Blurred | _Swapped, *, key: str, group_N: Tensor | None = None
    ) -> ConceptDataset:
        return replace(
            dataset,
            read_image=read,
            group_N=dataset.group_N if group_N is None else group_N,
            source_key=f"{dataset.source_key} | Backgrounds-{PAINT} kind={self.kind} split={dataset.split} seed={self.seed} {key}",
        )

    def _usable(self, base: ConceptDataset, *, split: str) -> tuple[list[int], str]:
        """The rows whose background can be changed, and a hash of their masks, on which the changed pictures depend."""
        if base.read_foreground is None:
            raise ValueError(
                f"{self.source!r} has no object masks, so its backgrounds cannot be changed; give a source with masks "
                "(CUB with its segmentations, Synthetic, or a folder with masks/)"
            )
        digest = hashlib.blake2b(digest_size=8)
        kept: list[int] = []
        for row in range(len(base)):
            mask_HW = base.sample(row, image=False).foreground_HW
            if mask_HW is not None and mask_HW.any() and not mask_HW.all():
                kept.append(row)
                digest.update(np.packbits(mask_HW.numpy()).tobytes())
        left_out = f"{len(base) - len(kept)} without a usable mask"
        if self.kind == "swapped":
            count_K = torch.bincount(base.label_N[kept], minlength=base.concepts.num_classes)
            alone = [row for row in kept if count_K[base.label_N[row]] < 2]
            if alone:
                kept = [row for row in kept if count_K[base.label_N[row]] >= 2]
                left_out += f", {len(alone)} that are the only one of their class"
            if len(set(base.label_N[kept].tolist())) < 2:
                raise ValueError(
                    f"the {base.split} split of {self.source!r} has fewer than two classes with two usable masks each; "
                    "backgrounds cannot be swapped between classes"
                )
        if not kept:
            raise ValueError(f"no picture of the {base.split} split of {self.source!r} has a usable mask; check the masks' files")
        if len(kept) < len(base):
            warnings.warn(f"{left_out}, of {len(base)} pictures, are left out of {split}", stacklevel=3)
        return kept, digest.hexdigest()

    def _random(self, split: str, row: int) -> NDArray[np.float64]:
        """(2,) in [0, 1), for row `row` of the source's split."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, _STREAMS[split], row]))).random(2)

    def _colours(self, chosen: ConceptDataset, kept: list[int], *, split: str) -> tuple[dict[int, tuple[int, int, int]], Tensor]:
        """The colour of each row, by what the reader is called with, and (N,) whether it is the class's own."""
        num_classes = chosen.concepts.num_classes
        palette = class_colours(num_classes, seed=self.seed)
        tie = self.tie_ood if split == "test_ood" else self.tie
        colours: dict[int, tuple[int, int, int]] = {}
        own_N = torch.zeros(len(chosen), dtype=torch.long)
        for index, (row, label) in enumerate(zip(kept, chosen.label_N.tolist(), strict=True)):
            first, second = self._random(split, row)
            own_N[index] = int(first < tie)
            colour = label if first < tie else (label + 1 + int(second * (num_classes - 1))) % num_classes
            colours[_reader_row(chosen, index)] = palette[colour]
        return colours, own_N

    def _donors(self, chosen: ConceptDataset, kept: list[int], *, split: str) -> dict[int, int]:
        """For each row the row of its donor, both as the reader is called with them."""
        labels = chosen.label_N
        donors: dict[int, int] = {}
        for index, row in enumerate(kept):
            fits_N = (labels == labels[index]) if split == "test_same" else (labels != labels[index])
            fits_N[index] = False
            candidates = fits_N.nonzero()[:, 0].tolist()
            donor = candidates[int(self._random(split, row)[0] * len(candidates))]
            donors[_reader_row(chosen, index)] = _reader_row(chosen, donor)
        return donors


def _reader_row(dataset: ConceptDataset, index: int) -> int:
    """What the dataset's read functions are called with for its row `index`."""
    return dataset.rows[index] if dataset.rows is not None else index


def _mask(dataset: ConceptDataset, row: int) -> Tensor:
    assert dataset.read_foreground is not None
    mask_HW = dataset.read_foreground(row)
    assert mask_HW is not None
    return mask_HW


# The readers hold the dataset whose pictures they change, so that they can be sent to a loader's process.


@dataclass(frozen=True)
class _Coloured:
    dataset: ConceptDataset
    colours: dict[int, tuple[int, int, int]]

    def __call__(self, row: int) -> Tensor:
        return coloured_background(self.dataset.read_image(row), _mask(self.dataset, row), self.colours[row])


@dataclass(frozen=True)
class _Blurred:
    dataset: ConceptDataset
    blur: float

    def __call__(self, row: int) -> Tensor:
        return blurred_background(self.dataset.read_image(row), _mask(self.dataset, row), blur=self.blur)


@dataclass(frozen=True)
class _Swapped:
    dataset: ConceptDataset
    donors: dict[int, int]

    def __call__(self, row: int) -> Tensor:
        read, donor = self.dataset.read_image, self.donors[row]
        return swap_background(read(row), _mask(self.dataset, row), read(donor), _mask(self.dataset, donor))
