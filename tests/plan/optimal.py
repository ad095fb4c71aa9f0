"""The best split there is when links are free: the reference (`lp`) that `waterfill` is held against.

Rows of an expert may be computed by any of its replicas, so the smallest largest load is a flow problem with integer
capacities: bisection over the load, a maximum flow each time.
"""

import networkx

from moetrain.plan.placement import LayerPlacement


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
