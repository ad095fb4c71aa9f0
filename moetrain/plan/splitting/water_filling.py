"""Levelling: groups of rows that may each be split over some positions, split so that the largest load is small.

Water-filling one group at a time, the others held still, and again until nothing moves: coordinate descent on the sum of
squared loads, whose minimum also has the smallest largest load. `relieved` goes only part of the way: nodes are levelled
inside, and what is above a cap, but no more, crosses to other nodes. Plain integers on the host: a layer has few groups, and
each is a sort of a few numbers.
"""

from typing import NamedTuple

import numpy as np

from moetrain.plan.cost.machine import Topology

CONVERGED = 64           # done when a sweep moved less than this part of the mean load, or the largest is that close to it
CAPS = (24, 8, 0)   # of `relieved`, in 1/64 of the way from the mean to the largest load once nodes are levelled inside

ReplicaGroup = tuple[int, tuple[int, ...], tuple[int, ...]]         # line of rows, replicas, and their positions
ReplicaGroups = tuple[ReplicaGroup, ...]


class SplitChoices(NamedTuple):
    """What may be split how under a placement."""

    on_node: ReplicaGroups                # where rows of each node (a line each) may be computed while they stay on it wherever it holds
    anywhere: ReplicaGroups            # their expert; and if they may go anywhere
    within_node: ReplicaGroups              # replicas of one expert on one node: among them no row crosses
    across_nodes: tuple[tuple[int, ...], ...]      # replicas of an expert that is on several nodes


def split_choices(expert_C: np.ndarray, position_C: np.ndarray, topology: Topology) -> SplitChoices:
    position, by_expert, by_cell = position_C.tolist(), {}, {}
    for c, (expert, at) in enumerate(zip(expert_C.tolist(), position, strict=True)):
        by_expert.setdefault(expert, []).append(c)
        by_cell.setdefault((expert, at // topology.per_node), []).append(c)
    spread = [(expert, members) for expert, members in by_expert.items() if len(members) > 1]

    def choice(line: int, members: list[int]) -> ReplicaGroup:
        return line, tuple(members), tuple(position[c] for c in members)

    on_node = [(line, by_cell.get((expert, line), members)) for line in range(topology.nodes) for expert, members in spread]
    return SplitChoices(tuple(choice(line, members) for line, members in on_node if len(members) > 1),       # others have no choice
                   tuple(choice(0, members) for _, members in spread),
                   tuple(choice(0, members) for members in by_cell.values() if len(members) > 1),
                   tuple(tuple(members) for _, members in spread
                         if len({position[c] // topology.per_node for c in members}) > 1))


def level_quotas(rows_NC: np.ndarray, position: list[int], choices: ReplicaGroups, positions: int, sweeps: int) -> np.ndarray:
    """Quotas [C] with the sums per expert that the rows have and a largest load near the smallest possible.

    rows_NC: where rows go at the start, a line for each of `choices`' lines.
    """
    lines = rows_NC.tolist()
    load = _loads([sum(rows) for rows in zip(*lines)], position, positions)
    _level_groups([_RowGroup(members, at, lines[line]) for line, members, at in choices], load, sweeps)
    return np.array(lines, dtype=np.int64).sum(0)


def shed_between_nodes(quotas_C: np.ndarray, position: list[int], split_choices: SplitChoices, topology: Topology, sweeps: int) -> np.ndarray:
    """Quotas [K, C]: levelled inside nodes, and then for ever lower caps with what is above them on other nodes."""
    rows = quotas_C.tolist()
    load = _loads(rows, position, topology.positions)
    groups = [_RowGroup(members, at, rows) for _, members, at in split_choices.within_node]
    _level_groups(groups, load, sweeps)
    mean, highest, quotas_K = -(-sum(load) // len(load)), max(load), [rows[:]]
    for part in CAPS:
        if _move_excess(rows, load, position, split_choices.across_nodes, topology, mean + (highest - mean) * part // 64):
            _level_groups(groups, load, sweeps)
        quotas_K.append(rows[:])
    return np.array(quotas_K, dtype=np.int64)


def _move_excess(rows: list[int], load: list[int], position: list[int], across_nodes: tuple[tuple[int, ...], ...], topology: Topology,
          cap: int) -> bool:
    """Move rows from positions above the cap to those below it on other nodes, by the room that they have. Whether any did."""
    moved = False
    for members in across_nodes:
        for c in members:
            out = min(load[position[c]] - cap, rows[c])
            if out <= 0:
                continue
            node = topology.node_of(position[c])
            space = [max(0, cap - load[position[other]]) if topology.node_of(position[other]) != node else 0 for other in members]
            out, end, begin = min(out, sum(space)), 0, 0
            if out == 0:
                continue
            for other, gap in zip(members, space):
                begin, end = end, end + gap
                taken = end * out // sum(space) - begin * out // sum(space)
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
    groups = sorted((group for group in groups if group.total), key=lambda group: -group.total)      # large ones first; stable
    mean = -(-sum(load) // len(load))
    for sweep in range(sweeps):
        # There and back, so that rows are passed on along a chain of copies whichever way it runs.
        moved = [group.refill(load) for group in (reversed(groups) if sweep % 2 else groups)]
        if sum(moved) * CONVERGED <= mean or max(load) * CONVERGED <= mean * (CONVERGED + 1):
            break


def fill(rows: int, bases: list[int]) -> list[int]:
    """Rows added to each base so that the highest of those raised is as low as it can be; the rest to the lowest, by id."""
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
    """Rows of one expert (from one node, or from all) that may go to any of its members. rows: of all replicas, shared."""

    def __init__(self, members: tuple[int, ...], positions: tuple[int, ...], rows: list[int]) -> None:
        self.members, self.positions, self.rows = members, positions, rows

    @property
    def total(self) -> int:
        return sum(self.rows[c] for c in self.members)

    def refill(self, load: list[int]) -> int:
        """Fill anew what this group has, given the other loads; how many rows that moved."""
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
