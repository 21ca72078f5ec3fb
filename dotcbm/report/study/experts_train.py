"""Training and evaluation of one small ViT-MoE with a linear head, pictures in memory; in bfloat16 on a GPU.

B pictures, T tokens, K active experts of E.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dotcbm.data.source import ConceptSource
from dotcbm.data.transforms import prepare_picture
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.moe.layer import moe_layers
from dotcbm.moe.matryoshka import at_budget, nestedness
from dotcbm.report.study.experts_plan import Loop
from dotcbm.structures import ConceptSample, ConceptSet, Preprocessing, Problem
from dotcbm.training.experts import ExpertFigures, ExpertTraining, ExpertWork

__all__ = ["Pictures", "evaluate_at", "flops_per_picture", "make_model", "nested_by_budget", "read_pictures", "train_model"]

_AT_ONCE = 500  # pictures in evaluation


class Pictures:
    """Prepared pictures of one split and their classes, on one device."""

    def __init__(self, image_B3HW: Tensor, label_B: Tensor) -> None:
        """Args: as they are named; float and int64."""
        self.image_B3HW, self.label_B = image_B3HW, label_B

    def __len__(self) -> int:
        return len(self.label_B)


def read_pictures(
    source: ConceptSource, described: Mapping[str, Any], split: str, *, preprocessing: Preprocessing, cache: Path, device: str
) -> Pictures:
    """A split, decoded and resized once for all studies that lie beside each other.

    Args:
        source: The data.
        described: What it was made from, by which its file is named.
        split: Of the source.
        preprocessing: Of the encoder.
        cache: Folder of the files.
        device: Where the pictures shall be.
    """
    key = hashlib.sha256(json.dumps([described, split, preprocessing.to_dict()], sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"pictures-{key}.pt"
    if not path.exists():
        dataset = source.load(split)
        read = [_prepared(dataset.sample(row, masks=False), preprocessing) for row in range(len(dataset))]
        cache.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.partial")  # processes of one study may all be at it
        try:
            torch.save((torch.stack(read).half(), dataset.label_N), aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    image_B3HW, label_B = torch.load(path, weights_only=True)
    return Pictures(image_B3HW.float().to(device), label_B.to(device))


def _prepared(sample: ConceptSample, preprocessing: Preprocessing) -> Tensor:
    assert sample.image is not None
    return prepare_picture(sample.image, preprocessing=preprocessing)


def make_model(encoder: Mapping[str, Any], moe: Mapping[str, Any], concepts: ConceptSet, *, seed: int) -> ConceptModel:
    """A fresh ViT-MoE with a linear head on its mean patch.

    Args:
        encoder: {"size", "image_size", "moe"}, as in `ExpertStudy`.
        moe: On top of that, see `ViTMoESettings`.
        concepts: Name the classes.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = ImageEncoder(
            f"vit_moe/{encoder['size']}",
            image_size=encoder["image_size"],
            pretrained=False,
            trainable=True,
            moe={**encoder.get("moe", {}), **moe},
        )
        problem = Problem(
            patch_width=tower.width, global_width=tower.global_width, detail_width=tower.detail_width, grid=tower.grid, concepts=concepts
        )
        return ConceptModel(tower, LinearProbe(problem))


def flops_per_picture(model: ConceptModel, budget: int | Sequence[int]) -> float:
    """Of the forward pass, with this many active experts; a training step costs three times as many."""
    device = next(model.parameters()).device
    picture = torch.zeros(1, 3, *model.preprocessing.size, device=device)
    training = model.training
    with at_budget(model, budget), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(picture)
    model.train(training)
    return float(counter.get_total_flops())


