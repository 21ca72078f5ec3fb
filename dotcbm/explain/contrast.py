"""Why this class and not that one: the difference of two sums, concept by concept.

    logit_a - logit_b = (bias_a - bias_b) + sum_j (contribution_aj - contribution_bj)

A concept may speak for both classes; only what it gives one more than the other decides between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dotcbm.explain.naming import class_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dotcbm.explain.explanation import ConceptEvidence, Explanation

__all__ = ["Contrast", "Difference", "contrast"]


@dataclass(frozen=True)
class Difference:
    """What one concept does between two classes.

    Attributes:
        name: Of the concept.
        probability: That it is there.
        first, second: What it contributes to each of the two class logits.
    """

    name: str
    probability: float
    first: float
    second: float

    @property
    def value(self) -> float:
        """first - second: above 0 it speaks for the first class."""
        return self.first - self.second


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two classes of one picture.

    Attributes:
        explanation: Of the first class.
        other: Index of the second class.
        difference_M: (M,) contributions to the first class minus those to the second.
        bias: The same of the head's bias.
        margin: The same of the class logits; bias + difference_M.sum().
    """

    explanation: Explanation
    other: int
    difference_M: Tensor
    bias: float
    margin: float

    @property
    def other_class(self) -> str:
        """Name of the second class."""
        return self.explanation.class_names[self.other]

    def for_first(self, n: int = 5) -> tuple[Difference, ...]:
        """At most `n` concepts that speak for the first class rather than the second, strongest first."""
        return tuple(self._of(j) for j in self.difference_M.argsort(descending=True, stable=True)[:n].tolist() if self.difference_M[j] > 0)

    def for_second(self, n: int = 5) -> tuple[Difference, ...]:
        """At most `n` concepts that speak for the second class rather than the first, strongest first: the counter-evidence."""
        return tuple(self._of(j) for j in self.difference_M.argsort(stable=True)[:n].tolist() if self.difference_M[j] < 0)

    def against_second(self, n: int = 5) -> tuple[ConceptEvidence, ...]:
        """At most `n` concepts that speak against the second class by themselves, whatever they say of the first."""
        return self.explanation.for_class(self.other).against(n)

    def plot(self, n: int = 5) -> Figure:
        """The strongest concepts of both sides as bars; see `dotcbm.explain.answers.plot_contrast`."""
        from dotcbm.explain.answers import plot_contrast

        return plot_contrast(self, n=n)

    def _of(self, j: int) -> Difference:
        both = self.explanation.contribution_KM[:, j]
        return Difference(
            name=self.explanation.concept_names[j],
            probability=float(self.explanation.concept_M[j]),
            first=float(both[self.explanation.target]),
            second=float(both[self.other]),
        )


def contrast(explanation: Explanation, other: int | str | None = None) -> Contrast:
    """The explained class against another.

    Args:
        explanation: Of one picture; its `target` is the first class.
        other: The second class by name or index; the most probable of the others by default.

    Raises:
        ValueError: There is no such class, it is the first one, or there is only one.
    """
    if len(explanation.class_names) < 2:
        raise ValueError(f"{explanation.target_class!r} is the only class; there is nothing to compare it with")
    index = explanation.runner_up if other is None else class_index(other, explanation.class_names)
    if index == explanation.target:
        raise ValueError(f"{explanation.target_class!r} is the class that is explained; name another one to compare it with")
    first, second = explanation.target, index
    return Contrast(
        explanation=explanation,
        other=index,
        difference_M=explanation.contribution_KM[first] - explanation.contribution_KM[second],
        bias=float(explanation.bias_K[first] - explanation.bias_K[second]),
        margin=float(explanation.class_logit_K[first] - explanation.class_logit_K[second]),
    )
