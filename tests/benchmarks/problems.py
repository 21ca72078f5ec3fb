"""Transport problems of the sizes and the difficulty that training meets, and how far a plan is from meeting its marginals.

B pictures, N patches, M concepts, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dotcbm.transport.cost import unit

__all__ = ["Inputs", "Size", "make_inputs", "residual"]

Size = tuple[int, int, int]

# Cosines in 16 dimensions spread with a deviation of 0.2, as those of trained adapters do, and a common component shifts them upwards.
# At (64, 196, 312) plain Sinkhorn then takes 18 passes to a residual of 1e-3 at eps 0.05, and 107 at eps 0.01 (8 pictures); on
# trained costs it took 14 and 172.
_WIDTH = 16
_COMMON = 0.7
_TEMPERATURE = 0.5


@dataclass(frozen=True)
class Inputs:
    """One batch of problems.

    Attributes:
        cost_BNM: (B, N, M) 1 - cosine of patches and concepts.
        theta_BN: (B, N) sums to 1.
        gamma_BM: (B, M) uniform.
        weight_BNM: (B, N, M) gradient of the loss with respect to the plan: the loss is (plan * weight).sum().
        patch_BND: (B, N, D) of length 1; for rivals that take points instead of costs.
        concept_MD: (M, D) of length 1.
    """

    cost_BNM: Tensor
    theta_BN: Tensor
    gamma_BM: Tensor
    weight_BNM: Tensor
    patch_BND: Tensor
    concept_MD: Tensor

    def with_gradients(self) -> Inputs:
        """The same numbers, with fresh leaves for the cost and both marginals."""
        cost, theta, gamma = (x.detach().requires_grad_() for x in (self.cost_BNM, self.theta_BN, self.gamma_BM))
        return replace(self, cost_BNM=cost, theta_BN=theta, gamma_BM=gamma)

    def double(self) -> Inputs:
        """The same in float64, where marginals rounded to float32 must be made to sum to 1 again: else no plan meets both."""
        wide = Inputs(*(x.double() for x in vars(self).values()))
        theta_BN, gamma_BM = (mass / mass.sum(1, keepdim=True) for mass in (wide.theta_BN, wide.gamma_BM))
        return replace(wide, theta_BN=theta_BN, gamma_BM=gamma_BM)

    def gradients(self, plan_BNM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the loss (plan * weight).sum() with respect to cost, theta and gamma.

        The weight is handed over as the gradient of the plan, so that no array of the loss's own is timed or counted.
        """
        cost, theta, gamma = torch.autograd.grad(plan_BNM, (self.cost_BNM, self.theta_BN, self.gamma_BM), self.weight_BNM)
        return cost, theta, gamma


def make_inputs(size: Size, *, device: torch.device, seed: int) -> Inputs:
    """Problems from random unit features that share a common component; the same numbers on every device.

    Args:
        size: (B, N, M).
        device: Where they go.
        seed: Of all of them.
    """
    B, N, M = size
    rng = torch.Generator().manual_seed(seed)
    common_D = _COMMON * unit(torch.randn(_WIDTH, generator=rng))
    patch_BND = unit(unit(torch.randn(B, N, _WIDTH, generator=rng)) + common_D)
    concept_MD = unit(unit(torch.randn(M, _WIDTH, generator=rng)) + common_D)
    return Inputs(
        cost_BNM=(1 - patch_BND @ concept_MD.T).to(device),
        theta_BN=torch.softmax(torch.randn(B, N, generator=rng) / _TEMPERATURE, dim=1).to(device),
        gamma_BM=torch.full((B, M), 1 / M, device=device),
        weight_BNM=torch.randn(B, N, M, generator=rng).to(device),
        patch_BND=patch_BND.to(device),
        concept_MD=concept_MD.to(device),
    )


def residual(plan_BNM: Tensor, inputs: Inputs) -> float:
    """The L1 violation, rows plus columns, of the worst picture, summed in float64.

    Every solver meets one side to rounding, and which one differs; the sum treats them alike.
    """
    rows_B = (plan_BNM.sum(2, dtype=torch.float64) - inputs.theta_BN).abs().sum(1)
    columns_B = (plan_BNM.sum(1, dtype=torch.float64) - inputs.gamma_BM).abs().sum(1)
    return float((rows_B + columns_B).max())
