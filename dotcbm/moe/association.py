"""Which experts go with what is in a patch, beyond where the patch lies and beyond chance.

B pictures of one block, N of all, P patches of each, E experts, K experts per patch; X things that each patch holds some of (a part, the
mass of a concept), Y things that a whole picture holds (its class), Z = X + Y of them; R permutations, G groups of pictures.

With a_bpe = 1 where patch p of picture b goes to expert e and w_bpz >= 0 how much of thing z is in it (w_bz for every patch of the picture,
for the Y), the statistic is the mass that the expert gets, and beside it stands what it would get if routing did not look at what is there:

    T_ze    = sum_b sum_p w_bpz a_bpe
    T0_ze   = sum_p (sum_b w_bpz) (sum_b a_bpe), without the pairs of a picture with itself, / (N - 1)
    lift_ze = T_ze / T0_ze

T0 is the mean of T over all ways to hand each picture's routing to another picture, patch by patch. An expert that always takes the middle
of a picture, where birds happen to be, has a lift of 1 for birds: independence given the place, not independence alone.

The test exchanges whole pictures' routing too. Under the hypothesis that routing does not depend on what is in the pictures, every such
exchange is as likely as the truth, whatever the patches of one picture have to do with one another, and however unevenly experts and things
lie over the pictures. Exchanges are among the pictures of one block, which must be drawn at random: a subgroup of all exchanges, for which
the test is as exact. T is studentised with mean and deviation over the R exchanges and the truth, and its p-value is the share of
these R + 1 whose largest value, over all things, experts and layers, reaches it (Westfall & Young 1993, single-step max T). So the chance
that a router which ignores the pictures gets any mark at all is at most the level, for all tables together. One-sided: more than chance.

Intervals of lifts: the logarithm's delete-a-group jackknife (Kott 2001) over G groups of pictures, with Student's t; for single cells, not
corrected for how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["Association", "Associations"]

_GROUPS = 20  # a deviation from 20 groups is known to a sixth; t with 19 degrees of freedom makes up for it
_LEAST = 5  # pictures that a thing, or an expert, must be in: below, one picture decides


@dataclass(frozen=True)
class Association:
    """Of one layer.

    Attributes:
        share_ZE: (Z, E) share of a thing's mass that goes to an expert; of K experts per patch all count, so rows sum to K.
        lift_ZE: (Z, E); NaN where thing or expert never occurs.
        low_ZE, high_ZE: (Z, E) ends of the lifts' 95 % intervals; NaN where there is none.
        expected_ZE: (Z, E) the share that other pictures' routing would give: share / lift.
        p_ZE: (Z, E) p-values, corrected for all tables; NaN where nothing can be tested.
    """

    share_ZE: Tensor
    lift_ZE: Tensor
    low_ZE: Tensor
    high_ZE: Tensor
    expected_ZE: Tensor
    p_ZE: Tensor


@dataclass
class _Sums:
    mass_GZE: Tensor
    count_GPE: Tensor
    exchanged_RZE: Tensor
    num_using_E: Tensor


class Associations:
    """Sums over blocks of pictures; of the pictures' own tensors nothing is kept.

    Example:
        >>> found = Associations(num_permutations=99)
        >>> for _ in range(4):
        ...     thing_BP = torch.rand(16, 9).round()  # half of the patches hold it, and expert 1 takes just those
        ...     found.update({"blocks.0": (thing_BP.long()[..., None], 2)}, weight_BPX=thing_BP[..., None])
        >>> bool(found.compute()["blocks.0"].p_ZE[0, 1] <= 0.05)
        True
    """

    def __init__(self, *, num_permutations: int = 499, seed: int = 0) -> None:
        """Args:
        num_permutations: R >= 19; the smallest p-value is 1 / (R + 1).
        seed: Of the exchanges.

        Raises:
            ValueError: Too few permutations for any mark at 5 %.
        """
        if num_permutations < 19:
            raise ValueError(f"num_permutations is {num_permutations}; with fewer than 19 no p-value reaches 5 %")
        self.num_permutations = num_permutations
        self.num_pictures = 0
        self._drawn = torch.Generator().manual_seed(seed)
        self._weight_GPX = self._weight_GY = self._num_holding_Z = torch.zeros(0)
        self._sums: dict[str, _Sums] = {}

    @torch.no_grad()
    def update(
        self, chosen: Mapping[str, tuple[Tensor, int]], *, weight_BPX: Tensor | None = None, weight_BY: Tensor | None = None
    ) -> None:
        """Take a block of pictures, which must be drawn at random from all: they are exchanged with one another.

        16 are a good number: the truth is a sixteenth of the mean that it is held against, and the work grows with the number.

        Args:
            chosen: By layer, the same layers each time: (B, P, K) integers, the experts of each patch, distinct within it; and E.
            weight_BPX: (B, P, X) >= 0.
            weight_BY: (B, Y) >= 0.

        Raises:
            ValueError: Shapes that do not fit, or weights below zero or NaN.
        """
        B, P = next(iter(chosen.values()))[0].shape[:2]
        weight_BPX = torch.zeros(B, P, 0) if weight_BPX is None else weight_BPX.float().cpu()
        weight_BY = torch.zeros(B, 0) if weight_BY is None else weight_BY.float().cpu()
        if weight_BPX.shape[:2] != (B, P) or len(weight_BY) != B:
            raise ValueError(
                f"weights of shape {tuple(weight_BPX.shape)} and {tuple(weight_BY.shape)} do not fit {B} pictures of {P} patches"
            )
        if not bool((weight_BPX >= 0).all() & (weight_BY >= 0).all()):
            raise ValueError("weights must be 0 or more; give 0 for what is not known")
        group_B = (self.num_pictures + torch.arange(B)) % _GROUPS
        exchange_RB = torch.stack([torch.randperm(B, generator=self._drawn) for _ in range(self.num_permutations)])
        if not self.num_pictures:
            X, Y = weight_BPX.shape[2], weight_BY.shape[1]
            self._weight_GPX, self._weight_GY = (torch.zeros(_GROUPS, *size, dtype=torch.float64) for size in ((P, X), (Y,)))
            self._num_holding_Z = torch.zeros(X + Y, dtype=torch.long)
        self._weight_GPX.index_add_(0, group_B, weight_BPX.double())
        self._weight_GY.index_add_(0, group_B, weight_BY.double())
        self._num_holding_Z += torch.cat([weight_BPX.amax(1), weight_BY], 1).gt(0).sum(0)
        for name, (index_BPK, num_experts) in chosen.items():
            self._add(name, index_BPK.cpu(), num_experts, weight_BPX, weight_BY, group_B, exchange_RB)
        self.num_pictures += B

    def compute(self) -> dict[str, Association]:
        """Of each layer, with p-values that are corrected for all of them."""
        tested = {name: self._studentised(sums) for name, sums in self._sums.items()}
        most_R = torch.full((self.num_permutations + 1,), -torch.inf)
        for z_RZE in tested.values():
            most_R = torch.maximum(most_R, z_RZE.nan_to_num(-torch.inf).flatten(1).amax(1) if z_RZE.numel() else most_R)
        sorted_R = most_R.sort().values
        return {name: self._association(sums, tested[name][0], sorted_R) for name, sums in self._sums.items()}

    def _add(
        self, name: str, index_BPK: Tensor, E: int, weight_BPX: Tensor, weight_BY: Tensor, group_B: Tensor, exchange_RB: Tensor
    ) -> None:
        B, P, X = weight_BPX.shape
        chosen_BPE = torch.zeros(B, P, E).scatter_(2, index_BPK.long(), 1.0)
        # Mass of the first picture's things at the places where the second one's routing chose the expert, for all pairs at once.
        by_patch = weight_BPX.transpose(1, 2).reshape(B * X, P) @ chosen_BPE.transpose(0, 1).reshape(P, B * E)
        mass_BBZE = torch.cat(
            [by_patch.view(B, X, B, E).transpose(1, 2), weight_BY[:, None, :, None] * chosen_BPE.sum(1)[None, :, None, :]], dim=2
        )
        shape = (self.num_permutations, *mass_BBZE.shape[2:])
        flat = mass_BBZE.reshape(B * B, shape[1] * shape[2])
        exchanged_RZE = torch.nn.functional.embedding_bag(exchange_RB * B + torch.arange(B), flat, mode="sum").view(shape)
        if name not in self._sums:
            Z = mass_BBZE.shape[2]
            self._sums[name] = _Sums(
                torch.zeros(_GROUPS, Z, E, dtype=torch.float64),
                torch.zeros(_GROUPS, P, E, dtype=torch.float64),
                torch.zeros(self.num_permutations, Z, E),
                torch.zeros(E, dtype=torch.long),
            )
        sums = self._sums[name]
        sums.mass_GZE.index_add_(0, group_B, mass_BBZE[torch.arange(B), torch.arange(B)].double())
        sums.count_GPE.index_add_(0, group_B, chosen_BPE.double())
        sums.exchanged_RZE += exchanged_RZE
        sums.num_using_E += chosen_BPE.amax(1).gt(0).sum(0)

    def _studentised(self, sums: _Sums) -> Tensor:
        """(R + 1, Z, E) z of the truth and of each exchange; NaN where nothing can be tested."""
        all_RZE = torch.cat([sums.mass_GZE.sum(0)[None].float(), sums.exchanged_RZE])
        mean_ZE = all_RZE.mean(0)
        deviation_ZE = (all_RZE - mean_ZE).square().mean(0).sqrt()
        rare_ZE = (self._num_holding_Z < _LEAST)[:, None] | (sums.num_using_E < _LEAST)
        still_ZE = deviation_ZE <= 1e-6 * mean_ZE.abs()  # sums of equal numbers, but for rounding: exchanges change nothing
        return torch.where(rare_ZE | still_ZE, torch.nan, (all_RZE - mean_ZE) / deviation_ZE)

    def _association(self, sums: _Sums, z_ZE: Tensor, sorted_R: Tensor) -> Association:
        mass_ZE = sums.mass_GZE.sum(0)
        total_Z = torch.cat([self._weight_GPX.sum((0, 1)), sums.count_GPE.shape[1] * self._weight_GY.sum(0)])
        lift_ZE = self._lift(sums, None)
        low_ZE, high_ZE = self._interval(sums, lift_ZE)
        num_reaching_ZE = len(sorted_R) - torch.searchsorted(sorted_R, z_ZE.contiguous() - 1e-5)
        share_ZE = mass_ZE / torch.where(total_Z > 0, total_Z, torch.nan)[:, None]
        return Association(
            share_ZE=share_ZE,
            lift_ZE=lift_ZE,
            low_ZE=low_ZE,
            high_ZE=high_ZE,
            expected_ZE=self._expected(sums, None) / torch.where(total_Z > 0, total_Z, torch.nan)[:, None],
            p_ZE=torch.where(z_ZE.isnan(), torch.nan, num_reaching_ZE / len(sorted_R)).double(),
        )

    def _expected(self, sums: _Sums, without: int | None) -> Tensor:
        """(Z, E) T0, of all groups or of all but one."""
        kept = [g for g in range(_GROUPS) if g != without]
        num = self.num_pictures if without is None else self.num_pictures - len(range(without, self.num_pictures, _GROUPS))
        count_PE = sums.count_GPE[kept].sum(0)
        of_all_ZE = torch.cat([self._weight_GPX[kept].sum(0).T @ count_PE, self._weight_GY[kept].sum(0)[:, None] * count_PE.sum(0)])
        return (of_all_ZE - sums.mass_GZE[kept].sum(0)) / max(num - 1, 1)

    def _lift(self, sums: _Sums, without: int | None) -> Tensor:
        kept = [g for g in range(_GROUPS) if g != without]
        expected_ZE = self._expected(sums, without)
        # Differences of equal sums are not quite zero.
        smallest = 1e-9 * float(expected_ZE.abs().max()) if expected_ZE.numel() else 0.0
        return sums.mass_GZE[kept].sum(0) / torch.where(expected_ZE > smallest, expected_ZE, torch.nan)

    def _interval(self, sums: _Sums, lift_ZE: Tensor) -> tuple[Tensor, Tensor]:
        num = min(_GROUPS, self.num_pictures)
        if num < _LEAST:
            return torch.full_like(lift_ZE, torch.nan), torch.full_like(lift_ZE, torch.nan)
        log_GZE = torch.stack([self._lift(sums, g) for g in range(num)]).log()
        deviation_ZE = ((num - 1) * (log_GZE - log_GZE.mean(0)).square().mean(0)).sqrt()
        half_ZE = _student(0.975, num - 1) * torch.where(deviation_ZE.isfinite(), deviation_ZE, torch.nan)
        return lift_ZE * (-half_ZE).exp(), lift_ZE * half_ZE.exp()


def _student(level: float, freedom: int) -> float:
    """Quantile of Student's t (Abramowitz & Stegun 26.7.5, three terms: right to 0.1 % from 10 degrees of freedom on)."""
    z = NormalDist().inv_cdf(level)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
