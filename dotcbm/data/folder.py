"""Your own pictures: a folder of images and a CSV file of concepts.

Image-level concepts, one row a picture:

    root/images/...                   pictures, in any folders below
    root/concepts.csv                 image, class, [split,] and one column a concept or attribute

Class-level concepts (`level="class"`), one row a class:

    root/images/<class>/...           pictures of a class (or `listing_file`: a CSV with image, class, [split])
    root/concepts.csv                 class, and one column a concept or attribute

Optional in both: `parts.csv` (image, part, x, y[, visible]: points in pixels; or x0, y0, x1, y1: boxes), `boxes.csv` (image, x0, y0,
x1, y1: the object), `masks/<image without suffix>.png`, `part_masks/<part>/<image without suffix>.png`, and
`concept_parts.csv` (concept, part: on which part a concept can be seen). `datasets/folder.md` shows each.

Shape letters: N pictures, M concepts, K classes, P parts.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dotcbm.data.annotations import PICTURE_SUFFIXES, Parts, PictureFiles, hash_split, read_boxes, read_concept_parts, read_parts
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.tables import ConceptColumns, Table, near_match, read_concept_columns, read_table, readable
from dotcbm.structures import ConceptSet

__all__ = ["Folder"]


@dataclass(frozen=True)
class _Rows:
    """The pictures as listed: for each its name below the image folder, class, split, and where it was listed."""

    names: list[str]
    classes: list[str]
    splits: list[str]
    where: list[str]


@dataclass(frozen=True)
class Folder(ConceptSource):
    """A folder of pictures with image-level or class-level concepts in a CSV file. The module's docstring shows the layout.

    How a concept column is read: see `dotcbm.data.tables.read_concept_columns` (0/1, true/false, yes/no; words make one
    concept a value; empty is unknown and becomes NaN). With class-level concepts a number between 0 and 1 is the share of the
    class's pictures that show the concept, and its pictures are labelled with the concept above one half. With image-level
    concepts `class_concept_KM` is the mean over the known labels of the training pictures.

    The files are read once, at the first touch; make a new `Folder` after changing them.

    Args:
        root: The folder.
        concepts_file: The CSV file with the concepts, below `root`.
        level: Whether a row of it is a picture or a class.
        image_folder: Where the pictures are, below `root`. Paths in CSV files are relative to it; a path that begins with its name is
            taken as relative to `root`.
        image_column, class_column, split_column: Columns of `concepts_file` (or of `listing_file`). Without the default column
            "split", or with None, the split is made by `hash_split`; None also keeps a column called "split" from being a concept.
        concept_columns: The concept columns; by default all that are not named otherwise.
        ignore_columns: Columns that are no concepts.
        categorical_columns: Columns to read as categorical although they hold numbers.
        max_values: How many values a categorical column may have.
        listing_file: With class-level concepts, a CSV with the pictures instead of class folders.
        split_names: Our split name -> what the split column says, for columns that use other words: {"test": "val"} takes
            the rows marked val as the test split (and then there is no "val"). Values beyond train, val and test must be named here.
        test_fraction, val_fraction: Shares for the split by hash. By default no "val": the data module holds some of train out.
        seed: Of the split by hash.
        parts_file, boxes_file, concept_parts_file, masks_folder, part_masks_folder: Optional annotations, used if they exist.

    Raises (from `concepts`, `splits` and `load`):
        ValueError: Whatever does not fit, with file, row, column and value.
    """

    root: str
    _: KW_ONLY
    concepts_file: str = "concepts.csv"
    level: Literal["image", "class"] = "image"
    image_folder: str = "images"
    image_column: str = "image"
    class_column: str = "class"
    split_column: str | None = "split"
    concept_columns: Sequence[str] = ()
    ignore_columns: Sequence[str] = ()
    categorical_columns: Sequence[str] = ()
    max_values: int = 50
    listing_file: str | None = None
    split_names: Mapping[str, str] = field(default_factory=dict)
    test_fraction: float = 0.2
    val_fraction: float = 0.0
    seed: int = 0
    parts_file: str = "parts.csv"
    boxes_file: str = "boxes.csv"
    concept_parts_file: str = "concept_parts.csv"
    masks_folder: str = "masks"
    part_masks_folder: str = "part_masks"

    def __post_init__(self) -> None:
        for name in ("concept_columns", "ignore_columns", "categorical_columns"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is one word; expected a list of column names: {name}=[{getattr(self, name)!r}]"
                )
        if self.level not in ("image", "class"):
            raise ValueError(f"level={self.level!r}; expected 'image' (a row is a picture) or 'class' (a row is a class)")
        if self.listing_file is not None and self.level == "image":
            raise ValueError("listing_file goes with level='class'; with level='image' the concepts file lists the pictures")

    @property
    def concepts(self) -> ConceptSet:
        """The vocabulary: classes in alphabetical order, or as in a class-level file; concepts in the order of the columns."""
        return self._everything.concepts

    @property
    def splits(self) -> tuple[str, ...]:
        """ "train", "val" if there is one, "test", then others in order of appearance."""
        present = dict.fromkeys(self._rows.splits)
        return tuple(split for split in dict.fromkeys(("train", "val", "test", *present)) if split in present)

    def load(self, split: str) -> ConceptDataset:
        """The pictures of a split, in the order of the CSV file (of their paths, without one)."""
        if split not in self.splits:
            raise ValueError(
                f"{self.root}: there is no split '{split}'; the splits are {list(self.splits)}{near_match(split, self.splits)}"
            )
        chosen = [i for i, of in enumerate(self._rows.splits) if of == split]
        return self._everything.subset(chosen, split=split)

    @property
    def _images(self) -> Path:
        return Path(self.root) / self.image_folder

    def _name(self, written: str) -> str:
        """A path as written in a CSV file -> relative to the image folder, with forward slashes."""
        path = written.replace("\\", "/").removeprefix("./")
        prefix = self.image_folder.strip("/") + "/"
        return path.removeprefix(prefix) if self.image_folder.strip("./") else path

    @cached_property
    def _table(self) -> Table:
        if not Path(self.root).is_dir():
            raise ValueError(f"{self.root}: no such folder; expected one with {self.image_folder}/ and {self.concepts_file}")
        what = f"columns '{self.image_column}', '{self.class_column}' and the concepts" if self.level == "image" else "one row a class"
        return read_table(Path(self.root) / self.concepts_file, what=what)

    @cached_property
    def _columns(self) -> ConceptColumns:
        table = self._table
        taken = {
            self.class_column,
            self.split_column or "split",
            *self.ignore_columns,
            *([self.image_column] if self.level == "image" else []),
        }
        for name in (*self.ignore_columns, *self.categorical_columns, *self.concept_columns):
            table.column(name, what="named in ignore_columns, categorical_columns or concept_columns")
        columns = self.concept_columns or [name for name in table.columns if name not in taken]
        return read_concept_columns(
            table, columns=columns, categorical=self.categorical_columns, max_values=self.max_values, fractions=self.level == "class"
        )

    @cached_property
    def _on_disk(self) -> set[str]:
        if not self._images.is_dir():
            raise ValueError(f"{self._images}: no such folder; expected the pictures there (name another with image_folder=...)")
        skip = {Path(self.root) / self.masks_folder, Path(self.root) / self.part_masks_folder}
        found = (p for p in self._images.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and not skip & set(p.parents))
        return {p.relative_to(self._images).as_posix() for p in found}

    @cached_property
    def _class_names(self) -> list[str]:
        if self.level == "image":
            return sorted(set(self._rows.classes))
        names = self._table.column(self.class_column, what="the class", option="class_column")
        for i, name in enumerate(names):
            if not name:
                raise ValueError(f"{self._table.where(i)}: the class is empty")
            if name in names[:i]:
                raise ValueError(
                    f"{self._table.where(i)}: the class '{name}' is already in row {self._table.lines[names.index(name)]}; "
                    "a class-level file has one row a class (level='image' is for one row a picture)"
                )
        return names

    @cached_property
    def _rows(self) -> _Rows:
        if self.level == "image":
            if self.image_column not in self._table.columns and self.class_column in self._table.columns:
                classes = self._table.column(self.class_column, what="the class")
                if len(set(classes)) == len(classes):
                    raise ValueError(
                        f"{self._table.path}: no column '{self.image_column}' and each '{self.class_column}' once: if its rows are "
                        f"classes, set level='class'; the columns are {list(self._table.columns)}"
                        f"{near_match(self.image_column, self._table.columns)}"
                    )
            rows = self._listed(self._table)
        elif self.listing_file is not None:
            rows = self._listed(read_table(Path(self.root) / self.listing_file, what=f"'{self.image_column}' and '{self.class_column}'"))
        else:
            names = sorted(self._on_disk)
            loose = [name for name in names if "/" not in name]
            if loose:
                raise ValueError(f"{self._images / loose[0]}: lies in no class folder; expected {self.image_folder}/<class>/<picture>")
            rows = _Rows(names, [name.split("/")[0] for name in names], [], [str(self._images / name) for name in names])
        self._check(rows)
        if rows.splits:
            return rows
        order = {name: k for k, name in enumerate(sorted(set(rows.classes)))}
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        if self.test_fraction == 0:
            raise ValueError("test_fraction is 0 and there is no split column; expected a share of the pictures for testing, such as 0.2")
        splits = hash_split(rows.names, labels=[order[c] for c in rows.classes], fractions=fractions, seed=self.seed)
        return self._checked_splits(replace(rows, splits=splits))

    def _listed(self, table: Table) -> _Rows:
        images = table.column(self.image_column, what="the picture's path", option="image_column")
        classes = table.column(self.class_column, what="the class", option="class_column")
        where = [table.where(i) for i in range(len(images))]
        for i, (image, name) in enumerate(zip(images, classes, strict=True)):
            if not image or not name:
                raise ValueError(f"{where[i]}: the {'image' if not image else 'class'} is empty")
        rows = _Rows([self._name(image) for image in images], classes, [], where)
        if self.split_column is None or (self.split_column == "split" and "split" not in table.columns and not self.split_names):
            return rows
        theirs = {name: name for name in ("train", "val", "test") if name not in self.split_names and name not in self.split_names.values()}
        theirs |= {value: name for name, value in self.split_names.items()}
        cells = table.column(self.split_column, what="the split", option="split_column")
        for i, cell in enumerate(cells):
            if cell not in theirs:
                raise ValueError(
                    f"{where[i]}, column '{self.split_column}': the split '{cell}' is unknown; expected one of {sorted(theirs)}"
                    f"{near_match(cell, theirs)}; other words are named with split_names={{'test': '{cell or '...'}'}}"
                )
        return self._checked_splits(replace(rows, splits=[theirs[cell] for cell in cells]))

    def _checked_splits(self, rows: _Rows) -> _Rows:
        counts = Counter(rows.splits)
        for split in ("train", "test"):
            if not counts[split]:
                raise ValueError(
                    f"{self.root}: the split '{split}' is empty; the pictures by split are {dict(counts)}; to use the rows of another as "
                    f"'{split}', set split_names={{'{split}': '...'}}; to split by hash (needs two pictures of a class), split_column=None"
                )
        trained = {name for name, split in zip(rows.classes, rows.splits, strict=True) if split == "train"}
        without = sorted(set(rows.classes) - trained)
        if without:
            raise ValueError(
                f"{self.root}: the classes {without[:5]} ({len(without)} in all) have no training picture and cannot be learned; "
                "move pictures to train or remove these classes"
            )
        return rows

    def _check(self, rows: _Rows) -> None:
        """Compare what is listed with what is on disk."""
        first: dict[str, int] = {}
        for i, name in enumerate(rows.names):
            if name in first:
                raise ValueError(f"{rows.where[i]}: the picture '{name}' is already in {rows.where[first[name]]}; keep one row a picture")
            first[name] = i
        missing = [i for i, name in enumerate(rows.names) if name not in self._on_disk]
        if missing:
            name = rows.names[missing[0]]
            stem = Path(name).stem.casefold()
            alike = [found for found in sorted(self._on_disk) if Path(found).stem.casefold() == stem]
            hint = f"there is '{alike[0]}'" if alike else f"{len(self._on_disk)} pictures were found there"
            raise ValueError(
                f"{rows.where[missing[0]]}: the picture '{name}' is not below {self._images} ({hint}); "
                f"{len(missing)} of {len(rows.names)} listed pictures are missing; correct the paths or set image_folder"
            )
        if self.level == "class":
            known = set(self._class_names)
            for where, name in zip(rows.where, rows.classes, strict=True):
                if name not in known:
                    raise ValueError(f"{where}: the class '{name}' has no row in {self._table.path}{near_match(name, known)}")
            empty = [name for name in self._class_names if name not in set(rows.classes)]
            if empty:
                raise ValueError(
                    f"{self._table.path}: the class '{empty[0]}' has no picture ({len(empty)} such classes); "
                    f"expected {self._images / empty[0]}/{near_match(empty[0], set(rows.classes) - known)}"
                )
        unlisted = sorted(self._on_disk - set(rows.names))
        if unlisted:
            warnings.warn(
                f"{self._images}: {len(unlisted)} pictures have no row and are left out, the first is '{unlisted[0]}'", stacklevel=2
            )

    @cached_property
    def _everything(self) -> ConceptDataset:
        """All N pictures as one data set, of which the splits are subsets."""
        rows, columns, root = self._rows, self._columns, Path(self.root)
        class_names = self._class_names
        number = {name: k for k, name in enumerate(class_names)}
        label_N = torch.tensor([number[name] for name in rows.classes])
        if self.level == "image":
            concept_NM = columns.value_NM
            train_N = torch.tensor([split == "train" for split in rows.splits])
            class_KM = torch.stack([concept_NM[train_N & (label_N == k)].nanmean(0) for k in range(len(class_names))])
        else:
            class_KM = columns.value_NM
            concept_NM = torch.where(class_KM.isnan(), torch.nan, (class_KM > 0.5).float())[label_N]
        files = PictureFiles(paths=tuple(self._images / name for name in rows.names))
        row_of = {name: i for i, name in enumerate(rows.names)}

        def find(written: str) -> int | None:
            return row_of.get(self._name(written))

        parts = Parts()
        if (root / self.parts_file).is_file():
            parts = read_parts(root / self.parts_file, row_of=find, size=files.size, num_pictures=len(rows.names))
        box_N4 = None
        if (root / self.boxes_file).is_file():
            box_N4 = read_boxes(root / self.boxes_file, row_of=find, size=files.size, names=rows.names)
        parts, files = self._with_masks(parts, replace(files, part_boxes_NP4=parts.boxes_NP4), rows.names)
        part_names, concept_parts = parts.names, None
        if (root / self.concept_parts_file).is_file():
            concept_parts = read_concept_parts(
                root / self.concept_parts_file, concepts=columns.names, groups=columns.groups, part_names=part_names
            )
            part_names = part_names or tuple(dict.fromkeys(part for row in concept_parts for part in row))
        return ConceptDataset(
            concepts=ConceptSet(
                names=columns.names,
                class_names=tuple(readable(name) for name in class_names),
                class_concept_KM=class_KM,
                groups=columns.groups,
                part_names=part_names,
                parts=concept_parts,
            ),
            split="all",
            names=tuple(rows.names),
            label_N=label_N,
            concept_NM=concept_NM,
            read_image=files.image,
            read_size=files.size,
            points_NP3=parts.points_NP3,
            box_N4=box_N4,
            read_foreground=files.foreground if files.masks else None,
            read_part_masks=files.parts if files.part_masks or files.part_boxes_NP4 is not None else None,
            source_key=self._key(rows.names),
        )

    def _with_masks(self, parts: Parts, files: PictureFiles, names: Sequence[str]) -> tuple[Parts, PictureFiles]:
        masks, part_masks = Path(self.root) / self.masks_folder, Path(self.root) / self.part_masks_folder
        stems = [Path(name).with_suffix(".png") for name in names]
        if masks.is_dir():
            found = tuple(path if (path := masks / stem).is_file() else None for stem in stems)
            if not any(found):
                raise ValueError(f"{masks}: no mask belongs to a picture; expected {masks / stems[0]} for {self._images / names[0]}")
            files = replace(files, masks=found)
        if part_masks.is_dir():
            folders = sorted(p.name for p in part_masks.iterdir() if p.is_dir())
            all_names = tuple(dict.fromkeys((*parts.names, *folders)))
            table = tuple(tuple(path if (path := part_masks / part / stem).is_file() else None for part in all_names) for stem in stems)
            if not any(path for row in table for path in row):
                expected = part_masks / (all_names[0] if all_names else "<part>") / stems[0]
                raise ValueError(f"{part_masks}: no part mask belongs to a picture; expected {expected}")
            grown = len(all_names) - len(parts.names)
            files = replace(files, part_masks=table, part_boxes_NP4=_padded(parts.boxes_NP4, grown, torch.nan))
            parts = Parts(names=all_names, points_NP3=_padded(parts.points_NP3, grown, 0.0), boxes_NP4=files.part_boxes_NP4)
        files.check_masks()
        return parts, files

    def _key(self, names: Sequence[str]) -> str:
        """Where the pictures are and how many bytes each has, so that a feature cache notices pictures that were replaced."""
        sizes = hashlib.sha256(" ".join(str((self._images / name).stat().st_size) for name in names).encode()).hexdigest()
        return f"Folder {self._images.resolve()} {sizes}"


def _padded(values_NPX: Tensor | None, more: int, fill: float) -> Tensor | None:
    """(N, P + more, X): parts that only have masks get no point and no box."""
    if values_NPX is None or not more:
        return values_NPX
    return torch.cat([values_NPX, values_NPX.new_full((len(values_NPX), more, values_NPX.shape[2]), fill)], dim=1)
