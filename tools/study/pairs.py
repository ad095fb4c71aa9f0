"""Differences of two arms of a study over equal seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Student's t, two-sided 95 %, by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


class Difference(NamedTuple):
    """Difference of two arms over the same seeds: mean, half of the 95 % interval, number of seeds."""

    mean: float
    half: float
    seeds: int

    @property
    def spread(self) -> float:
        """Standard deviation of a pair's difference."""
        return self.half * self.seeds**0.5 / T_95.get(self.seeds - 1, 2.0)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def difference(values: Sequence[float]) -> Difference | None:
    """Mean of the differences of pairs, with its interval; None below two pairs."""
    if len(values) < 2:
        return None
    half = T_95.get(len(values) - 1, 2.0) * float(np.std(values, ddof=1)) / len(values)**0.5
    return Difference(float(np.mean(values)), half, len(values))


def smallest_seen(spread: float, seeds: int) -> float:
    """Smallest difference that so many pairs distinguish from zero.

    Args:
        spread: standard deviation of the difference of a pair.
        seeds: number of pairs.
    """
    return T_95.get(seeds - 1, 2.0) * spread / seeds**0.5
