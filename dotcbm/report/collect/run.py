"""Run a model over a split and keep, column by column, what an audit needs of each picture.

Everything later is computed from these columns and the model's head alone, but for the tests that show the model other pictures
(`dotcbm.report.collect.probe`).

N pictures of a split, B of a batch, M concepts, K classes, D features, P parts, S thresholds; the maps' patches are called L here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dotcbm.data.batches import Annotations, Rows, mix_seed
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.collect.maps import explaining_map, saliency_map
from dotcbm.report.collect.places import all_maps, place_columns
from dotcbm.report.collect.settings import AuditSettings
from dotcbm.report.collect.store import Store, digest
from dotcbm.structures import ConceptBatch, ConceptOutput, PatchFeatures

__all__ = ["Columns", "audited_rows", "collect", "evaluating", "pictures_digest"]

_LIMIT = 0x11A17  # separates the draw of `limit` from the other uses of the seed


@dataclass(frozen=True)
class Columns:
    """What a model said of N pictures of a split, and what is known about them.

    Attributes:
        split: Its name.
        names: N names.
        row_N: (N,) rows of the split.
        label_N: (N,) classes.
        truth_NM: (N, M) in {0, 1, NaN}.
        class_logit_NK: (N, K).
        concept_logit_NM: (N, M).
        pooled_ND: (N, D) mean of the patch features: what controls are fitted to.
        grid: (grid_h, grid_w) of the maps.
        has_maps: Whether the model offers maps of its concepts (`dotcbm.report.collect.maps`).
        context_NX: (N, ...) `ConceptOutput.context_BX`, or None.
        group_N: (N,) sub-populations, or None.
        residual_N: (N,) transport residuals, or None.
        theta_NL: (N, L) patch priors, or None.
        places: (N, M), (N, M, 2) or (N, M, S) figures of maps by "<figure>/<map>"; see `dotcbm.report.collect.places`.
    """

    split: str
    names: tuple[str, ...]
    row_N: Tensor
    label_N: Tensor
    truth_NM: Tensor
    class_logit_NK: Tensor
    concept_logit_NM: Tensor
    pooled_ND: Tensor
    grid: tuple[int, int]
    has_maps: bool = False
    context_NX: Tensor | None = None
    group_N: Tensor | None = None
    residual_N: Tensor | None = None
    theta_NL: Tensor | None = None
    places: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def class_NK(self) -> Tensor:
        """(N, K) float64 class probabilities."""
        return self.class_logit_NK.double().softmax(1)

    @property
    def concept_NM(self) -> Tensor:
        """(N, M) concept probabilities."""
        return self.concept_logit_NM.sigmoid()

    @property
    def predicted_N(self) -> Tensor:
        """(N,) most probable class."""
        return self.class_logit_NK.argmax(1)

    @property
    def correct_N(self) -> Tensor:
        """(N,) float64: 1 for a picture that is classified rightly."""
        return (self.predicted_N == self.label_N).double()

    def context(self, rows: Tensor) -> Tensor | None:
        """`context_NX` of some pictures."""
        return None if self.context_NX is None else self.context_NX[rows]

    def maps(self, figure: str) -> tuple[str, ...]:
        """The maps for which a figure of places is known."""
        return tuple(key.partition("/")[2] for key in self.places if key.partition("/")[0] == figure)

    def pair_name(self, n: int) -> str:
        """The name of picture n without its split, by which other splits show the same picture differently."""
        return self.names[n].removeprefix(f"{self.split}/")


@contextmanager
def evaluating(model: ConceptModel) -> Iterator[None]:
    """The model in eval mode without gradients; its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def audited_rows(num: int, *, settings: AuditSettings) -> Tensor:
    """(n,) rows of a split of `num` pictures that are audited, ascending."""
    if settings.limit is None or settings.limit >= num:
        return torch.arange(num)
    drawn = torch.Generator().manual_seed(mix_seed(settings.seed, _LIMIT))
    return torch.randperm(num, generator=drawn)[: settings.limit].sort().values


def pictures_digest(data: ConceptDataModule, split: str, row_N: Tensor) -> str:
    """SHA-256 of the names, classes and concepts of a split's pictures."""
    dataset = data.dataset(split)
    names = "\n".join(dataset.names[row] for row in row_N.tolist())
    return digest([split, names, dataset.label_N[row_N], dataset.concept_NM[row_N]])


