"""Copies of experts under FSSDP: every expert has one home, copies lie where its tokens are.

Fully sharded sparse data parallelism (Hecate, arXiv 2502.02581). One iteration, for every layer with experts:

    plan                       before the step: which positions get copies of which experts      plan/planners/
    prefetch                   at the block's start: the sparse all-gather starts, attention     transfers.py, comm/sparse/
                               hides it
    add_copies                 once a step, after the gate: copies that the plan lacks start too plan/calibration.py
    wait                       between dispatch and experts: copies have arrived
    compute                    one grouped product over homes and copies                         ops/grouped_experts.py
    release_after_forward      with `rematerialize`: copies are dropped
    backward of release        with `rematerialize`: the all-gather starts again
    backward of wait           gradients of copies are added up over micro-batches
    reduce_grads_in_backward   backward of the last micro-batch, once the rows' gradients have arrived: the sparse
                               reduce-scatter starts, attention hides it
    finish                     after the last backward: wait, sum at the home in a fixed order
    release                    after the update: copies are stale

The hooks are those of moe/bank.py, which lists their callers. Only homes have optimizer state, so a plan may
change at every step and moves none. The dense part is FSDP2's, which sees no expert. One `CopyManager` per
model owns every handle. What it posts is waited for exactly once, on every rank, and whether anything is
posted follows from the placement, which all ranks of the group share. `wait` passes the rows through an
autograd node, so its backward runs on every rank, also on one without rows or copies.

Lifetime of copies:

    rematerialize=false   from the first use in a step to its end: one gather a step, whatever the accumulation
    rematerialize=true    while a layer computes: gathered for every forward and again for every backward, where the gather of
                          the layer below starts one layer ahead. Their memory is that of two layers. With
                          activation checkpointing the recomputed block gathers by itself

Gradients of copies are summed here over micro-batches and travel once a step, in float32 (float64 in float64
runs).

With calibration (`add_copies`) a step goes on with another placement, as if it had been planned. Only its
first gather comes in two parts, which are put in the order of slots when both have arrived. Groups of
replicas may decide differently; their sums meet at the homes.

Shapes: h homes, c copies, W numbers of an expert, N rows that arrived, R rows computed, D model width, G = 2F
expert rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.moe.bank import CopiedMatrices, ExpertBank
from moetrain.ops.pinned import DeviceTables, to_device
from moetrain.parallel.fssdp.transfers import CopyTransfers, PendingGradReduction
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement


class CopyManager:
    """Copies of all layers of a model.

    Args:
        banks: of the model by router name, in layer order; sets `copies` of each.
        group: the positions, `ep`.
        dtype: of the computation, and of copies while they travel.
        rematerialize: drop copies after forward and gather them again for backward.
        recompute: activation checkpointing runs blocks again in backward.
        form: of the sparse collectives (comm/sparse/forms.py).
        topology: how the positions lie on nodes; None: all on one.
    """

    def __init__(self, banks: Mapping[str, ExpertBank], group: Group, *, dtype: torch.dtype, rematerialize: bool,
                 recompute: bool, form: str = "packed", topology: Topology | None = None) -> None:
        topology = topology or Topology(group.size, group.size)
        self.layers: dict[str, LayerCopies] = {}
        below = None
        for name, bank in banks.items():
            below = self.layers[name] = bank.copies = LayerCopies(bank, group, dtype, rematerialize, recompute, below, form,
                                                                  topology)

    def set_placement(self, placement: ExpertPlacement, tables: DeviceTables) -> None:
        """Put a placement in force for the steps to come.

        Between steps only; drops the copies of the old one.
        """
        for name, layer in placement.layers:
            self.layers[name].set_placement(layer, tables)

    def begin(self, backwards: int) -> None:
        """Begin a step of so many backward passes."""
        for layer in self.layers.values():
            layer.begin(backwards)

    @property
    def added(self) -> int:
        """Copies that calibration has added in this step, over all positions and layers."""
        return sum(layer.added for layer in self.layers.values())

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the gradients of homes with those of all their copies. After the last backward; waits."""
        for layer in self.layers.values():
            layer.finish()

    def release(self) -> None:
        """Drop all copies: the parameters have changed."""
        for layer in self.layers.values():
            layer.release()


