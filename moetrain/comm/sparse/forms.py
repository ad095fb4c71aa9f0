"""Forms of the sparse collectives by name, and the differentiable pair of gather and reduction.

`sparse_all_gather` is the mathematical reference, which tests compare with. A training run posts early and
waits late instead (parallel/fssdp/copies.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import Collective
from moetrain.comm.sparse.packed import Packed
from moetrain.comm.sparse.two_level import TwoLevel
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement

FORMS: dict[str, Callable[..., Collective]] = {"packed": Packed, "two_level": TwoLevel}


def collective(form: str, placement: LayerPlacement, topology: Topology, position: int,
               tables: DeviceTables) -> Collective:
    """Make the sparse collective of one position under a placement.

    Args:
        form: `packed` or `two_level`.
        placement: homes and copies of the layer.
        topology: positions and nodes.
        position: this position.
        tables: where indices are put on the device.
    """
    assert placement.positions == topology.positions, (placement.positions, topology.positions)
    return FORMS[form](placement, topology, position, tables)


def sparse_all_gather(homes_hW: Tensor, collective: Collective, group: Group) -> Tensor:
    """Matrices of all physical slots here, [h + c, W]: homes, then copies. Waits.

    Its gradient is the sparse reduce-scatter.
    """
    return _SparseAllGather.apply(homes_hW, collective, group)


class _SparseAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, homes_hW, collective, group):
        ctx.collective, ctx.group = collective, group
        return torch.cat([homes_hW, collective.post_gather([homes_hW], group).wait()])

    @staticmethod
    def backward(ctx, grad_W):
        own_hW, copies_cW = grad_W.split([len(grad_W) - ctx.collective.copies, ctx.collective.copies])
        received_sW = ctx.collective.post_reduce(copies_cW.contiguous(), ctx.group).wait()
        return ctx.collective.sum_at_home(own_hW, received_sW), None, None
