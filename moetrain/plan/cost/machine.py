"""What planners know of the machine: how positions lie on nodes, and what computing and sending cost.

All planners get the same numbers. A position is a place on the `ep` axis; neighbours fill a node.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """positions: size of the `ep` axis. per_node: how many of them share a node; the last node may have fewer."""

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
    """Of one layer.

    row_s: seconds that an expert computes on one row, forward and backward together.
    row_bytes: bytes of a row on the wire, one way. expert_bytes: bytes of an expert's weights on the wire.
    inside, between: bytes per second of a position's link to others on its node, and to other nodes.
    latency_s: seconds of a message that carries nothing.
    hidden_s: seconds of other work (attention) behind which weights travel unseen, forward; backward has twice that.
    collective: the form in which they travel (plan/transfers.py).
    """

    row_s: float
    row_bytes: float
    expert_bytes: float
    inside: float
    between: float
    latency_s: float = 0.0
    hidden_s: float = 0.0
    collective: str = "packed"
