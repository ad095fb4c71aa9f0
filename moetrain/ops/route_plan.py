"""The row of every used slot, ordered by physical id, with sizes that depend on shapes alone.

What `plan_permutation` (ops/permute.py) answers, for devices: nothing waits for the host, so the number of rows is a
static bound and what is used of it stays on the device. Rows of an id may begin at a multiple of `alignment`.

    slots_R    the slot of each of `max_rows` rows; -1 in gaps of the alignment and behind the last row
    rows_TK    the row of each slot; -1 where it is unused, or its row would lie beyond max_rows
    counts_P   rows of each physical id, gaps not counted
    ends_P     int32: where the rows of each id end, its gap included: the offsets of a grouped product

Shapes: T tokens, K slots per token, R = max_rows, P physical ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.extension import define
from moetrain.ops.permute import Permutation

MAX_PHYSICAL = 12288             # of the kernel: one warp's counters in shared memory (csrc/launch.h)


class RoutePlan(NamedTuple):
    permutation: Permutation     # padded: slots_R has rows without a slot
    ends_P: Tensor


def _reference(physical_TK: Tensor, num_physical: int, max_rows: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat_N = physical_TK.flatten()
    id_N = flat_N.where((flat_N >= 0) & (flat_N < num_physical), num_physical)       # unused slots: behind all ids
    counts_Q = count_ids(id_N, num_physical + 1)
    aligned_Q = (counts_Q + alignment - 1) // alignment * alignment
    ends_Q = aligned_Q.cumsum(0)
    begins_Q = ends_Q - aligned_Q
    first_Q = counts_Q.cumsum(0) - counts_Q                              # where an id begins among the sorted slots

    slots_N = id_N.argsort(stable=True)
    sorted_N = id_N[slots_N]
    row_N = begins_Q[sorted_N] + torch.arange(len(flat_N), device=flat_N.device) - first_Q[sorted_N]
    placed_N = (sorted_N < num_physical) & (row_N < max_rows)
    rows_N = torch.empty_like(flat_N).scatter(0, slots_N, row_N.where(placed_N, -1))
    slots_R = torch.full((max_rows + 1,), -1, dtype=torch.int64, device=flat_N.device)
    slots_R = slots_R.scatter(0, row_N.where(placed_N, max_rows), slots_N)[:max_rows].clone()
    return slots_R, rows_N.view(physical_TK.shape), counts_Q[:-1].clone(), ends_Q[:-1].int()


def _fake(physical_TK, num_physical, max_rows, alignment):
    return (physical_TK.new_empty(max_rows), torch.empty_like(physical_TK, memory_format=torch.contiguous_format),
            physical_TK.new_empty(num_physical), physical_TK.new_empty(num_physical, dtype=torch.int32))


_route_plan = define(
    "route_plan(Tensor physical_TK, int num_physical, int max_rows, int alignment) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)


def route_plan(physical_TK: Tensor, num_physical: int, max_rows: int, alignment: int = 1) -> RoutePlan:
    """Order used slots by physical id, then by token, then by slot. physical_TK: int64, -1 in unused slots.

    max_rows: with alignment a, used slots + (a - 1) for every id that may have rows is always enough.
    """
    plan = _route_plan if num_physical <= MAX_PHYSICAL else _reference
    *permutation, ends_P = plan(physical_TK, num_physical, max_rows, alignment)
    return RoutePlan(Permutation(*permutation), ends_P)
