"""The steps that test_labo.py makes in one process and in two."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dotcbm.losses import concept_loss
from dotcbm.models.labo import LaBo
from dotcbm.structures import PatchFeatures


def in_a_pair(rank: int, folder: str) -> dict[str, torch.Tensor]:
    """What process `rank` of two is left with after training on every other picture."""
    given = torch.load(f"{folder}/given.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(LaBo(given["problem"], **given["settings"]))
        model.module.load_state_dict(given["state"])
        steps(model, [tuple(part[rank::2] for part in batch) for batch in given["batches"]])
        state = model.module.state_dict()
        del model
        dist.barrier()  # neither leaves while the other still talks
    finally:
        dist.destroy_process_group()
    return state


def steps(model: nn.Module, batches: list[tuple[torch.Tensor, ...]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for patch_BND, truth_BM, label_B in batches:
        out = model(PatchFeatures(patch_BND, patch_BND.mean(1), (4, 5)))
        loss = concept_loss(out.concept_logit_BM, truth_BM) + F.cross_entropy(out.class_logit_BK, label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_a_pair(1, sys.argv[1])
    os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts ("terminate called without an active exception")
