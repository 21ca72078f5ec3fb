"""Parts found on real birds: concepts of one part look at it more often than all parts together do. Key points are read to judge only."""

from __future__ import annotations

from pathlib import Path

import torch

from dotcbm.data.batches import prepare_view
from dotcbm.data.cub import CUB
from dotcbm.encoders.image import ImageEncoder
from dotcbm.metrics.localization import pointing_distance
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.object_core import CORES, choose_core, core_scores
from dotcbm.models.parts import find_parts
from dotcbm.structures import PatchFeatures, Problem


@torch.inference_mode()
def test_groups_of_concepts_point_at_their_parts(shared: Path):
    birds = CUB(root=shared / "data" / "CUB_200_2011_subset").load("train")
    rows = torch.arange(0, len(birds), 8)
    encoder = ImageEncoder(f"local-dir:{shared / 'weights' / 'tf_efficientnet_lite2'}", image_size=320)
    samples = [prepare_view(birds.sample(int(row), masks=False), preprocessing=encoder.preprocessing, view="plain") for row in rows]
    patches = PatchFeatures.cat([encoder(torch.stack([sample.image for sample in samples[i : i + 20]])) for i in range(0, len(rows), 20)])
    concepts = birds.concepts
    known = {"concept_nM": birds.concept_NM[rows], "label_n": birds.label_N[rows], "group_M": concepts.group_index_M()}
    parts = find_parts(patches, **known, num_parts=12, num_clusterings=6, part_width=32)
    scores = core_scores(patches, parts, **known, num_parts=12, eps=0.1, softness=1 / 6, smoothing=3)
    core = choose_core(scores, tolerance=0.03)
    assert core in CORES

    pointing = {}
    for scored in (True, False):
        problem = Problem(encoder.width, encoder.global_width, encoder.grid, concepts, detail_width=encoder.detail_width)
        bottleneck = DotCBM(problem, num_clusterings=6, part_width=32, scored=scored).eval()
        bottleneck.set_parts(parts, core=core)
        seen_BNM, _ = bottleneck.look(patches.patch_BND, bottleneck.prior(patches))
        distance_BM = pointing_distance(
            seen_BNM,
            grid=encoder.grid,
            points_BP3=torch.stack([sample.points_P3 for sample in samples]),
            part_mask_MP=concepts.part_mask_MP(),
            size_B2=torch.tensor([sample.size for sample in samples]),
        )
        shown_BM = (birds.concept_NM[rows] == 1) & ~distance_BM.isnan()
        pointing[scored] = float((distance_BM[shown_BM] <= 0.1).float().mean())
    assert pointing[True] > pointing[False] + 0.03
