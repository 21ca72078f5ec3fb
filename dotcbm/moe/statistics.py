"""How evenly experts are used, and what for, over a whole validation set.

B pictures, N tokens of each, T = B N tokens, E experts, K classes, M concepts. With c_i the assignments of counted tokens to expert i and
f_i their share,

    MaxVio  max_i c_i / mean(c) - 1 (Wang et al. 2024, arXiv 2408.15664), 0 where all are equal
    MinVio  min_i c_i / mean(c) - 1, -1 where an expert is dead
    dead    experts with c_i = 0
    entropy the mean over tokens of the entropy of softmax(z), in nats, at most log E
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from dotcbm.moe.balance import expert_counts
from dotcbm.moe.layer import MoELayer
from dotcbm.moe.router import Routing

__all__ = ["LayerStatistics", "RoutingStatistics", "lift", "max_vio", "min_vio"]


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer, over all counted tokens seen. Numbers are NaN before the first token."""

    num_tokens: int
    count_E: Tensor
    """(E,) int64 assignments."""
    f_E: Tensor
    """(E,) float64 share of the assignments."""
    p_E: Tensor
    """(E,) float64 mean probability; beside f it shows where the balance loss looks good and the balance is not."""
    max_vio: float
    min_vio: float
    num_dead: int
    entropy: float
    switch_loss: float
    """E sum_i f_i p_i."""
    bias_spread: float
    """Largest minus smallest selection bias, at the last update."""
    class_KE: Tensor | None
    """(K, E) float64 assignments of tokens of pictures of each class; None where no classes were given."""
    concept_ME: Tensor | None
    """(M, E) float64 assignments, weighted by how much of the concept is in the token; None where no concepts were given."""


@dataclass
class _Sums:
    num_tokens: int
    count_E: Tensor
    p_E: Tensor
    entropy: float
    bias_spread: float
    class_KE: Tensor | None = None
    concept_ME: Tensor | None = None

    def add(self, other: _Sums) -> None:
        self.num_tokens += other.num_tokens
        self.count_E = self.count_E + other.count_E
        self.p_E = self.p_E + other.p_E
        self.entropy += other.entropy
        self.bias_spread = other.bias_spread
        self.class_KE = _sum(self.class_KE, other.class_KE)
        self.concept_ME = _sum(self.concept_ME, other.concept_ME)


class RoutingStatistics:
    """Sums over batches.

    Example:
        >>> statistics = RoutingStatistics()
        >>> layer = MoELayer(8, 16, 4, 1)
        >>> _ = layer(torch.ones(2, 5, 8))
        >>> statistics.update({"blocks.0.mlp": layer})
        >>> statistics.compute()["blocks.0.mlp"].max_vio  # equal tokens go to one expert of four
        3.0
    """

    def __init__(self, *, num_classes: int = 0) -> None:
        """Args:
        num_classes: K, for the table of experts and classes; 0 for none.
        """
        self.num_classes = num_classes
        self._sums: dict[str, _Sums] = {}

    @torch.no_grad()
    def update(self, layers: Mapping[str, MoELayer], *, class_B: Tensor | None = None, concept: Tensor | None = None) -> None:
        """Take the last forward of each layer.

        Args:
            layers: By name, as `dotcbm.moe.layer.moe_layers` gives them.
            class_B: (B,) integers in [0, K), the pictures' classes.
            concept: (B, M) concept labels or scores of pictures, which go to all their tokens, or (B, P, M) weights of the P counted tokens
                of each picture, such as a transport plan. Not negative; NaN (unknown) counts as 0.

        Raises:
            ValueError: A layer that has not run, classes without `num_classes`, or labels whose shape does not fit the tokens.
        """
        if class_B is not None and not self.num_classes:
            raise ValueError("class_B is given, and num_classes is 0; tell RoutingStatistics how many classes there are")
        for name, layer in layers.items():
            if layer.routing is None:
                raise ValueError(f"expert layer {name} has not run yet; call the model first")
            self._add(name, self._of(layer.routing, layer.router.selection_bias, class_B, concept))

    def gather(self) -> None:
        """Add up what all ranks have seen; every rank must call it, once, after its last batch."""
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return
        everyone: list[dict[str, _Sums] | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, self._sums)
        self._sums = {}
        for sums in everyone:
            for name, seen in (sums or {}).items():
                self._add(name, seen)

    def compute(self) -> dict[str, LayerStatistics]:
        """The figures of each layer seen."""
        return {name: _statistics(sums) for name, sums in self._sums.items()}

    def _add(self, name: str, seen: _Sums) -> None:
        if name in self._sums:
            self._sums[name].add(seen)
        else:
            self._sums[name] = seen

    def _of(self, routing: Routing, bias_E: Tensor, class_B: Tensor | None, concept: Tensor | None) -> _Sums:
        logit_TE, index_TK = routing.logit_TE.detach(), routing.index_TK
        counted_T = torch.ones_like(index_TK[:, 0], dtype=torch.bool) if routing.counted_T is None else routing.counted_T
        log_p_TE = logit_TE.log_softmax(-1)[counted_T]
        p_TE = log_p_TE.exp()
        seen = _Sums(
            num_tokens=len(p_TE),
            count_E=expert_counts(routing).cpu(),
            p_E=p_TE.cpu().double().sum(0),
            entropy=-float((p_TE * log_p_TE).cpu().double().sum()),
            bias_spread=float(bias_E.max() - bias_E.min()),
        )
        chosen_TE = torch.zeros_like(logit_TE).scatter_(1, index_TK, 1.0)[counted_T]
        if class_B is not None:
            class_BK = torch.nn.functional.one_hot(class_B.to(logit_TE.device), self.num_classes).float()
            seen.class_KE = _table(class_BK, chosen_TE, name="class_B")
        if concept is not None:
            seen.concept_ME = _table(concept.to(logit_TE.device).nan_to_num(0.0).float(), chosen_TE, name="concept")
        return seen


