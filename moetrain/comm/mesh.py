"""Device mesh: two views of the ranks of a run, and the groups that communicate.

    dense view    pp × dp_replicate × dp_shard × cp × tp        attention, norms, embeddings, routers
    expert view   pp × edp_replicate × edp_shard × ep × esp     routed experts

Both views order the same ranks, last axis fastest; their products are equal. Derived groups, by name:

    batch         ranks that hold different tokens: pooled counts, cross-entropy denominator
    dense_grad    ranks over which gradients of dense parameters are summed; of them
                  dense_shard cut the parameters up between them, dense_replicas hold the same part
    expert_grad   ranks that share the same experts: their gradients are summed; of them
                  expert_shard cut them up between them, expert_replicas hold the same part
    ep            ranks that share the experts of a layer; of them
                  ep_node are on this machine, ep_rail have this rank's place on every machine
    expert_parts  ranks that together hold every expert once: ep and expert_shard
    node          ranks of one machine

No code asks for the world size: what communicates takes one of these groups. A group of one rank has no
process group, and every function of `comm/` is then the identity, so `parallel=single` runs without
torch.distributed.
"""

import datetime
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import gcd, prod
from typing import TypeVar

import torch
import torch.distributed as dist

from moetrain.errors import RendezvousError

T = TypeVar("T")

MARGIN_S = 2.0               # more than torch's own time limit, so that torch's error comes first
DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "esp")
DERIVED = {
    "batch": (DENSE_AXES, ("dp_replicate", "dp_shard", "cp")),
    "dense_grad": (DENSE_AXES, ("dp_replicate", "dp_shard", "cp")),
    "dense_shard": (DENSE_AXES, ("dp_shard",)),
    "dense_replicas": (DENSE_AXES, ("dp_replicate", "cp")),
    "expert_grad": (EXPERT_AXES, ("edp_replicate", "edp_shard")),
    "expert_shard": (EXPERT_AXES, ("edp_shard",)),
    "expert_replicas": (EXPERT_AXES, ("edp_replicate",)),
    "expert_parts": (EXPERT_AXES, ("edp_shard", "ep")),
    "ep": (EXPERT_AXES, ("ep",)),
}


@dataclass(frozen=True)
class Group:
    """Some ranks in a fixed order.

    Args:
        name: name of the group in the mesh.
        ranks: global ranks, in order.
        position: place of this rank among them.
        process_group: what torch.distributed communicates over; None for a group of one rank.
    """

    name: str
    ranks: tuple[int, ...]
    position: int
    process_group: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """Sizes of all axes, and the groups of this rank by name."""

    sizes: Mapping[str, int]
    rank: int
    device: torch.device
    groups: Mapping[str, Group]

    def __getitem__(self, name: str) -> Group:
        return self.groups[name]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def size(self) -> int:
        """Number of ranks, for reports. Code that communicates takes a group instead."""
        return prod(self.sizes.get(axis, 1) for axis in DENSE_AXES)


