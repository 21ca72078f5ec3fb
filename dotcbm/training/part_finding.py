"""Before the training: find the parts that a bottleneck transports patches onto, and the core of the object that they lie in, in the
training pictures.

It takes the plain view of at most `_MOST` pictures, drawn evenly from the classes, the encoder's features of them, and the
concepts that they are labelled with. Neither masks nor key points are read.
"""

from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dotcbm.data.batches import mix_seed, prepare_view
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.object_core import CORES, choose_core, core_scores
from dotcbm.models.parts import find_parts
from dotcbm.structures import PatchFeatures

__all__ = ["check_finds_parts", "prepare_parts"]

_MOST = 2000  # pictures; their features are in memory at once
_DRAWN = 0x9A7  # separates the draw of these pictures from the other uses of the seed
_CHUNK = 64


def check_finds_parts(encoder: ImageEncoder) -> None:
    """Raise ValueError where the features will change after the parts were found in them."""
    if encoder.trainable:
        raise ValueError(
            "DotCBM finds its parts in the features of a frozen encoder, and this one is trainable; set trainable to false, or take "
            "PublishedDotCBM, which learns where to look together with the encoder"
        )


@torch.no_grad()
def prepare_parts(bottleneck: DotCBM, data: ConceptDataModule, encoder: ImageEncoder, *, seed: int, device: torch.device) -> None:
    """Find the parts, and the scale of what is read from them, and set both.

    Args:
        bottleneck: On `device`.
        data: With the encoder in use.
        encoder: Frozen.
        seed: Of pictures and clusterings.
        device: Where to compute.

    Raises:
        ValueError: See `find_parts`.
    """
    dataset = data.dataset("train")
    rows = _drawn(dataset.label_N, seed=seed)
    patches = _features(data, encoder, rows, device=device).to(device)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        clusterings = progress.add_task("Finding parts", total=bottleneck.num_clusterings)
        known = {"concept_nM": dataset.concept_NM[rows], "label_n": dataset.label_N[rows], "group_M": bottleneck.group_M.cpu()}
        parts = find_parts(
            patches,
            **known,
            num_parts=bottleneck.num_parts,
            num_clusterings=bottleneck.num_clusterings,
            part_width=bottleneck.part_CE.shape[1],
            seed=seed,
            advance=partial(progress.advance, clusterings),
        )
        core = CORES[-1] if bottleneck.core is None and bottleneck.learns else bottleneck.core
        if core is None:
            cores = progress.add_task("Choosing the core", total=len(CORES))
            scores = core_scores(
                patches,
                parts,
                **known,
                num_parts=bottleneck.num_parts,
                eps=bottleneck.eps,
                softness=bottleneck.softness,
                smoothing=bottleneck.patch_smoothing,
                advance=partial(progress.advance, cores),
            )
            core = choose_core(scores, tolerance=bottleneck.core_tolerance)
    bottleneck.set_parts(parts, core=core)
    read = []
    for part in torch.arange(len(rows)).split(_CHUNK):
        chunk = patches.rows(part).to(dtype=torch.float32)
        found_BNG, _ = bottleneck.find(chunk.patch_BND, bottleneck.prior(chunk))
        read.append(bottleneck.read(chunk, found_BNG))
    bottleneck.set_scale(torch.cat(read))
    how = (
        "details" if patches.detail_BNL is not None else "their patches: this encoder gives no details, which would tell them apart better"
    )
    rank_zero_info(
        f"Found {len(parts.part_CE)} parts in {len(rows)} training pictures, and which groups of concepts they show by {how}; the object's "
        f"core begins at {core:g}{_told_learned(bottleneck)}"
    )


def _told_learned(bottleneck: DotCBM) -> str:
    num_learned, num_concepts = int(bottleneck.learned_M.sum()), len(bottleneck.learned_M)
    return f"; the places of {num_learned} of {num_concepts} concepts are learned from there" if num_learned else ""


def _drawn(label_N: Tensor, *, seed: int) -> Tensor:
    """(n,) rows in order: all, or `_MOST` of them, as evenly over the classes as they allow."""
    if len(label_N) <= _MOST:
        return torch.arange(len(label_N))
    generator = torch.Generator().manual_seed(mix_seed(seed, _DRAWN))
    order_N = torch.randperm(len(label_N), generator=generator)
    turn_N = torch.zeros_like(label_N)  # how many of its class came before
    for label in label_N.unique():
        mine_X = (label_N[order_N] == label).nonzero()[:, 0]
        turn_N[mine_X] = torch.arange(len(mine_X))
    return order_N[turn_N.argsort(stable=True)[:_MOST]].sort().values


def _features(data: ConceptDataModule, encoder: ImageEncoder, rows: Tensor, *, device: torch.device) -> PatchFeatures:
    """Of the plain view, on the CPU in half precision: from the cache, or computed now where features are not cached."""
    cache = data.cache("train", device=device)
    if cache is not None:
        read = [cache.read(part).to(dtype=torch.float16) for part in rows.split(_CHUNK)]
    else:
        home, dataset = next(encoder.parameters()).device, data.dataset("train")
        prepare, read = partial(prepare_view, preprocessing=encoder.preprocessing, view="plain"), []
        for part in rows.split(_CHUNK // 8):
            pictures = [prepare(dataset.sample(row, masks=False)).image for row in part.tolist()]
            read.append(encoder(torch.stack([picture for picture in pictures if picture is not None]).to(home)).to("cpu", torch.float16))
    return PatchFeatures.cat(read)
