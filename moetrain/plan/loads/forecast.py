"""Forecasts of expert loads, in integers, so that ranks that saw the same loads expect the same.

    MeanForecast     mean of the last steps (Hecate: five)
    TrendForecast    exponential moving average with a trend (Holt), in fixed point
    LoadForecaster   one of them, checked: a bank that it got wrong is planned from the last step's loads

Loads are those of all banks of experts in one flat int64 buffer, as they are counted. What a checkpoint keeps
of a forecast are its `tables`. They are written in place, so reading into them restores the forecast.

Shapes: L experts of all banks together, w steps of a window, r banks, E experts of one bank.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 8        # bits after the binary point of a trend forecast's level and slope
ONE = 1 << FRACTION_BITS


class Forecast(Protocol):
    """Predictor of the next step's loads. Its tables are zeros until it has observed a step."""

    def observe(self, loads_L: Tensor) -> None:
        """Take in the loads of a step, int64 [L]. The caller may overwrite them afterwards."""

    def expected(self) -> Tensor:
        """Loads expected of the next step, int64 [L], never negative."""

    def last(self) -> Tensor:
        """Loads of the step observed last, int64 [L]."""

    def tables(self) -> dict[str, Tensor]:
        """State of the forecast by name, int64."""


class MeanForecast:
    """Mean of the last steps.

    Args:
        size: L, experts of all banks.
        window: steps that count.
    """

    def __init__(self, size: int, window: int = 5) -> None:
        # Newest step last. A step of zeros is one that has not been observed yet.
        self.loads_wL = torch.zeros(window, size, dtype=torch.int64)

    def observe(self, loads_L: Tensor) -> None:
        self.loads_wL.copy_(torch.cat([self.loads_wL[1:], loads_L[None]]))

    def expected(self) -> Tensor:
        """Mean of the steps observed, rounded to the nearest integer, int64 [L]."""
        steps = max(1, int(self.loads_wL.any(1).sum()))
        return (2 * self.loads_wL.sum(0) + steps) // (2 * steps)

    def last(self) -> Tensor:
        return self.loads_wL[-1]

    def tables(self) -> dict[str, Tensor]:
        return {"loads": self.loads_wL}


class TrendForecast:
    """Exponential moving average with a trend (Holt's linear method).

    Args:
        size: L, experts of all banks.
        level: weight of a new observation in the level, in (0, 1]; rounded to 1/256.
        trend: weight of a new slope in the trend, in [0, 1]; rounded to 1/256. With 0 this is a plain moving
            average.
    """

    def __init__(self, size: int, level: float = 0.5, trend: float = 0.1) -> None:
        assert 0 < level <= 1 and 0 <= trend <= 1, (level, trend)
        self.level, self.trend = max(1, round(level * ONE)), round(trend * ONE)
        self.loads_1L = torch.zeros(1, size, dtype=torch.int64)
        self.level_L = torch.zeros(size, dtype=torch.int64)                  # loads * 256
        self.slope_L = torch.zeros(size, dtype=torch.int64)                  # change of loads in a step * 256

    def observe(self, loads_L: Tensor) -> None:
        now_L = loads_L * ONE
        if not self.level_L.any():                                           # the first observation
            self.level_L.copy_(now_L)
        expected_L = self.level_L + self.slope_L
        level_L = expected_L + (self.level * (now_L - expected_L) >> FRACTION_BITS)
        self.slope_L += self.trend * (level_L - self.level_L - self.slope_L) >> FRACTION_BITS
        self.level_L.copy_(level_L)
        self.loads_1L.copy_(loads_L[None])

    def expected(self) -> Tensor:
        return ((self.level_L + self.slope_L + ONE // 2) >> FRACTION_BITS).clamp(min=0)

    def last(self) -> Tensor:
        return self.loads_1L[0]

    def tables(self) -> dict[str, Tensor]:
        return {"loads": self.loads_1L, "level": self.level_L, "slope": self.slope_L}


def forecast_of(kind: str, size: int, window: int) -> Forecast:
    """Make the forecast that a config names.

    Args:
        kind: `mean` or `trend`.
        size: L, experts of all banks.
        window: steps that a mean is over.
    """
    return TrendForecast(size) if kind == "trend" else MeanForecast(size, window)


class LoadForecaster:
    """Loads that planners plan for: a forecast, or the last step's loads where the forecast was wrong.

    Args:
        forecast: forecast of the loads of all banks.
        sizes: number of experts by bank.
        max_error: share of a bank's rows, in thousandths (`misplaced_permille`), above which its forecast
            counts as wrong, so that the last step's loads stand for the next. 1000 never falls back.
    """

    def __init__(self, forecast: Forecast, sizes: Mapping[str, int], max_error: int) -> None:
        self.forecast, self.sizes, self.max_error = forecast, sizes, max_error
        # Error of each bank's forecast of the last step; 0 before there was a forecast.
        self.errors_r = torch.zeros(len(sizes), dtype=torch.int64)

    def observe(self, loads_L: Tensor) -> None:
        """Compare the loads of a step with the forecast of them, then add them to it."""
        if self.forecast.expected().any():
            pairs = zip(self._by_bank(self.forecast.expected()), self._by_bank(loads_L))
            errors = [misplaced_permille(expected, seen) for expected, seen in pairs]
            self.errors_r.copy_(torch.tensor(errors))
        self.forecast.observe(loads_L)

    def loads(self) -> dict[str, np.ndarray]:
        """Rows to expect of each expert, int64 [E] by bank."""
        expected, last = self._by_bank(self.forecast.expected()), self._by_bank(self.forecast.last())
        return {name: last[index] if error > self.max_error else expected[index]
                for index, (name, error) in enumerate(zip(self.sizes, self.errors_r.tolist()))}

    def tables(self) -> dict[str, Tensor]:
        """State of the forecast and its errors by name, int64: what a checkpoint keeps."""
        return {**self.forecast.tables(), "errors": self.errors_r}

    def _by_bank(self, flat_L: Tensor) -> list[np.ndarray]:
        return [loads_E.numpy() for loads_E in flat_L.split(list(self.sizes.values()))]


def misplaced_permille(expected_L: np.ndarray, seen_L: np.ndarray) -> int:
    """Error of a forecast: thousandths of the rows that went to other experts than expected.

    Only shares count, whatever the totals: 0 where they agree, 1000 where no expert that was expected got any
    row. It is an integer, so that ranks agree on whether to fall back.
    """
    expected, seen = int(expected_L.sum()), int(seen_L.sum())
    if expected == 0 or seen == 0:
        return 0 if expected == seen else 1000
    # Python integers instead of int64: products of counts are exact at any size.
    surplus_L = np.maximum(seen_L.astype(object) * expected - expected_L.astype(object) * seen, 0)
    return int(surplus_L.sum()) * 1000 // (expected * seen)
