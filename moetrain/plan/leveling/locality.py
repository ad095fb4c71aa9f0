"""Copies that keep rows on their node: spend the remaining memory and hidden time on traffic between nodes.

Once loads are level, a copy of an expert that no position of a node holds lets that node's rows for the
expert stay there. The largest such flows get copies first, on the least loaded positions of their node, as
long as no position sends or receives more than `budget` copies. Rows move to them, and to copies that exist
already, only as far as loads stay level.

Shapes: E experts, P positions, N nodes, X copies (or flows, or moves), C cells (node, expert), S free places
for copies.
"""

import numpy as np

from moetrain.plan.leveling.overflow import LoadSnapshot, OverflowState, rank_in_group, sum_by_index

ROUNDS = 6           # of taking rows back where they would overfill a position


class NodeFlows:
    """Largest flows of rows to experts on other nodes while there are no copies, in descending order.

    Attributes:
        expert_X: expert of each flow, int64 [X].
        node_X: node that the rows come from, int64 [X].
        rows_X: rows of each flow, int64 [X].

    Args:
        snapshot: loads and homes of the layer.
        max_copies: copies that a position may take; a node keeps about as many flows as its positions take
            copies.
    """

    def __init__(self, snapshot: LoadSnapshot, max_copies: int) -> None:
        topology = snapshot.topology
        rows_NE = snapshot.loads_NE.copy()
        rows_NE[snapshot.home_E // topology.per_node, np.arange(len(snapshot.home_E))] = 0
        most = min(rows_NE.shape[1], max_copies * topology.per_node)
        # A threshold instead of the `most` largest, so that ties do not depend on how numpy partitions.
        cut_N = np.partition(rows_NE, -most, axis=1)[:, -most]
        node_X, expert_X = np.nonzero(rows_NE >= np.maximum(cut_N, 1)[:, None])
        order = np.argsort(-rows_NE[node_X, expert_X], kind="stable")
        self.expert_X, self.node_X = expert_X[order], node_X[order]
        self.rows_X = rows_NE[self.node_X, self.expert_X]


def add_local_copies(state: OverflowState, flows: NodeFlows, budget: int) -> OverflowState:
    """Add copies on the nodes that rows come from, and move rows to them.

    Args:
        state: loads and copies so far; not changed.
        flows: rows that leave their node while there are no copies.
        budget: copies that a position may send or receive, including those of `state`.

    Returns:
        Another state, with these copies.
    """
    state, experts = state.copy(), len(state.snapshot.home_E)
    home_E, topology = state.snapshot.home_E, state.snapshot.topology
    expert_X, position_X, rows_X = state.copies()
    sent_P = np.bincount(home_E[expert_X], minlength=topology.positions)
    received_P = np.bincount(position_X, minlength=topology.positions)
    copy_cell_X = position_X // topology.per_node * experts + expert_X
    supply_C = sum_by_index(copy_cell_X, rows_X, topology.nodes * experts)
    holder_C = np.full(topology.nodes * experts, -1, dtype=np.int64)
    holder_C[copy_cell_X] = position_X

    # Where the node has a copy already, that copy may take more.
    cell_X = flows.node_X * experts + flows.expert_X
    held_X = holder_C[cell_X] >= 0
    unserved_X = (flows.rows_X[held_X] - supply_C[cell_X[held_X]]).clip(0)
    existing = flows.expert_X[held_X], holder_C[cell_X[held_X]], unserved_X

    expert_X, node_X, rows_X = flows.expert_X[~held_X], flows.node_X[~held_X], flows.rows_X[~held_X]
    allowed_X = rank_in_group(home_E[expert_X], rows_X) < (budget - sent_P)[home_E[expert_X]]
    expert_X, node_X, rows_X = expert_X[allowed_X], node_X[allowed_X], rows_X[allowed_X]
    free_P = np.minimum(state.copies_left_P, budget - received_P).clip(0)
    position_S, first_N, places_N = _copy_places(free_P, state)
    place_X = rank_in_group(node_X, rows_X)
    fits_X = place_X < places_N[node_X]
    new = expert_X[fits_X], position_S[(first_N[node_X] + place_X)[fits_X]], rows_X[fits_X]

    expert_X, position_X, rows_X = (np.concatenate(parts) for parts in zip(existing, new, strict=True))
    state.move(expert_X, position_X, _rows_within_level(state, expert_X, position_X, rows_X))
    return state


def _copy_places(free_P: np.ndarray, state: OverflowState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Free places for copies, node after node.

    A node has first one place at each of its positions, the least loaded first, then a second one at each.

    Returns:
        Position of each place [S]; for each node its first place [N], and the number of its places [N].
    """
    per_node, nodes = state.snapshot.topology.per_node, state.snapshot.topology.nodes
    position_S = np.repeat(np.arange(len(free_P)), free_P)
    round_S = np.arange(len(position_S)) - np.repeat(free_P.cumsum() - free_P, free_P)
    order = np.lexsort((state.load_P[position_S], round_S, position_S // per_node))
    places_N = np.bincount(position_S // per_node, minlength=nodes)
    return position_S[order], places_N.cumsum() - places_N, places_N


def _rows_within_level(state: OverflowState, expert_X: np.ndarray, position_X: np.ndarray,
                       rows_X: np.ndarray) -> np.ndarray:
    """Reduce moves to rows that are still at home and that their new positions take.

    No position rises above the level, or above the largest load where that is higher.
    """
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
