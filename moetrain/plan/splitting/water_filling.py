"""Water-filling of quotas: split rows over replicas so that the largest position load is small.

One group is filled at a time while the others are held still, and again until nothing moves. This is
coordinate descent on the sum of squared loads, whose minimum also has the smallest largest load.
`shed_between_nodes` goes only part of the way: it levels loads inside every node, and moves to other nodes
only what lies above a cap.

All of it is plain integers on the host, in lists instead of arrays: a layer has few groups, and each takes a
sort of a few numbers.

Shapes: E experts, C replicas, N nodes, K candidates.
"""

from typing import NamedTuple

import numpy as np

from moetrain.plan.cost.machine import Topology

# Sweeps end when one moved less than this part of the mean load, or when the largest load is that close to
# the mean.
CONVERGED = 64
# Caps of `shed_between_nodes`, in 1/64 of the way from the mean to the largest load once nodes are level
# inside.
CAPS = (24, 8, 0)


class ReplicaGroup(NamedTuple):
    """Replicas of one expert that rows may be split over.

    Attributes:
        source: node that the rows come from, and so their row in a table [N, C]; 0 if it has one row.
        replicas: indices of the replicas.
        positions: position of each of these replicas.
    """

    source: int
    replicas: tuple[int, ...]
    positions: tuple[int, ...]


class SplitChoices(NamedTuple):
    """Groups of replicas that rows may be split over under a placement.

    Groups of a single replica are left out: their rows have no choice.

    Attributes:
        on_node: for the rows of each node, the replicas on that node; all replicas where it has none.
        anywhere: for each expert, all its replicas.
        within_node: for each expert and node, the replicas there; rows moved among them stay on the node.
        across_nodes: indices of the replicas of every expert that is on several nodes.
    """

    on_node: tuple[ReplicaGroup, ...]
    anywhere: tuple[ReplicaGroup, ...]
    within_node: tuple[ReplicaGroup, ...]
    across_nodes: tuple[tuple[int, ...], ...]


