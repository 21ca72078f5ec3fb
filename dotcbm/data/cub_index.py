"""Which images, classes and attributes a CUB folder lists.

Shape letters: I images, C classes of classes.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dotcbm.data.cub_tables import by_id, read_rows

__all__ = ["ImageTable", "read_attribute_names", "read_class_names", "read_images", "read_voters"]


@dataclass(frozen=True)
class ImageTable:
    """images.txt and what the other tables say of each of its rows.

    Attributes:
        ids: I image ids.
        paths: I paths below images/.
        train_I: (I,) bool.
        class_I: (I,) index among `kept`.
        kept: For each class that has images, its row in classes.txt, from 0.
        class_names: The C names in classes.txt.
    """

    ids: tuple[int, ...]
    paths: tuple[str, ...]
    train_I: NDArray[np.bool_]
    class_I: NDArray[np.int64]
    kept: tuple[int, ...]
    class_names: tuple[str, ...]


def read_class_names(root: Path) -> dict[int, str]:
    """The names in classes.txt by class id."""
    path = root / "classes.txt"
    return {row[0]: str(row[1]) for row in by_id(path, read_rows(path, columns=(("class id", int), ("name", str)))).values()}


def read_attribute_names(root: Path) -> tuple[str, ...]:
    """The names in attributes.txt, which lies in `root`, beside it or in attributes/.

    Raises:
        ValueError: There is none, or its ids are not 1, 2, 3, ...
    """
    places = (root / "attributes.txt", root / "attributes" / "attributes.txt", root.parent / "attributes.txt")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"no attributes.txt among {', '.join(map(str, places))}; the archive has it beside CUB_200_2011/")
    rows = by_id(path, read_rows(path, columns=(("attribute id", int), ("name", str))))
    for number, found in enumerate(rows, 1):
        if found != number:
            raise ValueError(f"{path}: row {number} has id {found}, expected {number}; the other attribute tables count on the order")
    return tuple(str(row[1]) for row in rows.values())


def read_images(root: Path) -> ImageTable:
    """images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, checked against each other.

    Raises:
        ValueError: A table is missing or truncated, lists other images than images.txt, or holds an unknown class or split.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; root is the folder that holds images.txt and images/ (CUB_200_2011 in the archive)")
    index = root / "images.txt"
    listed = by_id(index, read_rows(index, columns=(("image id", int), ("path", str))))
    ids = tuple(listed)
    class_names = read_class_names(root)

    def column(name: str, what: str, allowed: Sequence[int], hint: str) -> NDArray[np.int64]:
        path = root / name
        rows = read_rows(path, columns=(("image id", int), (what, int)))
        known = set(allowed)
        for number, (image, value) in enumerate(rows, 1):
            if value not in known:
                raise ValueError(f"{path}: row {number} (image {image}) has {what} {value}, expected {hint}")
        return np.array([row[1] for row in by_id(path, rows, ids=ids, ids_from=index).values()])

    class_id_I = column("image_class_labels.txt", "class id", list(class_names), f"an id of classes.txt (it lists {len(class_names)})")
    train_I = column("train_test_split.txt", "is training image", (0, 1), "0 (test) or 1 (training)")
    kept = np.unique(class_id_I)
    row_of = {class_id: row for row, class_id in enumerate(class_names)}
    return ImageTable(
        ids=ids,
        paths=tuple(str(row[1]) for row in listed.values()),
        train_I=train_I == 1,
        class_I=np.searchsorted(kept, class_id_I),
        kept=tuple(row_of[int(class_id)] for class_id in kept),
        class_names=tuple(class_names.values()),
    )


def read_voters(path: Path, *, table: ImageTable) -> NDArray[np.int64]:
    """Rows of the images that a text file lists, one id a line.

    Raises:
        ValueError: An image that is no training image.
    """
    row_of = {image: i for i, image in enumerate(table.ids)}
    chosen = []
    for number, (image,) in enumerate(read_rows(path, columns=(("image id", int),)), 1):
        if image not in row_of or not table.train_I[row_of[image]]:
            raise ValueError(f"{path}: row {number} has image {image}, which is no training image; only training images may vote")
        chosen.append(row_of[image])
    return np.unique(chosen)
