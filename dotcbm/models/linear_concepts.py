"""What the bottlenecks with a linear concept layer share: scaled features, activations made comparable, and probabilities.

B pictures, N patches, M concepts, D features, X any columns.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.losses import concept_loss
from dotcbm.models.pooling import Scaling
from dotcbm.models.readout import frequency_logit
from dotcbm.structures import Problem

__all__ = ["Calibration", "LinearConcepts", "Moments", "cubed_cosine"]

_MOMENTUM = 0.1  # of the running statistics, as torch's batch norm
_SMALLEST_ALPHA = 0.05  # a slope of 0 would leave no way back from a concept's logit to its activation


def cubed_cosine(activation_BX: Tensor, target_BX: Tensor) -> Tensor:
    """(X...) similarity over the batch, cos(a^3, t^3) of centred columns (Oikarinen et al., ICLR 2023, equation 1).

    The cube gives weight to the pictures in which a concept is strongest. Neither scale nor offset of a column matters. The
    statistics are those of the batch, under DDP of each process's own batch.

    Args:
        activation_BX: (B, X...).
        target_BX: (B, X...) of the same shape, or one that broadcasts to it; NaN where unknown: that row is left out of the column.

    Returns:
        In [-1, 1]; 0, with a zero gradient, for a column that does not vary among its known rows.
    """
    activation, target = torch.broadcast_tensors(activation_BX.float(), target_BX.float())
    known = ~target.isnan()
    count = known.sum(0).clamp(min=1)

    def cubed(column: Tensor) -> tuple[Tensor, Tensor]:
        column = torch.where(known, column, 0.0)
        centred = torch.where(known, column - column.sum(0) / count, 0.0)
        deviation = (centred.detach().square().sum(0) / count).sqrt()
        # Below that, what is left after centring is rounding.
        varies = deviation > 1e-5 * column.detach().abs().amax(0)
        return (centred / torch.where(varies, deviation, 1.0)) ** 3, varies

    a, a_varies = cubed(activation)
    t, t_varies = cubed(target)
    varies = a_varies & t_varies
    product = (a * t).sum(0)
    # Square roots of 0 have no gradient; such columns are replaced before the root, not after.
    squares = torch.where(varies, a.square().sum(0) * t.square().sum(0), 1.0)
    return torch.where(varies, product / squares.sqrt(), 0.0)


class Moments(nn.Module):
    """Running mean and deviation of X columns, updated in training from each batch of two pictures or more.

    Training and evaluation use the same running values, so that what is computed with them is one affine map and linear in the
    patches always. Under DDP each process updates from its own batch and Lightning hands on those of the first.
    """

    mean_X: Tensor
    variance_X: Tensor
    num_batches: Tensor

    def __init__(self, num_columns: int) -> None:
        """Args:
        num_columns: X.
        """
        super().__init__()
        self.register_buffer("mean_X", torch.zeros(num_columns))
        self.register_buffer("variance_X", torch.ones(num_columns))
        self.register_buffer("num_batches", torch.tensor(0))

    @property
    def deviation_X(self) -> Tensor:
        """(X,) positive."""
        return (self.variance_X + 1e-8).sqrt()

    @torch.no_grad()
    def update(self, value_BX: Tensor) -> None:
        """Take a batch; nothing happens outside of training."""
        if not self.training or len(value_BX) < 2:
            return
        self.num_batches += 1
        # At first the mean over batches: a start at 0 and 1 would linger.
        share = torch.clamp(1 / self.num_batches, min=_MOMENTUM)
        self.mean_X.lerp_(value_BX.float().mean(0), share)
        self.variance_X.lerp_(value_BX.float().var(0, unbiased=False), share)


class LinearConcepts(nn.Module):
    """A linear layer from the mean of the patches to concept activations, which is also the mean of its maps over the patches."""

    def __init__(self, problem: Problem, *, scaling: Scaling, dropout: float, bias: bool) -> None:
        """Args:
        problem: What the data and the encoder fix.
        scaling: "full" gives every pooled feature mean 0 and deviation 1; "half" divides by the root of the deviation only;
            "none" leaves features as they are.
        dropout: Share of the features dropped in training, for all patches of a picture the same.
        bias: Whether activations have an offset of their own.

        Raises:
            ValueError: A scaling that does not exist, or a dropout outside [0, 1).
        """
        super().__init__()
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling is {scaling!r}; choose 'none', 'half' or 'full'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; give a share in [0, 1)")
        self.scaling: Scaling = scaling
        self.moments = None if scaling == "none" else Moments(problem.patch_width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(problem.patch_width, problem.concepts.num_concepts, bias=bias)
        if bias and scaling != "none":
            # Centred features leave the concepts' frequency to the bias, which the first steps would spend their time on.
            with torch.no_grad():
                self.linear.bias.copy_(frequency_logit(problem))

    def forward(self, patch_BND: Tensor) -> Tensor:
        """(B, M) activations."""
        activation_BM = self.maps(patch_BND.to(self.linear.weight.dtype).mean(1, keepdim=True))[:, 0]
        return activation_BM if self.linear.bias is None else activation_BM + self.linear.bias

    def maps(self, patch_BND: Tensor) -> Tensor:
        """(B, N, M) whose mean over the patches is, but for the bias, the activation."""
        weight_MD = self.linear.weight
        patch_BND = patch_BND.to(weight_MD.dtype)
        if self.moments is not None:
            self.moments.update(patch_BND.detach().mean(1))
            deviation_D = self.moments.deviation_X
            factor_D = 1 / deviation_D if self.scaling == "full" else (deviation_D * deviation_D.mean()).rsqrt()
            weight_MD = weight_MD * factor_D  # scaled here and not at the patches, which are many more numbers
            patch_BND = patch_BND - self.moments.mean_X
        if self.training and self.dropout.p:
            patch_BND = patch_BND * self.dropout(torch.ones_like(patch_BND[:, :1]))
        return patch_BND @ weight_MD.T


class Calibration(nn.Module):
    """Activations without a scale to concept logits: z = (a - mean) / deviation, logit = alpha z + beta with alpha > 0.

    alpha and beta are fitted to the labels by cross-entropy on activations that are cut from the graph, so that the sigmoid of the
    logit is a probability where labels exist (Platt, 1999) and the activations are shaped by the method's own loss alone.
    """

    def __init__(self, problem: Problem, *, initial_alpha: float = 2.0) -> None:
        """Args:
        problem: What the data and the encoder fix; concepts start at their frequency.
        initial_alpha: alpha at the start: 2, so that two deviations are nearly a certainty.
        """
        super().__init__()
        num_concepts = problem.concepts.num_concepts
        self.moments = Moments(num_concepts)
        self.raw_alpha_M = nn.Parameter(torch.full((num_concepts,), initial_alpha - _SMALLEST_ALPHA).expm1().log())
        self.beta_M = nn.Parameter(frequency_logit(problem))

    @property
    def alpha_M(self) -> Tensor:
        """(M,) positive."""
        return _SMALLEST_ALPHA + F.softplus(self.raw_alpha_M)

    @property
    def slope_M(self) -> Tensor:
        """(M,) what the logit gains with the activation."""
        return self.alpha_M / self.moments.deviation_X

    def forward(self, activation_BM: Tensor) -> Tensor:
        """(B, M) logits."""
        self.moments.update(activation_BM.detach())
        return (activation_BM - self.moments.mean_X) * self.slope_M + self.beta_M

    def standardised(self, logit_BM: Tensor) -> Tensor:
        """(B, M) z of given logits: the inverse of the last step."""
        return (logit_BM - self.beta_M) / self.alpha_M

    def activation(self, logit_BM: Tensor) -> Tensor:
        """(B, M) activations of given logits: the inverse of `forward`."""
        return self.standardised(logit_BM) * self.moments.deviation_X + self.moments.mean_X

    def loss(self, logit_BM: Tensor, concepts_BM: Tensor, *, pos_weight_M: Tensor | None = None) -> Tensor:
        """The cross-entropy that alpha and beta are fitted by; see `dotcbm.losses.concept_loss`."""
        z_BM = self.standardised(logit_BM).detach()
        return concept_loss(self.alpha_M * z_BM + self.beta_M, concepts_BM, pos_weight_M=pos_weight_M)
