"""Cost curves: seconds of a stage by its size, fitted to measurements.

    line     seconds = latency + per_unit * size, both 0 or more (the alpha-beta model)
    table    the measured medians, interpolated between sizes; beyond the largest, the slope of its last part

A line is fitted to relative errors: chunk counts are decided at small sizes, where absolute errors, and so
r^2, say nothing. Where the line is more than LINE_ERROR off in the mean, for any third of the sizes, the
table stands for it.

FSMoE (2501.10714), section 3.2, fits lines by least squares. Units are the caller's: bytes, rows, products.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple, Protocol

import numpy as np

# Mean relative error of a line above which the measured table takes its place.
LINE_ERROR = 0.1
# Sizes without which nothing is fitted: a line through two points has no error to report.
LEAST_SIZES = 3
BUCKETS = ("small", "medium", "large")


class CostCurve(Protocol):
    """Seconds of a stage by its size."""

    def seconds(self, size: float) -> float:
        """Seconds of the stage at a size of 0 or more; 0 at size 0, where nothing is started."""
        ...


class CostLine(NamedTuple):
    """Seconds along a line.

    Attributes:
        latency_s: seconds of a stage of hardly any size.
        per_unit_s: seconds of a further unit.
    """

    latency_s: float
    per_unit_s: float

    def seconds(self, size: float) -> float:
        return self.latency_s + self.per_unit_s * size if size > 0 else 0.0


class CostTable(NamedTuple):
    """Measured seconds, interpolated.

    Attributes:
        sizes: ascending.
        measured_s: seconds at each.
    """

    sizes: tuple[float, ...]
    measured_s: tuple[float, ...]

    def seconds(self, size: float) -> float:
        if size <= 0:
            return 0.0
        if size <= self.sizes[-1]:
            # Below the smallest size the time is that of the smallest: latency dominates there.
            return float(np.interp(size, self.sizes, self.measured_s))
        rise_s = self.measured_s[-1] - self.measured_s[-2]
        slope = max(0.0, rise_s / (self.sizes[-1] - self.sizes[-2]))
        return self.measured_s[-1] + slope * (size - self.sizes[-1])


class Fit(NamedTuple):
    """A cost curve and how well it describes what was measured.

    Attributes:
        curve: the line, or the table where the line is too far off.
        line: the line.
        errors: mean relative error of the line, by third of the sizes: small, medium, large.
        r2: share of the variance that the line explains; hides errors at small sizes.
    """

    curve: CostLine | CostTable
    line: CostLine
    errors: dict[str, float]
    r2: float


def fit_cost(measured_s: Mapping[float, Sequence[float]]) -> Fit:
    """Fit a cost curve to repeated measurements.

    Args:
        measured_s: seconds of every repetition, by size. The median of a size counts.

    Raises:
        ValueError: fewer than three sizes, a size of 0 or less, or a time that is no positive number.
    """
    sizes = sorted(measured_s)
    if len(sizes) < LEAST_SIZES:
        raise ValueError(f"a cost needs {LEAST_SIZES} sizes or more, and {len(sizes)} were measured")
    if sizes[0] <= 0:
        raise ValueError(f"size {sizes[0]:g} is not above 0")
    medians_s = [median(measured_s[size]) for size in sizes]
    if not all(0 < seconds < float("inf") for seconds in medians_s):
        raise ValueError(f"{medians_s} are not all positive times")
    size_N, time_N = np.array(sizes, dtype=float), np.array(medians_s)
    line = _line(size_N, time_N)
    off_N = np.abs(line.latency_s + line.per_unit_s * size_N - time_N) / time_N
    thirds = np.array_split(off_N, len(BUCKETS))
    errors = {name: float(part.mean()) for name, part in zip(BUCKETS, thirds)}
    table = CostTable(tuple(sizes), tuple(medians_s))
    return Fit(line if max(errors.values()) <= LINE_ERROR else table, line, errors, _r2(line, size_N, time_N))


def _line(size_N: np.ndarray, time_N: np.ndarray) -> CostLine:
    """Least squares of the relative errors, with both numbers 0 or more.

    Of a convex function of two numbers that may not be negative, the minimum is the free one, or lies on an
    edge, where it is that of one number.
    """
    constant_N, slope_N, ones_N = 1 / time_N, size_N / time_N, np.ones_like(time_N)
    both = np.stack([constant_N, slope_N], 1)
    latency, per_unit = np.linalg.lstsq(both, ones_N, rcond=None)[0]
    if min(latency, per_unit) >= 0:
        return CostLine(float(latency), float(per_unit))
    edges = [CostLine(float(constant_N.sum() / (constant_N @ constant_N)), 0.0),
             CostLine(0.0, float(slope_N.sum() / (slope_N @ slope_N)))]
    return min(edges, key=lambda line: float(((line.latency_s + line.per_unit_s * size_N) / time_N - 1) @
                                             ((line.latency_s + line.per_unit_s * size_N) / time_N - 1)))


def _r2(line: CostLine, size_N: np.ndarray, time_N: np.ndarray) -> float:
    left = time_N - line.latency_s - line.per_unit_s * size_N
    around = time_N - time_N.mean()
    return float(1 - (left @ left) / (around @ around)) if around.any() else 1.0
