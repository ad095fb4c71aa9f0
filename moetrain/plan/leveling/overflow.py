"""Move rows above a target level from overfull positions to copies on those below it.

What overfull positions must shed, hottest expert first, and what the other positions can still take are laid
end to end, both in descending order. Wherever an interval of the one overlaps an interval of the other, there
is a copy. That needs at most as many copies as there are intervals on both sides, and no loop over copies: a
layer of 256 experts over 1,024 positions is a few sorts of a few thousand numbers.

Shapes: E experts, P positions, N nodes, I items to shed (the excess of one expert), R receivers, X copies, G
groups.
"""

from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moetrain.plan.cost.machine import Topology

PASSES = 3                    # rows that found no place are offered again to positions that still take copies
MIN_ROWS_DIVISOR = 32         # fewer rows than this part of the level are not worth a copy
LOCAL_MIN_ROWS_DIVISOR = 8    # nor are fewer than this part, where the copy only serves its own node


class OverflowPlan(NamedTuple):
    """Copies of one layer and the rows that each replica takes; no (expert, position) comes twice. All int64.

    Attributes:
        kept_E: rows that stay at the home of each expert.
        expert_X: expert of each copy.
        position_X: position of each copy.
        rows_X: rows that each copy takes, 1 or more.
    """

    kept_E: np.ndarray
    expert_X: np.ndarray
    position_X: np.ndarray
    rows_X: np.ndarray

    @staticmethod
    def empty(loads_E: np.ndarray) -> "OverflowPlan":
        """The plan without copies: all rows stay at home."""
        none = np.zeros(0, dtype=np.int64)
        return OverflowPlan(loads_E.copy(), none, none, none)