class LayerCopies:
    """Copies of one layer: the state between `prefetch` and `release`, behind the hooks of its bank."""

    def __init__(self, bank: ExpertBank, group: Group, dtype: torch.dtype, rematerialize: bool, recompute: bool,
                 below: "LayerCopies | None", form: str, topology: Topology) -> None:
        self.bank, self.group, self.dtype, self.below = bank, group, dtype, below
        self.form, self.topology = form, topology
        self.rematerialize = rematerialize
        self.hooked = rematerialize and not recompute    # a recomputed block keeps nothing that hooks would have to drop
        self.placement: LayerPlacement | None = None     # in force; None before the first plan
        self.transfers: CopyTransfers | None = None      # of its copies; None: no position has one
        self.backwards = 0                               # of this step, still to come
        self.calibrated = True                           # nothing more may be added in this step
        self.added = 0
        self._gathers: list[PendingGather] = []          # under way
        self._rows_cW: Tensor | None = None              # the copies, while they are here
        self._gradients_cW: Tensor | None = None
        self._pending_reduction: PendingGradReduction | None = None
        self._anchor = torch.zeros(0, requires_grad=True)      # runs backward of the nodes even if no row needs gradients

    def set_placement(self, placement: LayerPlacement, tables: DeviceTables) -> None:
        self.release()
        self.placement, self.transfers = placement, self._transfers(placement, tables)

    def begin(self, backwards: int) -> None:
        self.backwards, self.calibrated, self.added = backwards, False, 0

    @torch.no_grad()
    def prefetch(self) -> None:
        """Start the gather, unless copies are here or under way."""
        if self.transfers is not None and not self._gathers and self._rows_cW is None:
            self._gathers = [self._gather(self.placement, self.transfers)]

    @torch.no_grad()
    def add_copies(self, placement: LayerPlacement) -> None:
        """Go on with a placement that has more copies, and start the gather of those.

        Before the step's first `wait`.
        """
        here, self._rows_cW = self._rows_cW, None
        landed = [] if here is None else [PendingGather(self.placement.gathered_at(self.group.position), lambda: here)]
        added = placement.beyond(self.placement)
        with DeviceTables(self.bank.gate_up.device) as tables:
            transfers, transfers_of_all = self._transfers(added, tables), self._transfers(placement, tables)
        self._gathers = [*landed, *self._gathers, self._gather(added, transfers)]
        self.placement, self.transfers, self.added = placement, transfers_of_all, len(added.copies)

    def wait(self, x_ND: Tensor) -> tuple[Tensor, CopiedMatrices | None]:
        """Wait for the copies. The rows pass through."""
        if self.transfers is None:
            return x_ND, None
        x_ND, gate_up_cGD, down_cDF = _Wait.apply(x_ND, self._anchor, self)
        return x_ND, (gate_up_cGD, down_cDF)

    @contextmanager
    def regather_in_backward(self) -> Iterator[None]:
        """Save where a copy lay instead of the copy, if backward gathers copies again."""
        if self.transfers is None or not self.hooked:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def release_after_forward(self, rows_RD: Tensor) -> Tensor:
        """Drop copies that backward gathers again, and start that gather in backward of this node."""
        if self.transfers is None or not self.rematerialize:
            return rows_RD
        self._rows_cW = None
        return _ReleaseAfterForward.apply(rows_RD, self) if self.hooked else rows_RD

    def matrices(self) -> tuple[Tensor, Tensor]:
        """gate_up [c, G, D] and down [c, D, F] of the copies, views. Waits for them."""
        if self._rows_cW is None:
            self.prefetch()
            self._rows_cW = self._wait_gathers()
        gate_up, down = self.bank.gate_up.shape[1:], self.bank.down.shape[1:]
        parts = self._rows_cW.detach().split([gate_up.numel(), down.numel()], dim=1)
        return parts[0].unflatten(1, gate_up), parts[1].unflatten(1, down)

    def reduce_grads_in_backward(self, x_TD: Tensor) -> Tensor:
        """Start the reduction in backward of this node, which runs after the rows' gradients have arrived.

        Posted as soon as the gradients of copies exist, it would delay the exchange of the rows' gradients,
        for which attention waits.
        """
        return x_TD if self.transfers is None and self.calibrated else _ReduceGrads.apply(x_TD, self._anchor, self)

    @torch.no_grad()
    def start_reduction(self) -> None:
        """Start sending the gradients of copies to their homes, if this was the last micro-batch."""
        if self.backwards == 0 and self._gradients_cW is not None:
            self._pending_reduction, self._gradients_cW = self.transfers.post_reduce(self._gradients_cW), None

    @torch.no_grad()
    def add_grads(self, gate_up_cGD: Tensor, down_cDF: Tensor) -> None:
        """Add up the gradients of the copies from one micro-batch."""
        if self.hooked:                                  # a rank that saved nothing of copies has not unpacked any
            self.matrices()
        if self.rematerialize:
            self._rows_cW = None
        gradients_cW = torch.cat([gate_up_cGD.flatten(1), down_cDF.flatten(1)], dim=1).to(self.bank.gate_up.dtype)
        self._gradients_cW = gradients_cW if self._gradients_cW is None else self._gradients_cW.add_(gradients_cW)
        self.backwards -= 1

    def finish(self) -> None:
        """Complete the gradients of the homes. Waits."""
        if self.transfers is None:
            return
        assert self._pending_reduction is not None, f"{self.backwards} backward passes of this step did not run"
        self._pending_reduction.finish()
        self._pending_reduction = None

    def release(self) -> None:
        assert not self._gathers and self._pending_reduction is None, "a collective is still under way"
        self._rows_cW = self._gradients_cW = None

    def _transfers(self, placement: LayerPlacement, tables: DeviceTables) -> CopyTransfers | None:
        if not placement.copies and not placement.sliced:
            return None
        return CopyTransfers(placement, self.bank, self.group, self.form, self.topology, tables)

    def _gather(self, placement: LayerPlacement, transfers: CopyTransfers) -> "PendingGather":
        return PendingGather(placement.gathered_at(self.group.position), transfers.post_gather(self.dtype).wait)

    def _wait_gathers(self) -> Tensor:
        """Copies [c, W] in the order of their slots. Waits."""
        gathers, self._gathers = self._gathers, []
        rows_cW = [gather.wait() for gather in gathers]
        if len(gathers) == 1:
            return rows_cW[0]
        landed = [expert for gather in gathers for expert in gather.experts]
        wanted = self.placement.gathered_at(self.group.position)
        order_c = torch.tensor([landed.index(expert) for expert in wanted], dtype=torch.int64)
        return torch.cat(rows_cW)[to_device(order_c, self.bank.gate_up.device)]

    def _pack(self, tensor: Tensor) -> "Tensor | _Place":
        if self._rows_cW is None or not tensor.numel() or _storage(tensor) != _storage(self._rows_cW):
            return tensor
        return _Place(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: "Tensor | _Place") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.matrices()
        return self._rows_cW.as_strided(*saved)


