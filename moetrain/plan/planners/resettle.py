def resettle(loads, placement, topology, costs, *, horizon, state_ratio):
    return placement
