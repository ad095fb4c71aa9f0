"""Which expert travels from where to where when copies are brought, and what that sends: the legs of a sparse collective.

A *leg* is one exchange between all positions; a transfer in it is the weights of one expert from one position to another.

    packed      one leg: from the home to every copy
    two_level   two: from the home to the copies on its node, and to one copy on each other node, the leader; then from
                leaders to the other copies on their node. What crosses between nodes crosses once for each node

Leaders rotate by expert id among the positions of a node that hold a copy, so none needs memory for another's sake.

Sliced experts travel by themselves in either form, every piece straight to all who compute the expert (comm/sparse/sliced.py).

Gradients take the same legs the other way, the last leg first: what a position sends of them is what it would receive of
weights. Pure functions of a placement: all positions derive the same legs, comm/sparse/ carries them out.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement


class Transfer(NamedTuple):
    """One expert on its way between two positions."""

    expert: int
    source: int
    to: int


Leg = tuple[Transfer, ...]


class Traffic(NamedTuple):
    """Bytes that each position sends, by position: to others on its node, and to other nodes."""

    inside: tuple[int, ...]
    between: tuple[int, ...]


def packed(placement: LayerPlacement, topology: Topology) -> tuple[Leg, ...]:
    """Straight from the homes."""
    return (tuple(Transfer(expert, placement.home[expert], to) for expert, to in placement.whole_copies),)


def two_level(placement: LayerPlacement, topology: Topology) -> tuple[Leg, ...]:
    """To leaders, and from them. The second leg is empty where no leader has anybody to pass an expert on to."""
    groups: dict[tuple[int, int], list[int]] = {}            # (expert, node) -> copies, ascending
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


LEGS: dict[str, Callable[[LayerPlacement, Topology], tuple[Leg, ...]]] = {"packed": packed, "two_level": two_level}


def slice_transfers(placement: LayerPlacement) -> Leg:
    """Of every sliced expert the piece of each position, to all who compute it."""
    return tuple(Transfer(expert, source, to) for to in range(placement.positions) for expert in placement.assembled_at(to)
                 for source in range(placement.positions) if source != to)


def gather_bytes(form: str, placement: LayerPlacement, topology: Topology, expert_bytes: int,
                 slice_bytes: Sequence[int] = ()) -> Traffic:
    """What bringing the copies sends. expert_bytes: of one expert's weights on the wire; piece_bytes: of each position's
    piece of them, where experts are sliced."""
    sent = [(source, to, expert_bytes) for _, source, to in chain(*LEGS[form](placement, topology))]
    return _traffic(sent + [(source, to, slice_bytes[source]) for _, source, to in slice_transfers(placement)], topology)


def reduce_bytes(form: str, placement: LayerPlacement, topology: Topology, expert_bytes: int,
                 slice_bytes: Sequence[int] = ()) -> Traffic:
    """What taking the gradients home sends; the same of gradients."""
    sent = [(to, source, expert_bytes) for _, source, to in chain(*LEGS[form](placement, topology))]
    return _traffic(sent + [(to, source, slice_bytes[source]) for _, source, to in slice_transfers(placement)], topology)


def _traffic(sent: Iterable[tuple[int, int, int]], topology: Topology) -> Traffic:
    """Of (source, destination, bytes)."""
    inside, between = [0] * topology.positions, [0] * topology.positions
    for source, to, nbytes in sent:
        same = topology.node_of(source) == topology.node_of(to)
        (inside if same else between)[source] += nbytes
    return Traffic(tuple(inside), tuple(between))
