"""Concept labels from a teacher: an image-text model's scores in place of annotations, for training and for nothing else.

A teacher says how similar a picture is to each concept's name. Label-free CBM (Oikarinen et al., ICLR 2023) and its successors
train on such similarities. They have no zero and no unit, so `TaughtConcepts` maps those of each concept to [0, 1] by an affine
map, 0 at the smallest and 1 at the largest training similarity: the order and the shape of the similarities stay,
and losses that know neither scale nor offset see the similarities themselves.

Metrics need labels in {0, 1}, and a teacher's opinion is no truth: validation and test keep the source's own labels.

N pictures of a split, M concepts, K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dotcbm.data.annotations import hash_split
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.transforms import prepare_picture
from dotcbm.structures import ConceptSet, Preprocessing

__all__ = ["TaughtConcepts", "Teacher", "teacher_similarities"]

_FORMAT = 1  # raised when the meaning of a cached file changes


class Teacher(ABC):
    """What knows pictures and words: `dotcbm.training.clip_teacher.ClipTeacher` is one for open_clip models."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """Of the pictures that `similarities` reads."""

    @abstractmethod
    def similarities(self, image_B3HW: Tensor, names: Sequence[str]) -> Tensor:
        """(B, M) on the CPU: how well each name fits each picture, on any scale, the larger the better.

        Args:
            image_B3HW: Prepared pictures, on the CPU.
            names: M concept names.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes whenever the similarities of the same prepared pictures and names would."""


def teacher_similarities(
    dataset: ConceptDataset,
    *,
    teacher: Teacher,
    names: Sequence[str],
    directory: Path | None,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """(N, M) float32 similarities of a split, from `directory` if they lie there, else computed and written there.

    Args:
        dataset: The split.
        teacher: Who is asked.
        names: M concept names.
        directory: Where `teacher-<split>-<key>.safetensors` lies; None keeps nothing.
        batch_size: Pictures shown at once.
        progress: Draw a progress bar, to stderr.

    Raises:
        ValueError: An empty split, or a teacher whose answer is not finite or of the wrong shape; the picture is named.
        BadPictureError: A picture that cannot be decoded.
    """
    if len(dataset) == 0:
        raise ValueError(f"the split {dataset.split!r} is empty: there is nothing to ask the teacher about")
    told = {
        "format": _FORMAT,
        "teacher": teacher.fingerprint(),
        "preprocessing": teacher.preprocessing.to_dict(),
        "names": list(names),
        "data": dataset.fingerprint(),
    }
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    path = None if directory is None else Path(directory) / f"teacher-{dataset.split}-{key[:16]}.safetensors"
    if path is not None and path.is_file():
        try:
            return _read(path, key=key)
        except (SafetensorError, ValueError, OSError) as error:
            warnings.warn(f"{path}: a teacher's cached similarities cannot be used and are computed again ({error})", stacklevel=2)
    parts: list[Tensor] = []
    batches = range(0, len(dataset), batch_size)
    for start in track(
        batches, description=f"Asking the teacher about {dataset.split}", disable=not progress, console=Console(stderr=True)
    ):
        rows = range(start, min(start + batch_size, len(dataset)))
        pictures = [dataset.sample(row, masks=False).image for row in rows]
        prepared = [prepare_picture(picture, preprocessing=teacher.preprocessing) for picture in pictures if picture is not None]
        said_BM = teacher.similarities(torch.stack(prepared), names).float()
        if tuple(said_BM.shape) != (len(rows), len(names)):
            raise ValueError(
                f"{type(teacher).__name__} gave similarities of shape {tuple(said_BM.shape)} for {len(rows)} pictures and "
                f"{len(names)} concepts; expected ({len(rows)}, {len(names)})"
            )
        if not said_BM.isfinite().all():
            b, j = (~said_BM.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{dataset.names[rows[b]]}: the teacher's similarity to {names[j]!r} is {said_BM[b, j]:g}; check its weights")
        parts.append(said_BM)
    similarity_NM = torch.cat(parts)
    if path is not None:
        _write(path, similarity_NM, key=key)
    return similarity_NM


class TaughtConcepts(ConceptSource):
    """Another source whose training labels are a teacher's scores in [0, 1]; validation and test keep the source's own labels.

    The splits are the source's, and "val", carved out of train by class, where the source has none: a part carved out later would
    have scores for labels, which no metric can be computed on. `class_concept_KM` holds the class means of the scores. Pictures,
    and so the cached features of encoders, are those of the source.

    Args:
        source: Where the pictures come from; it may have no labels (NaN), then concept metrics are not there.
        teacher: Who gives the scores. It is asked once about each training picture.
        val_fraction: Share of each training class that becomes "val" if the source has none; 0 for no such split (then set the data
            module's `val_fraction` to 0 too).
        seed: Of that part.
        cache_dir: Where the similarities are kept; None keeps none.
        batch_size: Pictures that the teacher sees at once.
    """

    def __init__(
        self,
        source: ConceptSource,
        *,
        teacher: Teacher,
        val_fraction: float = 0.15,
        seed: int = 0,
        cache_dir: str | None = "cache",
        batch_size: int = 32,
    ) -> None:
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it is a share of the training pictures in [0, 1)")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch needs at least one picture")
        self.source = source
        self.teacher = teacher
        self.val_fraction = val_fraction
        self.seed = seed
        self.cache_dir = cache_dir
        self.batch_size = batch_size

    def __repr__(self) -> str:
        return f"TaughtConcepts({self.source!r}, teacher={self.teacher!r}, val_fraction={self.val_fraction}, seed={self.seed})"

    @property
    def concepts(self) -> ConceptSet:
        return self._taught.concepts

    @property
    def splits(self) -> tuple[str, ...]:
        own = self.source.splits
        if "val" in own or not self.val_fraction:
            return own
        return ("train", "val", *(split for split in own if split != "train"))

    def load(self, split: str) -> ConceptDataset:
        if split not in self.splits:
            raise ValueError(f"TaughtConcepts has no split {split!r}, only {', '.join(self.splits)}")
        if split == "train":
            return self._taught
        if split in self.source.splits:
            return replace(self.source.load(split), concepts=self.concepts)
        whole = self.source.load("train")
        return replace(whole.subset(self._part(whole, "val"), split="val"), concepts=self.concepts)

    def _part(self, whole: ConceptDataset, split: str) -> list[int]:
        """The rows of the source's training split that are ours."""
        if "val" in self.splits and "val" not in self.source.splits:
            parts = hash_split(whole.names, labels=whole.label_N.tolist(), fractions={"val": self.val_fraction}, seed=self.seed)
            return [row for row, part in enumerate(parts) if part == split]
        return list(range(len(whole)))

    @cached_property
    def _taught(self) -> ConceptDataset:
        """The training split. All of the source's is asked about, so that another val_fraction asks nothing again."""
        whole = self.source.load("train")
        concepts = self.source.concepts
        similarity_NM = teacher_similarities(
            whole,
            teacher=self.teacher,
            names=concepts.names,
            directory=None if self.cache_dir is None else Path(self.cache_dir),
            batch_size=self.batch_size,
            progress=True,
        )
        rows = self._part(whole, "train")
        own_NM = similarity_NM[rows]
        low_M, high_M = own_NM.amin(0), own_NM.amax(0)
        # A concept that is equally similar to all pictures says nothing: one half.
        score_NM = torch.where(high_M > low_M, (own_NM - low_M) / (high_M - low_M).clamp(min=1e-12), 0.5).clamp(0, 1)
        train = whole.subset(rows, split="train")
        class_KM = torch.full((concepts.num_classes, concepts.num_concepts), torch.nan)
        for k in train.label_N.unique().tolist():
            class_KM[k] = score_NM[train.label_N == k].mean(0).clamp(0, 1)
        return replace(train, concepts=replace(concepts, class_concept_KM=class_KM), concept_NM=score_NM)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path, *, key: str) -> Tensor:
    with safe_open(path, framework="pt") as opened:
        told = opened.metadata() or {}
        similarity_NM = opened.get_tensor("similarity")
    if told.get("key") != key:
        raise ValueError("they were made by another teacher, or for other pictures or names")
    if told.get("checksum") != _digest(similarity_NM):
        raise ValueError("the content differs from its checksum")
    return similarity_NM


def _write(path: Path, similarity_NM: Tensor, *, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({"similarity": similarity_NM.contiguous()}, scratch, metadata={"key": key, "checksum": _digest(similarity_NM)})
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
