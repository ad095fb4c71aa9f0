"""Optimal splits of rows over replicas, with which `waterfill` is compared.

With free links the smallest largest load is a flow problem with integer capacities: bisection over the load,
a maximum flow each time. With links it is a linear program over rows that may be divided, so its optimum is
no larger than that of rows.
"""

import networkx
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import EXCHANGES
from moetrain.plan.placement import LayerPlacement


def shortest_time(n_PE: np.ndarray, placement: LayerPlacement, topology: Topology, costs: Costs) -> float:
    """Smallest compute_s + link_s (plan/cost/step_time.py) in seconds: computing, and exchanges of rows."""
    positions, replicas = placement.positions, [(expert, at) for expert, at, _ in placement.replicas]
    # Variables behind rows [P, C].
    compute, link = positions * len(replicas), positions * len(replicas) + 1
    # Sums that must stay below one of the two.
    busy: dict[tuple, list[tuple[int, float]]] = {}
    given: dict[tuple[int, int], list[int]] = {}
    for source in range(positions):
        for c, (expert, at) in enumerate(replicas):
            row = source * len(replicas) + c
            given.setdefault((source, expert), []).append(row)
            busy.setdefault((compute, at), []).append((row, costs.row_s))
            if source != at:
                same_node = topology.node_of(source) == topology.node_of(at)
                seconds = EXCHANGES * costs.row_bytes / (costs.inside if same_node else costs.between)
                busy.setdefault((link, same_node, "sends", source), []).append((row, seconds))
                busy.setdefault((link, same_node, "receives", at), []).append((row, seconds))
    bounds = [[*terms, (key[0], -1.0)] for key, terms in busy.items()]
    rows_of_each = [[(row, 1.0) for row in rows] for rows in given.values()]
    found = linprog(np.eye(link + 1)[compute:].sum(0),
                    A_ub=_matrix(bounds, link + 1), b_ub=np.zeros(len(bounds)),
                    A_eq=_matrix(rows_of_each, link + 1),
                    b_eq=[n_PE[source, expert] for source, expert in given], method="highs")
    assert found.success, found.message
    return found.fun + EXCHANGES * costs.latency_s


def _matrix(lines: list[list[tuple[int, float]]], columns: int) -> coo_array:
    at = [(row, column) for row, line in enumerate(lines) for column, _ in line]
    values = [value for line in lines for _, value in line]
    return coo_array((values, tuple(zip(*at))), shape=(len(lines), columns))


def smallest_largest_load(rows_E: list[int], placement: LayerPlacement) -> int:
    """Rows of the fullest position when rows are split over replicas as well as they can be."""
    total = sum(rows_E)
    low, high = -(-total // placement.positions), total
    while low < high:
        middle = (low + high) // 2
        if _fits(rows_E, placement, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(rows_E: list[int], placement: LayerPlacement, load: int) -> bool:
    graph = networkx.DiGraph()
    for expert, rows in enumerate(rows_E):
        graph.add_edge("rows", ("expert", expert), capacity=rows)
    for expert, position, _ in placement.replicas:
        graph.add_edge(("expert", expert), ("position", position))         # without a capacity: unbounded
    for position in range(placement.positions):
        graph.add_edge(("position", position), "done", capacity=load)
    return networkx.maximum_flow_value(graph, "rows", "done") == sum(rows_E)