class LoadSnapshot:
    """Loads and homes of one layer, and the orders in which they are visited.

    It holds all that does not depend on the level, so that several levels can be tried on it.

    Args:
        loads_NE: rows from each node for each expert, int64 [N, E].
        home_E: home position of each expert, int64 [E].
        topology: positions and the nodes that they lie on.
        sliced: experts whose parameters lie in slices over all positions.
    """

    def __init__(self, loads_NE: np.ndarray, home_E: np.ndarray, topology: Topology,
                 sliced: tuple[int, ...] = ()) -> None:
        self.loads_NE, self.home_E, self.topology, self.sliced = loads_NE, home_E, topology, sliced
        self.loads_E = loads_NE.sum(0)
        self.load_P = sum_by_index(home_E, self.loads_E, topology.positions)
        # By home, the hottest expert of a home first. The sort is stable, so ties go to the lower id.
        self.order = np.lexsort((-self.loads_E, home_E))
        self.home_I = home_E[self.order]
        self.first_I = np.searchsorted(self.home_I, self.home_I)

    @cached_property
    def origins(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes that the rows of each expert come from, and these rows; int64 [E, N] each.

        The node that most rows come from is first, the node of the expert's home last.
        """
        rank_EN = -self.loads_NE.T
        rank_EN[np.arange(len(self.home_E)), self.home_E // self.topology.per_node] = 1
        node_EN = np.argsort(rank_EN, axis=1, kind="stable")
        return node_EN, np.take_along_axis(self.loads_NE.T, node_EN, 1)


class OverflowState:
    """Loads of one layer while rows move to copies, and the moves so far.

    Args:
        snapshot: the layer before anything moves.
        level: rows above which no position should rise.
        max_copies: copies that each position may take.
    """

    def __init__(self, snapshot: LoadSnapshot, level: int, max_copies: int) -> None:
        self.snapshot, self.level = snapshot, level
        self.min_rows = max(1, level // MIN_ROWS_DIVISOR)
        self.kept_E, self.load_P = snapshot.loads_E.copy(), snapshot.load_P.copy()
        self.copies_left_P = np.full(len(self.load_P), max_copies, dtype=np.int64)
        self.moved: list[np.ndarray] = []                            # (expert, position, rows) of every move

    def copy(self) -> "OverflowState":
        """An independent state with the same moves."""
        twin = copy(self)
        twin.kept_E, twin.load_P = self.kept_E.copy(), self.load_P.copy()
        twin.copies_left_P = self.copies_left_P.copy()
        twin.moved = list(self.moved)
        return twin

    def place_overflow(self, *, whole: bool, on_source_nodes: bool = False) -> "OverflowState":
        """Move what lies above the level to positions below it, in place.

        Args:
            whole: first move the items that fit undivided.
            on_source_nodes: first offer rows to positions on the nodes that they come from. Rows that find no
                place there go anywhere.

        Returns:
            This state, so that calls can be chained.
        """
        if on_source_nodes:
            self.place_split(*self.excess_by_node(), within_nodes=True)
        if whole:
            self.place_whole(*self.excess()[:2])
        for _ in range(PASSES):
            if not self.place_split(*self.excess(), within_nodes=False):
                break
        return self

    def result(self) -> OverflowPlan:
        """The moves as a plan, sorted by expert and position; moves to the same copy are merged."""
        if not self.moved:
            return OverflowPlan.empty(self.kept_E)
        expert_X, position_X, rows_X = self.copies()
        key_X, merged_X = np.unique(expert_X * len(self.load_P) + position_X, return_inverse=True)
        expert_X, position_X = np.divmod(key_X, len(self.load_P))
        return OverflowPlan(self.kept_E, expert_X, position_X, sum_by_index(merged_X, rows_X, len(key_X)))

    def copies(self) -> np.ndarray:
        """Expert, position and rows of every move so far, int64 [3, X]; a copy may come twice."""
        return np.concatenate([np.zeros((3, 0), dtype=np.int64), *self.moved], axis=1)

    def excess(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items to shed, in descending order.

        Returns:
            Expert, rows and group of each item, int64 [I] each. All are of group 0.
        """
        expert_I, rows_I = self._excess_rows()
        order = np.argsort(-rows_I, kind="stable")
        return expert_I[order], rows_I[order], np.zeros_like(expert_I)

    def excess_by_node(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items to shed, divided among the nodes that their rows come from, and sorted by node and rows.

        The node that sends an expert most rows gets the first of them, the node of its home the last.

        Returns:
            Expert, rows and node of each item, int64 [I] each.
        """
        expert_I, rows_I = self._excess_rows()
        node_EN, rows_EN = self.snapshot.origins
        here_IN = rows_EN[expert_I]
        take_IN = np.minimum(rows_I[:, None] - (here_IN.cumsum(1) - here_IN), here_IN)
        item, column = np.nonzero(take_IN >= max(1, self.level // LOCAL_MIN_ROWS_DIVISOR))
        rows, node = take_IN[item, column], node_EN[expert_I[item], column]
        order = np.lexsort((-rows, node))
        return expert_I[item[order]], rows[order], node[order]

    def place_split(self, expert_I: np.ndarray, rows_I: np.ndarray, group_I: np.ndarray, *,
                    within_nodes: bool) -> bool:
        """Move items to the gaps below the level, divided where they overlap more than one gap.

        Args:
            expert_I: int64 [I], expert of each item.
            rows_I: int64 [I], rows of each item, descending within a group.
            group_I: int64 [I], group of each item, ascending: its node with `within_nodes`, else 0.
            within_nodes: an item of group n goes to positions on node n only.

        Returns:
            Whether any copy was added.
        """
        position_R = np.flatnonzero((self.load_P <= self.level - self.min_rows) & (self.copies_left_P > 0))
        if not len(expert_I) or not len(position_R):
            return False
        gap_R = self.level - self.load_P[position_R]
        group_R = position_R // self.snapshot.topology.per_node if within_nodes else np.zeros_like(position_R)
        order_R = np.lexsort((-gap_R, group_R))
        position_R, group_R = position_R[order_R], group_R[order_R]
        item, receiver, rows_X = overlaps(rows_I, group_I, gap_R[order_R], group_R)
        large = rows_X >= self.min_rows
        expert_X, position_X, rows_X = expert_I[item[large]], position_R[receiver[large]], rows_X[large]
        fits_X = rank_in_group(position_X, rows_X) < self.copies_left_P[position_X]
        self.move(expert_X[fits_X], position_X[fits_X], rows_X[fits_X])
        return bool(fits_X.any())

    def place_whole(self, expert_I: np.ndarray, rows_I: np.ndarray) -> None:
        """Move the k-th largest item to the k-th largest gap wherever it fits there undivided.

        Items come sorted descending.
        """
        position_R = np.flatnonzero((self.load_P < self.level) & (self.copies_left_P > 0))
        gap_R = self.level - self.load_P[position_R]
        order_R = np.argsort(-gap_R, kind="stable")
        pairs = min(len(expert_I), len(position_R))
        fits = rows_I[:pairs] <= gap_R[order_R[:pairs]]
        if fits.any():
            self.move(expert_I[:pairs][fits], position_R[order_R[:pairs]][fits], rows_I[:pairs][fits])

    def _excess_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts and rows that homes must shed to come down to the level, the hottest of a home first."""
        snapshot = self.snapshot
        kept_I = self.kept_E[snapshot.order]
        end_I = kept_I.cumsum()
        before_I = end_I - kept_I - (end_I - kept_I)[snapshot.first_I]
        rows_I = np.minimum((self.load_P - self.level)[snapshot.home_I] - before_I, kept_I)
        large = rows_I >= self.min_rows
        return snapshot.order[large], rows_I[large]

    def move(self, expert_X: np.ndarray, position_X: np.ndarray, rows_X: np.ndarray) -> None:
        """Move rows from the homes of these experts to copies at these positions; int64 [X] each."""
        moved_E = sum_by_index(expert_X, rows_X, len(self.kept_E))
        self.kept_E -= moved_E
        self.load_P -= sum_by_index(self.snapshot.home_E, moved_E, len(self.load_P))
        self.load_P += sum_by_index(position_X, rows_X, len(self.load_P))
        self.copies_left_P -= np.bincount(position_X, minlength=len(self.copies_left_P))
        self.moved.append(np.stack([expert_X, position_X, rows_X]))


def overlaps(rows_I: np.ndarray, group_I: np.ndarray, gap_R: np.ndarray,
             group_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlaps of two sequences of intervals, each laid end to end, starting anew in every group.

    Args:
        rows_I: int64 [I], lengths of the items.
        group_I: int64 [I], group of each item, ascending from 0.
        gap_R: int64 [R], lengths of the gaps.
        group_R: int64 [R], group of each gap, ascending from 0.

    Returns:
        Index of the item, index of the gap and length of every overlap, int64 [X] each.
    """
    groups = int(max(group_I[-1], group_R[-1])) + 1
    width_G = np.maximum(sum_by_index(group_I, rows_I, groups), sum_by_index(group_R, gap_R, groups))
    base_G = width_G.cumsum() - width_G
    start_I, start_R = _interval_starts(rows_I, group_I, base_G), _interval_starts(gap_R, group_R, base_G)
    cuts = np.sort(np.concatenate([start_I, start_I + rows_I, start_R, start_R + gap_R]), kind="stable")
    start, rows = cuts[:-1], np.diff(cuts)
    item = np.searchsorted(start_I, start, side="right") - 1
    receiver = np.searchsorted(start_R, start, side="right") - 1
    both = (item >= 0) & (receiver >= 0) & (rows > 0)
    both &= (start < (start_I + rows_I)[item]) & (start < (start_R + gap_R)[receiver])
    return item[both], receiver[both], rows[both]


def sum_by_index(index_C: np.ndarray, rows_C: np.ndarray, size: int) -> np.ndarray:
    """Sum rows that have the same index, int64 [size].

    Args:
        index_C: int64 [C], where each entry is added.
        rows_C: int64 [C], what is added. Exact while the sums stay below 2**53: `bincount` adds in float64.
        size: number of sums.
    """
    return np.bincount(index_C, weights=rows_C, minlength=size).astype(np.int64)


def _interval_starts(rows_I: np.ndarray, group_I: np.ndarray, base_G: np.ndarray) -> np.ndarray:
    """Start of each interval, when those of group g are laid end to end from base_G[g] on."""
    before_I = rows_I.cumsum() - rows_I
    return before_I - before_I[np.searchsorted(group_I, group_I)] + base_G[group_I]


def rank_in_group(group_X: np.ndarray, rows_X: np.ndarray) -> np.ndarray:
    """Rank of each entry among those of its group, from 0 for the most rows; ties keep their order.

    int64 [X].
    """
    order = np.lexsort((-rows_X, group_X))
    sorted_X = group_X[order]
    place_X = np.empty_like(order)
    place_X[order] = np.arange(len(order)) - np.searchsorted(sorted_X, sorted_X)
    return place_X