def collect(
    model: ConceptModel,
    data: ConceptDataModule,
    *,
    split: str,
    settings: AuditSettings,
    store: Store,
    places: bool = True,
    advance: Callable[[int], None] | None = None,
) -> Columns:
    """Run `model` over a split; pieces that `store` holds are not computed again.

    Args:
        model: On any device.
        data: Its encoder is set to the model's; features come from its cache where there is one.
        split: A split of the data.
        settings: Of the audit; `limit` holds for every split but "train" and "val".
        store: Keeps the pieces.
        places: Measure where the maps point; needs annotations beyond labels.
        advance: Told how many pictures were done.

    Raises:
        ValueError: A map holds NaN, or a picture cannot be read.
    """
    data.use_encoder(model.encoder)
    dataset = data.dataset(split)
    row_N = torch.arange(len(dataset)) if split in ("train", "val") else audited_rows(len(dataset), settings=settings)
    cache = data.cache(split)
    annotations: Annotations = "all" if places else "foreground" if data.foreground_in_training else "labels"
    rows = Rows(dataset, preprocessing=model.preprocessing, caches=None if cache is None else [cache], annotations=annotations)
    pieces: list[dict[str, Tensor]] = []
    with evaluating(model):
        for start in range(0, len(row_N), settings.chunk):
            chosen = row_N[start : start + settings.chunk]
            name = f"{split}-{'places' if places else 'labels'}-{start:06d}"
            pieces.append(store.keep(name, lambda chosen=chosen: _piece(model, rows, chosen, settings=settings, places=places)))
            if advance is not None:
                advance(len(chosen))
    joined = _joined(pieces)
    grid_h, grid_w = joined.pop("grid")[0].tolist()
    return Columns(
        split=split,
        names=tuple(dataset.names[row] for row in row_N.tolist()),
        row_N=row_N,
        label_N=dataset.label_N[row_N],
        truth_NM=dataset.concept_NM[row_N].float(),
        class_logit_NK=joined.pop("class_logit"),
        concept_logit_NM=joined.pop("concept_logit"),
        pooled_ND=joined.pop("pooled"),
        grid=(grid_h, grid_w),
        has_maps=bool(joined.pop("has_maps").all()),
        context_NX=joined.pop("context", None),
        group_N=None if dataset.group_N is None else dataset.group_N[row_N],
        residual_N=joined.pop("residual", None),
        theta_NL=joined.pop("theta", None),
        places=joined,
    )


def _piece(model: ConceptModel, rows: Rows, chosen: Tensor, *, settings: AuditSettings, places: bool) -> dict[str, Tensor]:
    batch = rows[[(row, 0) for row in chosen.tolist()]]
    device = next(model.bottleneck.parameters()).device
    output, features = run(model, batch.to(device))
    found = explaining_map(model, features, output) if places else None
    piece: dict[str, Tensor] = {
        "class_logit": output.class_logit_BK.float(),
        "concept_logit": output.concept_logit_BM.float(),
        "pooled": features.patch_BND.float().mean(1).cpu(),
        "grid": torch.tensor([output.grid]),
        "has_maps": torch.tensor([found is not None]),
    }
    for name, value in (("context", output.context_BX), ("residual", output.residual_B), ("theta", output.theta_BN)):
        if value is not None:
            piece[name] = value.float()
    if places:
        maps = all_maps(output, saliency_BN=saliency_map(features), row_B=chosen, seed=settings.seed)
        if found is not None:
            maps.setdefault(*found)
        piece |= place_columns(maps, output, batch, model.concepts)
    return piece


def run(model: ConceptModel, batch: ConceptBatch) -> tuple[ConceptOutput, PatchFeatures]:
    """The output of a batch on the CPU, and its features where they are."""
    features = batch.features
    if features is None:
        assert batch.image_B3HW is not None
        features = model.encoder(batch.image_B3HW)
    output = model.forward_batch(replace(batch, features=features, image_B3HW=None))
    return output.detach().to("cpu"), features


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor a column; a column that some pieces lack (no mask in any of their pictures) is NaN there."""
    names = list(dict.fromkeys(name for piece in pieces for name in piece))
    joined: dict[str, Tensor] = {}
    for name in names:
        like = next(piece[name] for piece in pieces if name in piece)
        parts = [
            piece[name] if name in piece else like.new_full((len(piece["class_logit"]), *like.shape[1:]), torch.nan) for piece in pieces
        ]
        joined[name] = torch.cat(parts)
    return joined
