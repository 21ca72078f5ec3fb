"""The linear head, fitted to the optimum.

Once the concepts are fixed, the head is a multinomial logistic regression: a convex problem, strictly so with an L2 term.
The paper trains it with AdamW; here L-BFGS in float64 solves it, so that a comparison of bottlenecks compares no learning
rates. Inputs are standardised for the fit, which makes one L2 strength mean the same for all of them, and the scaling is
folded back into weights and biases.

    minimise  sum_i w_(y_i) CE(W z_i + b, y_i) / sum_i w_(y_i)  +  l2 / 2 |W|^2,   z = (x - mean) / deviation

n pictures, F inputs of the head, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dotcbm.data.source import ConceptDataset
from dotcbm.metrics.standardize import standardize
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptBatch

__all__ = ["HEAD_L2_GRID", "HeadFit", "check_reads_truth", "collect_head_input", "fit_head", "true_head_input"]

HEAD_L2_GRID = (1.0, 0.3, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""Strengths that "auto" tries. With n pictures, scikit-learn's C is 1 / (l2 n)."""

_GAP = 1e-5  # how far from the optimum the objective may stay at worst (in practice it is a hundredth): |gradient|^2 / (2 l2)
_PATIENCE = 2  # weaker strengths that may be no better than the best before the search ends


@dataclass(frozen=True)
class HeadFit:
    """A fitted head.

    Attributes:
        weight_KF: (K, F) float64, for inputs as they are.
        bias_K: (K,) float64.
        l2: The strength used.
        train_accuracy: On the pictures it was fitted to.
        val_accuracy: On the validation pictures, NaN without any.
        gradient: Largest absolute entry of the gradient that is left, on standardised inputs.
    """

    weight_KF: Tensor
    bias_K: Tensor
    l2: float
    train_accuracy: float
    val_accuracy: float
    gradient: float


def fit_head(
    input_nF: Tensor,
    label_n: Tensor,
    *,
    num_classes: int,
    l2: float | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    class_weight_K: Tensor | None = None,
    max_iter: int = 2000,
) -> HeadFit:
    """Solve the problem at the head of this file.

    Args:
        input_nF: (n, F) what the head reads.
        label_n: (n,) class indices.
        num_classes: K.
        l2: Strength; None takes the one of `HEAD_L2_GRID` with the best validation accuracy (among equals the one with
            the smallest validation cross-entropy).
        val: Inputs and labels of the validation pictures.
        class_weight_K: (K,) weights of the classes' pictures; equal by default.
        max_iter: Of L-BFGS, for each strength.

    Raises:
        ValueError: l2 not positive, None without validation pictures, or inputs that are not finite.
    """
    if l2 is None and val is None:
        raise ValueError(
            "head_l2 'auto' chooses on a validation split, and there is none; set val_fraction above 0 or give head_l2 a number"
        )
    if l2 is not None and not l2 > 0:
        raise ValueError(f"head_l2 is {l2}; it must be positive, or the problem has no optimum on separable classes")
    if not input_nF.isfinite().all():
        row = int((~input_nF.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"what the head reads of training row {row} is not finite: the bottleneck has diverged; lower lr")
    x_nF = input_nF.double()
    z_nF, mean_F, deviation_F = standardize(x_nF)  # a constant input gets weight 0 from the L2 term
    weight = torch.zeros(num_classes, x_nF.shape[1] + 1, dtype=torch.float64, device=x_nF.device)
    best: tuple[float, float, HeadFit] | None = None
    behind = 0
    # From strong to weak: each optimum is a good start for the next.
    for strength in HEAD_L2_GRID if l2 is None else (l2,):
        weight, gradient = _solve(weight, z_nF, label_n, l2=strength, class_weight_K=class_weight_K, max_iter=max_iter)
        folded_KF = weight[:, :-1] / deviation_F
        bias_K = weight[:, -1] - folded_KF @ mean_F
        accuracy, entropy = (math.nan, math.nan) if val is None else _scores(folded_KF, bias_K, *val)
        fit = HeadFit(folded_KF, bias_K, strength, _scores(folded_KF, bias_K, x_nF, label_n)[0], accuracy, gradient)
        if best is None or (accuracy, -entropy) > best[:2]:
            best, behind = (accuracy, -entropy, fit), 0
        else:
            behind += 1
        if behind > _PATIENCE:
            break
    assert best is not None
    return best[2]


@torch.no_grad()
def collect_head_input(model: ConceptModel, batches: Iterable[ConceptBatch]) -> tuple[Tensor, Tensor]:
    """(n, F) float32 what the head reads and (n,) labels, on the CPU, in eval mode; the model's mode is restored."""
    device = next(model.bottleneck.parameters()).device
    was_training = model.training
    model.eval()
    inputs, labels = [], []
    try:
        for batch in batches:
            output = model.forward_batch(batch.to(device))
            inputs.append(model.bottleneck.head_input(output.concept_logit_BM, output.context_BX).float().cpu())
            labels.append(batch.label_B)
    finally:
        model.train(was_training)
    return torch.cat(inputs), torch.cat(labels)


def check_reads_truth(bottleneck: Bottleneck) -> None:
    """Check that a head can be fitted to true concepts: that certain concepts give it finite inputs.

    Raises:
        ValueError: The head reads logits, which are infinite for certain concepts, or a context that no label gives.
    """
    certain_1M = torch.full((1, bottleneck.problem.concepts.num_concepts), torch.inf)
    usable = bottleneck.reads_concepts and bottleneck.head.in_features == certain_1M.shape[1]
    if not usable or not bottleneck.head_input(certain_1M).isfinite().all():
        raise ValueError(
            f"regime 'independent' fits the head to true concepts, 0 or 1; the head of {type(bottleneck).__name__} reads something else "
            "than concept probabilities. Choose 'two_stage' or 'joint', or for CBM head_on: probability"
        )


def true_head_input(bottleneck: Bottleneck, dataset: ConceptDataset) -> tuple[Tensor, Tensor]:
    """(n, M) what the head would read of pictures whose concepts are certain, and (n,) labels.

    An unknown concept counts with its frequency among the known ones; 0.5 if it is never known.
    """
    truth_nM = dataset.concept_NM
    frequency_M = truth_nM.nanmean(0).nan_to_num(0.5)
    truth_nM = torch.where(truth_nM.isnan(), frequency_M, truth_nM)
    device = bottleneck.head.weight.device
    return bottleneck.head_input(torch.logit(truth_nM.to(device))).detach().float().cpu(), dataset.label_N


def _solve(
    start: Tensor, z_nF: Tensor, label_n: Tensor, *, l2: float, class_weight_K: Tensor | None, max_iter: int
) -> tuple[Tensor, float]:
    """(K, F + 1) weights and biases at the optimum, and the largest entry of the gradient there."""
    parameter = start.clone().requires_grad_()
    class_weight = None if class_weight_K is None else class_weight_K.to(z_nF)
    optimizer = torch.optim.LBFGS(
        [parameter],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=20,
        tolerance_grad=(2 * l2 * _GAP / start.numel()) ** 0.5,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        logit_nK = z_nF @ parameter[:, :-1].T + parameter[:, -1]
        return F.cross_entropy(logit_nK, label_n, weight=class_weight) + l2 / 2 * parameter[:, :-1].square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
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
