"""Transfers of expert copies: which expert goes from where to where, and the bytes that this sends.

A *stage* is one exchange between all positions. A transfer in it is one expert's matrices from one position
to another.

    packed      one stage: from the home to every copy
    two_level   two stages: from the home to the copies on its node, and to one copy on each other node, the
                leader; then from leaders to the other copies on their node. What crosses between nodes
                crosses once for each node

Leaders rotate by expert id among the positions of a node that hold a copy, so no position needs memory for a
copy that it does not compute.

Sliced experts travel apart from these in either form: every slice goes straight to all positions that compute
the expert (comm/sparse/sliced.py).

Gradients take the same stages in the other direction, the last stage first: a position sends as many bytes of
gradients as it receives of matrices. All functions here are pure functions of a placement. So all positions
derive the same stages; comm/sparse/ carries them out.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement


class Transfer(NamedTuple):
    """One expert, or one slice of it, sent from position `source` to position `to`."""

    expert: int
    source: int
    to: int


Stage = tuple[Transfer, ...]


class Traffic(NamedTuple):
    """Bytes that each position sends, by position.

    Attributes:
        inside: to other positions of its node.
        between: to other nodes.
    """

    inside: tuple[int, ...]
    between: tuple[int, ...]


def packed(placement: LayerPlacement, topology: Topology) -> tuple[Stage, ...]:
    """One stage: every copy straight from its home."""
    return (tuple(Transfer(expert, placement.home[expert], to) for expert, to in placement.whole_copies),)


def two_level(placement: LayerPlacement, topology: Topology) -> tuple[Stage, ...]:
    """Two stages: to leaders, and from them. The second is empty where no leader has a copy to pass on to."""
    groups: dict[tuple[int, int], list[int]] = {}       # (expert, node) -> positions of its copies, ascending
    for expert, to in placement.whole_copies:
        groups.setdefault((expert, topology.node_of(to)), []).append(to)
    first, second = [], []
    for (expert, node), copies in groups.items():
        home = placement.home[expert]
        if node == topology.node_of(home):
            first += [Transfer(expert, home, to) for to in copies]
            continue
        leader = copies[expert % len(copies)]
        first.append(Transfer(expert, home, leader))
        second += [Transfer(expert, leader, to) for to in copies if to != leader]
    return tuple(first), tuple(second)


Form = Callable[[LayerPlacement, Topology], tuple[Stage, ...]]
STAGES: dict[str, Form] = {"packed": packed, "two_level": two_level}


def slice_transfers(placement: LayerPlacement) -> Stage:
    """One stage: the slice of every position to all positions that compute a sliced expert."""
    return tuple(Transfer(expert, source, to)
                 for to in range(placement.positions) for expert in placement.assembled_at(to)
                 for source in range(placement.positions) if source != to)


def gather_bytes(form: str, placement: LayerPlacement, topology: Topology, expert_bytes: int,
                 slice_bytes: Sequence[int] = ()) -> Traffic:
    """Bytes that bringing the copies sends.

    Args:
        form: `packed` or `two_level`.
        placement: homes and copies.
        topology: positions and nodes.
        expert_bytes: bytes of one expert's matrices as they are sent.
        slice_bytes: bytes of each position's slice of an expert, where experts are sliced.
    """
    sent = [(source, to, expert_bytes) for _, source, to in chain(*STAGES[form](placement, topology))]
    slices = [(source, to, slice_bytes[source]) for _, source, to in slice_transfers(placement)]
    return _traffic(sent + slices, topology)


def reduce_bytes(form: str, placement: LayerPlacement, topology: Topology, expert_bytes: int,
                 slice_bytes: Sequence[int] = ()) -> Traffic:
    """Bytes that bringing the gradients of copies home sends.

    Args:
        form: `packed` or `two_level`.
        placement: homes and copies.
        topology: positions and nodes.
        expert_bytes: bytes of one expert's gradients as they are sent.
        slice_bytes: bytes of the gradients of each position's slice of an expert, where experts are sliced.
    """
    sent = [(to, source, expert_bytes) for _, source, to in chain(*STAGES[form](placement, topology))]
    slices = [(to, source, slice_bytes[source]) for _, source, to in slice_transfers(placement)]
    return _traffic(sent + slices, topology)


def _traffic(sent: Iterable[tuple[int, int, int]], topology: Topology) -> Traffic:
    """Sum (source, destination, bytes) by source and kind of link."""
    inside, between = [0] * topology.positions, [0] * topology.positions
    for source, to, nbytes in sent:
        same_node = topology.node_of(source) == topology.node_of(to)
        (inside if same_node else between)[source] += nbytes
    return Traffic(tuple(inside), tuple(between))
