"""Writers of tiny data sets in the original layouts of CUB-200-2011 and Waterbirds.

Shape letters: I images, A attributes (312), C classes.
"""

from __future__ import annotations

import colorsys
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["PARTS", "FakeCub", "attribute_names", "write_fake_cub", "write_fake_waterbirds"]

_COLORS = "blue brown iridescent purple rufous grey yellow olive green pink orange black white red buff"
_EYE_COLORS = _COLORS.replace("iridescent ", "")
_PATTERNS = "solid spotted striped multi-colored"
# The 28 groups of attributes.txt in their order.
_GROUPS = (
    ("bill_shape", "curved_(up_or_down) dagger hooked needle hooked_seabird spatulate all-purpose cone specialized"),
    ("wing_color", _COLORS),
    ("upperparts_color", _COLORS),
    ("underparts_color", _COLORS),
    ("breast_pattern", _PATTERNS),
    ("back_color", _COLORS),
    ("tail_shape", "forked_tail rounded_tail notched_tail fan-shaped_tail pointed_tail squared_tail"),
    ("upper_tail_color", _COLORS),
    ("head_pattern", "spotted malar crested masked unique_pattern eyebrow eyering plain eyeline striped capped"),
    ("breast_color", _COLORS),
    ("throat_color", _COLORS),
    ("eye_color", _EYE_COLORS),
    ("bill_length", "about_the_same_as_head longer_than_head shorter_than_head"),
    ("forehead_color", _COLORS),
    ("under_tail_color", _COLORS),
    ("nape_color", _COLORS),
    ("belly_color", _COLORS),
    ("wing_shape", "rounded-wings pointed-wings broad-wings tapered-wings long-wings"),
    ("size", "large_(16_-_32_in) small_(5_-_9_in) very_large_(32_-_72_in) medium_(9_-_16_in) very_small_(3_-_5_in)"),
    (
        "shape",
        "upright-perching_water-like chicken-like-marsh long-legged-like duck-like owl-like gull-like hummingbird-like pigeon-like "
        "tree-clinging-like hawk-like sandpiper-like upland-ground-like swallow-like perching-like",
    ),
    ("back_pattern", _PATTERNS),
    ("tail_pattern", _PATTERNS),
    ("belly_pattern", _PATTERNS),
    ("primary_color", _COLORS),
    ("leg_color", _COLORS),
    ("bill_color", _COLORS),
    ("crown_color", _COLORS),
    ("wing_pattern", _PATTERNS),
)
# fmt: off
PARTS = [
    "back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape", "right eye", "right leg",
    "right wing", "tail", "throat",
]
# fmt: on
# Where the parts lie in the bird's box, as fractions of it; right eye, leg and wing are hidden.
_PLACES = {
    "back": (0.45, 0.25),
    "beak": (0.97, 0.35),
    "belly": (0.5, 0.8),
    "breast": (0.75, 0.7),
    "crown": (0.8, 0.15),
    "forehead": (0.88, 0.2),
    "left eye": (0.85, 0.27),
    "left leg": (0.5, 0.95),
    "left wing": (0.4, 0.5),
    "nape": (0.7, 0.2),
    "tail": (0.08, 0.5),
    "throat": (0.82, 0.5),
}


def attribute_names() -> list[str]:
    """The 312 names of attributes.txt."""
    return [f"has_{group}::{value}" for group, values in _GROUPS for value in values.split()]


@dataclass(frozen=True)
class FakeCub:
    """What was written.

    Attributes:
        root: The folder.
        paths: I paths below images/.
        class_I: (I,) class numbers from 0.
        train_I: (I,) bool.
        profile_CA: (C, A) bool, the attributes of each class.
        present_IA: (I, A) {0, 1} as annotated.
        certainty_IA: (I, A) 1 (not visible) to 4.
        size: (height, width) of the pictures.
    """

    root: Path
    paths: list[str]
    class_I: np.ndarray
    train_I: np.ndarray
    profile_CA: np.ndarray
    present_IA: np.ndarray
    certainty_IA: np.ndarray
    size: tuple[int, int]


