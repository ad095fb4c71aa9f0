"""Move homes where that pays: the only change of a placement that moves optimizer state.

Hecate's heterogeneous sharding (arXiv 2502.02581, Algorithm 2), as a descent from the current homes. A layer
may be spread unevenly, as long as every position owns as many experts as before over all layers together. So
two positions always exchange experts: one goes from a layer's fullest position to its emptiest, and one that
does no harm comes back, of another layer or of the same one.

Level home loads serve two purposes. Experts too cool to be worth a copy are spread evenly. And as a home
sends about one copy for every mean load that it must shed, the sending of hot experts is spread too. But
leveling moves much for little gain, so the modeled time of the layer, with the copies that its planner would
add, is computed along the way. What is kept is the state with the largest gain over the horizon, less the
time to send what moves (weights and two moments). If no gain is positive, nothing moves.

Shapes: E experts, P positions, X experts on the fullest position, Y experts on the emptiest one.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from moetrain.plan.placement import ExpertPlacement, LayerPlacement

CHECK_GROWTH = 2     # a layer's time is computed after 1, 2, 4, 8, ... exchanges, and after the last


def exchange_homes(loads: dict[str, np.ndarray], placement: ExpertPlacement,
                   seconds: Callable[[str, LayerPlacement], float], *, horizon: int,
                   move_s: Mapping[str, float], tolerance: float) -> ExpertPlacement:
    """Exchange homes between positions where that shortens the horizon by more than the moves cost.

    Args:
        loads: rows of a step for each expert, int64 [E] by router.
        placement: homes of all layers.
        seconds: modeled step time of a layer, by its router and its homes.
        horizon: steps for which these loads are expected to last.
        move_s: seconds that moving one expert takes, by router.
        tolerance: excess of the largest position load over the mean, as a fraction, that is left alone.

    Returns:
        Placements without copies. Every position owns as many experts as before over all layers together.
    """
    homes = [_LayerHomes(loads[name], layer, move_s[name]) for name, layer in placement.layers]
    for index in sorted(range(len(homes)), key=lambda index: (-homes[index].imbalance(), index)):
        if homes[index].imbalance() > 1 + tolerance:
            _level_layer(homes, index, partial(seconds, placement.layers[index][0]), horizon)
    return ExpertPlacement(tuple((name, layer.placement())
                                 for (name, _), layer in zip(placement.layers, homes, strict=True)))


class _LayerHomes:
    """Loads and homes of one layer while homes move; `origin_E` are the homes before anything moved."""

    def __init__(self, loads_E: np.ndarray, layer: LayerPlacement, move_s: float) -> None:
        self.move_s = move_s
        self.loads_E = np.asarray(loads_E, dtype=np.int64)
        self.origin_E = np.array(layer.home, dtype=np.int64)
        self.home_E, self.load_P = self.origin_E.copy(), np.zeros(layer.positions, dtype=np.int64)
        np.add.at(self.load_P, self.home_E, self.loads_E)

    def imbalance(self) -> float:
        return int(self.load_P.max()) * len(self.load_P) / max(1, int(self.load_P.sum()))

    def placement(self) -> LayerPlacement:
        return LayerPlacement(tuple(self.home_E.tolist()), len(self.load_P))

    def move(self, expert: int, position: int) -> None:
        self.load_P[self.home_E[expert]] -= self.loads_E[expert]
        self.load_P[position] += self.loads_E[expert]
        self.home_E[expert] = position


class _Exchange(NamedTuple):
    """Exchange of two experts between the fullest and the emptiest position of a layer.

    Attributes:
        expert: expert that leaves the fullest position.
        other: layer of the expert that comes back.
        returning: expert that comes back.
    """

    expert: int
    other: _LayerHomes
    returning: int


class _Move(NamedTuple):
    """One home that has moved."""

    layer: _LayerHomes
    expert: int
    origin: int


def _level_layer(homes: list[_LayerHomes], index: int, seconds: Callable[[LayerPlacement], float],
                 horizon: int) -> None:
    """Exchange homes until none levels the layer further, then return to the state that gained most."""
    layer = homes[index]
    before_s, moved_before = seconds(layer.placement()), _num_moved(homes)
    log: list[_Move] = []
    best_gain, keep, check = 0.0, 0, 1
    settled: set[int] = set()
    while True:
        exchanged = _exchange_once(homes, index, settled, log)
        if not exchanged or len(log) // 2 == check:
            check *= CHECK_GROWTH
            moved = _num_moved(homes)
            moving_s = sum((moved[each_s] - moved_before[each_s]) * each_s for each_s in moved)
            gain = horizon * (before_s - seconds(layer.placement())) - moving_s
            if gain > best_gain:
                best_gain, keep = gain, len(log)
        if not exchanged or len(log) > 2 * len(layer.home_E):
            break
    for other, expert, origin in reversed(log[keep:]):
        other.move(expert, origin)


def _num_moved(homes: list[_LayerHomes]) -> Counter[float]:
    """Count the experts that have moved, by the seconds that each of them takes."""
    moved: Counter[float] = Counter()
    for layer in homes:
        moved[layer.move_s] += int((layer.home_E != layer.origin_E).sum())
    return moved


def _exchange_once(homes: list[_LayerHomes], index: int, settled: set[int], log: list[_Move]) -> bool:
    """Relieve the fullest position of a layer that can be relieved; return whether anything moved.

    `settled` collects the positions for which no exchange was found, `log` the moves.
    """
    layer = homes[index]
    empty = int(layer.load_P.argmin())
    for full in np.argsort(-layer.load_P, kind="stable").tolist():
        gap = int(layer.load_P[full] - layer.load_P[empty])
        if gap <= 1 or int(layer.load_P[full]) * len(layer.load_P) <= int(layer.load_P.sum()):
            return False
        if full in settled:
            continue
        found = _with_other_layer(homes, index, full, empty, gap) or _within_layer(layer, full, empty, gap)
        if found:
            log += [_Move(layer, found.expert, full), _Move(found.other, found.returning, empty)]
            layer.move(found.expert, empty)
            found.other.move(found.returning, full)
            return True
        settled.add(full)
    return False


def _with_other_layer(homes: list[_LayerHomes], index: int, full: int, empty: int,
                      gap: int) -> _Exchange | None:
    """Exchange for an expert of a layer in which that lifts no position above the mean."""
    layer = homes[index]
    on_full = np.flatnonzero((layer.home_E == full) & (layer.loads_E > 0) & (layer.loads_E < gap))
    if not len(on_full):
        return None
    # Half the gap is best: the two positions are then as alike as they can be.
    expert = int(on_full[np.abs(2 * layer.loads_E[on_full] - gap).argmin()])
    for other in homes[index + 1:] + homes[:index]:
        mean = int(other.load_P.sum()) // len(other.load_P)
        returning = np.flatnonzero((other.home_E == empty) & (other.load_P[full] + other.loads_E <= mean))
        if len(returning):
            return _Exchange(expert, other, int(returning[other.loads_E[returning].argmin()]))
    return None


def _within_layer(layer: _LayerHomes, full: int, empty: int, gap: int) -> _Exchange | None:
    """Exchange of the two experts of this layer whose loads differ by as near to half the gap as can be."""
    on_full, on_empty = np.flatnonzero(layer.home_E == full), np.flatnonzero(layer.home_E == empty)
    if not len(on_empty):
        return None
    less_XY = layer.loads_E[on_full][:, None] - layer.loads_E[on_empty]
    miss_XY = np.where((less_XY > 0) & (less_XY < gap), np.abs(2 * less_XY - gap), gap)
    x, y = divmod(int(miss_XY.argmin()), len(on_empty))
    return _Exchange(int(on_full[x]), layer, int(on_empty[y])) if miss_XY[x, y] < gap else None
