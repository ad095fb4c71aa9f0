"""Random homes and copies of experts over four ranks."""

import random

import torch
import torch.distributed as dist

from moetrain.comm.mesh import Group
from moetrain.plan.placement import LayerPlacement

POSITIONS, WIDTH = 4, 6
# No copies, one, everywhere; one home for all; three copies on a node that has no home.
SEEDS = (0, 1, 2, 3, 4, 5, 8, 12)
CPU = torch.device("cpu")


def placement_of(seed: int) -> LayerPlacement:
    """Random homes (a position may own none or all) and copies (none, some, everywhere)."""
    draw = random.Random(seed)
    home = tuple(draw.choice([[draw.randrange(POSITIONS) for _ in range(7)],
                              [draw.randrange(POSITIONS)] * 7]))
    pairs = [(expert, at) for expert in range(7) for at in range(POSITIONS) if at != home[expert]]
    copies = draw.sample(pairs, draw.choice([0, 1, 5, 8, 12, len(pairs)]))
    return LayerPlacement(home, POSITIONS, tuple(copies))


def group() -> Group:
    return Group("ep", tuple(range(POSITIONS)), dist.get_rank(), dist.group.WORLD)
