"""Fully sharded data parallelism (FSDP2) for the modules it is handed.

    dense part    every block, then the rest of the model: sharded over `dp_shard`, replicated over `dp_replicate`
    experts       the experts' own module of every layer: sharded over `edp_shard`, replicated over `edp_replicate`

Gradients are *summed* over both axes, never averaged: the loss carries global denominators. Parameters stay float32 and
are cast where they are used (no mixed-precision policy). The groups are those of comm/mesh.py; an axis of one rank shards
nothing, and parameters that are not sharded stay with the reducer of parallel/data_parallel.py.

An expert stack is cut along experts where their number divides, else along the rows of each expert, so that no rank is
left with nothing. Shapes that reach FSDP2 are the same on every rank of a group.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from moetrain.comm.mesh import Group


def shard(modules: Iterable[nn.Module], *, over: Group, replicated: Group, device: torch.device,
          ignore: set[nn.Parameter] = frozenset()) -> None:
    """Shard each module's parameters that no earlier call took; the outermost module comes last. In place, on any device."""
    mesh = device_mesh(over, replicated, device)
    for module in modules:
        # True also for the outermost: a forward pass without a backward must leave sharded parameters behind.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(ignore),
                    shard_placement_fn=lambda parameter: _placement(parameter, over.size))
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def device_mesh(over: Group, replicated: Group, device: torch.device) -> DeviceMesh:
    """FSDP2's view of two of our groups: [replicated, over], or one axis where nothing is replicated."""
    if replicated.size == 1:
        return DeviceMesh.from_group(over.process_group, device.type, mesh_dim_names=("shard",))
    first = over.ranks[0] - replicated.position * (replicated.ranks[1] - replicated.ranks[0])
    stride = over.ranks[1] - over.ranks[0]
    step = replicated.ranks[1] - replicated.ranks[0]
    ranks = [[first + row * step + column * stride for column in range(over.size)] for row in range(replicated.size)]
    return DeviceMesh.from_group([replicated.process_group, over.process_group], device.type, mesh=torch.tensor(ranks),
                                 mesh_dim_names=("replicate", "shard"))


def _placement(parameter: nn.Parameter, size: int) -> Shard:
    stacked = parameter.ndim == 3
    return Shard(1) if stacked and parameter.shape[0] % size and parameter.shape[1] % size == 0 else Shard(0)
