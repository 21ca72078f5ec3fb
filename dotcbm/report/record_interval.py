"""A figure with its uncertainty: what all records of reports are made of."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Interval"]


@dataclass(frozen=True)
class Interval:
    """A figure with its uncertainty.

    Attributes:
        value: None where it is not defined.
        low, high: Ends of the interval; None where there is none.
        n: What was counted (pictures, or pairs of picture and concept).
        over: What n counts, in words: "pictures", "pairs of picture and concept", "concepts".
        level: Coverage of the interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    over: str = "pictures"
    level: float = 0.95
