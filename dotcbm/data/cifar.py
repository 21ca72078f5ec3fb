"""CIFAR-10 and CIFAR-100 through torchvision, with concepts from a text file.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The data sets have no concept labels. Two stand-ins are read:
what a concept list says of whole classes, and pseudo-labels of pictures that an image-text model made beforehand. Neither is an
annotation; `datasets/cifar.md` says what figures on them mean.

Shape letters: N pictures, M concepts, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.tables import near_match, read_lines, read_table, readable
from dotcbm.structures import ConceptSet

__all__ = ["CIFAR", "read_concept_list"]

_VARIANTS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def read_concept_list(path: Path, *, class_names: Sequence[str]) -> ConceptSet:
    """Concepts from a text file, one a line, and what they have to do with classes.

    ```
    # a comment
    [body]                        the concepts below belong to the group "body"
    fur
    feathers
    cat: fur                      a class and its concepts: of those the file gives to any class, it has no others
    bird: feathers
    ```

    If the file has class lines only, the concepts are theirs, in order of appearance. If it has both forms, class lines must
    keep to the listed concepts. A class without a line, and a listed concept in no class line, are unknown (NaN).

    Args:
        path: The file.
        class_names: The K classes; letter case and '_' make no difference.

    Raises:
        ValueError: An unknown class, an unlisted or doubled concept, a class with two lines, no concept at all; file and line are named.
    """
    known = {readable(name).casefold(): k for k, name in enumerate(class_names)}
    listed: dict[str, str] = {}
    of_class: dict[int, list[tuple[int, str]]] = {}
    group: str | None = None
    for i, line in enumerate(read_lines(path, what="one concept a line, or 'class: concept, concept'"), start=1):
        text = readable(line)
        if not text or text.startswith("#"):
            continue
        if text.startswith("[") and text.endswith("]"):
            group = text[1:-1].strip() or None
        elif ":" in text:
            name, _, rest = text.partition(":")
            k = known.get(name.strip().casefold())
            if k is None:
                raise ValueError(
                    f"{path}, line {i}: no class '{name.strip()}'; expected one of {list(class_names)[:10]}{near_match(name, class_names)}"
                )
            if k in of_class:
                raise ValueError(f"{path}, line {i}: the class '{name.strip()}' already has a line; put all its concepts on one")
            concepts = [c.strip() for c in rest.split(",") if c.strip()]
            doubled = sorted({c for c in concepts if concepts.count(c) > 1})
            if doubled:
                raise ValueError(f"{path}, line {i}: '{doubled[0]}' appears twice")
            of_class[k] = [(i, c) for c in concepts]
        elif text in listed:
            raise ValueError(f"{path}, line {i}: the concept '{text}' is listed twice")
        else:
            listed[text] = group or text
    if listed:
        for i, concept in (pair for pairs in of_class.values() for pair in pairs):
            if concept not in listed:
                raise ValueError(f"{path}, line {i}: the concept '{concept}' is not listed{near_match(concept, listed)}; add a line for it")
    names = list(listed) or list(dict.fromkeys(c for pairs in of_class.values() for _, c in pairs))
    if not names:
        raise ValueError(f"{path}: no concept in it; expected one a line, or 'class: concept, concept'")
    class_KM = torch.full((len(class_names), len(names)), torch.nan)
    spoken = torch.tensor([any(name == c for pairs in of_class.values() for _, c in pairs) for name in names])
    for k, pairs in of_class.items():
        class_KM[k, spoken] = 0.0
        for _, concept in pairs:
            class_KM[k, names.index(concept)] = 1.0
    return ConceptSet(
        names=tuple(names),
        class_names=tuple(readable(name) for name in class_names),
        class_concept_KM=class_KM,
        groups=tuple(listed.get(name, name) for name in names),
    )


@dataclass(frozen=True)
class _Pixels:
    """Pictures in memory. `data_NHWC` is uint8."""

    data_NHWC: np.ndarray

    def image(self, row: int) -> Tensor:
        return torch.from_numpy(self.data_NHWC[row]).permute(2, 0, 1).contiguous()

    def size(self, row: int) -> tuple[int, int]:
        return self.data_NHWC.shape[1], self.data_NHWC.shape[2]


@dataclass(frozen=True)
class CIFAR(ConceptSource):
    """CIFAR-10 or CIFAR-100 with the official splits "train" (50,000) and "test" (10,000); pictures of 32 x 32 pixels.

    Concept labels are, for each picture, the pseudo-labels if given, else those of its class in `concepts_file`, else NaN.

    Args:
        root: The folder that holds (or with `download` will hold) `cifar-10-batches-py` or `cifar-100-python`.
        variant: Which of the two.
        concepts_file: The concepts; see `read_concept_list`.
        download: Let torchvision fetch the archive (170 MB) if it is not there. Otherwise nothing is fetched.
        pseudo_labels: (N, M) scores in [0, 1], or NaN, for the pictures of a split in torchvision's order: a `.npy` file, or a `.csv`
            with a column a concept, whose path has "{split}" for train and test; or one `.safetensors` file with the tensors
            "train" and "test".
        threshold: Scores from here on are a concept present. One half, as for probabilities, has no other reason.

    Raises (from `concepts` and `load`):
        ValueError: The data set or a file is missing, damaged or of another shape; where it was looked for and how to get it.
    """

    root: str
    _: KW_ONLY
    variant: Literal["cifar10", "cifar100"]
    concepts_file: str
    download: bool = False
    pseudo_labels: str | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant={self.variant!r}; expected 'cifar10' or 'cifar100'")
        if self.pseudo_labels is not None:
            suffix = Path(self.pseudo_labels).suffix
            if suffix not in (".npy", ".csv", ".safetensors"):
                raise ValueError(f"pseudo_labels={self.pseudo_labels!r} ends in '{suffix}'; expected .npy, .csv or .safetensors")
            if suffix != ".safetensors" and "{split}" not in self.pseudo_labels:
                raise ValueError(
                    f"pseudo_labels={self.pseudo_labels!r} is one file for two splits; write '{{split}}' where train or test goes"
                )

    @property
    def concepts(self) -> ConceptSet:
        """The list's concepts; with pseudo-labels `class_concept_KM` is their mean over the training pictures of a class."""
        return self._concepts

    @property
    def splits(self) -> tuple[str, ...]:
        """ "train" and "test"."""
        return ("train", "test")

    def load(self, split: str) -> ConceptDataset:
        """A split in torchvision's order; all its pictures are held in memory."""
        if split not in self.splits:
            raise ValueError(
                f"{self.variant}: there is no split '{split}'; the splits are {list(self.splits)}{near_match(split, self.splits)}"
            )
        stored = self._read(split)
        pixels, label_N = _Pixels(stored.data), torch.tensor(stored.targets)
        if self.pseudo_labels is not None:
            concept_NM = self._pseudo_NM(split, num_pictures=len(label_N), names=self.concepts.names)
        else:
            concept_NM = self.concepts.class_concept_KM[label_N]
        return ConceptDataset(
            concepts=self.concepts,
            split=split,
            names=tuple(f"{split}/{i:05d}" for i in range(len(label_N))),
            label_N=label_N,
            concept_NM=concept_NM,
            read_image=pixels.image,
            read_size=pixels.size,
            source_key=self.variant,  # torchvision has compared checksums, so the pictures are these wherever they lie
        )

    @cached_property
    def _concepts(self) -> ConceptSet:
        # With class-level labels any split tells the class names, and test is the smaller one.
        stored = self._read("test" if self.pseudo_labels is None else "train")
        concepts = read_concept_list(Path(self.concepts_file), class_names=stored.classes)
        if self.pseudo_labels is None:
            return concepts
        label_N = torch.tensor(stored.targets)
        concept_NM = self._pseudo_NM("train", num_pictures=len(label_N), names=concepts.names)
        class_KM = torch.stack([concept_NM[label_N == k].nanmean(0) for k in range(concepts.num_classes)])
        return ConceptSet(names=concepts.names, class_names=concepts.class_names, class_concept_KM=class_KM, groups=concepts.groups)

    def _read(self, split: str) -> datasets.CIFAR10:
        kind = _VARIANTS[self.variant]
        try:
            return kind(self.root, train=split == "train", download=self.download)
        except OSError as error:  # URLError is one
            raise ValueError(f"{kind.url}: could not be fetched or unpacked into {self.root} ({error}); {self._how_to_get()}") from error
        except RuntimeError as error:  # torchvision's "not found or corrupted": say which
            folder = Path(self.root) / kind.base_folder
            files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
            missing = [name for name, _ in files if not (folder / name).is_file()]
            damaged = [name for name, md5 in files if name not in missing and not check_integrity(str(folder / name), md5)]
            what = f"the files {missing} are missing" if missing else f"the files {damaged} are damaged (their checksum differs)"
            where = f"{folder}: no such folder" if not folder.is_dir() else f"{folder}: {what}"
            raise ValueError(f"{self.variant} was looked for in {where}; {self._how_to_get()}") from error

    def _how_to_get(self) -> str:
        kind = _VARIANTS[self.variant]
        return f"set download=True, or unpack {kind.url} (md5 {kind.tgz_md5}) into {self.root}"

    def _pseudo_NM(self, split: str, *, num_pictures: int, names: Sequence[str]) -> Tensor:
        """(N, M) in {0, 1} or NaN."""
        path = Path(str(self.pseudo_labels).replace("{split}", split))
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected ({num_pictures}, {len(names)}) scores in [0, 1] for the split '{split}'")
        if path.suffix == ".csv":
            scores = _csv_scores(path, names=names)
        elif path.suffix == ".npy":
            scores = _npy_scores(path)
        else:
            scores = _safetensors_scores(path, split=split)
        if tuple(scores.shape) != (num_pictures, len(names)):
            raise ValueError(
                f"{path}: scores of shape {tuple(scores.shape)} for '{split}'; {num_pictures} pictures and {len(names)} concepts of "
                f"{self.concepts_file} need ({num_pictures}, {len(names)})"
            )
        odd = ~(scores.isnan() | ((scores >= 0) & (scores <= 1)))
        if odd.any():
            i, j = odd.nonzero()[0].tolist()
            raise ValueError(
                f"{path}: picture {i}, concept '{names[j]}': the score {scores[i, j]:g} is not in [0, 1]; "
                "turn similarities into probabilities first"
            )
        return torch.where(scores.isnan(), torch.nan, (scores >= self.threshold).float())


def _npy_scores(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a NumPy array of numbers ({error}); write it with numpy.save") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path}: an array of type {array.dtype}; expected numbers")
    return torch.from_numpy(array.astype(np.float32))


def _safetensors_scores(path: Path, *, split: str) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    if split not in tensors:
        raise ValueError(f"{path}: no tensor '{split}'; it holds {sorted(tensors)}{near_match(split, tensors)}")
    return tensors[split].float()


def _csv_scores(path: Path, *, names: Sequence[str]) -> Tensor:
    table = read_table(path, what=f"a column for each of {len(names)} concepts and a row for each picture")
    columns: list[list[float]] = []
    for name in names:
        columns.append([])
        for i, cell in enumerate(table.column(name, what="a concept of the list")):
            try:
                columns[-1].append(float(cell) if cell else math.nan)
            except ValueError:
                raise ValueError(
                    f"{table.where(i)}, column '{name}': '{cell}' is no number; expected a score in [0, 1] or nothing"
                ) from None
    return torch.tensor(columns).T
