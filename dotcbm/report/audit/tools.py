"""What the sections of an audit share: what was gathered, and intervals in the record's form.

N pictures of a split, M concepts, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.metrics.intervals import bootstrap, bootstrap_mean, paired_bootstrap, wilson
from dotcbm.models.concept_model import ConceptModel
from dotcbm.report.collect.experts import Routed
from dotcbm.report.collect.maps import MAPS
from dotcbm.report.collect.probe import Occlusion, Swap
from dotcbm.report.collect.run import Columns
from dotcbm.report.collect.settings import AuditSettings
from dotcbm.report.record import Absence, Figure, Interval

__all__ = [
    "KNOW_NOTHING",
    "NEAR",
    "PAIRS",
    "Gathered",
    "Section",
    "difference",
    "known",
    "mean",
    "pair_means",
    "rounded",
    "share",
    "statistic",
]

PAIRS = "pairs of picture and concept"

NEAR = 0.1
"""Diagonals of the picture within which a peak is at a key point, where there are no masks (`pointing` of the concepts' table)."""

KNOW_NOTHING = {
    "prior": "the patch prior alone",
    "saliency": "the norm of the encoder's features",
    "centre": "the centre of the picture",
}
"""Maps that are the same for all concepts, and what they are."""


@dataclass(frozen=True)
class Gathered:
    """All that the sections are computed from.

    Attributes:
        model, data, settings: Of the audit.
        columns: Of the audited split.
        train: Of the training split, without places.
        others: Of the other test splits, without places.
        swap, occlusion: Experiments; None where they could not be made.
        routed: What the encoder's experts were given; None where it has none.
    """

    model: ConceptModel
    data: ConceptDataModule
    settings: AuditSettings
    columns: Columns
    train: Columns
    others: tuple[Columns, ...] = ()
    swap: Swap | None = None
    occlusion: Occlusion | None = None
    routed: Routed | None = None

    @property
    def reads_concepts(self) -> bool:
        """Whether the classes follow from the concepts."""
        return type(self.model.bottleneck).reads_concepts

    @property
    def map_name(self) -> str | None:
        """The map that the model offers as its explanation."""
        present = {key.partition("/")[2] for key in self.columns.places}
        return next((name for name in MAPS if name in present), None)

    def control_of(self, score: Callable[[str], float]) -> tuple[str, str]:
        """Which of the maps that know no concept has the highest score, by its name in `columns.places`, and what it is, for people.

        They are the patch prior, the saliency of the features, and the centre of the picture. A map of the model is held against the
        one that does best in the very figure that is told, so that no figure looks good beside a control that is weak in it.

        Args:
            score: Of a map, by its name; NaN where it has none.
        """
        scores = {name: score(name) for name in KNOW_NOTHING}
        best = max(KNOW_NOTHING, key=lambda name: scores[name] if known(scores[name]) else -math.inf)
        return best, KNOW_NOTHING[best]

    @cached_property
    def control_name(self) -> str:
        """The map without concepts that points at parts most often; without parts, the one with the largest share on the object."""

        def score(name: str) -> float:
            hit_NM = self.pointing(name)
            if hit_NM is None and f"background/{name}" in self.columns.places:
                hit_NM = 1 - self.columns.places[f"background/{name}"]
            return math.nan if hit_NM is None else float(torch.where(self.columns.truth_NM == 1, hit_NM, torch.nan).nanmean())

        return self.control_of(score)[0]

    def pointing(self, name: str | None) -> Tensor | None:
        """(N, M) 1 where a map's peak is on the concept's part (in its mask, or within `NEAR` of a key point), 0 beside it, else NaN."""
        places = self.columns.places
        if f"in_mask/{name}" in places:
            return places[f"in_mask/{name}"].double()
        distance_NM = places.get(f"distance/{name}")
        return None if distance_NM is None else torch.where(distance_NM.isnan(), torch.nan, (distance_NM <= NEAR).double())


@dataclass
class Section:
    """Figures of a section, and what could not be measured."""

    figures: list[Figure] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)

    def extend(self, other: Section) -> None:
        """Take over another section's content."""
        self.figures += other.figures
        self.absent += other.absent


