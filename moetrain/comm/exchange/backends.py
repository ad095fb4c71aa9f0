"""Exchange backends by the name that `parallel.exchange` gives them.

Every entry makes a factory: a function from the router's name to the exchange of its layer. What layers share
is made once, with the factory. With one position nothing travels, and the backend is `flat`.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from moetrain.comm.exchange.base import Exchange
from moetrain.comm.exchange.deepep import DeepEPExchange, buffer
from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.exchange.peer import NUM_BUFFERS, NUM_SIGNALS, PeerChannels, PeerExchange
from moetrain.comm.exchange.shared_buffers import SharedBuffers, shared_files, symmetric_memory
from moetrain.comm.exchange.two_level import TwoLevelExchange
from moetrain.comm.exchange.vdev import SymmetricWorkspace, VdevExchange
from moetrain.comm.mesh import Mesh
from moetrain.errors import ConfigError

ExchangeFactory = Callable[[str], Exchange]


def exchange_factory(name: str, mesh: Mesh, limit_s: float) -> ExchangeFactory:
    """Make the factory of a backend. Collective.

    Args:
        name: value of `parallel.exchange`.
        mesh: its groups `ep`, `ep_node` and `ep_rail` exchange rows.
        limit_s: seconds that a rank may wait for another, where the backend itself watches the time.
    """
    return (BACKENDS[name] if mesh["ep"].size > 1 else _flat)(mesh, limit_s)


def _flat(mesh: Mesh, limit_s: float) -> ExchangeFactory:
    return lambda router: FlatExchange(mesh["ep"])


def _two_level(mesh: Mesh, limit_s: float) -> ExchangeFactory:
    return lambda router: TwoLevelExchange(mesh["ep"], mesh["ep_node"], mesh["ep_rail"], mesh.device)


def _peer(mesh: Mesh, limit_s: float, *, push: bool = False) -> ExchangeFactory:
    group = mesh["ep"]
    if mesh["ep_node"].size < group.size:
        raise ConfigError(86, f"parallel.exchange=peer{'_push' * push}, and the {group.size} ranks that "
                          "share experts are on several machines", where="parallel.exchange, parallel.ep",
                          why="the peer exchange writes into the memory of ranks of one machine",
                          next=f"parallel.exchange=two_level, or parallel.ep={mesh['ep_node'].size}")
    share = symmetric_memory(group, mesh.device) if mesh.device.type == "cuda" else shared_files(group)
    buffers = SharedBuffers(group.position, group.ranks, NUM_BUFFERS, NUM_SIGNALS, share, mesh.device)
    channels = PeerChannels(buffers, limit_s, push=push)
    return lambda router: PeerExchange(FlatExchange(group), channels, router)


def _deepep(mesh: Mesh, limit_s: float) -> ExchangeFactory:
    _need_cuda("deepep", mesh)
    made = buffer(_package("deep_ep", "deepep"), mesh["ep"].process_group, mesh["ep_rail"].size)
    return lambda router: DeepEPExchange(FlatExchange(mesh["ep"]), made)


def _vdev(mesh: Mesh, limit_s: float) -> ExchangeFactory:
    _need_cuda("vdev", mesh)
    workspace = SymmetricWorkspace(mesh["ep"].process_group, mesh["ep"].size, mesh.device)
    return lambda router: VdevExchange(FlatExchange(mesh["ep"]), workspace)


BACKENDS: dict[str, Callable[[Mesh, float], ExchangeFactory]] = {
    "flat": _flat, "two_level": _two_level, "peer": _peer, "peer_push": partial(_peer, push=True),
    "deepep": _deepep, "vdev": _vdev,
}


def _need_cuda(name: str, mesh: Mesh) -> None:
    if mesh.device.type != "cuda":
        raise ConfigError(87, f"parallel.exchange={name} on {mesh.device.type}",
                          where="parallel.exchange, run.device", why="it moves rows between GPUs",
                          next="parallel.exchange=flat, or run.device=cuda where there are GPUs")


def _package(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(88, f"parallel.exchange={name}, and the package {package} cannot be imported",
                          where="parallel.exchange", why=str(error),
                          next=f"install {package} for this torch and CUDA, "
                               "or parallel.exchange=flat") from error
