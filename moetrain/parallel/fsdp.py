"""Fully sharded data parallelism (FSDP2) of given modules.

                  modules                              sharded over    replicated over
    dense part    blocks, then the rest of the model   `dp_shard`      `dp_replicate`
    experts       routed experts of each layer         `edp_shard`     `edp_replicate`

Gradients are summed over both axes, never averaged: the loss already has global denominators. Parameters stay
float32 and are cast where they are used (no mixed-precision policy). The groups are those of comm/mesh.py. An
axis of one rank shards nothing. Parameters that are not sharded stay with `GradientReducer`
(data_parallel.py). Scalars are among them, because FSDP2 cannot shard a tensor without dims.

Frozen parameters are sharded and gathered like the others, and no gradient of theirs is reduced. They may
have another dtype: FSDP2 wants one dtype of the trainable parameters of a module alone.

A stack of experts is sharded along experts if their number is divisible by the number of shards, else along
the rows of each expert, so that no rank is left without a part. Shapes that reach FSDP2 are the same on every
rank of a group.
"""

from collections.abc import Iterable, Set

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from moetrain.comm.mesh import Group


def shard(modules: Iterable[nn.Module], *, over: Group, replicated: Group, device: torch.device,
          ignore: Set[nn.Parameter] = frozenset()) -> None:
    """Shard the parameters of modules in place, except those that an earlier module or call has sharded.

    Args:
        modules: modules to wrap; inner modules come first, the outermost last.
        over: ranks that shard the parameters.
        replicated: ranks that hold the same shard.
        device: device of the parameters, of any type.
        ignore: parameters that FSDP2 leaves alone.
    """
    mesh, modules = device_mesh(over, replicated, device), list(modules)
    scalars = {parameter for module in modules for parameter in module.parameters() if not parameter.ndim}
    for module in modules:
        # True for the outermost module, too: its parameters must be sharded after a forward without backward.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=scalars | ignore,
                    shard_placement_fn=lambda parameter: _placement(parameter, over.size))
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def device_mesh(over: Group, replicated: Group, device: torch.device) -> DeviceMesh:
    """Make the device mesh of FSDP2 from two groups.

    Args:
        over: ranks that shard the parameters.
        replicated: ranks that hold the same shard.
        device: device whose type the mesh has.

    Returns:
        Mesh with axes (`replicate`, `shard`), or with `shard` alone where nothing is replicated.
    """
    if replicated.size == 1:
        return DeviceMesh.from_group(over.process_group, device.type, mesh_dim_names=("shard",))
    first = over.ranks[0] - replicated.position * (replicated.ranks[1] - replicated.ranks[0])
    stride = over.ranks[1] - over.ranks[0]
    step = replicated.ranks[1] - replicated.ranks[0]
    ranks = [[first + row * step + column * stride for column in range(over.size)]
             for row in range(replicated.size)]
    return DeviceMesh.from_group([replicated.process_group, over.process_group], device.type,
                                 mesh=torch.tensor(ranks), mesh_dim_names=("replicate", "shard"))


def _placement(parameter: nn.Parameter, size: int) -> Shard:
    """Choose the sharded dim: rows of a stack (1) where only these divide evenly, else the first dim."""
    stacked = parameter.ndim == 3
    return Shard(1) if stacked and parameter.shape[0] % size and parameter.shape[1] % size == 0 else Shard(0)
