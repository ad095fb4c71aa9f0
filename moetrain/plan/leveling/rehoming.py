"""Homes, moved where that pays: the only step that moves optimizer state.

Hecate's heterogeneous sharding (arXiv 2502.02581, Algorithm 2) as a descent from the homes there are: a layer may be
unevenly spread as long as every position owns as many experts as before over all layers together. So two positions always exchange:
an expert goes from a layer's fullest position to its emptiest, and back comes whichever does no harm, of another layer, or
of the same one.

Levelling the loads of homes does both things that count here: experts too cool to be worth a copy sit evenly, and as a copy
is sent for about every mean load that a home must shed, the sending of hot ones is spread. But it moves much for little, so
each layer's time is asked for on the way, as its planner would have it with copies, and what is kept is the state with the
most gain over the horizon, less the sending of what moves: weights and two moments. That is none, if it is never positive.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from moetrain.plan.placement import ExpertPlacement, LayerPlacement

CHECK_GROWTH = 2           # a layer's time is asked for after 1, 2, 4, 8, ... exchanges, and after the last


def exchange_homes(loads: dict[str, np.ndarray], placement: ExpertPlacement, seconds: Callable[[str, LayerPlacement], float], *,
             horizon: int, move_s: float, tolerance: float) -> ExpertPlacement:
    """loads: rows a step, int64 [E] by router. seconds: a layer's modelled step time with these homes. horizon: steps for
    which loads are expected to last. move_s: seconds that moving one expert takes. tolerance: of max / mean - 1, left alone.
    """
    homes = [_LayerHomes(loads[name], layer) for name, layer in placement.layers]
    for index in sorted(range(len(homes)), key=lambda index: (-homes[index].imbalance(), index)):
        if homes[index].imbalance() > 1 + tolerance:
            _level_layer(homes, index, partial(seconds, placement.layers[index][0]), horizon, move_s)
    return ExpertPlacement(tuple((name, layer.placement())
                                 for (name, _), layer in zip(placement.layers, homes, strict=True)))


class _LayerHomes:
    """One layer's loads and homes. origin_E: homes before anything moved."""

    def __init__(self, loads_E: np.ndarray, layer: LayerPlacement) -> None:
        self.loads_E, self.origin_E = np.asarray(loads_E, dtype=np.int64), np.array(layer.home, dtype=np.int64)
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


def _level_layer(homes: list[_LayerHomes], index: int, seconds: Callable[[LayerPlacement], float], horizon: int, move_s: float) -> None:
    """Exchange until nothing helps; then go back to the state that gained most."""
    layer = homes[index]
    before_s, moved_before = seconds(layer.placement()), _num_moved(homes)
    log: list[tuple[_LayerHomes, int, int, int]] = []                     # (layer, expert, from, to)
    best_gain, keep, check = 0.0, 0, 1
    settled: set[int] = set()
    while True:
        exchanged = _exchange_once(homes, index, settled, log)
        if not exchanged or len(log) // 2 == check:
            check *= CHECK_GROWTH
            gain = horizon * (before_s - seconds(layer.placement())) - (_num_moved(homes) - moved_before) * move_s
            if gain > best_gain:
                best_gain, keep = gain, len(log)
        if not exchanged or len(log) > 2 * len(layer.home_E):
            break
    for other, expert, origin, _ in reversed(log[keep:]):
        other.move(expert, origin)


def _num_moved(homes: list[_LayerHomes]) -> int:
    return sum(int((layer.home_E != layer.origin_E).sum()) for layer in homes)


def _exchange_once(homes: list[_LayerHomes], index: int, settled: set[int], log: list[tuple[_LayerHomes, int, int, int]]) -> bool:
    """Relieve the fullest position that can be: settled are those that cannot. Whether anything moved."""
    layer = homes[index]
    empty = int(layer.load_P.argmin())
    for full in np.argsort(-layer.load_P, kind="stable").tolist():
        gap = int(layer.load_P[full] - layer.load_P[empty])
        if gap <= 1 or int(layer.load_P[full]) * len(layer.load_P) <= int(layer.load_P.sum()):
            return False
        if full in settled:
            continue
        exchange = _exchange_with_other_layer(homes, index, full, empty, gap) or _exchange_within_layer(layer, full, empty, gap)
        if exchange:
            expert, other, returning = exchange
            log += [(layer, expert, full, empty), (other, returning, empty, full)]
            layer.move(expert, empty)
            other.move(returning, full)
            return True
        settled.add(full)
    return False


def _exchange_with_other_layer(homes: list[_LayerHomes], index: int, full: int, empty: int, gap: int) -> tuple[int, _LayerHomes, int] | None:
    """(expert to go, layer and expert to come back): what comes is of a layer where it lifts nothing above the mean."""
    layer = homes[index]
    on_full = np.flatnonzero((layer.home_E == full) & (layer.loads_E > 0) & (layer.loads_E < gap))
    if not len(on_full):
        return None
    expert = int(on_full[np.abs(2 * layer.loads_E[on_full] - gap).argmin()])         # afterwards both are as alike as can be
    for other in homes[index + 1:] + homes[:index]:
        mean = int(other.load_P.sum()) // len(other.load_P)
        returning = np.flatnonzero((other.home_E == empty) & (other.load_P[full] + other.loads_E <= mean))
        if len(returning):
            return expert, other, int(returning[other.loads_E[returning].argmin()])
    return None


def _exchange_within_layer(layer: _LayerHomes, full: int, empty: int, gap: int) -> tuple[int, _LayerHomes, int] | None:
    """The pair of this layer whose difference is nearest to half the gap."""
    on_full, on_empty = np.flatnonzero(layer.home_E == full), np.flatnonzero(layer.home_E == empty)
    if not len(on_empty):
        return None
    less_XY = layer.loads_E[on_full][:, None] - layer.loads_E[on_empty]
    miss_XY = np.where((less_XY > 0) & (less_XY < gap), np.abs(2 * less_XY - gap), gap)
    x, y = divmod(int(miss_XY.argmin()), len(on_empty))
    return (int(on_full[x]), layer, int(on_empty[y])) if miss_XY[x, y] < gap else None
