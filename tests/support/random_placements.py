"""Random placements of experts."""

import random

from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement


def drawn(seed: int) -> tuple[LayerPlacement, Topology]:
    draw = random.Random(seed)
    positions, experts = draw.randint(1, 9), draw.randint(1, 9)
    home = tuple(draw.randrange(positions) for _ in range(experts))
    pairs = [(expert, at) for expert in range(experts) for at in range(positions) if at != home[expert]]
    copies = draw.sample(pairs, draw.randint(0, len(pairs)))
    return LayerPlacement(home, positions, tuple(copies)), Topology(positions, draw.randint(1, positions))
