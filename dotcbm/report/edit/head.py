"""Which inputs of the class head belong to a concept, and a head fitted with some of its weights held.

The fit is that of `dotcbm.training.head_fit` with three additions: pictures may be weighted, some weights are held, and some stay zero.

    minimise  sum_i w_i CE(W z_i + o_i + b, y_i) / sum_i w_i  +  l2 / 2 |W|^2  over the free entries of W, and b
    z = (x - mean) / deviation over the training pictures, unweighted;  o_i = H x_i, what the held weights H add

A removed input is none of the z: it is not in the problem, and its column of the result is zero exactly. A head that was sparse
stays within its pattern: no class comes to read a concept that it did not read before, so the number of effective concepts of a
sparse model never grows by an edit.

B pictures of a batch, n training pictures, M concepts, K classes, F inputs of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from dotcbm.metrics.standardize import standardize
from dotcbm.models.base import Bottleneck
from dotcbm.structures import ConceptOutput
from dotcbm.training.head_fit import HEAD_L2_GRID

__all__ = ["RefitHead", "concept_inputs", "pattern_of", "refit_head"]

_GAP = 1e-5  # as in dotcbm.training.head_fit: how far from the optimum the objective may stay
_PATIENCE = 2  # as there: weaker strengths that may be no better than the best before the search ends
_SAME = 1e-4  # largest difference of class logits that counts as rounding, relative to their size


@dataclass(frozen=True)
class RefitHead:
    """A head fitted anew.

    Attributes:
        weight_KF: (K, F) float64, for inputs as they are, held and removed columns included.
        bias_K: (K,) float64.
        l2: The strength used.
        gradient: Largest absolute entry of the gradient that is left, on standardised inputs.
        val_accuracy: On the validation pictures, NaN without any.
    """

    weight_KF: Tensor
    bias_K: Tensor
    l2: float
    gradient: float
    val_accuracy: float


@torch.no_grad()
def concept_inputs(bottleneck: Bottleneck, output: ConceptOutput) -> tuple[Tensor, ...]:
    """For each of the M concepts the inputs of the head that change with it: one, or a block where concepts are embeddings.

    Found by changing one concept after the other and looking at `head_input`, so that it holds for every bottleneck whose classes
    are a linear function of inputs each of which belongs to one concept (or to none, as a residual from the features).

    Args:
        bottleneck: In eval mode.
        output: Of a few pictures.

    Raises:
        ValueError: The classes are not read from concepts, the head is no plain linear layer, or an input belongs to several concepts.
    """
    kind = type(bottleneck).__name__
    if not bottleneck.reads_concepts:
        raise ValueError(f"the classes of {kind} are not read from concepts, so none can be removed from them; edit a concept bottleneck")
    head, logit_BM, context_BX = bottleneck.head, output.concept_logit_BM, output.context_BX
    plain_BF = bottleneck.head_input(logit_BM, context_BX)
    class_BK = F.linear(plain_BF, head.weight, head.bias)
    gap = float((class_BK - output.class_logit_BK).abs().max())
    if parametrize.is_parametrized(head) or not gap <= _SAME * max(1.0, float(class_BK.abs().max())):
        raise ValueError(
            f"the class head of {kind} is no plain linear layer on its inputs (its weights are derived from other parameters, or something "
            "is added to it), so a concept's column cannot be taken out and the rest fitted anew; train it again without the concept"
        )
    found = []
    owner_F = torch.full((head.in_features,), -1, dtype=torch.long)
    for j in range(logit_BM.shape[1]):
        moved = torch.zeros(head.in_features, dtype=torch.bool)
        for change in (-3.0, 3.0):  # either way, so that a probability near 0 or 1 is moved by one of them
            changed_BM = logit_BM.clone()
            changed_BM[:, j] += change
            moved |= (bottleneck.head_input(changed_BM, context_BX) != plain_BF).any(0).cpu()
        if bool((owner_F[moved] >= 0).any()):
            other = bottleneck.problem.concepts.names[int(owner_F[moved].max())]
            raise ValueError(
                f"an input of {kind}'s head changes with {bottleneck.problem.concepts.names[j]!r} and with {other!r}, so one cannot be "
                "removed without the other; train it again without the concept"
            )
        owner_F[moved] = j
        found.append(moved.nonzero()[:, 0])
    return tuple(found)


def pattern_of(weight_KF: Tensor) -> Tensor:
    """(K, F) bool: the weights that a re-fit may change. All of a dense head, the non-zero ones of a sparse one (half of them zero)."""
    zero_KF = weight_KF == 0
    return ~zero_KF if float(zero_KF.double().mean()) > 0.5 else torch.ones_like(zero_KF)


def refit_head(
    input_nF: Tensor,
    label_n: Tensor,
    *,
    weight_KF: Tensor,
    bias_K: Tensor,
    removed: Sequence[int] = (),
    held: Sequence[int] = (),
    l2: float | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    weight_n: Tensor | None = None,
    max_iter: int = 2000,
) -> RefitHead:
    """Solve the problem at the head of this file.

    Args:
        input_nF: (n, F) what the head reads.
        label_n: (n,) class indices.
        weight_KF: (K, F) where the search starts; `held` columns keep these values.
        bias_K: (K,) likewise.
        removed: Inputs that are left out.
        held: Inputs whose weights stay.
        l2: Strength; None takes the one of `HEAD_L2_GRID` with the best validation accuracy (among equals the smallest entropy).
        val: Inputs and labels of validation pictures.
        weight_n: (n,) weights of the training pictures, not negative; equal by default.
        max_iter: Of L-BFGS, for each strength.

    Raises:
        ValueError: l2 not positive or None without `val`, inputs that are not finite, or nothing is left to read.
    """
    if l2 is None and val is None:
        raise ValueError("l2 'auto' chooses on a validation split, and there is none; give l2 a number (the run's head_l2)")
    if l2 is not None and not (l2 > 0 and math.isfinite(l2)):
        raise ValueError(f"l2 is {l2}; it must be positive, or the problem has no optimum on separable classes")
    if not input_nF.isfinite().all():
        raise ValueError(f"what the head reads of training row {int((~input_nF.isfinite()).any(1).nonzero()[0])} is not finite")
    kept_F = torch.ones(weight_KF.shape[1], dtype=torch.bool)
    kept_F[list(removed)] = False
    free_F = kept_F.clone()
    free_F[list(held)] = False
    if not kept_F.any():
        raise ValueError("every input of the class head would be removed; leave one concept at least")
    weight_KF, bias_K = weight_KF.detach().cpu().double(), bias_K.detach().cpu().double()
    x_nF = input_nF.double()
    z_nF, mean_F, deviation_F = standardize(x_nF)  # a constant input gets weight 0 from the L2 term
    z_nf = z_nF[:, free_F]
    held_KF = torch.where(kept_F & ~free_F, weight_KF, 0.0)
    offset_nK = x_nF @ held_KF.T
    allowed_Kf = pattern_of(weight_KF)[:, free_F]
    share_n = (
        torch.full((len(x_nF),), 1 / len(x_nF), dtype=torch.float64) if weight_n is None else weight_n.double() / weight_n.double().sum()
    )
    start = torch.cat([weight_KF[:, free_F] * deviation_F[free_F], (bias_K + (weight_KF * mean_F)[:, free_F].sum(1))[:, None]], 1)
    best: tuple[float, float, RefitHead] | None = None
    behind = 0
    for strength in HEAD_L2_GRID if l2 is None else (l2,):
        start, gradient = _solve(start, z_nf, label_n, offset_nK, share_n, allowed_Kf, l2=strength, max_iter=max_iter)
        found_KF = held_KF.clone()
        found_KF[:, free_F] = start[:, :-1] / deviation_F[free_F]
        found_K = start[:, -1] - (found_KF * mean_F)[:, free_F].sum(1)
        accuracy, entropy = (math.nan, math.nan) if val is None else _scores(found_KF, found_K, *val)
        fit = RefitHead(found_KF, found_K, strength, gradient, accuracy)
        if best is None or (accuracy, -entropy) > best[:2]:
            best, behind = (accuracy, -entropy, fit), 0
        else:
            behind += 1
        if behind > _PATIENCE:
            break
    assert best is not None
    return best[2]


def _solve(
    start: Tensor,
    z_nf: Tensor,
    label_n: Tensor,
    offset_nK: Tensor,
    share_n: Tensor,
    allowed_Kf: Tensor,
    *,
    l2: float,
    max_iter: int,
) -> tuple[Tensor, float]:
    """(K, f + 1) weights and biases at the optimum, and the largest entry of the gradient there."""
    parameter = start.clone()
    parameter[:, :-1] *= allowed_Kf
    parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameter],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=20,
        tolerance_grad=(2 * l2 * _GAP / start.numel()) ** 0.5,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit_nK = z_nf @ (parameter[:, :-1] * allowed_Kf).T + offset_nK + parameter[:, -1]
        entropy_n = F.cross_entropy(logit_nK, label_n, reduction="none")
        loss = (share_n * entropy_n).sum() + l2 / 2 * parameter[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    assert parameter.grad is not None
    return parameter.detach(), float(parameter.grad.abs().max())


def _scores(weight_KF: Tensor, bias_K: Tensor, input_nF: Tensor, label_n: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    logit_nK = input_nF.double() @ weight_KF.T + bias_K
    return float((logit_nK.argmax(1) == label_n).double().mean()), float(F.cross_entropy(logit_nK, label_n))
