"""What repeated measurements come to: a median and quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    lower: float
    upper: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))


def ratio(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast as `base`, by round; rounds that only one of them has are left out."""
    return Spread.of([b / t for b, t in zip(base, other, strict=False)])
