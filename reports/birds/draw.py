"""Draw the explanations that reports/birds.md shows: three test pictures, chosen by their place in the list.

    python reports/birds/draw.py runs/birds/model

The photos belong to their photographers, so the bird's mask stands in for each; `--photos DIR` draws over the photos as well,
for your own eyes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dotcbm
from dotcbm.data.cub import CUB

HERE = Path(__file__).parent
GROUND, BIRD = 0.93, 0.72


def silhouette(mask_HW: Tensor) -> Tensor:
    """(3, H, W) uint8: the bird in grey."""
    return torch.where(mask_HW, BIRD, GROUND).mul(255).to(torch.uint8).expand(3, -1, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that from_pretrained reads")
    parser.add_argument("--root", default="../shared/data/CUB_200_2011_subset", help="the pictures, in the layout of CUB-200-2011")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="draw over the photos too, into this folder")
    given = parser.parse_args()
    model = dotcbm.from_pretrained(given.model)
    dataset = CUB(root=given.root).load("test")
    for number, row in enumerate((0, len(dataset) // 2, len(dataset) - 1), start=1):
        sample = dataset.sample(row)
        assert sample.image is not None
        assert sample.foreground_HW is not None
        explanation = dotcbm.explain(model, sample.image)
        print(f"{number}: {sample.name}: {dataset.concepts.class_names[sample.label]}; predicted {explanation.predicted_class}")
        if given.photos:
            given.photos.mkdir(parents=True, exist_ok=True)
            explanation.plot(6).savefig(given.photos / f"bird-{number}.png")
        drawn = replace(explanation, picture_3HW=silhouette(sample.foreground_HW.bool()))
        drawn.plot(6).savefig(HERE / f"bird-{number}.png")


if __name__ == "__main__":
    main()
