"""Waterbirds (Sagawa et al. 2020): CUB birds cut out and put on land or water; two classes, four groups.

Shape letters: N pictures of a split, M concepts, K classes (2), S species of CUB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dotcbm.data.cub_attributes import chosen_ids, vocabulary
from dotcbm.data.cub_index import read_attribute_names, read_class_names
from dotcbm.data.cub_pictures import PictureReader, check_files, pictures_key, read_picture_size
from dotcbm.data.cub_tables import read_percentages
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.waterbirds_table import SPLITS, MetadataRow, read_metadata
from dotcbm.structures import ConceptSet

__all__ = ["GROUP_NAMES", "Waterbirds"]

CLASS_NAMES = ("landbird", "waterbird")
GROUP_NAMES = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")


class Waterbirds(ConceptSource):
    """Waterbirds in its original layout: `root` holds metadata.csv and a folder of pictures for each species.

    The data set itself has no concepts. Each bird is a CUB photo, so its species, read from its folder's name, says which
    attributes it has: a picture's concept labels are those of its species (share above `threshold`), and
    `class_concept_KM` is the share averaged over the training pictures of landbirds and waterbirds. The group of a picture is
    2 * class + background, in the order of `GROUP_NAMES`; training groups are 95 % class-consistent, validation and test
    groups balanced within a class.

    Splits are "train", "val" and "test" as in metadata.csv.

    Args:
        root: The folder.
        cub_root: A CUB-200-2011 folder with attributes.txt, classes.txt and attributes/class_attribute_labels_continuous.txt;
            its pictures are not needed.
        attributes: "reference" for the 112 attributes of the literature, or "percentage" as in `dotcbm.data.cub.CUB`.
        min_classes: With "percentage": how many species must have an attribute.
        threshold: A species has an attribute if more than this share of its pictures shows it.
    """

    def __init__(
        self,
        root: str,
        *,
        cub_root: str,
        attributes: Literal["reference", "percentage"] = "reference",
        min_classes: int = 10,
        threshold: float = 0.5,
    ) -> None:
        if attributes not in ("reference", "percentage"):
            raise ValueError(f"attributes is {attributes!r}, expected 'reference' or 'percentage'")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold}, expected a share in [0, 1)")
        self.root = root
        self.cub_root = cub_root
        self.attributes: Literal["reference", "percentage"] = attributes
        self.min_classes = min_classes
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"Waterbirds({self.root!r}, cub_root={self.cub_root!r}, attributes={self.attributes!r})"

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS

    @property
    def concepts(self) -> ConceptSet:
        return self._vocabulary.concepts

    def check(self) -> None:
        """Look for every picture of metadata.csv without opening one.

        Raises:
            ValueError: Pictures are missing; the first five are named.
        """
        check_files([self._root / row.filename for row in self._rows], table=self._root / "metadata.csv")

    def load(self, split: str) -> ConceptDataset:
        if split not in SPLITS:
            raise ValueError(f"Waterbirds has no split {split!r}, only {', '.join(SPLITS)}")
        chosen = [i for i, row in enumerate(self._rows) if SPLITS[row.split] == split]
        if not chosen:
            raise ValueError(f"{self._root / 'metadata.csv'}: no picture is in the {split} split")
        known = self._vocabulary  # before the pictures: it says more of a wrong path
        rows = [self._rows[i] for i in chosen]
        paths = [self._root / row.filename for row in rows]
        check_files(paths, table=self._root / "metadata.csv")
        return ConceptDataset(
            concepts=known.concepts,
            split=split,
            names=tuple(row.filename for row in rows),
            label_N=torch.tensor([row.y for row in rows]),
            concept_NM=known.species_SM[known.species_I[chosen]],
            read_image=PictureReader(paths),
            read_size=_SizeReader(tuple(paths)),
            group_N=torch.tensor([2 * row.y + row.place for row in rows]),
            source_key=f"Waterbirds:{pictures_key(paths)}",
        )

    @property
    def _root(self) -> Path:
        return Path(self.root)

    @cached_property
    def _rows(self) -> list[MetadataRow]:
        return read_metadata(self._root)

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        cub = Path(self.cub_root)
        names, species = read_attribute_names(cub), list(read_class_names(cub).values())
        share_SA = read_percentages(
            cub / "attributes" / "class_attribute_labels_continuous.txt", num_classes=len(species), num_attributes=len(names)
        )
        present_SA = share_SA > self.threshold
        chosen = np.array(chosen_ids(self.attributes, present_CA=present_SA, min_classes=self.min_classes)) - 1
        index = {name: s for s, name in enumerate(species)}
        for row in self._rows:
            if row.species not in index:
                raise ValueError(
                    f"{self._root / 'metadata.csv'}: row {row.number} has species {row.species!r} ({row.filename}), "
                    f"which {cub / 'classes.txt'} does not list; its first folder must be a CUB class (001.Black_footed_Albatross)"
                )
        species_I = np.array([index[row.species] for row in self._rows])
        y_I = np.array([row.y for row in self._rows])
        train_I = np.array([row.split == 0 for row in self._rows])
        share_SM = share_SA[:, chosen]
        share_KM = np.full((2, len(chosen)), np.nan)
        for k, name in enumerate(CLASS_NAMES):
            weight_S = np.bincount(species_I[train_I & (y_I == k)], minlength=len(species)).astype(float)
            if not weight_S.sum():
                raise ValueError(f"{self._root / 'metadata.csv'}: no {name} (y = {k}) is in the train split (split = 0)")
            known_SM = ~np.isnan(share_SM) * weight_S[:, None]
            total_M = known_SM.sum(0)
            np.divide((np.nan_to_num(share_SM) * known_SM).sum(0), total_M, out=share_KM[k], where=total_M > 0)
        return _Vocabulary(
            concepts=vocabulary([names[a] for a in chosen], class_names=CLASS_NAMES, share_KM=share_KM, part_names=()),
            species_SM=torch.as_tensor(np.where(np.isnan(share_SM), np.nan, present_SA[:, chosen]), dtype=torch.float32),
            species_I=torch.as_tensor(species_I),
        )


@dataclass(frozen=True)
class _Vocabulary:
    concepts: ConceptSet
    species_SM: Tensor
    species_I: Tensor


@dataclass(frozen=True)
class _SizeReader:
    paths: tuple[Path, ...]

    def __call__(self, row: int) -> tuple[int, int]:
        return read_picture_size(self.paths[row])
