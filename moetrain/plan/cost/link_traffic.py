"""Load that copies of experts put on the busiest links, in experts: what the time model knows of copies.

    first     sent at the start of the block, hidden by other work: copies of whole experts from their homes,
              and slices of sliced experts. Under `two_level` what goes to another node goes to one position
              of it only, the leader
    second    sent from leaders to the other copies on their node, once a layer waits for its copies: nothing
              hides it

Gradients put the same load on the same links in the other direction. These are the transfers of
plan/transfers.py, but summed with array operations, because planners weigh thousands of copies many times.
The times are in cost/step_time.py.

Shapes: E experts, P positions, X copies, S sliced experts, H holders of one expert, G groups of copies of one
expert on one node.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology


class LinkLoad(NamedTuple):
    """Load of the busiest position, the larger of what it sends and what it receives.

    Attributes:
        inside: to or from positions of its own node.
        between: to or from other nodes.
    """

    inside: float
    between: float

    def seconds(self, unit_bytes: float, costs: Costs) -> float:
        """Seconds that this load takes, where a unit of it has `unit_bytes`. Both links work at once."""
        return max(self.inside * unit_bytes / costs.inside, self.between * unit_bytes / costs.between)


class CopyTraffic(NamedTuple):
    """Loads of bringing one layer's copies, in experts.

    Attributes:
        first: load at the start of the block.
        second: load from leaders to the other copies on their node.
        messages: collectives that `first` takes.
    """

    first: LinkLoad
    second: LinkLoad
    messages: int


def copy_traffic(expert_X: np.ndarray, position_X: np.ndarray, home_E: np.ndarray, sliced: Sequence[int],
                 topology: Topology, collective: str) -> CopyTraffic:
    """Link loads of bringing these copies.

    Args:
        expert_X: int64 [X], expert of each copy.
        position_X: int64 [X], position of each copy.
        home_E: int64 [E], home of each expert.
        sliced: experts whose parameters lie in slices over all positions. Their home needs a copy too.
        topology: positions and nodes.
        collective: `packed` or `two_level`, for the copies of whole experts.

    Returns:
        Loads of both stages, in experts.
    """
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
    """Load of the links of every position, float64 [4, P].

    Rows 0 and 1 are what a position sends and receives inside its node, rows 2 and 3 between nodes.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology, self.load_4P = topology, np.zeros((4, topology.positions))

    def add(self, source_X: np.ndarray, to_X: np.ndarray) -> None:
        """Add one expert from each source to its destination."""
        same_node_X = source_X // self.topology.per_node == to_X // self.topology.per_node
        for row, mask_X in ((0, same_node_X), (2, ~same_node_X)):
            for offset, end_X in enumerate((source_X, to_X)):
                self.load_4P[row + offset] += np.bincount(end_X[mask_X], minlength=self.topology.positions)

    def busiest(self) -> LinkLoad:
        inside, between = self.load_4P.reshape(2, -1).max(1).tolist()
        return LinkLoad(inside, between)


def _add_slices(links: _PositionLinks, holder_H: np.ndarray) -> None:
    """Add one expert in equal slices, from all positions to those that compute it."""
    positions, per_node = links.topology.positions, links.topology.per_node
    node_P = np.arange(positions) // per_node
    size_P, holds_P = np.bincount(node_P)[node_P], np.bincount(holder_H, minlength=positions)
    on_node_P = np.bincount(node_P, holds_P)[node_P]
    links.load_4P += np.stack([on_node_P - holds_P, (size_P - 1) * holds_P,
                               len(holder_H) - on_node_P, (positions - size_P) * holds_P]) / positions


def _leaders(expert_X: np.ndarray, position_X: np.ndarray, source_X: np.ndarray,
             topology: Topology) -> np.ndarray:
    """Position that receives each copy's expert from its home, int64 [X].

    On the node of the home that is the copy itself, on other nodes the leader of the copies there.
    """
    order = np.lexsort((position_X, expert_X))
    key_X = (expert_X * topology.nodes + position_X // topology.per_node)[order]
    _, start_G, group_X, size_G = np.unique(key_X, return_index=True, return_inverse=True, return_counts=True)
    leader_X = np.empty_like(position_X)
    leader_X[order] = position_X[order][start_G[group_X] + expert_X[order] % size_G[group_X]]
    same_node_X = source_X // topology.per_node == position_X // topology.per_node
    return np.where(same_node_X, position_X, leader_X)