def write_fake_cub(
    root: Path,
    *,
    num_classes: int = 4,
    images_per_class: int = 6,
    image_attributes: bool = True,
    percentages: bool = True,
    masks: bool = True,
    attributes_beside: bool = False,
    extra_classes: int = 0,
    size: tuple[int, int] = (48, 64),
    seed: int = 0,
) -> FakeCub:
    """Write a data set of `num_classes` * `images_per_class` pictures; of each class every third picture is a test picture.

    Args:
        root: The folder to write, CUB_200_2011 of the archive.
        num_classes: Classes with pictures.
        images_per_class: Pictures of each.
        image_attributes: Write attributes/image_attribute_labels.txt, with two rows that carry an extra column as in the original.
        percentages: Write attributes/class_attribute_labels_continuous.txt.
        masks: Write segmentations/.
        attributes_beside: Write attributes.txt beside `root`, as in the archive, and not in it.
        extra_classes: Classes of classes.txt and of the percentages that have no picture.
        size: (height, width) of the pictures.
        seed: Of everything drawn.
    """
    rng = np.random.default_rng(seed)
    total = num_classes + extra_classes
    h, w = size
    folders = [f"{c + 1:03d}.Fake_bird_{c + 1}" for c in range(total)]
    names = attribute_names()
    profile_CA = rng.random((total, len(names))) < 0.25
    class_I = np.repeat(np.arange(num_classes), images_per_class)
    train_I = np.tile(np.arange(images_per_class) % 3 != 2, num_classes)
    flipped = rng.random((len(class_I), len(names))) < 0.05
    present_IA = (profile_CA[class_I] ^ flipped).astype(int)
    certainty_IA = rng.integers(2, 5, present_IA.shape)
    certainty_IA[(present_IA == 0) & (rng.random(present_IA.shape) < 0.2)] = 1
    paths = [f"{folders[c]}/Fake_bird_{c + 1}_{n:04d}_{1000 + n}.jpg" for n, c in enumerate(class_I)]
    boxes = [_bird_box(rng, size) for _ in paths]

    for part in ("attributes", "parts", "images"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for i, (path, c) in enumerate(zip(paths, class_I, strict=True)):
        picture, mask = _draw(boxes[i], size=size, hue=c / max(num_classes, 1), ground=rng.integers(60, 200, 3))
        (root / "images" / path).parent.mkdir(exist_ok=True)
        picture.save(root / "images" / path, quality=90)
        if masks:
            target = root / "segmentations" / Path(path).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            mask.save(target)

    _write(root / "images.txt", (f"{i} {path}" for i, path in enumerate(paths, 1)))
    _write(root / "image_class_labels.txt", (f"{i} {c + 1}" for i, c in enumerate(class_I, 1)))
    _write(root / "train_test_split.txt", (f"{i} {int(t)}" for i, t in enumerate(train_I, 1)))
    _write(root / "classes.txt", (f"{c} {name}" for c, name in enumerate(folders, 1)))
    _write(root / "bounding_boxes.txt", (f"{i} {x:.1f} {y:.1f} {bw:.1f} {bh:.1f}" for i, (x, y, bw, bh) in enumerate(boxes, 1)))
    _write((root.parent if attributes_beside else root) / "attributes.txt", (f"{a} {name}" for a, name in enumerate(names, 1)))
    _write(root / "attributes" / "certainties.txt", ["1 not visible", "2 guessing", "3 probably", "4 definitely"])
    _write(root / "parts" / "parts.txt", (f"{p} {name}" for p, name in enumerate(PARTS, 1)))
    _write(root / "parts" / "part_locs.txt", _part_rows(boxes))
    if percentages:
        share_CA = np.where(profile_CA, rng.uniform(55, 95, profile_CA.shape), rng.uniform(0, 45, profile_CA.shape))
        _write(root / "attributes" / "class_attribute_labels_continuous.txt", (" ".join(f"{v:.10f}" for v in row) for row in share_CA))
    if image_attributes:
        _write(root / "attributes" / "image_attribute_labels.txt", _attribute_rows(present_IA, certainty_IA))
    return FakeCub(
        root=root,
        paths=paths,
        class_I=class_I,
        train_I=train_I,
        profile_CA=profile_CA,
        present_IA=present_IA,
        certainty_IA=certainty_IA,
        size=(h, w),
    )


def write_fake_waterbirds(root: Path, *, cub: FakeCub, scale: float = 0.75, leave_out: int = 0, seed: int = 0) -> list[dict[str, str]]:
    """Write the twins of a fake CUB: the same birds, smaller pictures, on land (greenish) or water (bluish).

    Even classes are waterbirds. In the training split a bird stands on its own kind of ground nine times in ten; validation and test
    pictures alternate. Every fifth training picture of CUB becomes a validation picture.

    Args:
        root: The folder to write.
        cub: What `write_fake_cub` gave.
        scale: Side of the twins in units of the original side.
        leave_out: So many of the last pictures have no twin.
        seed: Of the backgrounds.

    Returns:
        The rows of metadata.csv.
    """
    rng = np.random.default_rng(seed)
    h, w = cub.size
    rows = []
    for i, path in enumerate(cub.paths[: len(cub.paths) - leave_out]):
        y = int(cub.class_I[i] % 2 == 0)
        split = 2 if not cub.train_I[i] else int(i % 5 == 4)
        place = (y if rng.random() < 0.9 else 1 - y) if split == 0 else i % 2
        picture = np.array(Image.open(cub.root / "images" / path).convert("RGB"))
        mask = np.array(Image.open(cub.root / "segmentations" / Path(path).with_suffix(".png")).convert("L")) > 127
        ground = np.array([60, 90, 200] if place else [80, 160, 60]) + rng.integers(-20, 20, (h, w, 3))
        picture[~mask] = ground[~mask]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((round(w * scale), round(h * scale))).save(root / path)
        values = (str(i + 1), path, str(y), str(split), str(place), f"/{'o/ocean' if place else 'f/forest'}/{i:08d}.jpg")
        rows.append(dict(zip(("img_id", "img_filename", "y", "split", "place", "place_filename"), values, strict=True)))
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _write(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bird_box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x, y, width, height in pixels."""
    h, w = size
    bw, bh = w * rng.uniform(0.5, 0.7), h * rng.uniform(0.5, 0.7)
    return round(float(rng.uniform(1, w - bw - 1)), 1), round(float(rng.uniform(1, h - bh - 1)), 1), round(bw, 1), round(bh, 1)


def _draw(
    box: tuple[float, float, float, float], *, size: tuple[int, int], hue: float, ground: np.ndarray
) -> tuple[Image.Image, Image.Image]:
    """The picture and its mask: an ellipse in the colour of the class."""
    h, w = size
    x, y, bw, bh = box
    red, green, blue = (int(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.9, 0.9))
    picture = Image.new("RGB", (w, h), (int(ground[0]), int(ground[1]), int(ground[2])))
    mask = Image.new("L", (w, h), 0)
    corners = (x, y, x + bw, y + bh)
    ImageDraw.Draw(picture).ellipse(corners, fill=(red, green, blue))
    ImageDraw.Draw(mask).ellipse(corners, fill=255)
    return picture, mask


def _part_rows(boxes: list[tuple[float, float, float, float]]):
    for i, (x, y, bw, bh) in enumerate(boxes, 1):
        for p, name in enumerate(PARTS, 1):
            fx, fy = _PLACES.get(name, (None, None))
            yield f"{i} {p} 0.0 0.0 0" if fx is None or fy is None else f"{i} {p} {x + fx * bw:.1f} {y + fy * bh:.1f} 1"


def _attribute_rows(present_IA: np.ndarray, certainty_IA: np.ndarray):
    number_images, number_attributes = present_IA.shape
    for i in range(number_images):
        for a in range(number_attributes):
            extra = " 0" if i == 1 and a < 2 else ""  # the original has such rows in images 2275 and 9364
            yield f"{i + 1} {a + 1} {present_IA[i, a]} {certainty_IA[i, a]}{extra} {1.5 + a / 100:g}"
