"""CUB-200-2011 (Wah et al. 2011) in its original layout: birds, 312 attributes, key points, boxes and masks.

Shape letters: N pictures of a split, M concepts, K classes kept, P parts; I images, A attributes, C classes of the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dotcbm.data.cub_attributes import NOT_VISIBLE, chosen_ids, class_title, vocabulary, vote
from dotcbm.data.cub_index import ImageTable, read_attribute_names, read_images, read_voters
from dotcbm.data.cub_pictures import (
    MaskReader,
    PictureReader,
    check_files,
    check_same_shape,
    in_picture,
    pictures_key,
    read_bad_masks,
    read_part_locations,
    read_picture_size,
)
from dotcbm.data.cub_tables import by_id, read_image_attributes, read_percentages, read_rows
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.waterbirds_table import read_metadata, without_suffix
from dotcbm.structures import ConceptSet

__all__ = ["CUB"]

Attributes = Literal["reference", "majority", "percentage"]
Size = tuple[int, int]  # height, width


class CUB(ConceptSource):
    """CUB-200-2011, or a part of it in the same layout; the classes are those that image_class_labels.txt uses.

    Expected below `root`: images/, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, attributes.txt (also
    accepted beside `root`, where the archive puts it, and in attributes/), and in attributes/ one of
    class_attribute_labels_continuous.txt and image_attribute_labels.txt. Read where present: bounding_boxes.txt, parts/,
    segmentations/ (or beside `root`), mask_quality.csv (masks below 0.8 are left out).

    What a class has (`class_concept_KM` and the labels) comes from the vote of the training images where
    image_attribute_labels.txt is there, otherwise (and with attributes="percentage") from the class percentages, which the data
    set's authors took over all images, test images included.

    Splits are "train" and "test", and "test_twins" if `twins` is given. Key points are pixels from the top left corner in the
    original; the error of at most one pixel from its undocumented origin (0 or 1) is left as it is.

    Args:
        root: The folder.
        attributes: Which attributes are concepts. "reference": the 112 of the literature; "majority": those that
            `min_classes` classes have after the vote of the training images; "percentage": those whose class percentage is above
            `threshold` in `min_classes` classes. Both rules count over all classes of the files.
        labels: "class" gives each picture what its class has; "image" its own annotation.
        min_classes: How many classes must have an attribute. 10 is the choice of Koh et al. 2020.
        threshold: A class has an attribute if more than this share of its pictures shows it (percentages only).
        twins: Root of Waterbirds in its original layout: "test_twins" are the test pictures on its changed backgrounds.
        ties: What an equal number of votes for and against means; "present" is the choice of Koh et al. 2020.
        voters: A text file with one image id a line: the training images that vote, all of them by default.
        not_visible: With `labels="image"`: what an annotation "not visible" is, unknown (NaN) or absent (0).
    """

    def __init__(
        self,
        root: str,
        *,
        attributes: Attributes = "reference",
        labels: Literal["class", "image"] = "class",
        min_classes: int = 10,
        threshold: float = 0.5,
        twins: str | None = None,
        ties: Literal["present", "absent"] = "present",
        voters: str | None = None,
        not_visible: Literal["unknown", "absent"] = "unknown",
    ) -> None:
        for what, value, allowed in (
            ("attributes", attributes, ("reference", "majority", "percentage")),
            ("labels", labels, ("class", "image")),
            ("ties", ties, ("present", "absent")),
            ("not_visible", not_visible, ("unknown", "absent")),
        ):
            if value not in allowed:
                raise ValueError(f"{what} is {value!r}, expected one of {', '.join(allowed)}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold}, expected a share in [0, 1)")
        if voters is not None and attributes == "percentage":
            raise ValueError("voters is given, but attributes='percentage' holds no vote; take attributes='majority' or 'reference'")
        self.root = root
        self.attributes: Attributes = attributes
        self.labels = labels
        self.min_classes = min_classes
        self.threshold = threshold
        self.twins = twins
        self.ties: Literal["present", "absent"] = ties
        self.voters = voters
        self.not_visible = not_visible

    def __repr__(self) -> str:
        return f"CUB({self.root!r}, attributes={self.attributes!r}, labels={self.labels!r}, twins={self.twins!r})"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "test", "test_twins") if self.twins is not None else ("train", "test")

    @property
    def concepts(self) -> ConceptSet:
        return self._vocabulary.concepts

    def check(self) -> None:
        """Look for every picture of images.txt without opening one.

        Raises:
            ValueError: Pictures are missing; the first five are named.
        """
        check_files([self._root / "images" / path for path in self._images.paths], table=self._root / "images.txt")

    def load(self, split: str) -> ConceptDataset:
        if split not in self.splits:
            hint = "; give twins= (the root of Waterbirds) for it" if split == "test_twins" else ""
            raise ValueError(f"CUB has no split {split!r}, only {', '.join(self.splits)}{hint}")
        table = self._images
        rows = np.flatnonzero(table.train_I == (split == "train"))
        if not len(rows):
            raise ValueError(f"{self._root / 'train_test_split.txt'}: no image is in the {split} split")
        paths = [self._root / "images" / table.paths[i] for i in rows]
        check_files(paths, table=self._root / "images.txt")
        sizes = [read_picture_size(path) for path in paths]
        if split == "test_twins":
            kept, twins = self._match_twins([table.paths[i] for i in rows])
            twin_sizes = [read_picture_size(path) for path in twins]
            for n, path, size in zip(kept, twins, twin_sizes, strict=True):
                check_same_shape(path, size, of=sizes[n])
            points_NP3, box_N4 = self._geometry(rows[kept], [sizes[n] for n in kept])
            rows, paths, sizes = rows[kept], twins, twin_sizes
        else:
            points_NP3, box_N4 = self._geometry(rows, sizes)
        masks = [self._masks[i] for i in rows]
        return ConceptDataset(
            concepts=self.concepts,
            split=split,
            names=tuple(table.paths[i] for i in rows),
            label_N=torch.as_tensor(table.class_I[rows]),
            concept_NM=self._vocabulary.concept_IM[rows],
            read_image=PictureReader(paths),
            read_size=sizes.__getitem__,
            points_NP3=points_NP3,
            box_N4=box_N4,
            read_foreground=MaskReader(masks, sizes) if any(masks) else None,
            source_key=f"CUB:{pictures_key(paths)}",
        )

    # ------------------------------------------------------------------ tables

    @property
    def _root(self) -> Path:
        return Path(self.root)

    @cached_property
    def _images(self) -> ImageTable:
        return read_images(self._root)

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        table, names = self._images, read_attribute_names(self._root)
        kept = np.array(table.kept)
        image_level = self._image_level(len(names))
        if image_level is not None and self.attributes != "percentage":
            present_IA, certainty_IA = image_level
            voting = np.flatnonzero(table.train_I) if self.voters is None else read_voters(Path(self.voters), table=table)
            votes = vote(
                present_IA[voting],
                certainty_IA=certainty_IA[voting],
                class_I=table.class_I[voting],
                num_classes=len(kept),
                ties=self.ties,
            )
            share_CA, present_CA, row_K = votes.share_CA, votes.present_CA, np.arange(len(kept))
        else:
            path = self._root / "attributes" / "class_attribute_labels_continuous.txt"
            share_CA = read_percentages(path, num_classes=len(table.class_names), num_attributes=len(names))
            present_CA, row_K = share_CA > self.threshold, kept
        chosen = np.array(chosen_ids(self.attributes, present_CA=present_CA, min_classes=self.min_classes)) - 1
        share_KM, present_KM = share_CA[np.ix_(row_K, chosen)], present_CA[np.ix_(row_K, chosen)]
        if self.labels == "image" and image_level is not None:
            own_IM = image_level[0][:, chosen].astype(np.float32)
            own_IM[image_level[1][:, chosen] == NOT_VISIBLE] = np.nan if self.not_visible == "unknown" else 0.0
            concept_IM = torch.from_numpy(own_IM)
        else:
            class_label_KM = np.where(np.isnan(share_KM) & ~present_KM, np.nan, present_KM)
            concept_IM = torch.as_tensor(class_label_KM[table.class_I], dtype=torch.float32)
        part_names, _ = self._parts
        return _Vocabulary(
            concepts=vocabulary(
                [names[a] for a in chosen],
                class_names=tuple(class_title(table.class_names[c]) for c in kept),
                share_KM=share_KM,
                part_names=part_names,
            ),
            concept_IM=concept_IM,
        )

    def _image_level(self, num_attributes: int) -> tuple[NDArray[np.int8], NDArray[np.int8]] | None:
        """image_attribute_labels.txt where the settings need it, or can use it and it is there."""
        path = self._root / "attributes" / "image_attribute_labels.txt"
        needed = self.attributes == "majority" or self.labels == "image" or self.voters is not None
        if not needed and (self.attributes == "percentage" or not path.is_file()):
            return None
        return read_image_attributes(path, image_ids=self._images.ids, num_attributes=num_attributes)

    # ------------------------------------------------------------------ geometry and masks

    @cached_property
    def _parts(self) -> tuple[tuple[str, ...], NDArray[np.float64] | None]:
        """The part names, and (I, P, 3) x and y in pixels and visible."""
        folder = self._root / "parts"
        return read_part_locations(folder, image_ids=self._images.ids) if folder.is_dir() else ((), None)

    @cached_property
    def _boxes(self) -> NDArray[np.float64] | None:
        """(I, 4) x0, y0, x1, y1 in pixels."""
        path = self._root / "bounding_boxes.txt"
        if not path.is_file():
            return None
        columns = (("image id", int), ("x", float), ("y", float), ("width", float), ("height", float))
        rows = by_id(path, read_rows(path, columns=columns), ids=self._images.ids, ids_from=self._root / "images.txt")
        return np.array([(x, y, x + width, y + height) for _, x, y, width, height in rows.values()])

    def _geometry(self, rows: NDArray[np.int64], sizes: Sequence[Size]) -> tuple[Tensor | None, Tensor | None]:
        """(N, P, 3) points and (N, 4) boxes as fractions of the pictures."""
        names = [self._images.paths[i] for i in rows]
        points_NP3 = box_N4 = None
        _, points_IP3 = self._parts
        if points_IP3 is not None:
            points, path = points_IP3[rows], self._root / "parts" / "part_locs.txt"
            xy = in_picture(points[..., :2], sizes, known_NX=points[..., 2] == 1, path=path, names=names)
            points_NP3 = torch.as_tensor(np.concatenate([xy, points[..., 2:]], -1), dtype=torch.float32)
        if self._boxes is not None:
            corners, path = self._boxes[rows].reshape(-1, 2, 2), self._root / "bounding_boxes.txt"
            corners = in_picture(corners, sizes, known_NX=np.ones(corners.shape[:2], dtype=bool), path=path, names=names)
            box_N4 = torch.as_tensor(corners.reshape(-1, 4), dtype=torch.float32)
        return points_NP3, box_N4

    @cached_property
    def _masks(self) -> tuple[Path | None, ...]:
        """For each image its mask; None where it is missing or bad."""
        folders = (self._root / "segmentations", self._root.parent / "segmentations")
        folder = next((place for place in folders if place.is_dir()), None)
        if folder is None:
            return (None,) * len(self._images.ids)
        bad = read_bad_masks(self._root / "mask_quality.csv")
        paths = [folder / Path(path).with_suffix(".png") for path in self._images.paths]
        return tuple(None if image in bad or not path.is_file() else path for image, path in zip(self._images.ids, paths, strict=True))

    def _match_twins(self, names: Sequence[str]) -> tuple[list[int], list[Path]]:
        """Which of the pictures have a twin, and the twins' files."""
        root = Path(str(self.twins))
        twin_of = {without_suffix(row.filename): root / row.filename for row in read_metadata(root)}
        kept = [n for n, name in enumerate(names) if without_suffix(name) in twin_of]
        if not kept:
            raise ValueError(f"{root / 'metadata.csv'}: lists no twin of a test picture of {self.root}; expected paths as in images.txt")
        if len(kept) < len(names):
            what = f"{len(names) - len(kept)} of the {len(names)} test pictures have no twin in {root}"
            warnings.warn(f"{what} and are left out of test_twins", stacklevel=3)
        twins = [twin_of[without_suffix(names[n])] for n in kept]
        check_files(twins, table=root / "metadata.csv")
        return kept, twins


@dataclass(frozen=True)
class _Vocabulary:
    concepts: ConceptSet
    concept_IM: Tensor