def known(value: float) -> bool:
    """Whether a figure is defined."""
    return not (math.isnan(value) or math.isinf(value))


def rounded(value: float | Tensor | None, digits: int = 6) -> float | None:
    """A figure for the record: so many significant digits, as the file has them; None for NaN and infinity. -0.0 becomes 0.0."""
    if value is None:
        return None
    number = float(value)
    return float(f"{number:.{digits}g}") + 0.0 if known(number) else None


def interval(triple: tuple[float, float, float], *, n: int, over: str = "pictures", level: float = 0.95) -> Interval:
    """A value with its ends as the record's interval; undefined ones are None."""
    value, low, high = (rounded(part) for part in triple)
    return Interval(value, low, high, n, over, level) if value is not None else Interval(None, n=n, over=over, level=level)


def share(hit_N: Tensor, *, over: str = "pictures") -> Interval:
    """A share of independent pictures with Wilson's interval."""
    n = len(hit_N)
    return interval(wilson(int(hit_N.sum()), n), n=n, over=over)


def mean(value_N: Tensor, *, settings: AuditSettings, over: str = "pictures", level: float = 0.95) -> Interval:
    """A mean over pictures, NaN left out, with its bootstrap interval."""
    value_N = value_N[~value_N.isnan()].double()
    if len(value_N) < 2:
        return Interval(rounded(value_N.sum()) if len(value_N) else None, n=len(value_N), over=over, level=level)
    return interval(bootstrap_mean(value_N, num_draws=settings.num_draws, level=level, seed=settings.seed), n=len(value_N), over=over)


def pair_means(value_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) mean of each picture's pairs and (n,) how many there are, of the pictures that have any; NaN pairs do not count."""
    count_N = (~value_NM.isnan()).sum(1)
    some_N = count_N > 0
    return value_NM[some_N].nanmean(1).double(), count_N[some_N].double()


def mean_of_pairs(value_NM: Tensor, *, settings: AuditSettings) -> Interval:
    """A mean over pairs of picture and concept. The pairs of one picture hang together, so the bootstrap draws pictures."""
    value_n, count_n = pair_means(value_NM)
    if len(value_n) < 2:
        return Interval(rounded(value_n.sum()) if len(value_n) else None, n=int(count_n.sum()), over=PAIRS)
    triple = bootstrap_mean(value_n, weight_N=count_n, num_draws=settings.num_draws, seed=settings.seed)
    return interval(triple, n=int(count_n.sum()), over=PAIRS)


def difference(
    a_N: Tensor, b_N: Tensor, *, settings: AuditSettings, over: str = "pictures", level: float = 0.95, weight_N: Tensor | None = None
) -> Interval:
    """a - b of the same pictures with a paired bootstrap interval."""
    both_N = ~(a_N.isnan() | b_N.isnan())
    if int(both_N.sum()) < 2:
        return Interval(rounded((a_N - b_N)[both_N].sum()) if both_N.any() else None, n=int(both_N.sum()), over=over, level=level)
    weight = None if weight_N is None else weight_N[both_N]
    triple = paired_bootstrap(
        a_N[both_N].double(), b_N[both_N].double(), weight_N=weight, num_draws=settings.num_draws, level=level, seed=settings.seed
    )
    return interval(triple, n=int(both_N.sum() if weight is None else weight.sum()), over=over, level=level)


def statistic(compute: Callable[[Tensor], float], n: int, *, settings: AuditSettings, over: str = "pictures") -> Interval:
    """Any figure of a set of pictures, given by their numbers, with its bootstrap interval; a single picture has none."""
    if n < 2:
        return Interval(rounded(compute(torch.arange(n))) if n else None, n=n, over=over)
    return interval(bootstrap(compute, n, num_draws=settings.num_draws, seed=settings.seed), n=n, over=over)


def nan_like(value: Tensor) -> Tensor:
    """NaN of the same shape, in double precision."""
    return torch.full_like(value, torch.nan, dtype=torch.float64)