def axis_groups(axes: tuple[str, ...], sizes: Mapping[str, int],
                together: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Groups of ranks that differ only along some axes: a partition of the world.

    Args:
        axes: all axes of the view, the fastest last.
        sizes: size of each axis; 1 where it is not named.
        together: axes along which the ranks of a group differ.

    Returns:
        The ranks of each group, in order.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    shape = [sizes.get(axis, 1) for axis in axes]
    for rank in range(prod(shape)):
        rest, fixed = rank, []
        for axis, size in zip(reversed(axes), reversed(shape)):
            rest, coordinate = divmod(rest, size)
            if axis not in together:
                fixed.append(coordinate)
        groups.setdefault(tuple(fixed), []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def node_groups(sizes: Mapping[str, int], world: int) -> dict[str, list[tuple[int, ...]]]:
    """Partitions of the ranks by machine, each of LOCAL_WORLD_SIZE ranks, by name of the group."""
    node, groups = int(os.environ.get("LOCAL_WORLD_SIZE", world)), axis_groups(EXPERT_AXES, sizes, ("ep",))
    per_node = gcd(node, len(groups[0]))
    return {
        "node": [tuple(range(first, min(first + node, world))) for first in range(0, world, node)],
        "ep_node": [ranks[first:first + per_node]
                    for ranks in groups for first in range(0, len(ranks), per_node)],
        "ep_rail": [ranks[place::per_node] for ranks in groups for place in range(per_node)],
    }


def build_mesh(sizes: Mapping[str, int], device: torch.device) -> Mesh:
    """Make the mesh of this process. Collective where a process group exists: each rank makes all groups."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for axes in (DENSE_AXES, EXPERT_AXES):
        assert prod(sizes.get(axis, 1) for axis in axes) == world, (axes, sizes, world)
    partitions = {name: axis_groups(axes, sizes, together) for name, (axes, together) in DERIVED.items()}
    partitions |= node_groups(sizes, world)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    groups = {}
    for name, partition in partitions.items():
        for ranks in partition:
            if len(ranks) > 1 and ranks not in made:
                everyone = len(ranks) == world
                made[ranks] = dist.group.WORLD if everyone else dist.new_group(list(ranks))
            if rank in ranks:
                groups[name] = Group(name, ranks, ranks.index(rank), made.get(ranks))
    return Mesh(dict(sizes), rank, device, groups)


def lone_mesh(device: torch.device) -> Mesh:
    """Make the mesh of one process by itself, whatever ranks there are or will be. Not collective."""
    names = [*DERIVED, *node_groups({}, 1)]
    return Mesh({}, 0, device, {name: Group(name, (0,), 0) for name in names})


def mesh_sizes(mode: str, world: int, ep: int | None, shard: int | None = None) -> dict[str, int]:
    """Axis sizes of a parallel mode.

    A group of `shard` ranks holds every dense parameter once. The experts of an ep group are sharded over
    those of these ranks that are left over, so that both views replicate over the same ranks: edp_shard =
    shard / ep, or 1 where ep is larger. Under fssdp experts are whole, at one home in an ep group, and
    replicated over ep groups.

    Args:
        mode: value of `parallel.mode`.
        world: number of ranks.
        ep: ranks that share the experts of a layer; None for all ranks. Only for modes with expert
            parallelism.
        shard: ranks that share the dense parameters; None for all ranks. Only for modes with FSDP2.
    """
    ep = (ep or world) if mode in ("ep", "ep_fsdp", "fssdp") else 1
    shard = (shard or world) if mode in ("fsdp", "ep_fsdp", "fssdp") else 1
    expert_shard = max(1, shard // ep) if mode != "fssdp" else 1
    return {"dp_replicate": world // shard, "dp_shard": shard,
            "edp_replicate": world // (ep * expert_shard), "edp_shard": expert_shard, "ep": ep}


def connect(device: torch.device, timeout_s: int, *, over_host: bool = False) -> None:
    """Join the process group that the environment (torchrun, launch/local.py) describes.

    Args:
        device: device of this rank; a GPU is connected by NCCL, the CPU by gloo.
        timeout_s: seconds that joining, and later a collective, may take.
        over_host: connect GPUs by gloo as well. That is needed where ranks share a GPU, which NCCL refuses.
    """
    backend = "nccl" if device.type == "cuda" and not over_host else "gloo"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    limit = datetime.timedelta(seconds=timeout_s)
    try:
        store, rank, world = within(timeout_s + MARGIN_S,
                                    lambda: next(dist.rendezvous("env://", timeout=limit)))
        store.set_timeout(limit)
        # Given its device, NCCL connects now. So a wrong fabric fails here, not in the first collective of a
        # step.
        dist.init_process_group(backend, store=dist.PrefixStore("default_pg", store), rank=rank,
                                world_size=world, timeout=limit,
                                device_id=device if backend == "nccl" else None)
    except TimeoutError as error:
        if not _takes_connections(timeout_s):
            raise _nobody(where, f"no connection within {timeout_s} s") from error
        raise RendezvousError(
            20, f"what answers at {where} is not the rendezvous of this run", where=f"rendezvous at {where}",
            why="it takes connections and says nothing, or nothing that a torch store says, "
                f"for {timeout_s} s (run.timeout_s)",
            next="see what listens there, and set MASTER_ADDR and MASTER_PORT to rank 0's address and a free "
                 "port of it") from error
    except (RuntimeError, ValueError, OSError) as error:      # DistStoreError and its like are RuntimeErrors
        raise _nobody(where, str(error).splitlines()[0]) from error


def _nobody(where: str, why: str) -> RendezvousError:
    return RendezvousError(
        1, f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others",
        where=f"rendezvous at {where}", why=why,
        next="check that all ranks were started and reach this address; run.timeout_s sets the wait")


def _takes_connections(timeout_s: float) -> bool:
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout_s).close()
    except (OSError, ValueError, LookupError):
        return False
    return True


def within(limit_s: float, action: Callable[[], T]) -> T:
    """Return the result of `action`, or raise TimeoutError after `limit_s` seconds.

    The action is then left behind in a thread: torch's store knows no limit of its own once something has
    accepted its connection.
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(action())
        except BaseException as error:                       # raised where the result is asked for
            done.set_exception(error)

    threading.Thread(target=work, name="rendezvous", daemon=True).start()
    return done.result(limit_s)


def disconnect() -> None:
    """Leave the process group. A barrier keeps a fast rank from tearing down what a slow one still uses."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
