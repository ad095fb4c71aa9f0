"""Copies that keep rows on their node: what is left of the room and of the time that hides copies, spent on links.

Once loads are level, a copy of an expert that no position of a node holds lets that node's rows for it stay there. The largest
such flows get copies first, on the least loaded positions of their node, as long as no position sends or receives more than
`budget` copies. Rows move to them, and to the copies that there are, only as far as the loads stay level.

Shapes: E experts, P positions, N nodes, X copies.
"""

import numpy as np

from moetrain.plan.leveling.overflow import Field, Pool, rank, sums

ROUNDS = 6           # of taking back rows where copies would overfill a position


class Flows:
    """The largest flows of rows between nodes, before any copy: expert, the node they come from, rows; descending."""

    def __init__(self, field: Field, room: int) -> None:
        topology = field.topology
        rows_NE = field.loads_NE.copy()
        rows_NE[field.home_E // topology.per_node, np.arange(len(field.home_E))] = 0
        most = min(rows_NE.shape[1], room * topology.per_node)
        cut_N = np.partition(rows_NE, -most, axis=1)[:, -most]       # a value, so that which ones pass is well defined
        node_X, expert_X = np.nonzero(rows_NE >= np.maximum(cut_N, 1)[:, None])
        order = np.argsort(-rows_NE[node_X, expert_X], kind="stable")
        self.expert_X, self.node_X = expert_X[order], node_X[order]
        self.rows_X = rows_NE[self.node_X, self.expert_X]


def keep_near(pool: Pool, flows: Flows, budget: int) -> Pool:
    """Another pool, with more copies. budget: copies that a position may send or receive, those it has included."""
    pool, experts = pool.copy(), len(pool.field.home_E)
    home_E, topology = pool.field.home_E, pool.field.topology
    expert_X, position_X, rows_X = pool.copies()
    sent_P = np.bincount(home_E[expert_X], minlength=topology.positions)
    received_P = np.bincount(position_X, minlength=topology.positions)
    supply_C = sums(position_X // topology.per_node * experts + expert_X, rows_X, topology.nodes * experts)
    holder_C = np.full(topology.nodes * experts, -1, dtype=np.int64)
    holder_C[position_X // topology.per_node * experts + expert_X] = position_X

    # Where a copy is there already, it may take more.
    cell_X = flows.node_X * experts + flows.expert_X
    held_X = holder_C[cell_X] >= 0
    more = flows.expert_X[held_X], holder_C[cell_X[held_X]], (flows.rows_X[held_X] - supply_C[cell_X[held_X]]).clip(0)

    expert_X, node_X, rows_X = flows.expert_X[~held_X], flows.node_X[~held_X], flows.rows_X[~held_X]
    allowed_X = rank(home_E[expert_X], rows_X) < (budget - sent_P)[home_E[expert_X]]
    expert_X, node_X, rows_X = expert_X[allowed_X], node_X[allowed_X], rows_X[allowed_X]
    slot_position, slot_start_N, slots_N = _slots(np.minimum(pool.room_P, budget - received_P).clip(0), pool.load_P, pool)
    place_X = rank(node_X, rows_X)
    fits_X = place_X < slots_N[node_X]
    fresh = expert_X[fits_X], slot_position[(slot_start_N[node_X] + place_X)[fits_X]], rows_X[fits_X]

    expert_X, position_X, rows_X = (np.concatenate(parts) for parts in zip(more, fresh, strict=True))
    pool.move(expert_X, position_X, _level_rows(pool, expert_X, position_X, rows_X))
    return pool


def _slots(free_P: np.ndarray, load_P: np.ndarray, pool: Pool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places for copies, node after node: one at every position, the least loaded first, then a second one, ..."""
    per_node, nodes = pool.field.topology.per_node, pool.field.topology.nodes
    position_S = np.repeat(np.arange(len(free_P)), free_P)
    turn_S = np.arange(len(position_S)) - np.repeat(free_P.cumsum() - free_P, free_P)
    order = np.lexsort((load_P[position_S], turn_S, position_S // per_node))
    slots_N = np.bincount(position_S // per_node, minlength=nodes)
    return position_S[order], slots_N.cumsum() - slots_N, slots_N


def _level_rows(pool: Pool, expert_X: np.ndarray, position_X: np.ndarray, rows_X: np.ndarray) -> np.ndarray:
    """As many of these rows as are at home until now, and as their new positions take without rising above the highest."""
    field, positions = pool.field, len(pool.load_P)
    wanted_E = sums(expert_X, rows_X, len(field.home_E))
    rows_X = rows_X * np.minimum(pool.kept_E, wanted_E)[expert_X] // wanted_E[expert_X].clip(1)
    ceiling = max(pool.level, int(pool.load_P.max()))
    for _ in range(ROUNDS):
        in_P = sums(position_X, rows_X, positions)
        out_P = sums(field.home_E[expert_X], rows_X, positions)
        over_P = (pool.load_P + in_P - out_P - ceiling).clip(0)
        if not over_P.any():
            break
        rows_X = rows_X * (in_P - over_P).clip(0)[position_X] // in_P[position_X].clip(1)
    return rows_X
