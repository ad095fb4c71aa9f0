"""What bringing copies puts on the busiest links, in experts: what the model of time (plan/cost/step_time.py) knows of copies.

    first     leaves at the block's start, and hides behind other work: copies from whole homes and pieces of sliced experts;
              under `two_level` only to leaders, where the home is on another node
    second    from leaders to the others on their node, once a layer waits for its copies: nothing hides it

Gradients put the same on the same links, the other way round. These are the transfers of plan/transfers.py, added up from
arrays, because planners weigh thousands of copies many times.

Shapes: E experts, P positions, X copies, S sliced experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology


class LinkLoad(NamedTuple):
    """What the busiest position sends or receives: to its own node, and to others."""

    inside: float
    between: float

    def seconds(self, unit_bytes: float, costs: Costs) -> float:
        return max(self.inside * unit_bytes / costs.inside, self.between * unit_bytes / costs.between)


class CopyTraffic(NamedTuple):
    """messages: collectives that leave first."""

    first: LinkLoad
    second: LinkLoad
    messages: int


def copy_traffic(expert_X: np.ndarray, position_X: np.ndarray, home_E: np.ndarray, sliced: Sequence[int], topology: Topology,
           collective: str) -> CopyTraffic:
    """Of copies of these experts at these positions. collective: packed or two_level."""
    first, second, messages = _PositionLinks(topology), _PositionLinks(topology), int(bool(len(sliced)))
    if sliced:
        for expert in sliced:
            _add_slices(first, np.append(position_X[expert_X == expert], home_E[expert]))
        whole_X = ~np.isin(expert_X, sliced)
        expert_X, position_X = expert_X[whole_X], position_X[whole_X]
    if len(expert_X):
        messages += 1
        source_X = home_E[expert_X]
        if collective == "two_level":
            leader_X = _leaders(expert_X, position_X, source_X, topology)
            second.add(leader_X[leader_X != position_X], position_X[leader_X != position_X])
            source_X, position_X = source_X[leader_X == position_X], position_X[leader_X == position_X]
        first.add(source_X, position_X)
    return CopyTraffic(first.busiest(), second.busiest(), messages)


class _PositionLinks:
    """Sent and received by each position, inside its node and between nodes, [4, P]."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.load_4P = topology, np.zeros((4, topology.positions))

    def add(self, source_X: np.ndarray, to_X: np.ndarray) -> None:
        same_node_X = source_X // self.topology.per_node == to_X // self.topology.per_node
        for row, mask_X in ((0, same_node_X), (2, ~same_node_X)):
            for offset, end_X in enumerate((source_X, to_X)):
                self.load_4P[row + offset] += np.bincount(end_X[mask_X], minlength=self.topology.positions)

    def busiest(self) -> LinkLoad:
        inside, between = self.load_4P.reshape(2, -1).max(1).tolist()
        return LinkLoad(inside, between)


def _add_slices(links: _PositionLinks, holder_H: np.ndarray) -> None:
    """An expert in equal pieces, from all positions to those that compute it."""
    positions, per_node = links.topology.positions, links.topology.per_node
    node_P = np.arange(positions) // per_node
    size_P, holds_P = np.bincount(node_P)[node_P], np.bincount(holder_H, minlength=positions)
    on_node_P = np.bincount(node_P, holds_P)[node_P]
    links.load_4P += np.stack([on_node_P - holds_P, (size_P - 1) * holds_P,
                               len(holder_H) - on_node_P, (positions - size_P) * holds_P]) / positions


def _leaders(expert_X: np.ndarray, position_X: np.ndarray, source_X: np.ndarray, topology: Topology) -> np.ndarray:
    """The position on its node to which each copy's expert is sent: on the home's node the copy's own, elsewhere the leader's."""
    order = np.lexsort((position_X, expert_X))
    key_X = (expert_X * topology.nodes + position_X // topology.per_node)[order]
    _, start_G, group_X, size_G = np.unique(key_X, return_index=True, return_inverse=True, return_counts=True)
    first_stop_X = np.empty_like(position_X)
    first_stop_X[order] = position_X[order][start_G[group_X] + expert_X[order] % size_G[group_X]]
    same_node_X = source_X // topology.per_node == position_X // topology.per_node
    return np.where(same_node_X, position_X, first_stop_X)
