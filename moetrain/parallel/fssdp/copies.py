"""Fully sharded sparse data parallelism: every expert at one home, copies where the tokens are (Hecate, arXiv 2502.02581).

An iteration, for every layer with experts:

    plan        known before the step: which positions get copies of which experts            plan/planners/
    post        at the block's start: the sparse all-gather starts, attention hides it        transfers.py, comm/sparse/
    extend      once a step, after the gate: copies that the plan lacks start too             plan/calibration.py
    take        between dispatch and experts: wait; the rows pass through
    use         one grouped product over homes and copies                                     ops/grouped_experts.py
    leave       the outputs pass through; with `rematerialize` the copies are dropped here
    …backward   leave': post again     use': gradients     take': add them up
    depart'     the rows' gradients are back: the last micro-batch posts the reduction, attention hides it
    finish      after the last backward: wait, sum at the home in a fixed order
    release     after the update: copies are stale

Only homes have optimizer state, so a plan may change at every step without moving any. The dense part is FSDP2's, which never
hears of experts. One `CopyManager` a model owns every handle; what it posts is taken exactly once, on every rank, and
whether anything is posted depends on the placement, which all ranks of the group share. `take` passes the rows through an autograd node,
so its backward runs on every rank, also on one without rows or copies.

How long copies stay:

    rematerialize=false   from the first use in a step to its end: one gathering a step, whatever the accumulation
    rematerialize=true    while a layer computes: gathered for every forward and again for every backward, where the
                          gathering of the layer below is posted one layer ahead. Their memory is that of two layers. With
                          activation checkpointing the recomputed block gathers for itself

Their gradients are summed here over micro-batches and travel once a step, in float32 (float64 in float64 runs).

With calibration (`extend`) a step goes on with another placement, as if it had been planned so: only its first gathering comes
in two *waves*, which are laid in the order of slots when both have landed. Replicas of a group may decide differently:
their sums meet at the homes.

Shapes: h homes, c copies, W numbers of an expert, N rows that arrived, R rows computed, D model width, G = 2F expert rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank, Taken
from moetrain.ops.pinned import DeviceTables, to_device
from moetrain.parallel.fssdp.transfers import CopyTransfers, Leaving
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement


class CopyManager:
    """banks: those of the model by router name, in layer order; `copies` of each is set.

    group: the positions, `ep`. dtype: of the computation, and of copies on the wire. rematerialize: see above.
    recompute: activation checkpointing runs blocks again in backward. form: of the collectives (comm/sparse/forms.py).
    topology: how the positions lie on nodes; None: on one.
    """

    def __init__(self, banks: Mapping[str, ExpertBank], group: Group, *, dtype: torch.dtype, rematerialize: bool,
                 recompute: bool, form: str = "packed", topology: Topology | None = None) -> None:
        topology = topology or Topology(group.size, group.size)
        self.layers: dict[str, LayerCopies] = {}
        below = None
        for name, bank in banks.items():
            below = self.layers[name] = bank.copies = LayerCopies(bank, group, dtype, rematerialize, recompute, below, form,
                                                                  topology)

    def adopt(self, placement: ExpertPlacement, tables: DeviceTables) -> None:
        """A plan for the steps to come. Between steps only: copies of the old one are gone."""
        for name, layer in placement.layers:
            self.layers[name].adopt(layer, tables)

    def begin(self, backwards: int) -> None:
        """A step with so many micro-batches begins."""
        for layer in self.layers.values():
            layer.begin(backwards)

    @property
    def added(self) -> int:
        """Copies of this step, of all positions and layers, that were not planned."""
        return sum(layer.added for layer in self.layers.values())

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward: the gradients of homes are those of all their copies too. Waits."""
        for layer in self.layers.values():
            layer.finish()

    def release(self) -> None:
        """The parameters have changed: copies are stale."""
        for layer in self.layers.values():
            layer.release()