def lift(table_XE: Tensor, f_E: Tensor) -> Tensor:
    """(X, E) how many times likelier an expert is for tokens of a class or concept than for any token: P(e | x) / f_e.

    NaN where the class or concept, or the expert, never occurs.

    Args:
        table_XE: (X, E) `LayerStatistics.class_KE` or `concept_ME`.
        f_E: (E,) shares of the experts.
    """
    share_XE = table_XE / table_XE.sum(1, keepdim=True)
    return torch.where(f_E > 0, share_XE / f_E, torch.nan)


def max_vio(count_E: Tensor) -> float:
    """max_i c_i / mean(c) - 1; NaN without counts."""
    return float(count_E.max() / count_E.double().mean() - 1)


def min_vio(count_E: Tensor) -> float:
    """min_i c_i / mean(c) - 1; NaN without counts."""
    return float(count_E.min() / count_E.double().mean() - 1)


def _statistics(sums: _Sums) -> LayerStatistics:
    f_E = sums.count_E.double() / sums.count_E.sum()
    p_E = sums.p_E / sums.num_tokens
    return LayerStatistics(
        num_tokens=sums.num_tokens,
        count_E=sums.count_E,
        f_E=f_E,
        p_E=p_E,
        max_vio=max_vio(sums.count_E),
        min_vio=min_vio(sums.count_E),
        num_dead=int((sums.count_E == 0).sum()),
        entropy=sums.entropy / sums.num_tokens if sums.num_tokens else float("nan"),
        switch_loss=float(len(f_E) * (f_E * p_E).sum()),
        bias_spread=sums.bias_spread,
        class_KE=sums.class_KE,
        concept_ME=sums.concept_ME,
    )


def _table(weight: Tensor, chosen_TE: Tensor, *, name: str) -> Tensor:
    """(X, E) of (B, X) or (B, P, X) weights of pictures or of their counted tokens."""
    T, B = len(chosen_TE), len(weight)
    P = weight.shape[1] if weight.ndim == 3 else T // max(B, 1)
    if weight.ndim not in (2, 3) or B * P != T:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, which does not fit the {T} tokens counted; give what belongs to them")
    if weight.ndim == 2:
        chosen_BE = chosen_TE.view(B, P, chosen_TE.shape[1]).sum(1)
        return (weight.T.double() @ chosen_BE.double()).cpu()
    return (weight.flatten(0, 1).T.double() @ chosen_TE.double()).cpu()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
