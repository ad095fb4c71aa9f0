"""Rows above a level, moved from full positions to those below it: which copies that takes, and how many rows each.

What full positions must shed, hottest expert first, and what the others can take are laid end to end, both in descending
order; where two pieces overlap there is a copy. That needs at most as many copies as there are pieces on both sides, and
no loop over copies: a layer of 256 experts over 1,024 positions is a few sorts of a few thousand numbers.

Shapes: E experts, P positions, N nodes, I items to shed, R receivers, X copies.
"""

from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moetrain.plan.cost.machine import Topology

PASSES = 3           # rows that found no room are offered again to positions that still have some
MIN_ROWS_DIVISOR = 32          # what is less than this part of the level is not worth a copy
LOCAL_MIN_ROWS_DIVISOR = 8    # nor, where the copy only serves its node, what is less than this part


class OverflowPlan(NamedTuple):
    """kept_E: rows that stay at home. expert_X, position_X, rows_X: copies, none twice."""

    kept_E: np.ndarray
    expert_X: np.ndarray
    position_X: np.ndarray
    rows_X: np.ndarray

    @staticmethod
    def empty(loads_E: np.ndarray) -> "OverflowPlan":
        none = np.zeros(0, dtype=np.int64)
        return OverflowPlan(loads_E.copy(), none, none, none)


