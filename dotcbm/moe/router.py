"""Which experts see a token, and how much each one's answer counts.

T tokens, D width, E experts, K experts per token. Logits are z = x W^T and scores, by gate,

    softmax       softmax of z over all E experts (Switch, DeepSeek-V2)
    softmax_kept  the same scores, and as gates the softmax over the K kept logits (Mixtral)
    sigmoid       the sigmoid of each z (DeepSeek-V3)

The K experts with the highest score + selection bias are taken (Wang et al. 2024, arXiv 2408.15664: the bias enters nothing else).
Gates are the scores of those K, normalised in one of three ways:

    never     raw. Raw scores change the scale of the output when K changes.
    always    divided by their sum, except at K = 1, where the quotient would be 1 whatever the logits and the router would learn
              nothing from the task: there the raw score stays, so the scale does change between K = 1 and K = 2.
    detached  divided by their sum, through which no gradient flows. Gates sum to 1 at every K, and the router has a task gradient at
              every K: that of the logarithm of its score, times the gate. Ours.

"softmax_kept" is normalised by construction: with "never" it stays so at K = 1, where the gate is 1 and has no gradient (a warning
says so in training); with "always" and "detached" it is the same as "softmax".

Everything is computed in float32, also under autocast and in a model of half precision: rounded logits choose other experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Gate", "Normalize", "Router", "Routing"]

Gate = Literal["softmax", "softmax_kept", "sigmoid"]
Normalize = Literal["never", "always", "detached"]


@dataclass(frozen=True)
class Routing:
    """The decisions of one router for one batch of tokens; differentiable where it was made with gradients."""

    index_TK: Tensor
    """(T, K) int64, the chosen experts, the one with the highest score first; distinct within a token."""
    gate_TK: Tensor
    """(T, K) float32 factors of their outputs."""
    logit_TE: Tensor
    """(T, E) float32."""
    score_TE: Tensor
    """(T, E) float32, softmax or sigmoid of the logits."""
    counted_T: Tensor | None = None
    """(T,) bool, the tokens that balance terms and statistics count; None for all of them."""


# FSDP2 gathers a module's weights for the backward when a gradient reaches a tensor that it returned. PyTorch 2.11 finds such tensors in
# pytrees only (2.14 in any dataclass), and without this a sharded router's weight would still be freed in its backward.
torch.export.register_dataclass(Routing)


class Router(nn.Module):
    """A linear map to E logits, top-k, and gates; see the head of this file."""

    selection_bias: Tensor
    scale: Tensor

    def __init__(
        self, width: int, num_experts: int, *, gate: Gate = "softmax", normalize: Normalize = "detached", jitter: float = 0.0
    ) -> None:
        """Args:
        width: D.
        num_experts: E.
        gate: How scores come from logits.
        normalize: How gates come from scores.
        jitter: In [0, 1): in training the router sees each feature times a factor from U(1 - jitter, 1 + jitter) (Switch).

        Raises:
            ValueError: A setting out of its range.
        """
        super().__init__()
        if gate not in get_args(Gate):
            raise ValueError(f"gate is {gate!r}; choose one of {list(get_args(Gate))}")
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize is {normalize!r}; choose one of {list(get_args(Normalize))}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter}; it must be in [0, 1) (Switch Transformers take 0.01)")
        if width < 1 or num_experts < 1:
            raise ValueError(f"width is {width} and num_experts {num_experts}; both must be at least 1")
        self.gate: Gate = gate
        self.normalize: Normalize = normalize
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, width, dtype=torch.float32))
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Fresh weights, as timm draws a ViT's (normal, deviation 0.02); no selection bias; scale 1."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.selection_bias)
        nn.init.ones_(self.scale)

    def forward(self, x_TD: Tensor, k: int) -> Routing:
        """Route tokens to `k` experts each.

        Args:
            x_TD: (T, D) in any floating type; T may be 0.
            k: In [1, E].

        Raises:
            ValueError: k out of its range.
        """
        check_k(k, self.num_experts)
        device = x_TD.device.type
        with torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext():
            # A sharding engine may hand the weight over in half precision.
            weight_ED = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
            x_TD = x_TD.to(weight_ED.dtype)
            if self.jitter and self.training:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logit_TE = F.linear(x_TD, weight_ED)
            log_score_TE = F.logsigmoid(logit_TE) if self.gate == "sigmoid" else logit_TE.log_softmax(-1)
            score_TE = log_score_TE.exp()
            index_TK = (score_TE.detach() + self.selection_bias).topk(k, dim=-1).indices
            gate_TK = self._gates(log_score_TE.gather(1, index_TK)) * self.scale
        return Routing(index_TK, gate_TK, logit_TE, score_TE)

    def _gates(self, log_score_TK: Tensor) -> Tensor:
        # In logarithms a sum of scores that underflow divides nothing by zero: softmax(log s) = s / sum s.
        k = log_score_TK.shape[1]
        if self.normalize == "detached":
            return log_score_TK.detach().softmax(-1) * (log_score_TK - log_score_TK.detach()).exp()
        if self.normalize == "never" and self.gate == "softmax_kept":
            if k == 1 and self.training and torch.is_grad_enabled():
                _warn_of_constant_gate()
            return log_score_TK.softmax(-1)
        if self.normalize == "never" or k == 1:
            return log_score_TK.exp()
        return log_score_TK.softmax(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # model.to(torch.bfloat16) and its kin move this module and leave its precision.
        def apply(tensor: Tensor) -> Tensor:
            done = fn(tensor)
            return tensor.to(done.device) if done.dtype in (torch.bfloat16, torch.float16) else done

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        experts, width = self.weight.shape
        return f"width={width}, num_experts={experts}, gate={self.gate}, normalize={self.normalize}, jitter={self.jitter:g}"


def check_k(k: int, num_experts: int) -> None:
    """Raises ValueError unless 1 <= k <= num_experts."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}, with {num_experts} experts; k must be between 1 and {num_experts}")


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a kind of device; never for "meta", of which PyTorch refuses to say."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _warn_of_constant_gate() -> None:
    warnings.warn(
        'gate "softmax_kept" with normalize "never" is constantly 1 at k = 1, so the router learns nothing from the task; '
        'choose normalize "detached" or another gate',
        stacklevel=4,
    )
