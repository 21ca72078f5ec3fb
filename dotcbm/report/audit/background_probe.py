"""Does the background alone tell the class? A fact about the data, which no model can hide.

A linear classifier reads nothing but the colours of the pixels outside the object: a histogram knows no shape, so what is left of
the object is not in it, and unlike an encoder's patches it has no receptive field that reaches into the object. It is fitted on
training pictures and judged on the audited split. Its accuracy against that of the largest class says how far pictures of this
data can be told without the object, and so how little an accuracy on them proves.

In this file N counts the pictures used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptDataset
from dotcbm.training.head_fit import fit_head

__all__ = ["BackgroundProbe", "background_colours", "probe_background"]

_LEVELS = 4  # of each channel: 64 colours tell grass from water, and 1,000 pictures suffice to weigh them
_MARGIN = 0.02  # of the picture's longer side, around the object: masks are a pixel or two off
_L2 = 0.03  # of the fit on standardised counts; the figure hardly moves between 0.01 and 0.1
_LEAST = 0.02  # of the picture: with less background there is nothing to count


@dataclass(frozen=True)
class BackgroundProbe:
    """What the background's colours say of the class.

    Attributes:
        correct_N: (N,) bool, for each audited picture that has a mask.
        rows_N: (N,) their rows in the split.
        largest_share: Share of the largest class among them: what a guess gets.
        num_train: Training pictures it was fitted to.
    """

    correct_N: Tensor
    rows_N: Tensor
    largest_share: float
    num_train: int


def background_colours(picture_3HW: Tensor, foreground_HW: Tensor) -> Tensor | None:
    """(64,) share of the background's pixels in each of 4 x 4 x 4 colours; None where hardly any background is seen.

    Args:
        picture_3HW: uint8.
        foreground_HW: bool; a margin around it is left out too.
    """
    height, width = foreground_HW.shape
    margin = max(1, round(_MARGIN * max(height, width)))
    reach = 2 * margin + 1
    across = F.max_pool2d(foreground_HW[None, None].float(), (1, reach), stride=1, padding=(0, margin))
    grown = F.max_pool2d(across, (reach, 1), stride=1, padding=(margin, 0))[0, 0] > 0
    if (~grown).float().mean() < _LEAST:
        return None
    level_3P = picture_3HW[:, ~grown].long() * _LEVELS // 256
    code_P = (level_3P[0] * _LEVELS + level_3P[1]) * _LEVELS + level_3P[2]
    return torch.bincount(code_P, minlength=_LEVELS**3).float() / len(code_P)


def probe_background(
    data: ConceptDataModule, *, split: str, num_train: int = 1000, num_test: int = 1000, seed: int = 0
) -> BackgroundProbe | None:
    """Fit on the training split, judge on `split`; None where too few pictures of either have masks.

    Args:
        data: Its "train" split is fitted to.
        split: To be judged.
        num_train, num_test: At most so many pictures of each, drawn with the seed.
        seed: Of the draw.
    """
    train = _columns(data.dataset("train"), num=num_train, seed=seed)
    test = _columns(data.dataset(split), num=num_test, seed=seed)
    num_classes = data.concepts.num_classes
    if train is None or test is None or len(train[1].unique()) < 2:
        return None
    # Square roots: differences of rare colours count as well (Hellinger distance).
    fit = fit_head(train[0].sqrt(), train[1], num_classes=num_classes, l2=_L2)
    logit_NK = test[0].sqrt().double() @ fit.weight_KF.T + fit.bias_K
    largest = torch.bincount(test[1], minlength=num_classes).max() / len(test[1])
    return BackgroundProbe(logit_NK.argmax(1) == test[1], test[2], float(largest), len(train[1]))


def _columns(dataset: ConceptDataset, *, num: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Colours, labels and rows of pictures with masks, drawn in the seed's order until there are `num`."""
    if dataset.read_foreground is None:
        return None
    colours: list[Tensor] = []
    rows: list[int] = []
    for row in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(rows) == num:
            break
        sample = dataset.sample(row)
        if sample.foreground_HW is None or not sample.foreground_HW.any():
            continue
        assert sample.image is not None
        found = background_colours(sample.image, sample.foreground_HW)
        if found is not None:
            colours.append(found)
            rows.append(row)
    if len(rows) < 10:
        return None
    kept = torch.tensor(rows)
    return torch.stack(colours), dataset.label_N[kept], kept
