"""What loads to expect next: forecasts in integers, so that ranks that saw the same loads expect the same.

    MeanForecast    mean of the last steps (Hecate: five)
    TrendForecast   exponential moving average with a trend (Holt), in fixed point
    LoadForecaster         one of them, watched: a layer that it got wrong is planned from the last step's loads alone

Loads are those of all routers in one flat int64 buffer, as they are counted. What a checkpoint keeps of a forecast are its
`tables`, written to in place: reading into them restores it.

Shapes: L experts of all routers together, w steps of a window, r routers.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 8                # bits behind the point of a trend forecast's level and slope
ONE = 1 << FRACTION_BITS


class Forecast(Protocol):
    """Its tables begin as zeros, and are zeros until something was seen."""

    def observe(self, loads_L: Tensor) -> None:
        """The loads of a step."""

    def expected(self) -> Tensor:
        """Those of the next, int64 [L], never negative."""

    def last(self) -> Tensor:
        """Those of the step observed last."""

    def tables(self) -> dict[str, Tensor]:
        """Its state by name, int64."""


class MeanForecast:
    """size: L. window: steps that count."""

    def __init__(self, size: int, window: int = 5) -> None:
        self.loads_wL = torch.zeros(window, size, dtype=torch.int64)         # newest last; steps of zeros are none

    def observe(self, loads_L: Tensor) -> None:
        self.loads_wL.copy_(torch.cat([self.loads_wL[1:], loads_L[None]]))

    def expected(self) -> Tensor:
        """Rounded to the nearest."""
        steps = max(1, int(self.loads_wL.any(1).sum()))
        return (2 * self.loads_wL.sum(0) + steps) // (2 * steps)

    def last(self) -> Tensor:
        return self.loads_wL[-1]

    def tables(self) -> dict[str, Tensor]:
        return {"loads": self.loads_wL}


class TrendForecast:
    """size: L. level, trend: weights of what is new, in (0, 1] and [0, 1]; kept to 1/256. With trend 0 a plain moving
    average."""

    def __init__(self, size: int, level: float = 0.5, trend: float = 0.1) -> None:
        assert 0 < level <= 1 and 0 <= trend <= 1, (level, trend)
        self.level, self.trend = max(1, round(level * ONE)), round(trend * ONE)
        self.loads_1L = torch.zeros(1, size, dtype=torch.int64)
        self.level_L = torch.zeros(size, dtype=torch.int64)                  # loads * 256
        self.slope_L = torch.zeros(size, dtype=torch.int64)                  # loads a step * 256

    def observe(self, loads_L: Tensor) -> None:
        now_L = loads_L * ONE
        if not self.level_L.any():                                           # nothing was seen
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
    """The forecast that a config names."""
    return TrendForecast(size) if kind == "trend" else MeanForecast(size, window)


class LoadForecaster:
    """What planners are told to expect, and how far the forecast was off.

    sizes: experts by router. fallback: thousandths of a router's rows (`misplaced_permille`) above which its forecast counts
    as wrong, and the last step's loads stand for the next; 1000 never happens.
    """

    def __init__(self, forecast: Forecast, sizes: Mapping[str, int], fallback: int) -> None:
        self.forecast, self.sizes, self.fallback = forecast, sizes, fallback
        self.errors_r = torch.zeros(len(sizes), dtype=torch.int64)           # of the last step; 0 before the first forecast

    def observe(self, loads_L: Tensor) -> None:
        if self.forecast.expected().any():
            pairs = zip(self._by_router(self.forecast.expected()), self._by_router(loads_L))
            self.errors_r.copy_(torch.tensor([misplaced_permille(expected, seen) for expected, seen in pairs]))
        self.forecast.observe(loads_L)

    def loads(self) -> dict[str, np.ndarray]:
        """Rows to expect of each expert, int64 [E] by router."""
        expected, last = self._by_router(self.forecast.expected()), self._by_router(self.forecast.last())
        return {name: last[index] if error > self.fallback else expected[index]
                for index, (name, error) in enumerate(zip(self.sizes, self.errors_r.tolist()))}

    def tables(self) -> dict[str, Tensor]:
        return {**self.forecast.tables(), "errors": self.errors_r}

    def _by_router(self, flat_L: Tensor) -> list[np.ndarray]:
        return [loads_E.numpy() for loads_E in flat_L.split(list(self.sizes.values()))]


def misplaced_permille(expected_L: np.ndarray, seen_L: np.ndarray) -> int:
    """How far a forecast was off: thousandths of all rows that went to other experts than expected, whatever their number.

    0 when the shares agree, 1000 when no expert that was expected got any. An integer, so that ranks agree on a fall-back.
    """
    expected, seen = int(expected_L.sum()), int(seen_L.sum())
    if expected == 0 or seen == 0:
        return 0 if expected == seen else 1000
    surplus_L = np.maximum(seen_L.astype(object) * expected - expected_L.astype(object) * seen, 0)    # exact at any size
    return int(surplus_L.sum()) * 1000 // (expected * seen)
