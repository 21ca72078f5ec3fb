"""Draw where each method looks for the same 12 concepts, as reports/winning.md shows it.

    python reports/winning/draw.py "CBM=runs/studies/winning/models/<run>" "DOT-CBM=runs/studies/winning/models/<run>"

One picture, the middle one of the test split, cut to the bird and its surroundings; of the groups of concepts with a part, the first
concept that the bird has, 12 at most.
The photo belongs to its photographer, so the bird's mask stands in for it; `--photo FILE` draws over the photo as well, for your own eyes.
A cross marks each visible key point of the concept's part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

import dotcbm
from dotcbm.data.cub import CUB

HERE = Path(__file__).parent
GROUND, BIRD = 0.93, 0.72
COLUMNS = 12
_MARGIN = 0.3  # around the bird, in shares of its box


def chosen_concepts(concepts: dotcbm.ConceptSet, truth_M: Tensor) -> list[int]:
    """At most one concept of each group: the first that is there and has a part."""
    first: dict[int, int] = {}
    for j, group in enumerate(concepts.group_index_M().tolist()):
        if truth_M[j] == 1 and concepts.parts and concepts.parts[j]:
            first.setdefault(group, j)
    return list(first.values())[:COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="folders that from_pretrained reads")
    parser.add_argument("--root", default="../shared/data/CUB_200_2011_subset", help="the pictures, in the layout of CUB-200-2011")
    parser.add_argument("--row", type=int, help="of the test split; the middle one by default")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="draw over the photo too, into this file")
    given = parser.parse_args()
    dataset = CUB(root=given.root).load("test")
    sample = dataset.sample(len(dataset) // 2 if given.row is None else given.row)
    assert sample.image is not None
    assert sample.foreground_HW is not None
    assert sample.points_P3 is not None
    shown = chosen_concepts(dataset.concepts, sample.concepts_M)
    height, width = sample.size
    assert sample.box_4 is not None
    x0, y0, x1, y1 = sample.box_4.tolist()
    margin_x, margin_y = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    left, right = max(x0 - margin_x, 0) * width, min(x1 + margin_x, 1) * width
    top, bottom = max(y0 - margin_y, 0) * height, min(y1 + margin_y, 1) * height
    silhouette_HW = torch.where(sample.foreground_HW.bool(), BIRD, GROUND)
    maps: dict[str, Tensor] = {}
    for pair in given.models:
        name, _, folder = pair.partition("=")
        explanation = dotcbm.explain(dotcbm.from_pretrained(folder), sample.image)
        maps[f"{name}\n({explanation.view})"] = explanation.heatmaps_MHW[shown].float().clamp(min=0)
    for photo, path in ((None, HERE / "concepts.png"), (sample.image, given.photo)):
        if path is None:
            continue
        figure, axes = plt.subplots(len(maps), len(shown), figsize=(1.35 * len(shown), 1.5 * len(maps) + 0.6), squeeze=False)
        for row, (name, map_Xhw) in zip(axes, maps.items(), strict=True):
            big_XHW = functional.interpolate(map_Xhw[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
            for axis, map_HW, j in zip(row, big_XHW, shown, strict=True):
                if photo is None:
                    axis.imshow(silhouette_HW, cmap="gray", vmin=0, vmax=1)
                else:
                    axis.imshow(photo.permute(1, 2, 0))
                axis.imshow(map_HW / map_HW.max().clamp(min=1e-9), cmap="magma", alpha=0.6, vmin=0, vmax=1)
                for part, (x, y, visible) in zip(dataset.concepts.part_names, sample.points_P3.tolist(), strict=True):
                    if visible > 0.5 and part in (dataset.concepts.parts or ())[j]:
                        axis.plot(x * width, y * height, "+", color="cyan", markersize=7, markeredgewidth=1.5)
                axis.set_xlim(left, right)
                axis.set_ylim(bottom, top)
                axis.set_xticks([])
                axis.set_yticks([])
            row[0].set_ylabel(name, fontsize=8)
        for axis, j in zip(axes[0], shown, strict=True):
            axis.set_title(dataset.concepts.names[j].replace(" ", "\n", 1), fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
