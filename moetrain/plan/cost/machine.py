"""Machine model of the planners: how positions lie on nodes, and what computing and sending cost.

All planners get the same numbers. A position is an index on the `ep` axis; neighboring positions fill a node.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Positions of the `ep` axis and the nodes that they lie on.

    Args:
        positions: size of the `ep` axis.
        per_node: positions that share a node; the last node may have fewer.
    """

    positions: int
    per_node: int

    def __post_init__(self) -> None:
        assert self.positions >= 1 and self.per_node >= 1, self

    @property
    def nodes(self) -> int:
        return -(-self.positions // self.per_node)

    def node_of(self, position: int) -> int:
        return position // self.per_node

    def positions_of(self, node: int) -> range:
        return range(node * self.per_node, min((node + 1) * self.per_node, self.positions))


@dataclass(frozen=True)
class Costs:
    """What one layer's work costs.

    Args:
        row_s: seconds that an expert computes on one row, forward and backward together.
        row_bytes: bytes of a row as it is sent, one way.
        expert_bytes: bytes of an expert's matrices as they are sent.
        inside: bytes per second of a position's link to the other positions of its node.
        between: bytes per second of a position's link to other nodes.
        latency_s: seconds of a message that carries nothing.
        hidden_s: seconds of other work (attention) that hide copies in forward; backward has twice that.
        collective: form in which copies travel, `packed` or `two_level` (plan/transfers.py).
    """

    row_s: float
    row_bytes: float
    expert_bytes: float
    inside: float
    between: float
    latency_s: float = 0.0
    hidden_s: float = 0.0
    collective: str = "packed"
