"""What a solver returns, and how far it is from the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Extent", "Settings", "TransportPlan", "safe_log", "side_target"]

Extent = tuple[float, float]  # the least and the largest of some costs


class Settings(NamedTuple):
    """What every solver is told; see `dotcbm.transport.sinkhorn.sinkhorn`."""

    eps: float
    max_iter: int
    tol: float | None
    relax_patch: float | None
    relax_concept: float | None

    @property
    def powers(self) -> tuple[float, float]:
        """relax / (relax + eps) of the patches' and the concepts' side: how far an update goes; 1 where balanced."""
        power_u, power_v = (1.0 if relax is None else relax / (relax + self.eps) for relax in (self.relax_patch, self.relax_concept))
        return power_u, power_v

    @property
    def adjoint_tolerance(self) -> float:
        """Relative residual at which the float32 solve of the implicit gradient stops: a tenth of what is asked of the plan, within reason.

        A gradient solved to 1e-4 is within 3e-4 of the exact one at eps 0.01 and within 8e-5 at 0.05, where a plan to 1e-3 has it
        off by 9e-3 and 2e-3 (reports/benchmarks).
        """
        return 1e-5 if self.tol is None else min(max(self.tol / 10, 1e-5), 1e-4)

    @property
    def balanced(self) -> bool:
        """Whether both sides must be met."""
        return self.relax_patch is None and self.relax_concept is None


@dataclass(frozen=True)
class TransportPlan:
    """The plans of a batch of pictures: plan = exp(log_u + log_v - cost / eps).

    Attributes:
        plan_BNM: (B, N, M) mass that patch i sends to concept j.
        log_u_BN: (B, N) scaled potential of the patches, f / eps; -inf where theta is zero.
        log_v_BM: (B, M) scaled potential of the concepts, g / eps; -inf where gamma is zero.
        residual_B: (B,) L1 distance of the plan's marginals from what they must be, without gradient. On a relaxed side
            a marginal must be what the potentials prescribe (see `dotcbm.transport.sinkhorn.sinkhorn`).
        num_iter_B: (B,) updates of the concept potential that each picture took.
    """

    plan_BNM: Tensor
    log_u_BN: Tensor
    log_v_BM: Tensor
    residual_B: Tensor
    num_iter_B: Tensor

    @property
    def num_iter(self) -> int:
        """The most that a picture took; waits for the device."""
        return int(self.num_iter_B.max()) if len(self.num_iter_B) else 0


def safe_log(mass: Tensor) -> Tensor:
    """log(mass), and 0 with zero gradient where mass is 0: such entries are masked out by whoever uses it."""
    present = mass > 0
    return mass.where(present, mass.new_ones(())).log()


def side_target(marginal: Tensor, *, scaled_potential: Tensor, eps: float, relax: float | None) -> Tensor:
    """What a side of the plan must sum to at the optimum, given that side's potential without its log marginal.

    A balanced side must meet its marginal; a relaxed side marginal * exp(-potential / relax), the stationarity of the
    Kullback-Leibler penalty (Chizat et al. 2018, "Scaling algorithms for unbalanced optimal transport problems").
    """
    if relax is None:
        return marginal
    return marginal * (scaled_potential * (-eps / relax)).exp()
