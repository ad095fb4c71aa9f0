"""Copies that keep rows on their node: what is left of the room and of the time that hides copies, spent on links.

Once loads are level, a copy of an expert that no position of a node holds lets that node's rows for it stay there. The largest
such flows get copies first, on the least loaded positions of their node, as long as no position sends or receives more than
`budget` copies. Rows move to them, and to the copies that there are, only as far as the loads stay level.

Shapes: E experts, P positions, N nodes, X copies.
"""

import numpy as np

from moetrain.plan.leveling.overflow import LoadSnapshot, OverflowState, rank_in_group, sum_by_index

ROUNDS = 6           # of taking back rows where copies would overfill a position


class NodeFlows:
    """The largest flows of rows between nodes, before any copy: expert, the node they come from, rows; descending."""

    def __init__(self, snapshot: LoadSnapshot, room: int) -> None:
        topology = snapshot.topology
        rows_NE = snapshot.loads_NE.copy()
        rows_NE[snapshot.home_E // topology.per_node, np.arange(len(snapshot.home_E))] = 0
        most = min(rows_NE.shape[1], room * topology.per_node)
        cut_N = np.partition(rows_NE, -most, axis=1)[:, -most]       # a value, so that which ones pass is well defined
        node_X, expert_X = np.nonzero(rows_NE >= np.maximum(cut_N, 1)[:, None])
        order = np.argsort(-rows_NE[node_X, expert_X], kind="stable")
        self.expert_X, self.node_X = expert_X[order], node_X[order]
        self.rows_X = rows_NE[self.node_X, self.expert_X]


def add_local_copies(state: OverflowState, flows: NodeFlows, budget: int) -> OverflowState:
    """Another pool, with more copies. budget: copies that a position may send or receive, those it has included."""
    state, experts = state.copy(), len(state.snapshot.home_E)
    home_E, topology = state.snapshot.home_E, state.snapshot.topology
    expert_X, position_X, rows_X = state.copies()
    sent_P = np.bincount(home_E[expert_X], minlength=topology.positions)
    received_P = np.bincount(position_X, minlength=topology.positions)
    supply_C = sum_by_index(position_X // topology.per_node * experts + expert_X, rows_X, topology.nodes * experts)
    holder_C = np.full(topology.nodes * experts, -1, dtype=np.int64)
    holder_C[position_X // topology.per_node * experts + expert_X] = position_X

    # Where a copy is there already, it may take more.
    cell_X = flows.node_X * experts + flows.expert_X
    held_X = holder_C[cell_X] >= 0
    existing = flows.expert_X[held_X], holder_C[cell_X[held_X]], (flows.rows_X[held_X] - supply_C[cell_X[held_X]]).clip(0)

    expert_X, node_X, rows_X = flows.expert_X[~held_X], flows.node_X[~held_X], flows.rows_X[~held_X]
    allowed_X = rank_in_group(home_E[expert_X], rows_X) < (budget - sent_P)[home_E[expert_X]]
    expert_X, node_X, rows_X = expert_X[allowed_X], node_X[allowed_X], rows_X[allowed_X]
    place_position, place_start_N, places_N = _copy_places(np.minimum(state.free_copies_P, budget - received_P).clip(0), state.load_P, state)
    place_X = rank_in_group(node_X, rows_X)
    fits_X = place_X < places_N[node_X]
    new = expert_X[fits_X], place_position[(place_start_N[node_X] + place_X)[fits_X]], rows_X[fits_X]

    expert_X, position_X, rows_X = (np.concatenate(parts) for parts in zip(existing, new, strict=True))
    state.move(expert_X, position_X, _rows_within_level(state, expert_X, position_X, rows_X))
    return state


def _copy_places(free_P: np.ndarray, load_P: np.ndarray, state: OverflowState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places for copies, node after node: one at every position, the least loaded first, then a second one, ..."""
    per_node, nodes = state.snapshot.topology.per_node, state.snapshot.topology.nodes
    position_S = np.repeat(np.arange(len(free_P)), free_P)
    turn_S = np.arange(len(position_S)) - np.repeat(free_P.cumsum() - free_P, free_P)
    order = np.lexsort((load_P[position_S], turn_S, position_S // per_node))
    places_N = np.bincount(position_S // per_node, minlength=nodes)
    return position_S[order], places_N.cumsum() - places_N, places_N


def _rows_within_level(state: OverflowState, expert_X: np.ndarray, position_X: np.ndarray, rows_X: np.ndarray) -> np.ndarray:
    """As many of these rows as are at home until now, and as their new positions take without rising above the highest."""
    snapshot, positions = state.snapshot, len(state.load_P)
    wanted_E = sum_by_index(expert_X, rows_X, len(snapshot.home_E))
    rows_X = rows_X * np.minimum(state.kept_E, wanted_E)[expert_X] // wanted_E[expert_X].clip(1)
    ceiling = max(state.level, int(state.load_P.max()))
    for _ in range(ROUNDS):
        in_P = sum_by_index(position_X, rows_X, positions)
        out_P = sum_by_index(snapshot.home_E[expert_X], rows_X, positions)
        over_P = (state.load_P + in_P - out_P - ceiling).clip(0)
        if not over_P.any():
            break
        rows_X = rows_X * (in_P - over_P).clip(0)[position_X] // in_P[position_X].clip(1)
    return rows_X
