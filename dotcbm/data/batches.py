"""Whole batches read at once, in an order that depends on nothing but a seed and the epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dotcbm.data.copy_ahead import CopyAheadLoader
from dotcbm.data.features import FeatureCache
from dotcbm.data.source import BadPictureError, ConceptDataset
from dotcbm.data.transforms import collate, prepare_sample
from dotcbm.structures import ConceptBatch, ConceptSample, PatchFeatures, Preprocessing

__all__ = ["VIEWS", "Annotations", "Condense", "EpochSampler", "Row", "Rows", "View", "make_loader", "mix_seed", "prepare_view"]

Annotations = Literal["all", "foreground", "labels"]
View = Literal["plain", "flip", "coarse", "flip_coarse", "swap", "flip_swap", "swap_coarse", "flip_swap_coarse"]
VIEWS: tuple[View, ...] = get_args(View)
"""How a picture can be shown: as it is, mirrored, with the detail of a small picture, on the background of a picture of another class
("swap", see `dotcbm.data.swapped`), or several of these at once."""
_AT_ONCE = 64  # pictures whose patches are in memory while they are condensed
Condense = Callable[[PatchFeatures], PatchFeatures]
"""What training needs of the features of a frozen encoder, where that is less than all of them (`Bottleneck.condense`)."""
Row = tuple[int, int]
"""A row of a split and the number of the view it is shown in."""


def prepare_view(sample: ConceptSample, *, preprocessing: Preprocessing, view: View) -> ConceptSample:
    """`prepare_sample` for one of `VIEWS`. For one with another background the sample's picture must be on that already."""
    return prepare_sample(sample, preprocessing=preprocessing, flip="flip" in view, coarse="coarse" in view)


def mix_seed(*numbers: int) -> int:
    """One seed below 2**63 from several small numbers, different whenever one of them is."""
    mixed = 0
    for number in numbers:
        # The steps of splitmix64 (Steele et al. 2014), so that neighbouring seeds give unrelated streams.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


