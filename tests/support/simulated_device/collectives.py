"""Collectives on device tensors over gloo, and groups made with `nccl` that refuse tensors of the CPU."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.simulated_device.memory import alias
from tests.support.simulated_device.operators import tensors_of
from tests.support.simulated_device.waits import RECORD

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_BESIDE: dict[str, dist.ProcessGroup] = {}           # gloo group of the same ranks, by the name of a group


def moves_bytes(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group that stands behind a group."""
    return _BESIDE.get(group.group_name, group)


def _kept_alias(tensor: Tensor) -> Tensor:
    """Alias that keeps the device's memory: a collective may still read it when its caller has let go."""
    same = alias(tensor)
    same.untyped_storage().of_device = tensor.untyped_storage()
    return same


def _collective(name: str) -> Callable:
    op = getattr(torch.ops.c10d, name).default
    schema = op._schema
    group_at = next(place for place, argument in enumerate(schema.arguments)
                    if argument.name == "process_group")

    def run(*args: Any) -> Any:
        args = list(args)
        group = dist.ProcessGroup.unbox(args[group_at])
        beside = moves_bytes(group)
        if beside is not group and any(tensor.device.type != "cuda" for tensor in tensors_of(args)):
            raise RuntimeError("No backend type associated with device type cpu")
        if name == "barrier":
            RECORD.add("barrier", name)
        host = [_nested(argument, _kept_alias) for argument in args]
        host[group_at] = beside.boxed()
        results = op.redispatch(_CPU, *host)
        if isinstance(results, tuple):               # (tensors as given, work)
            return (args[0], *results[1:])
        return results

    return run


def _refuse_a_shared_device(group: dist.ProcessGroup, device: torch.device) -> None:
    """NCCL connects at once where it is told the device, and finds two ranks of a machine on the same one."""
    machine = dist.get_rank() // int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (machine, device.index), group=group)
    if len(set(told)) < len(told):
        raise RuntimeError(f"ncclInvalidUsage: Duplicate GPU detected: ranks of (machine, device) {told}")


def _nested(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return [_nested(entry, change) for entry in value] if isinstance(value, (list, tuple)) else value


_COLLECTIVES = ("allreduce_", "allreduce_coalesced_", "broadcast_", "allgather_", "_allgather_base_",
                "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_",
                "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_",
                "alltoall_", "alltoall_base_", "send", "recv_", "barrier")


def register_collectives() -> torch.library.Library:
    library = torch.library.Library("c10d", "IMPL", "CUDA")
    for name in _COLLECTIVES:
        library.impl(name, _collective(name), allow_override=True)
    init, new_group, backend_of = dist.init_process_group, dist.new_group, dist.get_backend

    def init_process_group(backend: str | None = None, *args: Any, device_id: torch.device | None = None,
                           **kwargs: Any) -> None:
        _NCCL.clear()                                # names of groups come again
        _BESIDE.clear()
        if backend != "nccl":
            return init(backend, *args, device_id=device_id, **kwargs)
        init("cuda:gloo", *args, **kwargs)
        joined(dist.group.WORLD, new_group(backend="gloo"), device_id)
        if device_id is not None:
            _refuse_a_shared_device(moves_bytes(dist.group.WORLD), device_id)

    def make_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        world = dist.group.WORLD
        # With it torch wants to split, which gloo cannot.
        device, world.bound_device_id = world.bound_device_id, None
        if world.group_name in _NCCL and kwargs.get("backend") in (None, "nccl"):
            group = new_group(ranks, *args, **{**kwargs, "backend": "cuda:gloo"})
            beside = new_group(ranks, backend="gloo")
            if isinstance(group, dist.ProcessGroup):
                joined(group, beside, device)
        else:
            group = new_group(ranks, *args, **kwargs)
        world.bound_device_id = device
        return group

    def joined(group: dist.ProcessGroup, beside: dist.ProcessGroup, device: torch.device | None) -> None:
        _NCCL.add(group.group_name)
        _BESIDE[group.group_name] = beside
        group.bound_device_id = device
        # Otherwise it complains of a backend of type 0.
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def get_backend(group: Any = None) -> str:
        name = (group or dist.group.WORLD).group_name
        return "nccl" if name in _NCCL else backend_of(group)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group = init_process_group, make_group
        module.get_backend = get_backend
    return library


_NCCL: set[str] = set()
