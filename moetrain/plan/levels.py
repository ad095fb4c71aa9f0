"""Levelling: groups of rows that may each be split over some positions, split so that the largest load is small.

Water-filling one group at a time, the others held still, and again until nothing moves: coordinate descent on the sum of
squared loads, whose minimum also has the smallest largest load. Plain integers on the host: a layer has few groups, and
each is a sort of a few numbers.
"""

import numpy as np

from moetrain.plan.costs import Topology

CALM = 64           # done when a sweep moved less than this part of the mean load, or the largest is that close to it

Choice = tuple[int, tuple[int, ...], tuple[int, ...]]         # line of rows, replicas, and their positions
Choices = tuple[Choice, ...]


def choices(expert_C: np.ndarray, position_C: np.ndarray, topology: Topology, *, stay: bool) -> Choices:
    """The groups that there are under a placement: of each node's rows, the replicas among which they may choose if they
    stay on their node wherever it holds their expert; or with one line for all nodes, those of all."""
    position, of_expert, of_cell = position_C.tolist(), {}, {}
    for c, (expert, at) in enumerate(zip(expert_C.tolist(), position, strict=True)):
        of_expert.setdefault(expert, []).append(c)
        of_cell.setdefault((expert, at // topology.per_node), []).append(c)
    spread = [(expert, members) for expert, members in of_expert.items() if len(members) > 1]
    found = []
    for line in range(topology.nodes if stay else 1):
        for expert, members in spread:
            here = of_cell.get((expert, line), members) if stay else members
            if len(here) > 1:                                     # others have no choice
                found.append((line, tuple(here), tuple(position[c] for c in here)))
    return tuple(found)


def level(rows_NC: np.ndarray, position: list[int], choices: Choices, positions: int, sweeps: int) -> np.ndarray:
    """Quotas [C] with the sums per expert that the rows have and a largest load near the smallest possible.

    rows_NC: where rows go at the start, a line for each of `choices`' lines.
    """
    quotas = rows_NC.sum(0).tolist()
    load = [0] * positions
    for at, rows in zip(position, quotas, strict=True):
        load[at] += rows
    lines = rows_NC.tolist()
    groups = [_Group(members, [lines[line][c] for c in members], at) for line, members, at in choices]
    groups = sorted((group for group in groups if group.total), key=lambda group: -group.total)     # large ones first; stable
    for group in groups:                                          # what may not move stays in the quotas
        for c, rows in zip(group.members, group.rows, strict=True):
            quotas[c] -= rows
    even = -(-sum(load) // len(load))
    for sweep in range(sweeps):
        # There and back, so that rows are passed on along a chain of copies whichever way it runs.
        moved = [group.settle(load) for group in (reversed(groups) if sweep % 2 else groups)]
        if sum(moved) * CALM <= even or max(load) * CALM <= even * (CALM + 1):
            break
    for group in groups:
        for c, rows in zip(group.members, group.rows, strict=True):
            quotas[c] += rows
    return np.array(quotas, dtype=np.int64)


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


class _Group:
    """Rows of one expert (from one node, or from all) that may go to any of its members."""

    def __init__(self, members: tuple[int, ...], rows: list[int], positions: tuple[int, ...]) -> None:
        self.members, self.rows, self.positions = members, rows, positions
        self.total = sum(rows)

    def settle(self, load: list[int]) -> int:
        """Fill anew what this group has, given the other loads; how many rows that moved."""
        rows = fill(self.total, [load[at] - had for at, had in zip(self.positions, self.rows)])
        if rows == self.rows:
            return 0
        moved = 0
        for at, had, has in zip(self.positions, self.rows, rows):
            load[at] += has - had
            moved += abs(has - had)
        self.rows = rows
        return moved // 2