class EpochSampler(DistributedSampler[list[Row]]):
    """Lists of rows, one list a batch: of this process's share of the split.

    Order and views of epoch e depend on (seed, e) and not on the number of processes: batch i of all processes together is
    the i-th stretch of one permutation. The share of the last batch is padded by repetition, so that all processes make
    the same number of steps.

    It is a DistributedSampler so that Lightning keeps it and calls `set_epoch`.
    """

    def __init__(
        self,
        dataset: Dataset[ConceptBatch],
        *,
        num_rows: int,
        batch_size: int,
        num_views: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        """Args:
        dataset: What is sampled.
        num_rows: Its rows.
        batch_size: Rows in a batch of this process.
        num_views: Views that a row can be shown in; one is drawn for each row in each epoch if `shuffle`, else it is the first.
        shuffle: Draw a new order in each epoch.
        seed: Of order and views.
        world_size, rank: How many processes share the rows, and which this is.
        """
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.num_views = num_views

    def __len__(self) -> int:
        share = -(-self.num_rows // self.num_replicas)
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[list[Row]]:
        order_N, view_N = torch.arange(self.num_rows), torch.zeros(self.num_rows, dtype=torch.long)
        if self.shuffle:
            drawn = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order_N = torch.randperm(self.num_rows, generator=drawn)
            view_N = torch.randint(self.num_views, (self.num_rows,), generator=drawn)
        missing = -self.num_rows % self.num_replicas
        order = torch.cat([order_N, order_N.repeat(-(-missing // self.num_rows))[:missing]])[self.rank :: self.num_replicas]
        for rows in order.split(self.batch_size):
            yield list(zip(rows.tolist(), view_N[rows].tolist()))


class Rows(Dataset[ConceptBatch]):
    """A split as a map from lists of rows to batches.

    With caches a batch holds features and pictures are not decoded; without, it holds prepared pictures.
    """

    def __init__(
        self,
        dataset: ConceptDataset,
        *,
        preprocessing: Preprocessing,
        views: Sequence[View] = ("plain",),
        caches: Sequence[FeatureCache] | None = None,
        annotations: Annotations = "all",
        in_memory: bool = False,
        condense: Condense | None = None,
        skip_bad: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Args:
        dataset: The split.
        preprocessing: Of the encoder.
        views: What the view numbers of rows mean.
        caches: The features of each view.
        annotations: "labels" gives only labels and concepts (the batch's `size_B2` is then the input's), "foreground" adds
            points, box and the object's mask, "all" adds the part masks.
        in_memory: Keep what was read: features, and annotations as they were prepared.
        condense: Of cached features give what this makes of them, computed once and kept in memory.
        skip_bad: Leave undecodable pictures out of their batch, with a warning, instead of raising.
        device: Where features in memory are kept and batches of them gathered: a GPU, if they leave half of its free memory to
            others, and main memory if not.

        Raises:
            ValueError: A view with another background and no caches.
        """
        if caches is None and (swapped := [view for view in views if "swap" in view]):
            raise ValueError(f"the view {swapped[0]!r} is read from cached features only; give the caches of {list(views)}")
        if annotations == "foreground":
            dataset = replace(dataset, read_part_masks=None)
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.views = tuple(views)
        self.caches = caches
        self.annotations = annotations
        self.skip_bad = skip_bad
        self._resident: list[PatchFeatures] | None = None
        if caches and condense is not None:
            self._resident = [_condensed(cache, condense) for cache in caches]
        elif caches and in_memory:
            self._resident = [cache.read(range(len(cache))) for cache in caches]
        if self._resident is not None and device is not None and _fits(self._resident, device):
            self._resident = [features.to(device) for features in self._resident]
        self._kept: dict[tuple[Row, ...], ConceptBatch] | None = {} if in_memory and annotations != "labels" else None
        self._samples: dict[int, ConceptSample] | None = {} if in_memory and not caches else None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def reads_features(self) -> bool:
        """Whether batches hold features that lie in main memory or on a disk."""
        return self.caches is not None and (self._resident is None or self._resident[0].patch_BND.device.type == "cpu")

    def __getitem__(self, index: list[Row]) -> ConceptBatch:
        if self.caches is None:
            return self._pictures(index)
        return replace(self._annotated(index), features=self._features(index))

    def _features(self, index: list[Row]) -> PatchFeatures:
        rows, views = torch.tensor(index).T
        caches = self.caches or ()
        if len(caches) == 1 and self._resident is None:
            return caches[0].read(rows)
        parts = [(views == number).nonzero()[:, 0] for number in range(len(caches))]
        read = [self._read(number, rows[part]) for number, part in enumerate(parts) if len(part)]
        if len(read) == 1:
            return read[0]
        return PatchFeatures.cat(read).rows(torch.cat(parts).argsort())

    def _read(self, view: int, rows: Tensor) -> PatchFeatures:
        if self._resident is not None:
            return self._resident[view].rows(rows)
        assert self.caches is not None
        return self.caches[view].read(rows)

    def _annotated(self, index: list[Row]) -> ConceptBatch:
        if self.annotations == "labels":
            rows = [row for row, _ in index]
            group_N = self.dataset.group_N
            return ConceptBatch(
                concepts_BM=self.dataset.concept_NM[rows],
                label_B=self.dataset.label_N[rows],
                index_B=torch.tensor(rows),
                names=tuple(self.dataset.names[row] for row in rows),
                size_B2=torch.tensor(self.preprocessing.size).repeat(len(rows), 1),
                group_B=None if group_N is None else group_N[rows],
            )
        key = tuple(index)
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        samples = [self.dataset.sample(row, image=False) for row, _ in index]
        batch = collate([prepare_view(s, preprocessing=self.preprocessing, view=self.views[view]) for s, (_, view) in zip(samples, index)])
        if self._kept is not None:
            self._kept[key] = batch
        return batch

    def _pictures(self, index: list[Row]) -> ConceptBatch:
        samples = []
        for row, view in index:
            try:
                sample = self._sample(row)
            except BadPictureError as error:
                if not self.skip_bad:
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
                continue
            samples.append(prepare_view(sample, preprocessing=self.preprocessing, view=self.views[view]))
        return collate(samples) if samples else _empty(self.dataset)

    def _sample(self, row: int) -> ConceptSample:
        if self._samples is not None and row in self._samples:
            return self._samples[row]
        sample = self.dataset.sample(row, masks=self.annotations != "labels")
        if self._samples is not None:
            self._samples[row] = sample
        return sample


@torch.no_grad()
def _condensed(cache: FeatureCache, condense: Condense) -> PatchFeatures:
    """What is made of the features of all rows, on the CPU."""
    return PatchFeatures.cat([condense(cache.read(rows)).to("cpu") for rows in torch.arange(len(cache)).split(_AT_ONCE)])


def _fits(kept: Sequence[PatchFeatures], device: torch.device) -> bool:
    """Whether a device has twice the room that features take."""
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * sum(features.nbytes for features in kept) <= free


def _empty(dataset: ConceptDataset) -> ConceptBatch:
    none = torch.zeros(0, dtype=torch.long)
    return ConceptBatch(
        concepts_BM=torch.zeros(0, dataset.concepts.num_concepts), label_B=none, index_B=none, names=(), size_B2=none.view(0, 2)
    )


def make_loader(
    rows: Rows,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    world_size: int = 1,
    rank: int = 0,
    device: torch.device | None = None,
) -> DataLoader[ConceptBatch]:
    """A loader of whole batches in the order of `EpochSampler`; on `device`, copied ahead, where workers read features for a GPU."""
    sampler = EpochSampler(
        rows,
        num_rows=len(rows),
        batch_size=batch_size,
        num_views=len(rows.views),
        shuffle=shuffle,
        seed=seed,
        world_size=world_size,
        rank=rank,
    )
    settings: dict[str, Any] = {
        "batch_size": None,
        "sampler": sampler,
        "num_workers": num_workers,
        "collate_fn": _as_is,
        "persistent_workers": num_workers > 0,
    }
    if device is not None and device.type == "cuda" and num_workers > 0 and rows.reads_features:
        return CopyAheadLoader(rows, device=device, **settings)
    return DataLoader(rows, **settings)


def _as_is(batch: Any) -> ConceptBatch:
    return batch
