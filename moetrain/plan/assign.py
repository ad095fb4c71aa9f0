"""Routed slots to physical slot ids: integer arithmetic on the device, once per micro-batch.

    assign    without copies an expert has one slot, at its home: a look-up
    spread    with copies, by quotas (plan/splitting/split.py): the slots that chose an expert go to its replicas in order, so many to
              the first, so many to the next

Nothing after this file knows what an expert is.

Shapes: T tokens, K slots per token, E experts, C replicas (homes and copies) by expert and then by position.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.plan.placement import LayerPlacement


def assign(ids_TK: Tensor, table_E: Tensor) -> Tensor:
    """Physical slot id of every routed slot, int64 [T, K]; -1 stays -1."""
    return table_E[ids_TK.clamp(min=0)].where(ids_TK >= 0, -1)


def slot_table(placement: LayerPlacement) -> Tensor:
    """Physical slot id of every expert's home by global id, int64 [E], on the host."""
    return torch.tensor(placement.physical, dtype=torch.int64, device="cpu")


class Replicas(NamedTuple):
    """Every home and copy of a layer's experts, by expert and then by position; int64 [C] each."""

    expert_C: Tensor
    position_C: Tensor
    physical_C: Tensor


def replica_table(placement: LayerPlacement) -> Tensor:
    """The rows of `Replicas`, int64 [3, C], on the host."""
    return torch.tensor(list(zip(*placement.replicas)), dtype=torch.int64, device="cpu")


def spread(ids_TK: Tensor, quotas_C: Tensor, replicas: Replicas) -> Tensor:
    """Physical slot id of every routed slot, int64 [T, K]; -1 stays -1.

    quotas_C: how many of these slots each replica takes; those of an expert sum to the slots that chose it.
    """
    ids_N = ids_TK.flatten()
    by_expert_N = ids_N.where(ids_N >= 0, len(quotas_C)).argsort(stable=True)                # unused slots last
    # One more replica, -1, takes the unused slots: then the size is known, and a device need not be asked for it.
    unused_1 = ids_N.numel() - quotas_C.sum(0, keepdim=True)
    physical_N = F.pad(replicas.physical_C, (0, 1), value=-1).repeat_interleave(torch.cat([quotas_C, unused_1]),
                                                                                output_size=ids_N.numel())
    return torch.empty_like(ids_N).scatter_(0, by_expert_N, physical_N).view_as(ids_TK)
