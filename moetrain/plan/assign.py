"""Routed slots to physical slot ids: integer arithmetic on the device, once per micro-batch.

Without copies an expert has one slot, at its home, and the assignment is a look-up. A placement with copies will choose
among them here; nothing after this file knows what an expert is.
"""

import torch
from torch import Tensor

from moetrain.plan.placement import LayerPlacement


def assign(ids_TK: Tensor, table_E: Tensor) -> Tensor:
    """Physical slot id of every routed slot, int64 [T, K]; -1 stays -1."""
    return table_E[ids_TK.clamp(min=0)].where(ids_TK >= 0, -1)


def slot_table(placement: LayerPlacement, device: torch.device) -> Tensor:
    """Physical slot id by global expert id, int64 [E]."""
    return torch.tensor(placement.physical, dtype=torch.int64, device=device)