class PendingGather(NamedTuple):
    """A gather under way: its experts in order, and a function that waits for their rows, called once."""

    experts: tuple[int, ...]
    wait: Callable[[], Tensor]


class _Place(NamedTuple):
    """Geometry of a view of the copies."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Wait(torch.autograd.Function):
    """Forward waits for copies; backward adds up their gradients."""

    @staticmethod
    def forward(ctx, x_ND, anchor, layer):
        ctx.layer = layer
        return x_ND.view_as(x_ND), *layer.matrices()

    @staticmethod
    def backward(ctx, grad_ND, gate_up_cGD, down_cDF):
        ctx.layer.add_grads(gate_up_cGD, down_cDF)
        return grad_ND, None, None


class _ReduceGrads(torch.autograd.Function):
    """Backward starts the reduction, on every rank."""

    @staticmethod
    def forward(ctx, x_TD, anchor, layer):
        ctx.layer = layer
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        ctx.layer.start_reduction()
        return grad_TD, None, None


class _ReleaseAfterForward(torch.autograd.Function):
    """Backward starts the gather of this layer and of the layer below, on every rank in the same order."""

    @staticmethod
    def forward(ctx, rows_RD, layer):
        ctx.layer = layer
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx, grad_RD):
        ctx.layer.prefetch()
        if ctx.layer.below is not None:
            ctx.layer.below.prefetch()
        return grad_RD, None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