class LoadSnapshot:
    """What does not depend on the level: loads, and the orders in which they are looked at. sliced: experts in pieces."""

    def __init__(self, loads_NE: np.ndarray, home_E: np.ndarray, topology: Topology, sliced: tuple[int, ...] = ()) -> None:
        self.loads_NE, self.home_E, self.topology, self.sliced = loads_NE, home_E, topology, sliced
        self.loads_E = loads_NE.sum(0)
        self.load_P = sum_by_index(home_E, self.loads_E, topology.positions)
        self.order = np.lexsort((-self.loads_E, home_E))             # by home, there hottest first; stable, so by id
        self.home_I = home_E[self.order]
        self.first_I = np.searchsorted(self.home_I, self.home_I)

    @cached_property
    def origins(self) -> tuple[np.ndarray, np.ndarray]:
        """For each expert the nodes [E, N] by the rows that come from them, descending, its home's last; and these rows."""
        rank_EN = -self.loads_NE.T
        rank_EN[np.arange(len(self.home_E)), self.home_E // self.topology.per_node] = 1
        node_EN = np.argsort(rank_EN, axis=1, kind="stable")
        return node_EN, np.take_along_axis(self.loads_NE.T, node_EN, 1)


class OverflowState:
    """Loads while rows move, and what was moved.

    level: that positions should not rise above. room: copies that each may take.
    """

    def __init__(self, snapshot: LoadSnapshot, level: int, room: int) -> None:
        self.snapshot, self.level = snapshot, level
        self.min_rows = max(1, level // MIN_ROWS_DIVISOR)
        self.kept_E, self.load_P = snapshot.loads_E.copy(), snapshot.load_P.copy()
        self.free_copies_P = np.full(len(self.load_P), room, dtype=np.int64)
        self.moved: list[np.ndarray] = []                            # (expert, position, rows)

    def copy(self) -> "OverflowState":
        twin = copy(self)
        twin.kept_E, twin.load_P, twin.free_copies_P = self.kept_E.copy(), self.load_P.copy(), self.free_copies_P.copy()
        twin.moved = list(self.moved)
        return twin

    def place_overflow(self, *, whole: bool, on_source_nodes: bool = False) -> "OverflowState":
        """nearby: first to positions on the nodes that the rows come from; what finds no room there goes anywhere.
        whole: first what fits a gap undivided."""
        if on_source_nodes:
            self.place_split(*self.excess_by_node(), within_nodes=True)
        if whole:
            self.place_whole(*self.excess()[:2])
        for _ in range(PASSES):
            if not self.place_split(*self.excess(), within_nodes=False):
                break
        return self

    def result(self) -> OverflowPlan:
        if not self.moved:
            return OverflowPlan.empty(self.kept_E)
        expert_X, position_X, rows_X = self.copies()
        key_X, merged_X = np.unique(expert_X * len(self.load_P) + position_X, return_inverse=True)
        return OverflowPlan(self.kept_E, *np.divmod(key_X, len(self.load_P)), sum_by_index(merged_X, rows_X, len(key_X)))

    def copies(self) -> np.ndarray:
        """Expert, position and rows of what was moved so far, int64 [3, X]; a copy may come twice."""
        return np.concatenate([np.zeros((3, 0), dtype=np.int64), *self.moved], axis=1)

    def excess(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items (expert, rows, group); one group."""
        expert_I, rows_I = self._excess_rows()
        order = np.argsort(-rows_I, kind="stable")
        return expert_I[order], rows_I[order], np.zeros_like(expert_I)

    def excess_by_node(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items (expert, rows, group) with a group per node: where most rows come from first, their home's node last."""
        expert_I, rows_I = self._excess_rows()
        node_EN, rows_EN = self.snapshot.origins
        here_IN = rows_EN[expert_I]
        take_IN = np.minimum(rows_I[:, None] - (here_IN.cumsum(1) - here_IN), here_IN)
        item, column = np.nonzero(take_IN >= max(1, self.level // LOCAL_MIN_ROWS_DIVISOR))
        rows, node = take_IN[item, column], node_EN[expert_I[item], column]
        order = np.lexsort((-rows, node))
        return expert_I[item[order]], rows[order], node[order]

    def place_split(self, expert_I: np.ndarray, rows_I: np.ndarray, group_I: np.ndarray, *, within_nodes: bool) -> bool:
        """Pour these, sorted by group and descending; whether any copy came of it."""
        position_R = np.flatnonzero((self.load_P <= self.level - self.min_rows) & (self.free_copies_P > 0))
        if not len(expert_I) or not len(position_R):
            return False
        gap_R = self.level - self.load_P[position_R]
        group_R = position_R // self.snapshot.topology.per_node if within_nodes else np.zeros_like(position_R)
        order_R = np.lexsort((-gap_R, group_R))
        position_R, group_R = position_R[order_R], group_R[order_R]
        item, receiver, rows_X = overlaps(rows_I, group_I, gap_R[order_R], group_R)
        large = rows_X >= self.min_rows
        expert_X, position_X, rows_X = expert_I[item[large]], position_R[receiver[large]], rows_X[large]
        fits_X = rank_in_group(position_X, rows_X) < self.free_copies_P[position_X]
        self.move(expert_X[fits_X], position_X[fits_X], rows_X[fits_X])
        return bool(fits_X.any())

    def place_whole(self, expert_I: np.ndarray, rows_I: np.ndarray) -> None:
        """The k-th largest item to the k-th largest gap, where it fits in whole; sorted descending."""
        position_R = np.flatnonzero((self.load_P < self.level) & (self.free_copies_P > 0))
        gap_R = self.level - self.load_P[position_R]
        order_R = np.argsort(-gap_R, kind="stable")
        pairs = min(len(expert_I), len(position_R))
        fits = rows_I[:pairs] <= gap_R[order_R[:pairs]]
        if fits.any():
            self.move(expert_I[:pairs][fits], position_R[order_R[:pairs]][fits], rows_I[:pairs][fits])

    def _excess_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts and rows that their homes must shed to come down to the level, the hottest of a home first."""
        snapshot = self.snapshot
        kept_I = self.kept_E[snapshot.order]
        end_I = kept_I.cumsum()
        before_I = end_I - kept_I - (end_I - kept_I)[snapshot.first_I]
        rows_I = np.minimum((self.load_P - self.level)[snapshot.home_I] - before_I, kept_I)
        large = rows_I >= self.min_rows
        return snapshot.order[large], rows_I[large]

    def move(self, expert_X: np.ndarray, position_X: np.ndarray, rows_X: np.ndarray) -> None:
        """Rows from the experts' homes to copies at these positions."""
        moved_E = sum_by_index(expert_X, rows_X, len(self.kept_E))
        self.kept_E -= moved_E
        self.load_P -= sum_by_index(self.snapshot.home_E, moved_E, len(self.load_P))
        self.load_P += sum_by_index(position_X, rows_X, len(self.load_P))
        self.free_copies_P -= np.bincount(position_X, minlength=len(self.free_copies_P))
        self.moved.append(np.stack([expert_X, position_X, rows_X]))


def overlaps(rows_I: np.ndarray, group_I: np.ndarray, gap_R: np.ndarray, group_R: np.ndarray) -> tuple[np.ndarray, ...]:
    """Items laid end to end against gaps laid end to end, anew in every group: index of the item, of the gap, and rows, of
    every overlap. Both sides are sorted by group, and groups are numbered from 0."""
    groups = int(max(group_I[-1], group_R[-1])) + 1
    width_G = np.maximum(sum_by_index(group_I, rows_I, groups), sum_by_index(group_R, gap_R, groups))
    base_G = width_G.cumsum() - width_G
    start_I, start_R = _start_offsets(rows_I, group_I, base_G), _start_offsets(gap_R, group_R, base_G)
    cuts = np.sort(np.concatenate([start_I, start_I + rows_I, start_R, start_R + gap_R]), kind="stable")
    start, rows = cuts[:-1], np.diff(cuts)
    item = np.searchsorted(start_I, start, side="right") - 1
    receiver = np.searchsorted(start_R, start, side="right") - 1
    both = (item >= 0) & (receiver >= 0) & (rows > 0)
    both &= (start < (start_I + rows_I)[item]) & (start < (start_R + gap_R)[receiver])
    return item[both], receiver[both], rows[both]


def sum_by_index(index_C: np.ndarray, rows_C: np.ndarray, size: int) -> np.ndarray:
    """Rows by index, int64 [size]; exact while sums stay below 2**53."""
    return np.bincount(index_C, weights=rows_C, minlength=size).astype(np.int64)


def _start_offsets(rows_I: np.ndarray, group_I: np.ndarray, base_G: np.ndarray) -> np.ndarray:
    """Where each piece starts."""
    before_I = rows_I.cumsum() - rows_I
    return before_I - before_I[np.searchsorted(group_I, group_I)] + base_G[group_I]


def rank_in_group(group_X: np.ndarray, rows_X: np.ndarray) -> np.ndarray:
    """Place of each piece among those of its group, the largest first; ties in their order."""
    order = np.lexsort((-rows_X, group_X))
    sorted_X = group_X[order]
    place_X = np.empty_like(order)
    place_X[order] = np.arange(len(order)) - np.searchsorted(sorted_X, sorted_X)
    return place_X
