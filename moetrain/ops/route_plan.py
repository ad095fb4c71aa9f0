"""Permutation of used slots by physical id on a device, with sizes that depend on shapes alone.

This is `plan_permutation` (ops/permute.py) without a wait of the host: the number of rows is a static bound,
and how many of them are used stays on the device. The rows of each id may begin at a multiple of `alignment`,
for a grouped product.

    slots_R    slot of each of `max_rows` rows; -1 in alignment gaps and behind the last row
    rows_TK    row of each slot; -1 where the slot is unused or its row would lie beyond max_rows
    counts_P   rows of each physical id, without gaps
    ends_P     int32: where the rows of each id end, its gap included: the offsets of a grouped product

Shapes: T tokens, K slots per token, R = max_rows, P physical ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.extension import define
from moetrain.ops.permute import Permutation

MAX_PHYSICAL = 12288             # of the kernel: one warp's counters fill shared memory (csrc/launch.h)


class RoutePlan(NamedTuple):
    """Permutation with a static number of rows, and where the rows of each id end."""

    permutation: Permutation     # padded: slots_R has rows without a slot
    ends_P: Tensor               # int32


def _reference(physical_TK: Tensor, num_physical: int, max_rows: int,
               alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat_N = physical_TK.flatten()
    used_N = (flat_N >= 0) & (flat_N < num_physical)
    id_N = flat_N.where(used_N, num_physical)                            # unused slots sort behind all ids
    counts_Q = count_ids(id_N, num_physical + 1)
    aligned_Q = (counts_Q + alignment - 1) // alignment * alignment
    ends_Q = aligned_Q.cumsum(0)
    begins_Q = ends_Q - aligned_Q
    first_Q = counts_Q.cumsum(0) - counts_Q                              # of each id among the sorted slots

    slots_N = id_N.argsort(stable=True)
    sorted_N = id_N[slots_N]
    row_N = begins_Q[sorted_N] + torch.arange(len(flat_N), device=flat_N.device) - first_Q[sorted_N]
    placed_N = (sorted_N < num_physical) & (row_N < max_rows)
    rows_N = torch.empty_like(flat_N).scatter(0, slots_N, row_N.where(placed_N, -1))
    slots_R = torch.full((max_rows + 1,), -1, dtype=torch.int64, device=flat_N.device)
    slots_R = slots_R.scatter(0, row_N.where(placed_N, max_rows), slots_N)[:max_rows].clone()
    return slots_R, rows_N.view(physical_TK.shape), counts_Q[:-1].clone(), ends_Q[:-1].int()


def _fake(physical_TK, num_physical, max_rows, alignment):
    rows_TK = torch.empty_like(physical_TK, memory_format=torch.contiguous_format)
    ends_P = physical_TK.new_empty(num_physical, dtype=torch.int32)
    return physical_TK.new_empty(max_rows), rows_TK, physical_TK.new_empty(num_physical), ends_P


_route_plan = define(
    "route_plan(Tensor physical_TK, int num_physical, int max_rows, int alignment)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)


def route_plan(physical_TK: Tensor, num_physical: int, max_rows: int, alignment: int = 1) -> RoutePlan:
    """Order used slots by physical id, then by token, then by slot.

    Args:
        physical_TK: int64 [T, K], physical id of each slot; -1 is unused.
        num_physical: P, number of physical ids.
        max_rows: R. With alignment a, the number of used slots plus a - 1 for every id that may have rows
            always suffices.
        alignment: the rows of each id begin at a multiple of this.

    Returns:
        Padded permutation of R rows, and the ends of the ids.
    """
    plan = _route_plan if num_physical <= MAX_PHYSICAL else _reference
    *permutation, ends_P = plan(physical_TK, num_physical, max_rows, alignment)
    return RoutePlan(Permutation(*permutation), ends_P)
