"""Assign routed slots to physical slots: integer arithmetic on the device, once for every micro-batch.

    assign    without copies: every expert has one physical slot, at its home, found in a table
    spread    with copies, by quotas (plan/splitting/split.py): the slots that chose an expert go to its
              replicas in order, as many to each as its quota says

Nothing downstream of this file knows what an expert is.

Shapes: T tokens, K slots per token, E experts, C replicas (homes and copies) by expert and then by position,
N routed slots.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.plan.placement import LayerPlacement


def assign(ids_TK: Tensor, table_E: Tensor) -> Tensor:
    """Physical slot of every routed slot, int64 [T, K]; -1 stays -1."""
    return table_E[ids_TK.clamp(min=0)].where(ids_TK >= 0, -1)


def slot_table(placement: LayerPlacement) -> Tensor:
    """Physical slot of every expert's home by global expert id, int64 [E], on the host."""
    return torch.tensor(placement.physical, dtype=torch.int64, device="cpu")


class Replicas(NamedTuple):
    """Every home and copy of a layer's experts, by expert and then by position.

    Attributes:
        expert_C: int64 [C], expert of each replica.
        position_C: int64 [C], position that it is on.
        physical_C: int64 [C], its physical slot.
    """

    expert_C: Tensor
    position_C: Tensor
    physical_C: Tensor


def replica_table(placement: LayerPlacement) -> Tensor:
    """The rows of `Replicas`, int64 [3, C], on the host."""
    return torch.tensor(list(zip(*placement.replicas)), dtype=torch.int64, device="cpu")


def spread(ids_TK: Tensor, quotas_C: Tensor, replicas: Replicas) -> Tensor:
    """Assign each routed slot to a replica of its expert.

    The slots of an expert fill its replicas in order, each up to its quota.

    Args:
        ids_TK: int64 [T, K], expert of each slot; -1 is unused.
        quotas_C: int64 [C], slots for each replica; those of an expert sum to the slots that chose it.
        replicas: expert, position and physical slot of each replica.

    Returns:
        int64 [T, K], physical slots; -1 stays -1.
    """
    ids_N = ids_TK.flatten()
    by_expert_N = ids_N.where(ids_N >= 0, len(quotas_C)).argsort(stable=True)      # unused slots last
    # One more replica, with physical slot -1, takes the unused slots. So the size of the result is known on
    # the host, and `repeat_interleave` does not wait for the device.
    unused_1 = ids_N.numel() - quotas_C.sum(0, keepdim=True)
    physical_N = F.pad(replicas.physical_C, (0, 1), value=-1).repeat_interleave(
        torch.cat([quotas_C, unused_1]), output_size=ids_N.numel())
    return torch.empty_like(ids_N).scatter_(0, by_expert_N, physical_N).view_as(ids_TK)
