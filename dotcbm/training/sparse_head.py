"""Sparse linear heads: an elastic-net path, cut to a wanted number of effective concepts a class (NEC).

    minimise  sum_i w_(y_i) CE(W z_i + b, y_i) / sum_i w_(y_i)  +  strength (alpha |W|_1 + (1 - alpha) / 2 |W|^2)

for strengths that fall geometrically from the one where all weights vanish, each start being the last optimum; z are the
inputs, standardised, and biases are free. This is the path of GLM-SAGA (Wong et al., "Leveraging sparse linear layers for
debuggable deep networks", ICML 2021), which Label-free CBM and VLG-CBM read their heads from.

Departures, all in the solver: not SAGA, but accelerated proximal gradient steps (FISTA with restarts) that find which weights
are not zero, and Newton steps on those, until the optimality conditions hold to a hundredth of the strength. Measured on birds
(n = 1,500, F = 112, K = 50, one core): 10 s for the whole path, where FISTA alone needs over 30 s, because concepts are
correlated; VLG-CBM runs SAGA for 500 epochs at most, whose optima are looser and so denser. And the largest strength is computed
from the data, where VLG-CBM takes a constant (0.1).

n pictures, F inputs of the head, K classes, C = F + 1 columns of a head with its bias, S weights that are not zero.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dotcbm.metrics.sparsity import nec as count_nec
from dotcbm.metrics.sparsity import truncate_weights
from dotcbm.metrics.standardize import standardize
from dotcbm.training.head_fit import HeadFit

__all__ = ["SparsePath", "fit_path", "fit_sparse_head", "largest_strength"]

_SPAN = 2.0**-15  # weakest over largest strength: VLG-CBM's 150 steps of 2^0.1
_TOLERANCE = 1e-2  # of the optimality conditions, in strengths; Newton steps end far below
_ROUNDS = 100  # at most, of _STEPS proximal steps and Newton steps on the support; birds need 1 to 3
_STEPS = 20
_MAX_SUPPORT = 2500  # weights up to which Newton steps are taken: the Hessian is a matrix of their number squared
_ABSENT = 30.0  # a class without pictures has its best bias at minus infinity; its logit stays this far below all others


@dataclass(frozen=True)
class SparsePath:
    """Heads from sparse to dense. Build it with `fit_path`.

    Attributes:
        strengths: Largest first.
        fits: The optimum at each strength; `HeadFit.l2` holds the strength, `HeadFit.gradient` the violation of the optimality
            conditions that is left (KKT residual on standardised inputs, to be compared with the strength).
        necs: NEC of each fit.
        mean_F, deviation_F: What standardised the inputs.
        train, val: Inputs and labels that accuracies are counted on.
    """

    strengths: tuple[float, ...]
    fits: tuple[HeadFit, ...]
    necs: tuple[float, ...]
    mean_F: Tensor
    deviation_F: Tensor
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor] | None = None

    def at(self, nec: int) -> HeadFit:
        """The fit of the smallest NEC that is not below `nec`, cut to the nec * K weights of largest magnitude.

        VLG-CBM (evaluations/sparse_utils.py) walks from the largest strength to the first fit whose share of weights above 1e-5
        reaches the target, which is the same fit wherever the NEC grows along the path; takes the last fit if none reaches it, as
        here; cuts the weights for normalised concepts by magnitude over the whole matrix; and keeps the bias of the uncut
        fit: nothing is fitted again. So here: magnitudes are those for standardised inputs, whose bias stays.

        Args:
            nec: Weights to keep for each class in the mean.

        Returns:
            A head for inputs as they are, with the accuracies of the cut weights. `nec` of it is lower where the path ends early.

        Raises:
            ValueError: nec below 1.
        """
        dense = [i for i, found in enumerate(self.necs) if found >= nec]
        i = min(dense, key=lambda i: (self.necs[i], i)) if dense else len(self.fits) - 1
        fit = self.fits[i]
        weight_KF = truncate_weights(fit.weight_KF * self.deviation_F, nec) / self.deviation_F
        bias_K = fit.bias_K + (fit.weight_KF - weight_KF) @ self.mean_F
        return replace(
            fit,
            weight_KF=weight_KF,
            bias_K=bias_K,
            train_accuracy=_accuracy(weight_KF, bias_K, self.train),
            val_accuracy=_accuracy(weight_KF, bias_K, self.val),
        )


def fit_path(
    input_nF: Tensor,
    label_n: Tensor,
    *,
    num_classes: int,
    alpha: float = 0.99,
    num_strengths: int = 50,
    max_nec: float = 30,
    val: tuple[Tensor, Tensor] | None = None,
    class_weight_K: Tensor | None = None,
) -> SparsePath:
    """Solve the problem at the head of this file for falling strengths, until the NEC passes `max_nec`.

    Args:
        input_nF: (n, F) what the head reads.
        label_n: (n,) class indices.
        num_classes: K.
        alpha: Share of the L1 penalty in (0, 1]; the default is that of Label-free CBM and VLG-CBM.
        num_strengths: At most; they span a factor of 2^15, as VLG-CBM's do.
        max_nec: Where to stop.
        val: Inputs and labels of the validation pictures, for accuracies alone.
        class_weight_K: (K,) weights of the classes' pictures; equal by default.

    Returns:
        Between 1 and `num_strengths` fits; the first has no weights.

    Raises:
        ValueError: A setting out of range, inputs that are not finite, or labels out of range.
    """
    x_nF = _checked(input_nF, label_n, num_classes=num_classes, alpha=alpha, num_strengths=num_strengths)
    z_nF, mean_F, deviation_F = standardize(x_nF)
    problem = _Problem.of(z_nF, label_n, num_classes=num_classes, alpha=alpha, class_weight_K=class_weight_K)
    train, present_P = (input_nF, label_n), problem.present_P
    largest = problem.largest_strength()
    weight_PC, curvature, last = problem.empty(), 1.0, largest
    strengths: list[float] = []
    fits: list[HeadFit] = []
    necs: list[float] = []
    for step in range(num_strengths):
        strength = largest * _SPAN ** (step / max(num_strengths - 1, 1))
        weight_PC, violation, curvature = _solve(problem, weight_PC, strength=strength, last=last, curvature=curvature)
        last = strength
        weight_KC = torch.zeros(num_classes, weight_PC.shape[1], dtype=x_nF.dtype, device=x_nF.device)
        if len(present_P) < num_classes:
            weight_KC[:, -1] = float((problem.z_nC @ weight_PC.T).min()) - _ABSENT
        weight_KC[present_P] = weight_PC
        weight_KF = weight_KC[:, :-1] / deviation_F
        bias_K = weight_KC[:, -1] - weight_KF @ mean_F
        fits.append(HeadFit(weight_KF, bias_K, strength, _accuracy(weight_KF, bias_K, train), _accuracy(weight_KF, bias_K, val), violation))
        strengths.append(strength)
        necs.append(count_nec(weight_KF))
        if necs[-1] > max_nec:
            break
    return SparsePath(tuple(strengths), tuple(fits), tuple(necs), mean_F, deviation_F, train, val)


def fit_sparse_head(
    input_nF: Tensor,
    label_n: Tensor,
    *,
    num_classes: int,
    nec: int,
    val: tuple[Tensor, Tensor] | None = None,
    class_weight_K: Tensor | None = None,
) -> HeadFit:
    """`SparsePath.at(nec)` of a path that stops as soon as it is dense enough; see `fit_path` for the other arguments.

    Raises:
        ValueError: nec below 1, or as `fit_path`.
    """
    if nec < 1:
        raise ValueError(f"nec is {nec}; a class needs one weight at least")
    path = fit_path(input_nF, label_n, num_classes=num_classes, max_nec=nec, val=val, class_weight_K=class_weight_K)
    return path.at(nec)


def largest_strength(
    input_nF: Tensor, label_n: Tensor, *, num_classes: int, alpha: float = 0.99, class_weight_K: Tensor | None = None
) -> float:
    """The smallest strength at which all weights vanish: max |sum_i w_i z_ij (1[y_i = k] - share of k)| / (alpha sum_i w_i).

    Args and errors as `fit_path`.
    """
    x_nF = _checked(input_nF, label_n, num_classes=num_classes, alpha=alpha, num_strengths=1)
    return _Problem.of(
        standardize(x_nF)[0], label_n, num_classes=num_classes, alpha=alpha, class_weight_K=class_weight_K
    ).largest_strength()


@dataclass(frozen=True)
class _Problem:
    """The smooth part: cross-entropy of the P classes that have pictures. The last of the C columns of z is 1."""

    z_nC: Tensor
    target_nP: Tensor
    share_n: Tensor  # weights of the pictures, summing to 1
    present_P: Tensor
    alpha: float

    @classmethod
    def of(cls, z_nF: Tensor, label_n: Tensor, *, num_classes: int, alpha: float, class_weight_K: Tensor | None) -> _Problem:
        weight_K = torch.ones(num_classes) if class_weight_K is None else class_weight_K
        share_n = weight_K.to(z_nF)[label_n]
        present_P = label_n.unique()
        target_nP = (label_n[:, None] == present_P).to(z_nF)
        z_nC = torch.cat([z_nF, torch.ones_like(z_nF[:, :1])], 1)
        return cls(z_nC, target_nP, share_n / share_n.sum(), present_P, alpha)

    def empty(self) -> Tensor:
        """(P, C) the optimum without weights: biases that give the classes' shares."""
        weight_PC = self.z_nC.new_zeros(self.target_nP.shape[1], self.z_nC.shape[1])
        weight_PC[:, -1] = (self.share_n @ self.target_nP).log()
        return weight_PC

    def largest_strength(self) -> float:
        """Where the penalty outweighs every entry of the gradient without weights. The floor serves inputs that say nothing."""
        return max(float(self.gradient(self.empty())[1][:, :-1].abs().max()) / self.alpha, torch.finfo(torch.float64).tiny ** 0.5)

    def loss(self, weight_PC: Tensor) -> float:
        logit_nP = self.z_nC @ weight_PC.T
        return float(self.share_n @ (logit_nP.logsumexp(1) - (logit_nP * self.target_nP).sum(1)))

    def gradient(self, weight_PC: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient."""
        logit_nP = self.z_nC @ weight_PC.T
        normal_n = logit_nP.logsumexp(1)
        loss = float(self.share_n @ (normal_n - (logit_nP * self.target_nP).sum(1)))
        residual_nP = ((logit_nP - normal_n[:, None]).exp() - self.target_nP) * self.share_n[:, None]
        return loss, residual_nP.T @ self.z_nC

    def penalty(self, weight_PC: Tensor, *, strength: float) -> float:
        inner = weight_PC[:, :-1]
        return strength * (self.alpha * float(inner.abs().sum()) + (1 - self.alpha) / 2 * float(inner.square().sum()))

    def violation(self, weight_PC: Tensor, gradient_PC: Tensor, *, strength: float) -> float:
        """Largest distance of an entry of minus the gradient from the subdifferential of the penalty; 0 at the optimum."""
        inner = weight_PC[:, :-1]
        slope = gradient_PC[:, :-1] + strength * (1 - self.alpha) * inner
        l1 = strength * self.alpha
        off = torch.where(inner != 0, (slope + l1 * inner.sign()).abs(), (slope.abs() - l1).clamp(min=0))
        return float(torch.cat([off.flatten(), gradient_PC[:, -1].abs()]).max())


def _solve(problem: _Problem, weight_PC: Tensor, *, strength: float, last: float, curvature: float) -> tuple[Tensor, float, float]:
    """The optimum at one strength, its violation of the optimality conditions, and the curvature that the steps settled at."""
    gradient_PC = problem.gradient(weight_PC)[1]
    # Sequential strong rule (Tibshirani et al., JRSS B 2012): columns below this will stay empty; the full check follows each round.
    threshold = problem.alpha * max(2 * strength - last, 0.0)
    violation = math.inf
    for _ in range(_ROUNDS):
        open_C = (weight_PC != 0).any(0) | (gradient_PC.abs().amax(0) > threshold)
        open_C[-1] = True
        part = replace(problem, z_nC=problem.z_nC[:, open_C])
        part_PC, curvature = _proximal_steps(part, weight_PC[:, open_C], strength=strength, curvature=curvature)
        if part.violation(part_PC, part.gradient(part_PC)[1], strength=strength) > _TOLERANCE * strength:
            part_PC = _newton_steps(part, part_PC, strength=strength)
        weight_PC = torch.zeros_like(weight_PC)
        weight_PC[:, open_C] = part_PC
        gradient_PC = problem.gradient(weight_PC)[1]
        violation = problem.violation(weight_PC, gradient_PC, strength=strength)
        if violation <= _TOLERANCE * strength:
            return weight_PC, violation, curvature
        threshold = min(threshold, problem.alpha * strength)
    warnings.warn(
        f"the sparse head at strength {strength:.3g} stopped {violation / strength:.1g} strengths from its optimum, where "
        f"{_TOLERANCE:g} is wanted; its weights may be denser than the optimum's",
        stacklevel=3,
    )
    return weight_PC, violation, curvature


def _proximal_steps(problem: _Problem, weight_PC: Tensor, *, strength: float, curvature: float) -> tuple[Tensor, float]:
    """FISTA (Beck and Teboulle 2009) with gradient restarts (O'Donoghue and Candes 2015) and a curvature that may fall again."""
    ahead_PC, momentum = weight_PC, 1.0
    for _ in range(_STEPS):
        loss, gradient_PC = problem.gradient(ahead_PC)
        while True:
            new_PC = ahead_PC - gradient_PC / curvature
            shrunk = new_PC[:, :-1].abs() - strength * problem.alpha / curvature
            new_PC[:, :-1] = new_PC[:, :-1].sign() * shrunk.clamp(min=0) / (1 + strength * (1 - problem.alpha) / curvature)
            step_PC = new_PC - ahead_PC
            bound = loss + float((gradient_PC * step_PC).sum()) + curvature / 2 * float(step_PC.square().sum())
            if problem.loss(new_PC) <= bound + 1e-12 * (1 + abs(loss)):
                break
            curvature *= 2
        if float(((ahead_PC - new_PC) * (new_PC - weight_PC)).sum()) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead_PC = new_PC + (momentum - 1) / following * (new_PC - weight_PC)
        weight_PC, momentum, curvature = new_PC, following, 0.97 * curvature
    return weight_PC, curvature


def _newton_steps(problem: _Problem, weight_PC: Tensor, *, strength: float) -> Tensor:
    """Newton's method on the weights that are not zero, signs kept: one that would change its sign becomes 0."""
    bias = weight_PC.shape[1] - 1
    value = problem.loss(weight_PC) + problem.penalty(weight_PC, strength=strength)
    for _ in range(6):  # quadratic convergence: 3 or 4 do
        support = weight_PC != 0
        support[:, bias] = True
        k_S, j_S = support.nonzero(as_tuple=True)
        if len(k_S) > _MAX_SUPPORT:
            break
        free_S, old_S = j_S == bias, weight_PC[k_S, j_S]
        slope_S = strength * (problem.alpha * old_S.sign() + (1 - problem.alpha) * old_S)
        slope_S = problem.gradient(weight_PC)[1][k_S, j_S] + torch.where(free_S, 0.0, slope_S)
        if float(slope_S.abs().max()) <= 0.01 * _TOLERANCE * strength:
            break
        hessian_SS = _hessian(problem, weight_PC, k_S, j_S)
        # Adding the same number to all biases changes nothing: the small diagonal picks the shortest of such steps.
        hessian_SS.diagonal().add_(torch.where(free_S, 1e-9, strength * (1 - problem.alpha) + 1e-12))
        step_S = torch.linalg.solve(hessian_SS, -slope_S)
        for halving in range(12):  # where the support is still too large, only short steps descend, and empty some of it
            share = 0.5**halving
            new_S = old_S + share * step_S
            new_S = torch.where(~free_S & (new_S * old_S < 0), 0.0, new_S)
            new_PC = weight_PC.index_put((k_S, j_S), new_S)
            new = problem.loss(new_PC) + problem.penalty(new_PC, strength=strength)
            if new < value:
                break
        else:
            break
        weight_PC, value = new_PC, new
    return weight_PC


def _hessian(problem: _Problem, weight_PC: Tensor, k_S: Tensor, j_S: Tensor) -> Tensor:
    """(S, S) second derivatives of the loss: sum_i share_i z_is z_it (p_is [k_s = k_t] - p_is p_it); k_S ascends."""
    probability_nP = (problem.z_nC @ weight_PC.T).softmax(1)
    z_nS = problem.z_nC[:, j_S]
    shared_nS = z_nS * probability_nP[:, k_S]
    weighed_nS = shared_nS * problem.share_n[:, None]
    hessian_SS = -(shared_nS.T @ weighed_nS)
    start = 0
    for size in k_S.bincount().tolist():
        block = slice(start, start + size)
        hessian_SS[block, block] += weighed_nS[:, block].T @ z_nS[:, block]
        start += size
    return hessian_SS


def _checked(input_nF: Tensor, label_n: Tensor, *, num_classes: int, alpha: float, num_strengths: int) -> Tensor:
    """The inputs in float64."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; the share of the L1 penalty lies in (0, 1], or nothing becomes sparse")
    if num_strengths < 1:
        raise ValueError(f"num_strengths is {num_strengths}; a path has one at least")
    if input_nF.ndim != 2 or len(input_nF) != len(label_n) or not len(label_n):
        raise ValueError(f"inputs have shape {tuple(input_nF.shape)} and labels {tuple(label_n.shape)}; give (n, F) and (n,), n above 0")
    if not input_nF.isfinite().all():
        row = int((~input_nF.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"what the head reads of training row {row} is not finite: the bottleneck has diverged; lower lr")
    if int(label_n.min()) < 0 or int(label_n.max()) >= num_classes:
        raise ValueError(f"labels run from {int(label_n.min())} to {int(label_n.max())}; {num_classes} classes are 0 to {num_classes - 1}")
    return input_nF.detach().double()


def _accuracy(weight_KF: Tensor, bias_K: Tensor, data: tuple[Tensor, Tensor] | None) -> float:
    """NaN without data."""
    if data is None:
        return math.nan
    return float(((data[0].to(weight_KF) @ weight_KF.T + bias_K).argmax(1) == data[1]).double().mean())