def train_model(
    model: ConceptModel,
    pictures: Pictures,
    *,
    loop: Loop,
    experts: ExpertTraining,
    seed: int,
    save_at: Mapping[int, Path] | None = None,
) -> dict[str, float]:
    """Train all weights, in place.

    Args:
        model: On the pictures' device.
        pictures: The training split.
        loop: Rate and length.
        experts: Balance and numbers of active experts.
        seed: Of the order of the pictures.
        save_at: Where to put the weights after so many steps.

    Returns:
        "train/flops", "train/seconds" and "train/loss", the mean loss of the classes over the last tenth of the steps.
    """
    start, device = time.monotonic(), pictures.label_B.device
    work = ExpertWork(experts, model.encoder)
    work.check(max_steps=loop.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=loop.lr, weight_decay=loop.weight_decay, fused=True)
    drawn = torch.Generator().manual_seed(seed)
    layers = moe_layers(model)
    at_one = flops_per_picture(model, 1)
    per_expert = (flops_per_picture(model, 2) - at_one) / len(layers) if min(layer.num_experts for layer in layers.values()) > 1 else 0.0
    flops, losses, order = 0.0, [], torch.zeros(0, dtype=torch.long)
    model.train()
    for step in range(loop.steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.lr * _rate(loop, step)
        if len(order) < loop.batch_size:
            order = torch.randperm(len(pictures), generator=drawn)
        rows, order = order[: loop.batch_size].to(device), order[loop.batch_size :]
        with work.at_step(step):
            flops += 3 * len(rows) * (at_one + per_expert * sum(layer.k - 1 for layer in layers.values()))
            with _precision(device):
                logit_BK = model(pictures.image_B3HW[rows]).class_logit_BK.float()
        loss = F.cross_entropy(logit_BK, pictures.label_B[rows])
        losses.append(loss.detach())
        total = loss + sum((work.loss_weights[name] * term for name, term in work.terms().items()), loss.new_zeros(()))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        work.end_step()
        if save_at and step + 1 in save_at:
            save_weights(model, save_at[step + 1])
    last = torch.stack(losses[-max(loop.steps // 10, 1) :]).mean()
    return {"train/flops": flops, "train/seconds": time.monotonic() - start, "train/loss": float(last), "train/steps": float(loop.steps)}


def save_weights(model: ConceptModel, path: Path) -> None:
    """Write the weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    torch.save(model.state_dict(), aside)
    aside.replace(path)


@torch.no_grad()
def evaluate_at(model: ConceptModel, pictures: Pictures, budget: int | Sequence[int]) -> dict[str, float]:
    """Accuracy, loss and the figures of every layer of experts over a whole split, with so many active experts."""
    model.eval()
    right, loss = 0, 0.0
    figures = ExpertFigures(model.encoder)
    with at_budget(model, budget), _precision(pictures.label_B.device):
        for begin in range(0, len(pictures), _AT_ONCE):
            label_B = pictures.label_B[begin : begin + _AT_ONCE]
            logit_BK = model(pictures.image_B3HW[begin : begin + _AT_ONCE]).class_logit_BK.float()
            right += int((logit_BK.argmax(1) == label_B).sum())
            loss += float(F.cross_entropy(logit_BK, label_B, reduction="sum"))
            figures.update()
    return {"accuracy": right / len(pictures), "loss": loss / len(pictures), **figures.compute()}


@torch.no_grad()
def nested_by_budget(model: ConceptModel, pictures: Pictures, budgets: Sequence[int]) -> dict[int, float]:
    """The mean over layers of `nestedness` of each budget in the largest, on the first pictures of a split."""
    model.eval()
    image_B3HW = pictures.image_B3HW[:_AT_ONCE]

    def chosen(budget: int) -> list[Tensor]:
        with at_budget(model, budget):
            model(image_B3HW)
            return [layer.routing.index_TK for layer in moe_layers(model).values() if layer.routing is not None]

    full = chosen(max(budgets))
    found = {}
    for budget in budgets:
        each = [nestedness(index_TK, full_TX) for index_TK, full_TX in zip(chosen(budget), full, strict=True)]
        found[budget] = sum(each) / len(each)
    return found


def _precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; on a CPU as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _rate(loop: Loop, step: int) -> float:
    """Of the learning rate."""
    warm = min(1.0, (step + 1) / loop.warmup) if loop.warmup else 1.0
    return warm * (0.5 * (1 + math.cos(math.pi * step / loop.steps)) if loop.schedule == "cosine" else 1.0)
