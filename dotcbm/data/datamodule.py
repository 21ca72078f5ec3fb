"""Splits, loaders and the feature cache of one data set, as Lightning wants them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dotcbm.data.batches import VIEWS, Annotations, Condense, Rows, View, make_loader, mix_seed, prepare_view
from dotcbm.data.features import FeatureCache, cache_features
from dotcbm.data.loose_pictures import loose_pictures
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.swapped import on_other_backgrounds
from dotcbm.structures import ConceptBatch, ConceptSet, PatchEncoder

__all__ = ["ConceptDataModule"]

_CARVED = ("train", "val")
_CONDENSED = " condensed"
_VALIDATION = 0x7A1  # separates the draw of the validation part from the other uses of the seed


class ConceptDataModule(LightningDataModule):
    """A source, split, cached and batched.

    A frozen encoder's features are computed once, if there is a cache folder; the loaders then give features and decode no
    picture. Every order and choice depends on the seed and the epoch alone.

    Attributes:
        skipped: Names of the pictures that the last prediction had to leave out.
    """

    def __init__(
        self,
        source: ConceptSource,
        *,
        batch_size: int = 128,
        val_fraction: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = "cache",
        views: list[View] | None = None,
        evaluate_splits: list[str] | None = None,
        foreground_in_training: bool = False,
        in_memory: bool = False,
        predict_files: list[str] | None = None,
        predict_split: str = "test",
    ) -> None:
        """Args:
        source: The data set.
        batch_size: Pictures in a batch of each process; the paper's is 128.
        val_fraction: Share of each training class that becomes the validation split, if the source has none; 0 for none.
        seed: Of the validation part, of orders and of views.
        num_workers: Processes that read batches; for a GPU, batches of cached features are then copied ahead (`dotcbm.data.copy_ahead`).
        cache_dir: Where the features of frozen encoders lie; None runs the encoder in every step.
        views: How training pictures are shown, one drawn for each picture and epoch (see `dotcbm.data.batches.VIEWS`): ["plain"]
                by default; ["plain", "flip"] mirrors every other one, "coarse" prepares for pictures of less detail, "swap" shows what the
                encoder takes for the foreground on the background of another class (with a cache of a frozen encoder only).
        evaluate_splits: What `test` evaluates; every split but "train" and "val" by default. "val" may be the part carved out.
        foreground_in_training: Read the object masks in training too, for bottlenecks whose patch prior is "external".
        in_memory: Keep features and masks, or without a cache the decoded pictures, in memory once they are read, in each process
                that reads. Features are kept on the GPU that trains, if it has room and no worker processes read.
        predict_files: What `predict` reads: pictures, and folders of pictures.
        predict_split: What it reads without `predict_files`.

        Raises:
            ValueError: A size, share, view or split that makes no sense.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch needs at least one picture")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it is a share of the training pictures in [0, 1)")
        views = ["plain"] if views is None else views
        if not views or views[0] != "plain" or len(set(views)) < len(views) or set(views) - set(VIEWS):
            raise ValueError(f"views is {views}; choose 'plain' first, and then any of {list(VIEWS[1:])}")
        carved = {"val"} if val_fraction > 0 else set()
        unknown = sorted({*(set(evaluate_splits or ()) - carved), *([] if predict_files else [predict_split])} - set(source.splits))
        if unknown:
            raise ValueError(f"{type(source).__name__} has no split {unknown[0]!r}; it has {list(source.splits)}")
        self.source = source
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self._seed = seed
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.views: tuple[View, ...] = tuple(views)
        self.evaluate_splits = tuple(evaluate_splits or (split for split in source.splits if split not in ("train", "val")))
        self.foreground_in_training = foreground_in_training
        self.in_memory = in_memory
        self.predict_files = predict_files
        self.predict_split = predict_split
        self._condense: Condense | None = None
        self.skipped: list[str] = []
        self._encoder: PatchEncoder | None = None
        self._datasets: dict[str, ConceptDataset] = {}
        self._caches: dict[tuple[str, View], FeatureCache] = {}
        self._rows: dict[tuple[str, str], Rows] = {}
        self._predicted: ConceptDataset | None = None
        self._seen: set[int] = set()

    @property
    def concepts(self) -> ConceptSet:
        """The vocabulary."""
        return self.source.concepts

    @property
    def seed(self) -> int:
        """Of the validation part, of orders and of views. Another one draws another validation part."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        if seed != self._seed and self._carves:
            self._datasets = {split: held for split, held in self._datasets.items() if split not in _CARVED}
            self._caches = {key: held for key, held in self._caches.items() if key[0] not in _CARVED}
            self._rows = {key: held for key, held in self._rows.items() if key[0] not in _CARVED}
        self._seed = seed

    @property
    def condense_in_training(self) -> Condense | None:
        """Set by what is trained (`Bottleneck.condense`): what the loaders of the training loop make of cached features."""
        return self._condense

    @condense_in_training.setter
    def condense_in_training(self, condense: Condense | None) -> None:
        if condense != self._condense:  # another bottleneck reads something else of the same features
            self._rows = {key: held for key, held in self._rows.items() if not key[1].endswith(_CONDENSED)}
        self._condense = condense

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return "val" in self.source.splits or self.val_fraction > 0

    @property
    def _carves(self) -> bool:
        return "val" not in self.source.splits and self.val_fraction > 0

    def use_encoder(self, encoder: PatchEncoder) -> None:
        """Set whose preprocessing, and if it is frozen whose features, the loaders give. Lightning's `setup` calls it."""
        if encoder is not self._encoder:
            self._encoder = encoder
            self._caches.clear()
            self._rows.clear()

    def setup(self, stage: str) -> None:
        """Read the splits of a stage, and cache their features.

        Raises:
            ValueError: An empty split, a class without a training picture, or views that the encoder or the lack of a cache rules out.
            BadPictureError: A picture that cannot be decoded, when features are cached.
        """
        if self.trainer is not None and (encoder := getattr(self.trainer.lightning_module, "encoder", None)) is not None:
            self.use_encoder(encoder)
        device = self.trainer.strategy.root_device if self.trainer is not None else None
        if stage == "predict":
            self._predicted = self._pictures_to_predict()
            return
        if stage == "fit":
            self._check_views(self.views)  # before hours of encoding
        wanted: list[tuple[str, tuple[View, ...]]] = []
        if stage in ("fit", "validate") and self.has_validation:
            wanted.append(("val", ("plain",)))
        if stage == "fit":
            wanted.append(("train", self.views))
        if stage == "test":
            wanted.extend((split, ("plain",)) for split in self.evaluate_splits)
        for split, views in wanted:
            self.dataset(split)
            for view in views:
                self.cache(split, view=view, device=device)

    def dataset(self, split: str) -> ConceptDataset:
        """A split: "train" and "val" after the validation part was carved out, or one of the source's.

        Raises:
            ValueError: An empty split, or a class without a training picture.
        """
        if split not in self._datasets:
            if split in _CARVED and self._carves:
                self._datasets.update(self._carved())
            else:
                self._datasets[split] = self._checked(self.source.load(split))
        return self._datasets[split]

    def cache(self, split: str, *, view: View = "plain", device: torch.device | None = None) -> FeatureCache | None:
        """The features of one view of a split; None for a trainable encoder or without a cache folder.

        Args:
            split: Its name.
            view: How the pictures are shown.
            device: Where to run the encoder if they must be computed; where it is by default.

        Raises:
            ValueError: A view with other backgrounds that the encoder or the lack of a cache rules out, or of a split with one class.
        """
        self._check_views((view,))
        if not self.caches_features:
            return None
        if (split, view) not in self._caches:
            plain = self.cache(split, device=device) if "swap" in view else None
            with _placed(self._known_encoder(), device):
                self._caches[split, view] = self.cache_pictures(self.dataset(split), view=view, plain=plain)
        return self._caches[split, view]

    @property
    def caches_features(self) -> bool:
        """Whether features are kept on disk: there is a folder for them, and the encoder is frozen."""
        return self.cache_dir is not None and not getattr(self._known_encoder(), "trainable", False)

    def cache_pictures(
        self,
        dataset: ConceptDataset,
        *,
        view: View = "plain",
        plain: FeatureCache | None = None,
        progress: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> FeatureCache:
        """The features of any pictures, from the cache folder or computed into it.

        Args:
            dataset: The pictures; its fingerprint must say all that they depend on.
            view: How they are shown.
            plain: Their features in the plain view, by which a view with other backgrounds finds what is in front.
            progress, advance: See `cache_features`.

        Raises:
            ValueError: `caches_features` is false, or a view with other backgrounds without `plain`, with an encoder that does not
                see whole pictures, or of one class only.
        """
        self._check_views((view,))
        if self.cache_dir is None or not self.caches_features:
            raise ValueError("features are cached for frozen encoders and with a cache_dir only")
        encoder = self._known_encoder()
        if "swap" in view:
            if plain is None:
                raise ValueError(f"the view {view!r} needs the plain features of the same pictures; give them as plain")
            dataset = on_other_backgrounds(dataset, plain=plain)
        return cache_features(
            dataset,
            encoder=encoder,
            prepare=partial(prepare_view, preprocessing=encoder.preprocessing, view=view),
            directory=self.cache_dir,
            view=view,
            progress=progress,
            advance=advance,
        )

    def train_dataloader(self) -> DataLoader[ConceptBatch]:
        """Shuffled batches of the training split; a new order and new views in each epoch."""
        annotations = "foreground" if self.foreground_in_training else "labels"
        return self._loader("train", annotations=annotations, views=self.views, shuffle=True, condense=self.condense_in_training)

    def val_dataloader(self) -> DataLoader[ConceptBatch] | list[DataLoader[ConceptBatch]]:
        """Batches of the validation split in order, without masks; no loader if there is no such split."""
        if not self.has_validation:
            return []
        annotations = "foreground" if self.foreground_in_training else "labels"
        return self._loader("val", annotations=annotations, condense=self.condense_in_training)

    def test_dataloader(self) -> list[DataLoader[ConceptBatch]]:
        """One loader for each of `evaluate_splits`, with all annotations."""
        return [self.loader(split) for split in self.evaluate_splits]

    def loader(self, split: str, *, places: bool = True) -> DataLoader[ConceptBatch]:
        """Batches of any split in order, with all annotations or, without `places`, those that the model itself needs."""
        return self._loader(split, annotations="all" if places else "foreground" if self.foreground_in_training else "labels")

    def plain_loader(
        self, split: str, *, annotations: Annotations = "labels", view: View = "plain", condense: Condense | None = None
    ) -> DataLoader:
        """All rows of a split once, in order, on this process, for work beside the training loop (fitting the head).

        Args:
            split, annotations, view: What is read.
            condense: See `dotcbm.data.batches.Rows`.
        """
        rows = self._split_rows(split, annotations=annotations, views=(view,), condense=condense)
        return make_loader(rows, batch_size=self.batch_size, num_workers=0)

    def predict_dataloader(self) -> DataLoader[ConceptBatch]:
        """Pictures to predict; those that cannot be decoded are left out of their batch, which may leave it empty."""
        if self._predicted is None:
            self._predicted = self._pictures_to_predict()
        self.skipped, self._seen = [], set()
        preprocessing = self._known_encoder().preprocessing
        rows = Rows(self._predicted, preprocessing=preprocessing, annotations="labels", skip_bad=True)
        return self._made(rows)

    def transfer_batch_to_device(self, batch: ConceptBatch, device: torch.device, dataloader_idx: int) -> ConceptBatch:
        """Lightning's hook."""
        del dataloader_idx
        if self.trainer is not None and self.trainer.predicting:
            self._seen.update(batch.index_B.tolist())
        return batch.to(device)

    def report_skipped(self) -> list[str]:
        """Names of the pictures that the prediction just made left out; warns if there are any."""
        if self._predicted is not None:
            world_size, rank = self._share()
            share = range(rank, len(self._predicted), world_size)
            self.skipped = [self._predicted.names[row] for row in share if row not in self._seen]
        if self.skipped:
            shown = ", ".join(self.skipped[:20]) + (", ..." if len(self.skipped) > 20 else "")
            num = len(self._predicted.names) if self._predicted is not None else 0
            warnings.warn(f"{len(self.skipped)} of {num} pictures could not be decoded and were skipped: {shown}", stacklevel=2)
        return self.skipped

    def concept_frequency(self) -> Tensor:
        """(M,) share of the training pictures that show a concept, among those where it is known; 0 where it never is."""
        return self.dataset("train").concept_NM.nanmean(0).nan_to_num(0.0)

    def class_weights(self) -> Tensor:
        """(K,) weights n / (K n_k): every class counts the same, and the mean over the training pictures is 1."""
        label_N = self.dataset("train").label_N
        num_classes = self.concepts.num_classes
        return len(label_N) / (num_classes * torch.bincount(label_N, minlength=num_classes).float())

    def concept_pos_weights(self) -> Tensor:
        """(M,) negatives / positives among the known training labels; 1 for a concept that does not vary."""
        concept_NM = self.dataset("train").concept_NM
        positive_M, negative_M = (concept_NM == 1).sum(0).float(), (concept_NM == 0).sum(0).float()
        varies_M = (positive_M > 0) & (negative_M > 0)
        return torch.where(varies_M, negative_M / positive_M.clamp(min=1), 1.0)

    def _check_views(self, views: tuple[View, ...]) -> None:
        swapped = ", ".join(view for view in views if "swap" in view)
        if not swapped:
            return
        if not self.caches_features:
            raise ValueError(
                f"views with other backgrounds ({swapped}) need cached features, by which they find what is in front; "
                "set cache_dir and a frozen encoder, or leave the view out"
            )
        if (resize := self._known_encoder().preprocessing.resize) != "squash":
            raise ValueError(
                f"views with other backgrounds ({swapped}) need an encoder that sees the whole picture, and this one's resize is "
                f"{resize!r}; set the encoder's resize to 'squash', or leave the view out"
            )

    def _known_encoder(self) -> PatchEncoder:
        if self._encoder is None:
            raise ValueError("the loaders do not know which encoder they feed; run them with a Trainer, or call use_encoder first")
        return self._encoder

    def _loader(
        self,
        split: str,
        *,
        annotations: Annotations,
        views: tuple[View, ...] = ("plain",),
        shuffle: bool = False,
        condense: Condense | None = None,
    ) -> DataLoader[ConceptBatch]:
        rows = self._split_rows(split, annotations=annotations, views=views, condense=condense)
        return self._made(rows, shuffle=shuffle)

    def _split_rows(self, split: str, *, annotations: Annotations, views: tuple[View, ...], condense: Condense | None = None) -> Rows:
        key = (split, f"{annotations} {views}{'' if condense is None else _CONDENSED}")
        if key not in self._rows:
            caches = [cache for view in views if (cache := self.cache(split, view=view)) is not None]
            trains = split in ("train", "val") and self.trainer is not None and self.num_workers == 0
            self._rows[key] = Rows(
                self.dataset(split),
                preprocessing=self._known_encoder().preprocessing,
                views=views,
                caches=caches or None,
                annotations=annotations,
                in_memory=self.in_memory,
                condense=condense,
                device=self.trainer.strategy.root_device if self.trainer is not None and trains else None,
            )
        return self._rows[key]

    def _made(self, rows: Rows, *, shuffle: bool = False) -> DataLoader[ConceptBatch]:
        world_size, rank = self._share()
        return make_loader(
            rows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            world_size=world_size,
            rank=rank,
            device=None if self.trainer is None else self.trainer.strategy.root_device,
        )

    def _share(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _carved(self) -> dict[str, ConceptDataset]:
        whole = self._checked(self.source.load("train"))
        drawn = torch.Generator().manual_seed(mix_seed(self.seed, _VALIDATION))
        chosen: list[int] = []
        for label in range(self.concepts.num_classes):
            rows = (whole.label_N == label).nonzero()[:, 0]
            # At least one of each class in both parts, as far as there are two.
            num = min(max(round(len(rows) * self.val_fraction), 1), len(rows) - 1)
            chosen.extend(rows[torch.randperm(len(rows), generator=drawn)[:num]].tolist())
        held = set(chosen)
        kept = [row for row in range(len(whole)) if row not in held]
        return {"train": whole.subset(kept, split="train"), "val": self._checked(whole.subset(sorted(held), split="val"))}

    def _checked(self, dataset: ConceptDataset) -> ConceptDataset:
        source = type(self.source).__name__
        if len(dataset) == 0:
            hint = "; it is carved out of classes with two pictures at least" if dataset.split == "val" else ""
            raise ValueError(f"the split {dataset.split!r} of {source} is empty{hint}: check the split's table and filters")
        if dataset.split == "train":
            count_K = torch.bincount(dataset.label_N, minlength=self.concepts.num_classes)
            missing = [self.concepts.class_names[k] for k in (count_K == 0).nonzero()[:, 0].tolist()]
            if missing:
                shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
                raise ValueError(
                    f"{len(missing)} of {self.concepts.num_classes} classes of {source} have no training picture: {shown}. "
                    "Add pictures of them, or take them out of the list of classes"
                )
        return dataset

    def _pictures_to_predict(self) -> ConceptDataset:
        if self.predict_files:
            return loose_pictures(self.predict_files, concepts=self.concepts)
        return self._checked(self.source.load(self.predict_split))


@contextmanager
def _placed(encoder: PatchEncoder, device: torch.device | None) -> Iterator[None]:
    """The encoder on another device for a while."""
    weight = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    if weight is None or device is None or not isinstance(encoder, nn.Module):
        yield
        return
    home = weight.device
    encoder.to(device)
    try:
        yield
    finally:
        encoder.to(home)
