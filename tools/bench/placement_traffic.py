"""Bytes that ranks hand to their collectives in tools/bench/placement.py, as counted and as they must be.

    Meter     bytes that this rank hands over, by destination, and how many collectives it calls
    traffic   what these must be, from the rows, the plan and the sizes alone

Shapes: P positions, E experts, C replicas.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  before Meter stands in for its op
from torch import Tensor

from moetrain.plan.placement import slice_columns
from moetrain.plan.planners.base import LayerPlan


class Meter:
    """Bytes that this rank hands to its collectives for each rank since `clear`, and how many it calls."""

    def __init__(self) -> None:
        self.sent_P = np.zeros(dist.get_world_size(), dtype=np.int64)
        self.calls = 0

    def clear(self) -> None:
        self.sent_P[:] = 0
        self.calls = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the collectives that move rows, counts or experts inside the block."""
        plain, functional = dist.all_to_all_single, torch.ops._c10d_functional.all_to_all_single

        def all_to_all(output, message, received=None, sent=None, group=None, **options):
            self._add(message, sent, dist.get_process_group_ranks(group))
            return plain(output, message, received, sent, group=group, **options)

        def functional_all_to_all(message, received, sent, group_name):
            group = torch._C._distributed_c10d._resolve_process_group(group_name)
            self._add(message, sent, dist.get_process_group_ranks(group))
            return functional(message, received, sent, group_name)

        dist.all_to_all_single = all_to_all
        torch.ops._c10d_functional.all_to_all_single = functional_all_to_all
        try:
            yield
        finally:
            dist.all_to_all_single, torch.ops._c10d_functional.all_to_all_single = plain, functional

    def _add(self, message: Tensor, sent: list[int], ranks: list[int]) -> None:
        row = message.element_size() * message.shape[1:].numel()
        self.sent_P[ranks] += np.asarray(sent) * row
        self.calls += 1


class Traffic(NamedTuple):
    """Bytes of a layer or a step, and the collectives of a rank."""

    bytes_PP: np.ndarray         # from each position to each
    calls: int


def traffic(n_PE: Tensor, plan: LayerPlan, rule: object, shapes: list[tuple[int, int]]) -> Traffic:
    """Traffic of one layer, forward and backward, in float32, for one micro-batch.

    Rows go and come back, forward and again backward; with each goes its gate weight, and comes the gradient
    of that. Copies come from homes, or in slices from everywhere, and their gradients go there. Counts are of
    slots, or of experts where a rule looks at all positions.

    Args:
        n_PE: int64 [P, E], rows.
        plan: the plan of the layer.
        rule: splits the rows of an expert over its replicas.
        shapes: rows and columns of an expert's matrices.
    """
    dim = shapes[0][1]
    placement, looks = plan.placement, bool(plan.placement.copies) and rule.needs_all_counts
    positions = placement.positions
    split_PC = rule.split(n_PE, placement, 0) if placement.copies else n_PE
    rows_PP = np.zeros((positions, positions), dtype=np.int64)
    for c, (_, at, _) in enumerate(placement.replicas):
        rows_PP[:, at] += split_PC[:, c].numpy()
    numbers_PP = np.zeros_like(rows_PP)                          # of weights, on their way to copies
    for expert, at in placement.whole_copies:
        numbers_PP[placement.home[expert], at] += sum(rows * columns for rows, columns in shapes)
    for source in range(positions):
        in_slice = sum(part.stop - part.start for part in slice_columns(shapes, source, positions))
        for at in range(positions):
            numbers_PP[source, at] += in_slice * len(placement.assembled_at(at))
    counted = placement.num_experts if looks else placement.slots_per_position
    per_row = 4 * dim + 4 + 4 * dim
    bytes_PP = per_row * (rows_PP + rows_PP.T) + 4 * (numbers_PP + numbers_PP.T) + 8 * counted
    return Traffic(bytes_PP, 1 + 4 + 2 * bool(placement.whole_copies) + 2 * bool(placement.sliced))


def by_link(bytes_PP: np.ndarray, per_node: int) -> dict[str, int]:
    """Bytes inside nodes and between them; what stays at a position crosses no link."""
    node_P = np.arange(len(bytes_PP)) // per_node
    near_PP = node_P[:, None] == node_P
    return {"inside": int((bytes_PP * (near_PP & ~np.eye(len(node_P), dtype=bool))).sum()),
            "between": int((bytes_PP * ~near_PP).sum())}
