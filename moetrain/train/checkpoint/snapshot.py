"""A copy of what a rank will write, taken before the next step changes it.

On the CPU a clone, on a GPU a copy to the host; both are done when `take` returns. The memory is that of the pieces this
rank writes, until they are written.
"""

import torch
from torch import Tensor

from moetrain.comm.mesh import Mesh
from moetrain.train.checkpoint.layout import NAMES, written_here
from moetrain.train.checkpoint.payload import Item
from moetrain.train.state import TrainState


@torch.no_grad()
def take(state: TrainState, mesh: Mesh) -> list[Item]:
    """Copies of the pieces that this rank writes. No collective."""
    items = []
    for piece in written_here(state.pieces(), mesh):
        copy = piece.rows.detach().to("cpu", copy=True).contiguous()
        rows = len(piece.rows) if piece.shape else 1
        items.append(Item(piece.name, NAMES[copy.dtype], tuple(piece.shape), piece.begin, rows, as_bytes(copy)))
    return items


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