class LayerCopies:
    """The copies of one layer: the state machine between `post` and `release`. `bank.copies` is one of these."""

    def __init__(self, bank: ExpertBank, group: Group, dtype: torch.dtype, rematerialize: bool, recompute: bool,
                 below: "LayerCopies | None", form: str, topology: Topology) -> None:
        self.bank, self.group, self.dtype, self.below = bank, group, dtype, below
        self.form, self.topology = form, topology
        self.rematerialize = rematerialize
        self.hooked = rematerialize and not recompute    # a recomputed block keeps nothing that hooks would have to drop
        self.placement: LayerPlacement | None = None     # in force; None before the first plan
        self.transfers: CopyTransfers | None = None         # of its copies; None: no position has one
        self.backwards = 0                               # of this step, still to come
        self.calibrated = True                           # nothing more may be added in this step
        self.added = 0
        self._waves: list[Wave] = []                     # under way
        self._rows_cW: Tensor | None = None              # the copies, while they are here
        self._gradients_cW: Tensor | None = None
        self._leaving: Leaving | None = None
        self._anchor = torch.zeros(0, requires_grad=True)      # so that backward comes by even if no row needs gradients

    def adopt(self, placement: LayerPlacement, tables: DeviceTables) -> None:
        self.release()
        self.placement, self.transfers = placement, self._transfers(placement, tables)

    def begin(self, backwards: int) -> None:
        self.backwards, self.calibrated, self.added = backwards, False, 0

    @torch.no_grad()
    def post(self) -> None:
        """Start bringing the copies, unless they are here or on their way."""
        if self.transfers is not None and not self._waves and self._rows_cW is None:
            self._waves = [self._gather(self.placement, self.transfers)]

    @torch.no_grad()
    def extend(self, placement: LayerPlacement) -> None:
        """Another placement for the rest of the step, with more copies: those that are missing start now. Comes before the
        step's first `take`."""
        here, self._rows_cW = self._rows_cW, None
        landed = [] if here is None else [Wave(self.placement.gathered_at(self.group.position), lambda: here)]
        added = placement.beyond(self.placement)
        with DeviceTables(self.bank.gate_up.device) as tables:
            transfers, transfers_of_all = self._transfers(added, tables), self._transfers(placement, tables)
        self._waves = [*landed, *self._waves, self._gather(added, transfers)]
        self.placement, self.transfers, self.added = placement, transfers_of_all, len(added.copies)

    def take(self, x_ND: Tensor) -> Taken:
        """Wait for the copies; the rows pass through."""
        if self.transfers is None:
            return Taken(x_ND, None)
        x_ND, gate_up_cGD, down_cDF = _Take.apply(x_ND, self._anchor, self)
        return Taken(x_ND, (gate_up_cGD, down_cDF))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is saved of copies is where they lay, not the copies, if backward is to gather them again."""
        if self.transfers is None or not self.hooked:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def leave(self, rows_RD: Tensor) -> Tensor:
        """Drop copies that backward will gather again; backward begins to do so here."""
        if self.transfers is None or not self.rematerialize:
            return rows_RD
        self._rows_cW = None
        return _Leave.apply(rows_RD, self) if self.hooked else rows_RD

    def matrices(self) -> tuple[Tensor, Tensor]:
        """gate_up [c, G, D] and down [c, D, F] of the copies, views. Waits for them."""
        if self._rows_cW is None:
            self.post()
            self._rows_cW = self._land()
        gate_up, down = self.bank.gate_up.shape[1:], self.bank.down.shape[1:]
        parts = self._rows_cW.detach().split([gate_up.numel(), down.numel()], dim=1)
        return parts[0].unflatten(1, gate_up), parts[1].unflatten(1, down)

    def depart(self, x_TD: Tensor) -> Tensor:
        """Tokens on their way to dispatch. In backward the gradients of copies start for home here, behind attention: posted
        as soon as they are there, they would hold up those of the rows, for which attention waits."""
        return x_TD if self.transfers is None and self.calibrated else _Depart.apply(x_TD, self._anchor, self)

    @torch.no_grad()
    def reduce(self) -> None:
        """After the last micro-batch: start sending the gradients of copies home."""
        if self.backwards == 0 and self._gradients_cW is not None:
            self._leaving, self._gradients_cW = self.transfers.post_reduce(self._gradients_cW), None

    @torch.no_grad()
    def add(self, gate_up_cGD: Tensor, down_cDF: Tensor) -> None:
        """Gradients of the copies from one micro-batch."""
        if self.hooked:                                  # a rank that saved nothing of copies has not unpacked any
            self.matrices()
        if self.rematerialize:
            self._rows_cW = None
        gradients_cW = torch.cat([gate_up_cGD.flatten(1), down_cDF.flatten(1)], dim=1).to(self.bank.gate_up.dtype)
        self._gradients_cW = gradients_cW if self._gradients_cW is None else self._gradients_cW.add_(gradients_cW)
        self.backwards -= 1

    def finish(self) -> None:
        """The gradients of the homes, with those of all copies. Waits."""
        if self.transfers is None:
            return
        assert self._leaving is not None, f"{self.backwards} backward passes of this step did not come by"
        self._leaving.finish()
        self._leaving = None

    def release(self) -> None:
        assert not self._waves and self._leaving is None, "a collective is still under way"
        self._rows_cW = self._gradients_cW = None

    def _transfers(self, placement: LayerPlacement, tables: DeviceTables) -> CopyTransfers | None:
        if not placement.copies and not placement.sliced:
            return None
        return CopyTransfers(placement, self.bank, self.group, self.form, self.topology, tables)

    def _gather(self, placement: LayerPlacement, transfers: CopyTransfers) -> "Wave":
        return Wave(placement.gathered_at(self.group.position), transfers.post_gather(self.dtype).wait)

    def _land(self) -> Tensor:
        """Rows of the copies in the order of their slots. Waits."""
        waves, self._waves = self._waves, []
        rows_cW = [wave.wait() for wave in waves]
        if len(waves) == 1:
            return rows_cW[0]
        landed = [expert for wave in waves for expert in wave.experts]
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


class Wave(NamedTuple):
    """Copies that travel together. wait: their rows, once."""

    experts: tuple[int, ...]
    wait: Callable[[], Tensor]


class _Place(NamedTuple):
    """Where a view of the copies lay."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Take(torch.autograd.Function):
    """Forward waits for copies, backward adds up their gradients."""

    @staticmethod
    def forward(ctx, x_ND, anchor, layer):
        ctx.layer = layer
        return x_ND.view_as(x_ND), *layer.matrices()

    @staticmethod
    def backward(ctx, grad_ND, gate_up_cGD, down_cDF):
        ctx.layer.add(gate_up_cGD, down_cDF)
        return grad_ND, None, None


class _Depart(torch.autograd.Function):
    """Backward posts the reduction, on every rank."""

    @staticmethod
    def forward(ctx, x_TD, anchor, layer):
        ctx.layer = layer
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        ctx.layer.reduce()
        return grad_TD, None, None


class _Leave(torch.autograd.Function):
    """Backward posts the gathering of this layer and of the one below, on every rank in the same order."""

    @staticmethod
    def forward(ctx, rows_RD, layer):
        ctx.layer = layer
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx, grad_RD):
        ctx.layer.post()
        if ctx.layer.below is not None:
            ctx.layer.below.post()
        return grad_RD, None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
