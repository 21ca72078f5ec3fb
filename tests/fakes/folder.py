"""Writes small folders in the layouts that `dotcbm.data.folder.Folder` reads. Pictures are drawn, so nothing third-party is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_ROWS = """image,class,split,has_tail,shape,fur_colour
a/one.png,cat,train,1,round,red
a/two.png,cat,train,0,round,
a/three.png,cat,test,yes,long,brown
b/four.png,dog,train,true,long,brown
b/five.png,dog,train,,long,red
b/six.png,dog,val,FALSE,round,?
b/seven.png,dog,test,no,round,red
"""
CLASS_ROWS = """class,striped,size
zebra,1,big
ant,0.25,small
"""


def picture(path: Path, *, width: int = 20, height: int = 10, value: int = 90) -> Path:
    """A picture of width x height whose left half is `value` and whose right half is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[:, : width // 2] = value
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, *, box: tuple[int, int, int, int], width: int = 20, height: int = 10, value: int = 255) -> Path:
    """A mask that holds in the pixels x0 <= x < x1, y0 <= y < y1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width), dtype=np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = value
    Image.fromarray(pixels).save(path)
    return path


def image_level(root: Path, *, rows: str = IMAGE_ROWS) -> Path:
    """Seven pictures of 20 x 10 pixels with image-level concepts; the rows can be replaced, the pictures stay."""
    for i, line in enumerate(IMAGE_ROWS.splitlines()[1:]):
        picture(root / "images" / line.split(",")[0], value=20 * i)
    (root / "concepts.csv").write_text(rows, encoding="utf-8")
    return root


def class_level(root: Path, *, rows: str = CLASS_ROWS, per_class: int = 10) -> Path:
    """Class folders with `per_class` pictures each, and class-level concepts."""
    for name in ("zebra", "ant"):
        for i in range(per_class):
            picture(root / "images" / name / f"{i:02}.png", value=i)
    (root / "concepts.csv").write_text(rows, encoding="utf-8")
    return root
