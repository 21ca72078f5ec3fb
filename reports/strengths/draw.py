"""Draw where a trained DOT-CBM starts to search, and where it looks in the end, as reports/winning.md shows it.

    python reports/strengths/draw.py runs/studies/strengths/models/strong-dot-cbm-seed0

Two creatures, the middle ones of the split whose backgrounds tell nothing; nine concepts that each of them has. "start" is the plan with
all queries at 0: half way between the prior and where the concept's group was found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional

import dotcbm
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.report.study.plan import make_source, read_study

HERE = Path(__file__).parent
COLUMNS = 9


def maps(model: dotcbm.ConceptModel, image_3HW: Tensor) -> dict[str, Tensor]:
    """(N, M) by name."""
    bottleneck = model.bottleneck
    assert isinstance(bottleneck, DotCBM)
    with torch.no_grad():
        features = model.encoder(model.prepare([image_3HW]))
        output = bottleneck(features)
        query_ME = bottleneck.query_ME.clone()
        bottleneck.query_ME.zero_()
        start = bottleneck(features)
        bottleneck.query_ME.copy_(query_ME)
    assert output.plan_BNM is not None
    assert output.evidence_BNM is not None
    assert start.plan_BNM is not None
    return {"start": start.plan_BNM[0], "plan": output.plan_BNM[0], "evidence": output.evidence_BNM[0].clamp(min=0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER", help="a model of the study, which from_pretrained reads")
    parser.add_argument("--world", default="strong", help="the world of the study that it was trained in")
    given = parser.parse_args()
    study = read_study(Path("configs/studies/strengths.yaml"))
    dataset = make_source(study.worlds[given.world].source).load("test_ood")
    model = dotcbm.from_pretrained(given.model).eval()
    middle = len(dataset) // 2
    figure, axes = plt.subplots(6, COLUMNS, figsize=(COLUMNS * 1.6, 6 * 1.75), layout="constrained")
    for row, sample in enumerate((dataset.sample(middle), dataset.sample(middle + 1))):
        assert sample.image is not None
        shown = (sample.concepts_M == 1).nonzero()[:COLUMNS, 0].tolist()
        for line, (name, map_NM) in enumerate(maps(model, sample.image).items()):
            for column, j in enumerate(shown):
                axis = axes[3 * row + line, column]
                grid_11HW = map_NM[:, j].view(1, 1, *model.encoder.grid)
                axis.imshow(sample.image.permute(1, 2, 0))
                axis.imshow(
                    functional.interpolate(grid_11HW, tuple(sample.image.shape[1:]), mode="bilinear")[0, 0], alpha=0.55, cmap="inferno"
                )
                axis.set(xticks=[], yticks=[])
                if line == 0:
                    axis.set_title(dataset.concepts.names[j], fontsize=8)
                if column == 0:
                    axis.set_ylabel(name, fontsize=8)
    out = HERE / "places_learned.png"
    figure.savefig(out, dpi=70)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
