"""Training pictures on the backgrounds of other classes, so that a model learns not to read the class from where a thing stands.

As `dotcbm.data.backgrounds` does for tests, after Xiao et al., "Noise or Signal: The Role of Image Backgrounds in Object
Recognition", ICLR 2021, but without masks: what is in front is predicted (`dotcbm.data.foreground`) from the frozen encoder's
own features, of the picture as of the donor of its background. Given masks are for tests, and never read here.

N pictures of a split; P patches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dotcbm.data.backgrounds_paint import PAINT, swap_background
from dotcbm.data.batches import mix_seed
from dotcbm.data.features import FeatureCache
from dotcbm.data.foreground import predicted_foregrounds
from dotcbm.data.source import ConceptDataset

__all__ = ["SWAP", "draw_donors", "on_other_backgrounds"]

SWAP = 1
"""Part of the keys of what is computed from these pictures; raised when foregrounds are predicted or donors drawn differently."""

_DONOR = 0xD04  # separates the draw of donors from the other uses of `mix_seed`


def on_other_backgrounds(dataset: ConceptDataset, *, plain: FeatureCache) -> ConceptDataset:
    """The same rows, each picture's foreground on the background of its donor (see `draw_donors`).

    Labels, concepts, points, boxes and masks stay as they are. A picture is shown unchanged if nothing stands out in it or in
    its donor. The fingerprint says what a picture depends on beside the encoder: the split, its labels, and this code.

    Args:
        dataset: The split.
        plain: The encoder's features of the same pictures in the plain view. The encoder must see whole pictures (resize "squash").

    Raises:
        ValueError: Features of other pictures or another view, or pictures of one class only.
    """
    if plain.meta["view"] != "plain" or plain.meta["data_fingerprint"] != dataset.fingerprint():
        raise ValueError(f"{plain.path} holds no plain features of the split {dataset.split!r}; give those of the same pictures")
    rows = dataset.rows if dataset.rows is not None else range(len(dataset))
    labels_key = hashlib.blake2b(dataset.label_N.long().numpy().tobytes(), digest_size=8).hexdigest()
    return replace(
        dataset,
        read_image=_Swapped(dataset, plain, draw_donors(dataset), {row: index for index, row in enumerate(rows)}),
        source_key=f"{dataset.source_key} | swapped-{SWAP} paint={PAINT} labels={labels_key}",
    )


def draw_donors(dataset: ConceptDataset) -> Tensor:
    """(N,) long: for each row another one of the same split whose class differs, drawn evenly. Row i's depends on i and the labels.

    Raises:
        ValueError: All pictures are of one class.
    """
    label_N = dataset.label_N
    donor_N = torch.zeros_like(label_N)
    for label in label_N.unique().tolist():
        other_X = (label_N != label).nonzero()[:, 0]
        if not len(other_X):
            raise ValueError(
                f"all {len(dataset)} pictures of the split {dataset.split!r} are of one class, so none can lend another one its "
                "background; add pictures of a second class, or leave the views with other backgrounds out"
            )
        for row in (label_N == label).nonzero()[:, 0].tolist():
            drawn = torch.Generator().manual_seed(mix_seed(_DONOR, row))
            donor_N[row] = other_X[torch.randint(len(other_X), (), generator=drawn)]
    return donor_N


@dataclass(frozen=True)
class _Swapped:
    """A dataset's reader of pictures; it holds what it needs, so that it can be sent to another process."""

    dataset: ConceptDataset
    plain: FeatureCache
    donor_N: Tensor
    index: dict[int, int]  # of a row, by what readers are called with

    def __call__(self, row: int) -> Tensor:
        index = self.index[row]
        pair = [index, int(self.donor_N[index])]
        picture, donor = (self._picture(index) for index in pair)
        norm_2P = self.plain.read(pair).patch_BND.float().norm(dim=2)
        sizes = [(int(shown.shape[1]), int(shown.shape[2])) for shown in (picture, donor)]
        foreground, donor_foreground = predicted_foregrounds(norm_2P, grid=self.plain.grid, sizes=sizes)
        if foreground is None or donor_foreground is None:
            return picture
        return swap_background(picture, foreground, donor, donor_foreground)

    def _picture(self, index: int) -> Tensor:
        picture = self.dataset.sample(index, masks=False).image
        assert picture is not None
        return picture
