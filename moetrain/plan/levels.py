"""Levelling: groups of rows that may each be split over some positions, split so that the largest load is small.

Water-filling one group at a time, the others held still, and again until nothing moves: coordinate descent on the sum of
squared loads, whose minimum also has the smallest largest load. Plain integers on the host: a layer has few groups, and
each is a sort of a few numbers.
"""

import torch
from torch import Tensor

from moetrain.plan.costs import Topology

CALM = 64           # done when a sweep moved less than this part of the mean load, or the largest is that close to it


def level(rows_NC: Tensor, expert_C: Tensor, position_C: Tensor, topology: Topology, sweeps: int) -> Tensor:
    """Quotas [C] with the sums per expert that the rows have and a largest load near the smallest possible.

    rows_NC: where rows go at the start. With one line per node, rows stay on their node wherever it holds their expert; with
    one line in all they may go to any replica.
    """
    position = position_C.tolist()
    load = [0] * topology.positions
    for at, rows in zip(position, rows_NC.sum(0).tolist(), strict=True):
        load[at] += rows
    groups = [_Group(members, [line[c] for c in members], [position[c] for c in members])
              for line, choices in zip(rows_NC.tolist(), _choices(rows_NC, expert_C, position, topology), strict=True)
              for members in choices if any(line[c] for c in members)]
    groups.sort(key=lambda group: -group.total)       # large ones first; stable
    even = -(-sum(load) // len(load))
    for sweep in range(sweeps):
        # There and back, so that rows are passed on along a chain of copies whichever way it runs.
        moved = [group.settle(load) for group in (reversed(groups) if sweep % 2 else groups)]
        if sum(moved) * CALM <= even or max(load) * CALM <= even * (CALM + 1):
            break
    quotas = [0] * len(position)
    for c, rows in enumerate(_fixed(rows_NC, groups)):
        quotas[c] = rows
    for group in groups:
        for c, rows in zip(group.members, group.rows, strict=True):
            quotas[c] += rows
    return torch.tensor(quotas, dtype=torch.int64)


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

    def __init__(self, members: list[int], rows: list[int], positions: list[int]) -> None:
        self.members, self.rows, self.positions = members, rows, positions
        self.total = sum(rows)

    def settle(self, load: list[int]) -> int:
        """Fill anew what this group has, given the other loads; how many rows that moved."""
        rows = fill(self.total, [load[at] - had for at, had in zip(self.positions, self.rows, strict=True)])
        if rows == self.rows:
            return 0
        moved = 0
        for at, had, has in zip(self.positions, self.rows, rows, strict=True):
            load[at] += has - had
            moved += abs(has - had)
        self.rows = rows
        return moved // 2


def _choices(rows_NC: Tensor, expert_C: Tensor, position: list[int], topology: Topology) -> list[list[list[int]]]:
    """For every line of rows, the replicas among which each replicated expert's rows may choose."""
    of_expert: dict[int, list[int]] = {}
    for c, expert in enumerate(expert_C.tolist()):
        of_expert.setdefault(expert, []).append(c)
    spread = [members for members in of_expert.values() if len(members) > 1]
    if len(rows_NC) == 1:
        return [spread]
    return [[[c for c in members if position[c] // topology.per_node == node] or members for members in spread]
            for node in range(topology.nodes)]


def _fixed(rows_NC: Tensor, groups: list[_Group]) -> list[int]:
    """Rows [C] of experts with one replica."""
    fixed = rows_NC.sum(0).tolist()
    for group in groups:
        for c in group.members:
            fixed[c] = 0
    return fixed
