"""Homes, moved where that pays: the only step that moves optimizer state.

Hecate's heterogeneous sharding (arXiv 2502.02581, Algorithm 2) as a descent from the homes there are: a layer may be unevenly
spread as long as every position owns as many experts as before over all layers together. So two positions always exchange:
an expert of a layer that is unbalanced goes one way, and whichever does least harm comes back, from the same layer or another.

Two things are levelled, layer by layer. The load of experts that are too cool to be copied (all but the t hottest, t being
what hides) sits where their homes are. And the hottest send their copies from their homes, so these are spread over senders.
The model of a layer is the larger of the mean and that largest load, and what its fullest sender takes beyond what hides.

Of the exchanges in the order found, as many are made as gain the most over the horizon, less the sending of what moves:
weights and two moments. None, if that is never positive.
"""

from collections.abc import Mapping

import numpy as np

from moetrain.plan.costs import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import fits_behind, hottest_first


def resettle(loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology, costs: Costs, *,
             horizon: int, state_ratio: float) -> ExpertPlacement:
    """loads: rows a step, int64 [E] by router. horizon: steps for which they are expected to last. state_ratio: bytes of an
    expert's state over those of its weights on the wire."""
    layers = [_Layer(loads[name], layer, topology, costs) for name, layer in placement.layers]
    rate = costs.between if topology.nodes > 1 else costs.inside
    move_s = costs.expert_bytes * state_ratio / rate
    before_s = [layer.seconds() for layer in layers]
    now_s, origin = list(before_s), [layer.home_E.copy() for layer in layers]
    best, best_gain = [layer.home_E.copy() for layer in layers], 0.0
    open_layers = set(range(len(layers)))
    while open_layers:
        worst = max(open_layers, key=lambda i: (now_s[i] - layers[i].least_s, -i))
        other = _exchange(layers, worst)
        if other is None:
            open_layers.remove(worst)
            continue
        now_s[worst], now_s[other] = layers[worst].seconds(), layers[other].seconds()
        moved = sum(int((layer.home_E != home_E).sum()) for layer, home_E in zip(layers, origin, strict=True))
        gain = horizon * sum(was - now for was, now in zip(before_s, now_s, strict=True)) - moved * move_s
        if gain > best_gain:
            best, best_gain = [layer.home_E.copy() for layer in layers], gain
    return ExpertPlacement(tuple((name, LayerPlacement(tuple(home_E.tolist()), topology.positions))
                                 for (name, _), home_E in zip(placement.layers, best, strict=True)))


class _Layer:
    """One layer's loads and homes. rest_P: load of the experts that cannot be copied; sends_P: copies to send."""

    def __init__(self, loads_E: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs) -> None:
        self.loads_E, self.home_E = np.asarray(loads_E, dtype=np.int64), np.array(homes.home, dtype=np.int64)
        self.costs, positions = costs, topology.positions
        self.rate = costs.between if topology.nodes > 1 else costs.inside
        self.mean = -(-int(self.loads_E.sum()) // positions)
        self.rest_E, self.sends_E = self.loads_E.copy(), np.zeros_like(self.loads_E)
        hot = hottest_first(self.loads_E)[:fits_behind(topology, costs, len(self.loads_E))]
        self.rest_E[hot] = 0
        self.sends_E[hot] = np.minimum(self.loads_E[hot] // max(1, self.mean), positions - 1)
        self.rest_P, self.sends_P = np.zeros(positions, dtype=np.int64), np.zeros(positions, dtype=np.int64)
        np.add.at(self.rest_P, self.home_E, self.rest_E)
        np.add.at(self.sends_P, self.home_E, self.sends_E)
        self.least_s = costs.row_s * self.mean

    def seconds(self) -> float:
        """The model above."""
        once_s = int(self.sends_P.max()) * self.costs.expert_bytes / self.rate
        exposed_s = max(0.0, once_s - self.costs.hidden_s) + max(0.0, once_s - 2 * self.costs.hidden_s)
        return self.costs.row_s * max(self.mean, int(self.rest_P.max())) + exposed_s

    def uneven(self) -> tuple[np.ndarray, np.ndarray]:
        """What to level next: the weight of each expert, and its sum by position."""
        if int(self.rest_P.max()) > self.mean:
            return self.rest_E, self.rest_P
        return self.sends_E, self.sends_P

    def harmless(self, position: int) -> np.ndarray:
        """Experts [E] that this position could take over without becoming the layer's fullest or its busiest sender."""
        return ((self.rest_P[position] + self.rest_E <= max(self.mean, int(self.rest_P.max())))
                & (self.sends_P[position] + self.sends_E <= self.sends_P.max()))

    def move(self, expert: int, position: int) -> None:
        for weight_E, sum_P in ((self.rest_E, self.rest_P), (self.sends_E, self.sends_P)):
            sum_P[self.home_E[expert]] -= weight_E[expert]
            sum_P[position] += weight_E[expert]
        self.home_E[expert] = position


def _exchange(layers: list[_Layer], index: int) -> int | None:
    """Relieve the layer's fullest position: an expert to the emptiest, another back. The other's layer; None if none helps."""
    layer = layers[index]
    weight_E, sum_P = layer.uneven()
    full, empty = int(sum_P.argmax()), int(sum_P.argmin())
    there = np.flatnonzero((layer.home_E == full) & (weight_E > 0))
    # Best where both end up alike: half the difference. What comes back from another layer does not count here.
    gap = int(sum_P[full] - sum_P[empty])
    there = there[weight_E[there] < gap]
    if not len(there):
        return None
    expert = int(there[np.abs(2 * weight_E[there] - gap).argmin()])
    for other in [*range(index + 1, len(layers)), *range(index)]:
        back = np.flatnonzero((layers[other].home_E == empty) & layers[other].harmless(full))
        if len(back):
            coolest = int(back[layers[other].loads_E[back].argmin()])
            layers[other].move(coolest, full)
            layer.move(expert, empty)
            return other
    return index if _swap(layer, weight_E, there, full, empty) else None


def _swap(layer: _Layer, weight_E: np.ndarray, there: np.ndarray, full: int, empty: int) -> bool:
    """Exchange within the layer: the pair whose difference is nearest to half the gap."""
    here = np.flatnonzero(layer.home_E == empty)
    if not len(here):
        return False
    less_XY = weight_E[there][:, None] - weight_E[here]
    _, sum_P = layer.uneven()
    gap = int(sum_P[full] - sum_P[empty])
    miss_XY = np.where((less_XY > 0) & (less_XY < gap), np.abs(2 * less_XY - gap), gap)
    x, y = divmod(int(miss_XY.argmin()), len(here))
    if miss_XY[x, y] >= gap:
        return False
    layer.move(int(there[x]), empty)
    layer.move(int(here[y]), full)
    return True
