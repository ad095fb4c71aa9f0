"""Copies of experts under FSSDP, on positions that compute rows of an expert whose home is elsewhere.

Fully sharded sparse data parallelism (Hecate, arXiv 2502.02581). One iteration, for every bank of experts:

    plan                       before the step (plan/planners/)
                               choose which positions get copies of which experts
    prefetch                   at the block's start (transfers.py, comm/sparse/)
                               start the sparse all-gather, which attention hides
    add_copies                 once a step, after the gate (plan/calibration.py)
                               start to gather copies that the plan lacks
    wait                       between dispatch and experts
                               wait for copies; then homes and copies compute in one grouped product
                               (ops/grouped_experts.py)
    release_after_forward      with `rematerialize`: drop copies
    backward of release        with `rematerialize`: start the all-gather again
    backward of wait           accumulate the gradients of copies over micro-batches and passes
    reduce_grads_in_backward   in backward of the step's last pass, when the rows' gradients have arrived
                               start the sparse reduce-scatter, which attention hides
    finish                     after the last backward
                               wait, and sum at the home in a fixed order; no gradient may be left over
    release                    after the update
                               drop copies, which are stale

The hooks are those of moe/bank.py, which lists their callers. Only homes have optimizer state, so a plan may
change at every step without moving any. FSDP2 shards the dense part and sees no expert. One `CopyManager` per
model owns every handle. Every rank waits exactly once for each collective that it posts. The placement, which
all ranks of the group share, decides whether one is posted. `wait` passes the rows through an autograd node,
so its backward runs on every rank, even without rows or copies.

A *pass* sends the tokens of a micro-batch through a bank once. A bank that several routers feed, in one layer
or in several, has a pass for each in every micro-batch.

Lifetime of copies:

    rematerialize=false   From the first use in a step to its end: one gather a step, however many
                          micro-batches it has.
    rematerialize=true    While a layer computes. Copies are gathered for every forward and again for every
                          backward, where the gather of the layer below starts one layer ahead. Two layers'
                          copies are in memory at once. With activation checkpointing, the recomputed block
                          gathers them itself.

Gradients of copies are summed here over micro-batches and passes, and travel once a step, in float32 (float64
in float64 runs). Frozen parameters are gathered, too, but no gradient of theirs is computed or sent.

With calibration (`add_copies`) a step continues with another placement, as if it had been planned. Only its
first gather comes in two parts, which are put in the order of slots when both have arrived. Replica groups
may decide differently; their gradients are summed at the homes.

Shapes: h homes, c copies, W numbers of an expert, N rows that arrived, R rows computed, T tokens, D model
width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.moe.bank import CopiedParameters, ExpertBank
from moetrain.ops.pinned import DeviceTables, to_device
from moetrain.parallel.fssdp.transfers import CopyTransfers, PendingGradReduction
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement


class CopyManager:
    """Copies of all banks of a model.

    Args:
        banks: experts by bank name, in run order. The manager sets their `copies`.
        group: the positions, `ep`.
        passes: passes over each bank in a micro-batch.
        dtype: dtype of the computation, and of copies while they travel.
        rematerialize: drop copies after forward and gather them again for backward.
        recompute: whether activation checkpointing runs blocks again in backward.
        form: form of the sparse collectives (comm/sparse/forms.py).
        topology: positions and nodes; None puts all positions on one node.
    """

    def __init__(self, banks: Mapping[str, ExpertBank], group: Group, *, passes: Mapping[str, int],
                 dtype: torch.dtype, rematerialize: bool, recompute: bool, form: str = "packed",
                 topology: Topology | None = None) -> None:
        topology = topology or Topology(group.size, group.size)
        self.passes = dict(passes)
        self.banks: dict[str, BankCopies] = {}
        below = None
        for name, bank in banks.items():
            below = self.banks[name] = bank.copies = BankCopies(
                bank, group, dtype, rematerialize, recompute, below, form, topology)

    def set_placement(self, placement: ExpertPlacement, tables: DeviceTables) -> None:
        """Put a placement in force. Between steps only; drops the copies of the old one.

        Args:
            placement: homes and copies of all banks.
            tables: where indices are put on the device.
        """
        for name, layer in placement.layers:
            self.banks[name].set_placement(layer, tables)

    def begin(self, micro_batches: int) -> None:
        """Begin a step of so many micro-batches."""
        for name, copies in self.banks.items():
            copies.begin(micro_batches * self.passes[name])

    @property
    def added(self) -> int:
        """Copies that calibration has added in this step, over all positions and banks."""
        return sum(copies.added for copies in self.banks.values())

    @torch.no_grad()
    def finish(self) -> None:
        """Add the gradients of all copies to those of their homes. After the last backward. Waits."""
        for copies in self.banks.values():
            copies.finish()

    def release(self) -> None:
        """Drop all copies, which are stale once the parameters have changed."""
        for copies in self.banks.values():
            copies.release()


class BankCopies:
    """Copies of one bank, and the hooks to which it delegates (moe/bank.py).

    Args:
        bank: experts whose home is here.
        group: the positions, `ep`.
        dtype: dtype of the computation, and of copies while they travel.
        rematerialize: drop copies after forward and gather them again for backward.
        recompute: whether activation checkpointing runs blocks again in backward.
        below: copies of the bank before this one, or None.
        form: form of the sparse collectives (comm/sparse/forms.py).
        topology: positions and nodes.
    """

    def __init__(self, bank: ExpertBank, group: Group, dtype: torch.dtype, rematerialize: bool,
                 recompute: bool, below: "BankCopies | None", form: str, topology: Topology) -> None:
        self.bank, self.group, self.dtype, self.below = bank, group, dtype, below
        self.form, self.topology = form, topology
        self.rematerialize = rematerialize
        # Whether saved-tensor hooks replace copies. A recomputed block saves nothing that they would drop.
        self.hooked = rematerialize and not recompute
        self.placement: LayerPlacement | None = None     # in force; None before the first plan
        self.transfers: CopyTransfers | None = None      # of its copies; None: no position has one
        self.backwards = 0                               # backward passes of this step still to come
        self.calibrated = True                           # nothing more may be added in this step
        self.added = 0                                   # copies added in this step, over all positions
        self._gathers: list[PendingGather] = []          # under way
        self._rows_cW: Tensor | None = None              # the copies, while they are in memory
        self._gradients_cW: Tensor | None = None         # summed over micro-batches and passes
        self._pending_reduction: PendingGradReduction | None = None
        # An input that requires a gradient: autograd runs backward of the nodes even if no row requires one.
        self._anchor = torch.zeros(0, requires_grad=True)

    def set_placement(self, placement: LayerPlacement, tables: DeviceTables) -> None:
        """Put a placement in force. Between steps only; drops the copies of the old one."""
        self.release()
        self.placement, self.transfers = placement, self._transfers(placement, tables)

    def begin(self, backwards: int) -> None:
        """Begin a step that has `backwards` backward passes; calibration may add copies again."""
        self.backwards, self.calibrated, self.added = backwards, False, 0

    @torch.no_grad()
    def prefetch(self) -> None:
        """Start gathering copies, unless they are in memory or under way."""
        if self.transfers is not None and not self._gathers and self._rows_cW is None:
            assert self.placement is not None
            self._gathers = [self._gather(self.placement, self.transfers)]

    @torch.no_grad()
    def add_copies(self, placement: LayerPlacement) -> None:
        """Continue with a placement that has more copies, and start gathering these.

        Called before the step's first `wait`.
        """
        assert self.placement is not None
        here, self._rows_cW = self._rows_cW, None
        landed = ([] if here is None
                  else [PendingGather(self.placement.gathered_at(self.group.position), lambda: here)])
        added = placement.beyond(self.placement)
        with DeviceTables(self.bank.like.device) as tables:
            transfers, transfers_of_all = self._transfers(added, tables), self._transfers(placement, tables)
        assert transfers is not None, "a placement without further copies"
        self._gathers = [*landed, *self._gathers, self._gather(added, transfers)]
        self.placement, self.transfers, self.added = placement, transfers_of_all, len(added.copies)

    def wait(self, x_ND: Tensor) -> tuple[Tensor, CopiedParameters | None]:
        """Wait for copies; return the rows and the copies' parameters, or None if no position has copies.

        In backward, the gradients of these are accumulated over micro-batches and passes.
        """
        if self.transfers is None:
            return x_ND, None
        x_ND, *copies = _Wait.apply(x_ND, self._anchor, self)
        return x_ND, tuple(copies)

    @contextmanager
    def regather_in_backward(self) -> Iterator[None]:
        """Context in which autograd saves the geometry of a copy instead of the copy.

        Does nothing unless backward gathers copies again, without recomputation of the block.
        """
        if self.transfers is None or not self.hooked:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def release_after_forward(self, rows_RD: Tensor) -> Tensor:
        """Drop copies that backward gathers again.

        The rows [R, D] pass through an autograd node whose backward starts that gather. A recomputed block
        needs no such node.
        """
        if self.transfers is None or not self.rematerialize:
            return rows_RD
        self._rows_cW = None
        return _ReleaseAfterForward.apply(rows_RD, self) if self.hooked else rows_RD

    def values(self) -> CopiedParameters:
        """Return the parameters [c, …] of the copies, as views. Waits for them."""
        if self._rows_cW is None:
            self.prefetch()
            self._rows_cW = self._wait_gathers()
        shapes = self.bank.shapes
        parts = self._rows_cW.detach().split([prod(shape) for shape in shapes], dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes))

    def reduce_grads_in_backward(self, x_TD: Tensor) -> Tensor:
        """Pass tokens [T, D] through an autograd node whose backward starts the reduction of gradients.

        That backward runs after the rows' gradients have arrived. If the reduction started as soon as the
        gradients of copies exist, it would delay the exchange of the rows' gradients, for which attention
        waits.
        """
        # Without copies so far, calibration may still add some after this node.
        return (x_TD if self.transfers is None and self.calibrated
                else _ReduceGrads.apply(x_TD, self._anchor, self))

    @torch.no_grad()
    def start_reduction(self) -> None:
        """Start sending the gradients of copies to their homes, if this was the last pass of the step."""
        if self.backwards == 0 and self._gradients_cW is not None:
            assert self.transfers is not None
            self._pending_reduction, self._gradients_cW = self.transfers.post_reduce(self._gradients_cW), None

    @torch.no_grad()
    def add_grads(self, gradients: Sequence[Tensor]) -> None:
        """Accumulate the gradients of copies from one pass.

        Args:
            gradients: of each parameter [c, …] that is not frozen, in the order of the bank.
        """
        if self.hooked:    # waits for the second gather on a rank whose saved tensors did not need it
            self.values()
        if self.rematerialize:
            self._rows_cW = None
        self.backwards -= 1
        if not gradients:
            return
        gradients_cW = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).to(
            self.bank.stacked(self.bank.trainable[0]).dtype)
        self._gradients_cW = (gradients_cW if self._gradients_cW is None
                              else self._gradients_cW.add_(gradients_cW))

    def finish(self) -> None:
        """Add the gradients of copies to those of the homes. Waits."""
        if self.transfers is None:
            return
        assert self.backwards == 0, (
            f"{self.backwards} more backward passes over the bank were expected than have run")
        if not self.bank.trainable:
            return
        # Gradients that come after the reduction has left would be lost.
        assert self._pending_reduction is not None and self._gradients_cW is None, (
            "gradients of copies were not sent")
        self._pending_reduction.finish()
        self._pending_reduction = None

    def release(self) -> None:
        """Drop copies and their gradients. No collective may be under way."""
        assert not self._gathers and self._pending_reduction is None, "a collective is still under way"
        self._rows_cW = self._gradients_cW = None

    def _transfers(self, placement: LayerPlacement, tables: DeviceTables) -> CopyTransfers | None:
        """Make the collectives of a placement, or None if no position has a copy."""
        if not placement.copies and not placement.sliced:
            return None
        return CopyTransfers(placement, self.bank, self.group, self.form, self.topology, tables)

    def _gather(self, placement: LayerPlacement, transfers: CopyTransfers) -> "PendingGather":
        """Start gathering the copies of a placement."""
        return PendingGather(placement.gathered_at(self.group.position),
                             transfers.post_gather(self.dtype).wait)

    def _wait_gathers(self) -> Tensor:
        """Wait for the gathers under way; return copies [c, W] in the order of their slots."""
        assert self.placement is not None
        gathers, self._gathers = self._gathers, []
        rows_cW = [gather.wait() for gather in gathers]
        if len(gathers) == 1:
            return rows_cW[0]
        landed = [expert for gather in gathers for expert in gather.experts]
        wanted = self.placement.gathered_at(self.group.position)
        order_c = torch.tensor([landed.index(expert) for expert in wanted], dtype=torch.int64)
        return torch.cat(rows_cW)[to_device(order_c, self.bank.like.device)]

    def _pack(self, tensor: Tensor) -> "Tensor | _Place":
        """Replace a saved view of the copies by its geometry."""
        if self._rows_cW is None or not tensor.numel() or _storage(tensor) != _storage(self._rows_cW):
            return tensor
        return _Place(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: "Tensor | _Place") -> Tensor:
        """Take a saved view from the copies that were gathered again. Waits for them."""
        if isinstance(saved, Tensor):
            return saved
        self.values()
        assert self._rows_cW is not None
        return self._rows_cW.as_strided(*saved)


class PendingGather(NamedTuple):
    """Gather under way: its experts in order, and a function that waits for their rows [c, W], once."""

    experts: tuple[int, ...]
    wait: Callable[[], Tensor]


class _Place(NamedTuple):
    """Geometry of a view of the copies."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Wait(torch.autograd.Function):
    """Autograd node whose forward waits for copies and whose backward accumulates their gradients."""

    @staticmethod
    def forward(ctx, x_ND, anchor, copies):
        values = copies.values()
        ctx.copies, ctx.trained = copies, [name in copies.bank.trainable for name in copies.bank.names]
        ctx.shapes = [value.shape for value in values]
        ctx.set_materialize_grads(all(ctx.trained))
        ctx.mark_non_differentiable(
            *(copied for copied, trained in zip(values, ctx.trained) if not trained))
        return x_ND.view_as(x_ND), *values

    @staticmethod
    def backward(ctx, grad_ND, *gradients):
        # Zeros for parameters that the pass did not use: all ranks send rows of one width.
        whole = (grad_ND.new_zeros(shape) if grad is None else grad
                 for grad, shape in zip(gradients, ctx.shapes))
        ctx.copies.add_grads([grad for grad, trained in zip(whole, ctx.trained) if trained])
        return grad_ND, None, None


class _ReduceGrads(torch.autograd.Function):
    """Autograd node whose backward starts the reduction of gradients, on every rank."""

    @staticmethod
    def forward(ctx, x_TD, anchor, copies):
        ctx.copies = copies
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        ctx.copies.start_reduction()
        return grad_TD, None, None


class _ReleaseAfterForward(torch.autograd.Function):
    """Autograd node whose backward starts the gathers of this bank and of the one before it.

    All ranks start them in the same order.
    """

    @staticmethod
    def forward(ctx, rows_RD, copies):
        ctx.copies = copies
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx, grad_RD):
        ctx.copies.prefetch()
        below = ctx.copies.below
        if below is not None and below.backwards:        # else nobody would wait for that gather
            below.prefetch()
        return grad_RD, None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
