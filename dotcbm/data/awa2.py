"""Animals with Attributes 2 in its original layout: 37,322 photos of 50 animals, and 85 attributes of each animal.

Xian, Lampert, Schiele, Akata, "Zero-Shot Learning: A Comprehensive Evaluation of the Good, the Bad and the Ugly",
TPAMI 2019; the attribute table goes back to Osherson et al. 1991 and Kemp et al. 2006.

    root/JPEGImages/<class>/*.jpg
    root/classes.txt, predicates.txt              "1<tab>antelope", one a line
    root/predicate-matrix-binary.txt              K lines of M zeros and ones
    root/predicate-matrix-continuous.txt          K lines of M percentages, -1 where missing

Shape letters: K classes, M concepts.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dotcbm.data.annotations import PICTURE_SUFFIXES, PictureFiles, hash_split
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.tables import near_match, read_lines
from dotcbm.structures import ConceptSet

__all__ = ["AwA2"]

# The predicates by what they speak of, in the order of predicates.txt. Values of a group often go together (a skunk is black and
# white): the groups serve for reading and for intervening on related concepts at once, not as exclusive choices.
GROUPS = {
    "colour": "black white blue brown gray orange red yellow",
    "pattern": "patches spots stripes",
    "skin": "furry hairless toughskin",
    "size": "big small",
    "build": "bulbous lean",
    "limbs": "flippers hands hooves pads paws longleg",
    "neck": "longneck",
    "tail": "tail",
    "teeth": "chewteeth meatteeth buckteeth strainteeth",
    "weapons": "horns claws tusks",
    "smell": "smelly",
    "locomotion": "flys hops swims tunnels walks",
    "speed": "fast slow",
    "strength": "strong weak muscle",
    "gait": "bipedal quadrapedal",
    "activity": "active inactive nocturnal hibernate agility",
    "food": "fish meat plankton vegetation insects",
    "feeding": "forager grazer hunter scavenger skimmer stalker",
    "world": "newworld oldworld",
    "habitat": "arctic coastal desert bush plains forest fields jungle mountains ocean ground water tree cave",
    "temper": "fierce timid smart",
    "company": "group solitary",
    "nest": "nestspot",
    "domestic": "domestic",
}
# Predicates that are no English words, for the text encoder and the reader.
SPELLING = {
    "toughskin": "tough skin",
    "longleg": "long legs",
    "longneck": "long neck",
    "chewteeth": "chewing teeth",
    "meatteeth": "meat-eating teeth",
    "buckteeth": "buck teeth",
    "strainteeth": "straining teeth",
    "flys": "flies",
    "muscle": "muscular",
    "quadrapedal": "quadrupedal",
    "hibernate": "hibernates",
    "agility": "agile",
    "fish": "eats fish",
    "meat": "eats meat",
    "plankton": "eats plankton",
    "vegetation": "eats vegetation",
    "insects": "eats insects",
    "newworld": "new world",
    "oldworld": "old world",
    "group": "lives in groups",
    "nestspot": "nest spot",
}


@dataclass(frozen=True)
class AwA2(ConceptSource):
    """Animals with Attributes 2, split by picture.

    Concepts are identical within a class: every photo of a zebra is labelled "stripes", "hooves" and "old world", whether
    they are in view or not, and many (smart, new world, nocturnal) cannot be seen at all. Concept accuracy is therefore
    nearly class accuracy, and says nothing of whether a concept was seen.

    The published split is by class, for zero-shot learning (`trainclasses.txt`, `testclasses.txt`), and is not read: a bottleneck needs
    training pictures of each class. The literature on concept bottlenecks splits by picture, without a common list; the
    shares here, 60 : 20 : 20, are those of the CEM authors' loader (github.com/mateoespinosa/cem, `_generate_splits`), but
    the split is by class and by hash of the path (`hash_split`), so that it is the same everywhere.

    Args:
        root: The folder `Animals_with_Attributes2`.
        class_values: What `concepts.class_concept_KM` holds: the 0/1 matrix, or the percentages / 100 (NaN where missing). The labels
            of pictures are always the 0/1 matrix, which is the other thresholded at its mean.
        test_fraction, val_fraction: Shares of each class's pictures; with val_fraction=0 there is no "val".
        seed: Of the split.

    Raises (from `concepts` and `load`):
        ValueError: A file that is missing or does not fit the others; the file, the line and the value are named.
    """

    root: str
    _: KW_ONLY
    class_values: Literal["binary", "continuous"] = "binary"
    test_fraction: float = 0.2
    val_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.class_values not in ("binary", "continuous"):
            raise ValueError(f"class_values={self.class_values!r}; expected 'binary' or 'continuous'")
        if self.test_fraction <= 0 or self.val_fraction < 0 or self.test_fraction + self.val_fraction >= 1:
            raise ValueError(
                f"test_fraction={self.test_fraction} and val_fraction={self.val_fraction} must be shares that leave some for train"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """ "train", "val" unless its share is 0, "test"."""
        return ("train", "val", "test") if self.val_fraction else ("train", "test")

    @property
    def concepts(self) -> ConceptSet:
        """85 concepts and 50 classes, in the order of the files; names spelt out ("longleg": "long legs")."""
        return self._concepts

    @cached_property
    def _concepts(self) -> ConceptSet:
        if not Path(self.root).is_dir():
            raise ValueError(
                f"{self.root}: no such folder; expected Animals_with_Attributes2 with JPEGImages/, classes.txt and predicates.txt"
            )
        predicates = self._names("predicates.txt")
        if self.class_values == "binary":
            class_KM = self._binary_KM
        else:
            percent_KM = self._matrix("predicate-matrix-continuous.txt", low=-1, high=100)
            class_KM = torch.where(percent_KM < 0, torch.nan, percent_KM / 100)
        group_of = {name: group for group, names in GROUPS.items() for name in names.split()}
        return ConceptSet(
            names=tuple(SPELLING.get(name, name) for name in predicates),
            class_names=tuple(name.replace("+", " ") for name in self._names("classes.txt")),
            class_concept_KM=class_KM,
            groups=tuple(group_of.get(name, name) for name in predicates),
        )

    def load(self, split: str) -> ConceptDataset:
        """The pictures of a split, by class and path."""
        if split not in self.splits:
            raise ValueError(
                f"{self.root}: there is no split '{split}'; the splits are {list(self.splits)}{near_match(split, self.splits)}"
            )
        names, labels = self._pictures
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        of = hash_split(names, labels=labels, fractions=fractions, seed=self.seed)
        chosen = [i for i, name in enumerate(of) if name == split]
        if not chosen:
            raise ValueError(f"{self.root}: the split '{split}' is empty, with {len(names)} pictures in all; extract the whole archive")
        folder = Path(self.root) / "JPEGImages"
        files = PictureFiles(paths=tuple(folder / names[i] for i in chosen))
        label_N = torch.tensor([labels[i] for i in chosen])
        sizes = hashlib.sha256(" ".join(str(path.stat().st_size) for path in files.paths).encode()).hexdigest()
        return ConceptDataset(
            concepts=self.concepts,
            split=split,
            names=tuple(names[i] for i in chosen),
            label_N=label_N,
            concept_NM=self._binary_KM[label_N],
            read_image=files.image,
            read_size=files.size,
            source_key=f"AwA2 {folder.resolve()} {sizes}",
        )

    @cached_property
    def _pictures(self) -> tuple[list[str], list[int]]:
        """Paths below JPEGImages, and class numbers."""
        folder = Path(self.root) / "JPEGImages"
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected one folder of photos a class (from AwA2-data.zip)")
        classes = self._names("classes.txt")
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        extra = [name for name in found if name not in classes]
        if extra:
            raise ValueError(f"{folder / extra[0]}: no such class in {Path(self.root) / 'classes.txt'}{near_match(extra[0], classes)}")
        names: list[str] = []
        labels: list[int] = []
        for k, name in enumerate(classes):
            pictures = sorted(p.name for p in (folder / name).glob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
            if not pictures:
                raise ValueError(
                    f"{folder / name}: no pictures of the class '{name}' (line {k + 1} of classes.txt); "
                    f"{len(found)} of {len(classes)} class folders are there; extract the whole archive"
                )
            names += [f"{name}/{picture}" for picture in pictures]
            labels += [k] * len(pictures)
        return names, labels

    @cached_property
    def _binary_KM(self) -> Tensor:
        matrix_KM = self._matrix("predicate-matrix-binary.txt", low=0, high=1)
        odd = (matrix_KM != 0) & (matrix_KM != 1)
        if odd.any():
            k, j = odd.nonzero()[0].tolist()
            raise ValueError(
                f"{Path(self.root) / 'predicate-matrix-binary.txt'}, line {k + 1}, column {j + 1}: {matrix_KM[k, j]:g} is neither 0 nor 1"
            )
        return matrix_KM

    def _names(self, file: str) -> list[str]:
        """The second words of lines "<number> <name>", whose numbers count from 1."""
        path = Path(self.root) / file
        names: list[str] = []
        for i, line in enumerate(read_lines(path, what="a number and a name a line"), start=1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2 or words[0] != str(len(names) + 1):
                raise ValueError(f"{path}, line {i}: found {line.strip()!r}, expected '{len(names) + 1}' and a name without blanks")
            if words[1] in names:
                raise ValueError(f"{path}, line {i}: the name '{words[1]}' is already in line {names.index(words[1]) + 1}")
            names.append(words[1])
        if not names:
            raise ValueError(f"{path} is empty; expected a number and a name a line")
        return names

    def _matrix(self, file: str, *, low: float, high: float) -> Tensor:
        """(K, M) numbers of a file with a line a class."""
        path = Path(self.root) / file
        num_classes, num_predicates = len(self._names("classes.txt")), len(self._names("predicates.txt"))
        lines = read_lines(path, what=f"{num_classes} lines of {num_predicates} numbers")
        rows = [(i, line.split()) for i, line in enumerate(lines, start=1) if line.strip()]
        for i, cells in rows:
            if len(cells) != num_predicates:
                raise ValueError(f"{path}, line {i}: {len(cells)} numbers, but predicates.txt has {num_predicates} names")
        if len(rows) != num_classes:
            raise ValueError(
                f"{path}: {len(rows)} lines, but classes.txt has {num_classes} names; the file is truncated or of another release"
            )
        values: list[list[float]] = []
        for i, cells in rows:
            values.append([])
            for j, cell in enumerate(cells, start=1):
                try:
                    value = float(cell)
                except ValueError:
                    raise ValueError(f"{path}, line {i}, column {j}: '{cell}' is no number") from None
                if not low <= value <= high:
                    raise ValueError(f"{path}, line {i}, column {j}: {cell} is not between {low:g} and {high:g}")
                values[-1].append(value)
        return torch.tensor(values)
