"""What loads to expect next: forecasts in integers, so that ranks that saw the same loads expect the same.

    MeanForecast    mean of the last steps (Hecate: five)
    TrendForecast   exponential moving average with a trend (Holt), in fixed point

Loads are those of all routers in one flat int64 buffer [sum of E], as they are counted. A forecast is a list of integers in
a checkpoint.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

POINT = 8                # bits behind the point of a trend forecast's level and slope
ONE = 1 << POINT


def misplaced_permille(expected_L: np.ndarray, seen_L: np.ndarray) -> int:
    """How far a forecast was off: thousandths of all rows that went to other experts than expected, whatever their number.

    0 when the shares agree, 1000 when no expert that was expected got any. An integer, so that ranks agree on a fall-back.
    """
    expected, seen = int(expected_L.sum()), int(seen_L.sum())
    if expected == 0 or seen == 0:
        return 0 if expected == seen else 1000
    surplus_L = np.maximum(seen_L.astype(object) * expected - expected_L.astype(object) * seen, 0)    # exact at any size
    return int(surplus_L.sum()) * 1000 // (expected * seen)


@dataclass
class MeanForecast:
    """window: steps that count."""

    window: int = 5
    _seen: list[np.ndarray] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        assert self.window >= 1, self.window

    def observe(self, loads_L: np.ndarray) -> None:
        self._seen = [*self._seen, np.array(loads_L, dtype=np.int64)][-self.window:]

    def forecast(self) -> np.ndarray | None:
        """int64 [L], rounded to the nearest; None before anything was seen."""
        if not self._seen:
            return None
        return (2 * sum(self._seen) + len(self._seen)) // (2 * len(self._seen))

    def state(self) -> dict[str, Any]:
        return {"seen": [loads_L.tolist() for loads_L in self._seen]}

    def restore(self, state: dict[str, Any]) -> None:
        self._seen = [np.array(loads, dtype=np.int64) for loads in state["seen"]][-self.window:]


@dataclass
class TrendForecast:
    """level, trend: weights of what is new, in (0, 1] and [0, 1]; kept to 1/256. With trend 0 a plain moving average."""

    level: float = 0.5
    trend: float = 0.1
    _level_L: np.ndarray | None = field(default=None, repr=False)      # loads * 256
    _slope_L: np.ndarray | None = field(default=None, repr=False)      # loads a step * 256

    def __post_init__(self) -> None:
        assert 0 < self.level <= 1 and 0 <= self.trend <= 1, (self.level, self.trend)

    def observe(self, loads_L: np.ndarray) -> None:
        now_L = np.array(loads_L, dtype=np.int64) * ONE
        if self._level_L is None:
            self._level_L, self._slope_L = now_L, np.zeros_like(now_L)
            return
        expected_L = self._level_L + self._slope_L
        level_L = expected_L + (max(1, round(self.level * ONE)) * (now_L - expected_L) >> POINT)
        self._slope_L = self._slope_L + (round(self.trend * ONE) * (level_L - self._level_L - self._slope_L) >> POINT)
        self._level_L = level_L

    def forecast(self) -> np.ndarray | None:
        """int64 [L], never negative; None before anything was seen."""
        if self._level_L is None:
            return None
        return np.maximum((self._level_L + self._slope_L + ONE // 2) >> POINT, 0)

    def state(self) -> dict[str, Any]:
        seen = self._level_L is not None
        return {"level": self._level_L.tolist() if seen else None, "slope": self._slope_L.tolist() if seen else None}

    def restore(self, state: dict[str, Any]) -> None:
        self._level_L, self._slope_L = (None if state[name] is None else np.array(state[name], dtype=np.int64)
                                        for name in ("level", "slope"))
