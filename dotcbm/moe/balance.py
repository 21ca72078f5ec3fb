"""Terms that spread tokens over experts.

T tokens, E experts, K experts per token, z the (T, E) logits, f_i the share of expert i in the assignments (no gradient), p_i the mean
over tokens of softmax(z)_i (through which the gradient flows).

    switch_loss  E sum_i f_i p_i (Fedus et al. 2021, arXiv 2101.03961). 1 where f or p is uniform; it is also 1 where p is uniform and f is
                 not, the degenerate minimum that Sigma-MoE-Tiny (arXiv 2512.16248) reports at one expert of many.
                 With f over all ranks and micro-batches of a step it is the global-batch loss of Qiu et al. 2025 (arXiv 2501.11873).
    top1_loss    E sum_i f^_i^2 / mean_t max_i q_ti with q = softmax(z / tau) and f^_i = mean_t q_ti (Sigma-MoE-Tiny).
    z_loss       mean of logsumexp(z)^2 (Zoph et al. 2022, arXiv 2202.08906): logits that stay small.
    update_selection_bias  b_i += u sign(mean c - c_i) for counts c (Wang et al. 2024, arXiv 2408.15664): no loss at all.

Balance over the global batch: forced on each picture, every picture goes through every expert, and none can stand for a concept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from dotcbm.moe.router import Routing

__all__ = ["LoadWindow", "expert_counts", "expert_load", "sum_over_ranks", "switch_loss", "top1_loss", "update_selection_bias", "z_loss"]


def expert_counts(routing: Routing) -> Tensor:
    """(E,) int64, how many counted tokens go to each expert; sums to their number times K."""
    index_TK = routing.index_TK
    once_TK = torch.ones_like(index_TK) if routing.counted_T is None else routing.counted_T.to(index_TK.dtype)[:, None].expand_as(index_TK)
    count_E = index_TK.new_zeros(routing.logit_TE.shape[1])
    return count_E.scatter_add_(0, index_TK.reshape(-1), once_TK.reshape(-1))


def expert_load(routing: Routing) -> Tensor:
    """(E,) float32 counts divided by K, which sum to the number of counted tokens.

    What to add up over layers' draws of K: a step with six experts per token weighs no more than a step with one.
    """
    return expert_counts(routing).float() / routing.index_TK.shape[1]


class LoadWindow:
    """Loads summed over ranks, and over the micro-batches of one optimizer step.

    Micro-batch j is balanced with the loads of micro-batches 1 to j, since later ones are not known yet.
    """

    def __init__(self) -> None:
        self._load: dict[str, Tensor] = {}

    def add(self, load: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each layer's experts have carried since `reset`, this micro-batch included.

        Every rank must call it, with the same layers; there is one communication for all of them.

        Args:
            load: (E,) by layer, from `expert_load`; the number of experts may differ between layers.
        """
        if load:
            total = sum_over_ranks(torch.cat([x.detach() for x in load.values()])).split([len(x) for x in load.values()])
            for (name, _), seen_E in zip(load.items(), total, strict=True):
                self._load[name] = self._load[name] + seen_E if name in self._load else seen_E
        return {name: self._load[name] for name in load}

    @property
    def loads(self) -> dict[str, Tensor]:
        """(E,) by layer, carried since `reset`."""
        return dict(self._load)

    def reset(self) -> None:
        """Begin the next optimizer step."""
        self._load.clear()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, without a gradient; x itself where there is one."""
    x = x.detach()
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return x
    x = x.clone()
    distributed.all_reduce(x)
    return x


def switch_loss(routing: Routing, load_E: Tensor | None = None) -> Tensor:
    """E sum_i f_i p_i over counted tokens; 0, with a gradient of zero, where there are none.

    Args:
        routing: Of this batch, for p.
        load_E: (E,) loads or counts, of any scale, for f: those of this batch if None, those of a `LoadWindow` for the global batch. With
            the latter and as many tokens on each rank, averaging gradients over ranks, as DDP does, gives the whole batch's.
    """
    load_E = expert_load(routing) if load_E is None else load_E.detach().float()
    p_TE = routing.logit_TE.softmax(-1)
    f_E = load_E / load_E.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return len(f_E) * (f_E * _mean(p_TE, routing.counted_T)).sum()


def top1_loss(routing: Routing, *, tau: float = 0.1, over_ranks: bool = False) -> Tensor:
    """E sum_i f^_i^2 / mean_t max_i q_ti over counted tokens.

    1 where tokens are sure and spread evenly, E where all are sure of the same expert; 0, with a gradient of zero, without tokens.

    Args:
        routing: Of this batch.
        tau: > 0, temperature of q; the paper's is 0.1, with a coefficient of 1e-2.
        over_ranks: Take both means over the tokens of all ranks, which must all call it. Averaging gradients over ranks, as DDP does, then
            gives the whole batch's.

    Raises:
        ValueError: tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be positive (the paper takes 0.1)")
    q_TE = (routing.logit_TE / tau).softmax(-1)
    counted_T = torch.ones_like(q_TE[:, 0]) if routing.counted_T is None else routing.counted_T.to(q_TE.dtype)
    sums = torch.cat([(counted_T[:, None] * q_TE).sum(0), (counted_T * q_TE.amax(-1)).sum()[None], counted_T.sum()[None]])
    if over_ranks:
        num_ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        sums = sum_over_ranks(sums) + num_ranks * (sums - sums.detach())
    total_E, most, num_tokens = sums[:-2], sums[-2], sums[-1]
    E = len(total_E)
    return E * total_E.square().sum() / (most * num_tokens).clamp(min=0.5 / E)  # with one token it is at least 1 / E


def z_loss(routing: Routing) -> Tensor:
    """The mean over counted tokens of logsumexp(z)^2."""
    return _mean(routing.logit_TE.logsumexp(-1).square(), routing.counted_T)


@torch.no_grad()
def update_selection_bias(bias_E: Tensor, count_E: Tensor, *, u: float = 1e-3) -> None:
    """Raise, in place, the bias of experts below the mean count by u, and lower that of experts above it.

    Args:
        bias_E: (E,) `Router.selection_bias`.
        count_E: (E,) counts or loads since the last update, over all ranks.
        u: >= 0; the paper's 1e-3 is meant for scores in [0, 1].
    """
    count_E = count_E.to(bias_E.dtype)
    bias_E += u * (count_E.mean() - count_E).sign()


def _mean(x: Tensor, counted_T: Tensor | None) -> Tensor:
    """Over the first dimension; 0 where there is nothing to average."""
    if counted_T is None:
        return x.sum(0) / max(len(x), 1)
    weight_T = counted_T.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
    return (weight_T * x).sum(0) / counted_T.sum().clamp(min=1)