def split_choices(expert_C: np.ndarray, position_C: np.ndarray, topology: Topology) -> SplitChoices:
    """Group the replicas of a placement.

    Args:
        expert_C: int64 [C], expert of each replica.
        position_C: int64 [C], position of each replica.
        topology: positions and nodes.
    """
    position = position_C.tolist()
    by_expert: dict[int, list[int]] = {}
    by_cell: dict[tuple[int, int], list[int]] = {}
    for c, (expert, at) in enumerate(zip(expert_C.tolist(), position, strict=True)):
        by_expert.setdefault(expert, []).append(c)
        by_cell.setdefault((expert, at // topology.per_node), []).append(c)
    copied = [(expert, members) for expert, members in by_expert.items() if len(members) > 1]

    def group(source: int, members: list[int]) -> ReplicaGroup:
        return ReplicaGroup(source, tuple(members), tuple(position[c] for c in members))

    on_node = [(node, by_cell.get((expert, node), members))
               for node in range(topology.nodes) for expert, members in copied]
    return SplitChoices(tuple(group(node, members) for node, members in on_node if len(members) > 1),
                        tuple(group(0, members) for _, members in copied),
                        tuple(group(0, members) for members in by_cell.values() if len(members) > 1),
                        tuple(tuple(members) for _, members in copied
                              if len({position[c] // topology.per_node for c in members}) > 1))


def level_quotas(rows_NC: np.ndarray, position: list[int], groups: tuple[ReplicaGroup, ...], positions: int,
                 sweeps: int) -> np.ndarray:
    """Split rows over groups of replicas so that the largest position load is near the smallest possible.

    Args:
        rows_NC: int64 [N, C], rows that each replica gets from each source at the start.
        position: position of each replica.
        groups: replicas that the rows of a source may be split over.
        positions: number of positions.
        sweeps: most sweeps over all groups.

    Returns:
        Quotas, int64 [C], with the same sum for every expert.
    """
    by_source = rows_NC.tolist()
    load = _loads([sum(rows) for rows in zip(*by_source)], position, positions)
    _level_groups([_RowGroup(group, by_source[group.source]) for group in groups], load, sweeps)
    return np.array(by_source, dtype=np.int64).sum(0)


def shed_between_nodes(quotas_C: np.ndarray, position: list[int], choices: SplitChoices, topology: Topology,
                       sweeps: int) -> np.ndarray:
    """Level loads inside nodes, then move what lies above lower and lower caps to other nodes.

    Args:
        quotas_C: int64 [C], rows for each replica at the start.
        position: position of each replica.
        choices: replicas that rows may be split over.
        topology: positions and nodes.
        sweeps: most sweeps over all groups.

    Returns:
        Quotas, int64 [K, C]: leveled inside nodes, and then for each cap.
    """
    rows = quotas_C.tolist()
    load = _loads(rows, position, topology.positions)
    groups = [_RowGroup(group, rows) for group in choices.within_node]
    _level_groups(groups, load, sweeps)
    mean, highest, candidates = -(-sum(load) // len(load)), max(load), [rows[:]]
    for part in CAPS:
        cap = mean + (highest - mean) * part // 64
        if _move_excess(rows, load, position, choices.across_nodes, topology, cap):
            _level_groups(groups, load, sweeps)
        candidates.append(rows[:])
    return np.array(candidates, dtype=np.int64)


def _move_excess(rows: list[int], load: list[int], position: list[int],
                 across_nodes: tuple[tuple[int, ...], ...], topology: Topology, cap: int) -> bool:
    """Move rows above the cap to replicas on other nodes, in proportion to the gaps below it there.

    `rows` and `load` are changed in place. Returns whether any row moved.
    """
    moved = False
    for members in across_nodes:
        for c in members:
            out = min(load[position[c]] - cap, rows[c])
            if out <= 0:
                continue
            node = topology.node_of(position[c])
            gaps = [max(0, cap - load[position[other]]) if topology.node_of(position[other]) != node else 0
                    for other in members]
            out, end, begin = min(out, sum(gaps)), 0, 0
            if out == 0:
                continue
            for other, gap in zip(members, gaps):
                begin, end = end, end + gap
                taken = end * out // sum(gaps) - begin * out // sum(gaps)
                rows[other] += taken
                load[position[other]] += taken
            rows[c] -= out
            load[position[c]] -= out
            moved = True
    return moved


def _loads(quotas: list[int], position: list[int], positions: int) -> list[int]:
    load = [0] * positions
    for at, rows in zip(position, quotas, strict=True):
        load[at] += rows
    return load


def _level_groups(groups: list["_RowGroup"], load: list[int], sweeps: int) -> None:
    """Fill the groups anew, sweep after sweep, until little moves.

    Large groups come first; the sort is stable.
    """
    groups = sorted((group for group in groups if group.total), key=lambda group: -group.total)
    mean = -(-sum(load) // len(load))
    for sweep in range(sweeps):
        # There and back, so that rows are passed on along a chain of copies whichever way it runs.
        moved = [group.refill(load) for group in (reversed(groups) if sweep % 2 else groups)]
        if sum(moved) * CONVERGED <= mean or max(load) * CONVERGED <= mean * (CONVERGED + 1):
            break


def fill(rows: int, bases: list[int]) -> list[int]:
    """Distribute rows over bases so that the highest base that is raised is as low as it can be.

    Rows that do not divide evenly go to the lowest bases, ties by index.

    Args:
        rows: rows to distribute.
        bases: loads that are there before, in any order.

    Returns:
        Rows added to each base.
    """
    order = sorted(range(len(bases)), key=bases.__getitem__)
    total, raised = rows, 0
    while raised < len(order) and (raised == 0 or total > raised * bases[order[raised]]):
        total += bases[order[raised]]
        raised += 1
    surface, extra = divmod(total, raised)
    added = [0] * len(bases)
    for rank, at in enumerate(order[:raised]):
        added[at] = surface - bases[at] + (rank < extra)
    return added


class _RowGroup:
    """Rows of one expert (from one node, or from all) that may go to any replica of a group.

    `rows` holds the rows of all replicas, and is shared with the other groups.
    """

    def __init__(self, group: ReplicaGroup, rows: list[int]) -> None:
        self.members, self.positions, self.rows = group.replicas, group.positions, rows

    @property
    def total(self) -> int:
        return sum(self.rows[c] for c in self.members)

    def refill(self, load: list[int]) -> int:
        """Distribute the rows of this group anew, given all other rows; return how many rows moved."""
        had = [self.rows[c] for c in self.members]
        has = fill(sum(had), [load[at] - rows for at, rows in zip(self.positions, had)])
        if has == had:
            return 0
        moved = 0
        for c, at, before, after in zip(self.members, self.positions, had, has):
            self.rows[c] = after
            load[at] += after - before
            moved += abs(after - before)
        return moved // 2
