"""Exchange backends against the flat exchange on four ranks, two a node: the same rows and gradients."""

import os
import resource
from typing import get_args, get_type_hints
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.backends import BACKENDS, _package, exchange_factory
from moetrain.comm.exchange.base import read_splits
from moetrain.comm.exchange.deepep import as_units, from_units
from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.exchange.shared_buffers import shared_files
from moetrain.comm.mesh import Mesh, build_mesh, mesh_sizes
from moetrain.config.parallel_schema import ParallelConfig
from moetrain.errors import ConfigError, DiskError

HERE = ["two_level", "peer", "peer_push"]                         # those that run without a GPU
TRAFFIC = [
    [[2, 1, 0, 0], [0, 3, 5, 0], [1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 7]] * 4, [[0] * 4] * 4,
    [[1, 0, 2, 1], [0, 0, 0, 3], [2, 2, 1, 0], [1, 4, 0, 0]],
]


def mesh() -> Mesh:
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        return build_mesh(mesh_sizes("ep", dist.get_world_size(), None), torch.device("cpu"))


def one_node() -> Mesh:
    return build_mesh(mesh_sizes("ep", dist.get_world_size(), None), torch.device("cpu"))


def rows(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(number, dtype=torch.int32)[:, None] + 100 * seed
    return (torch.randn(number, 5, generator=generator).requires_grad_(), ids,
            torch.randn(number, 2, generator=generator).double().requires_grad_())


def there_and_back(name: str, traffic: list[list[int]]) -> list[Tensor]:
    """Rows sent, changed where they arrive, and sent back, on two overlapping exchanges; and gradients."""
    rank = dist.get_rank()
    exchange = FlatExchange(mesh()["ep"]) if name == "flat" else factory_of(name)("layers.0.moe")
    transposition = [list(row) for row in zip(*traffic)]
    sent_CP = torch.tensor([traffic[rank], transposition[rank]])
    received_CP = sent_CP.flip(0)
    (plain, other), _ = read_splits(exchange, sent_CP, received_CP, sent_CP[:, :0])
    found = []
    sent = [rows(sum(splits.sent), 10 * number + rank) for number, splits in enumerate((plain, other))]
    on_way = [exchange.post(tensors, splits) for tensors, splits in zip(sent, (plain, other))]
    arrived = [handle.wait() for handle in on_way]
    returning = [exchange.post((x * weights.float()[:, :1] * (rank + 1),), splits.reversed(), read=False)
                 for (x, _, weights), splits in zip(arrived, (plain, other))]
    backs = [handle.wait() for handle in returning]
    for (x, ids, weights), (back,), tensors in zip(arrived, backs, sent):
        found += [x.detach(), ids, weights.detach(), back.detach()]
        (back ** 2).sum().backward()
        found += [tensors[0].grad, tensors[2].grad]
    return found


def factory_of(name: str):
    layout = one_node() if name.startswith("peer") else mesh()
    return exchange_factory(name, layout, 60)


@pytest.mark.ranks
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("traffic", TRAFFIC, ids=str)
def test_a_backend_moves_what_the_flat_exchange_moves(ranks, name, traffic):
    pool = ranks(4)
    for ours, flat in zip(pool.run(there_and_back, name, traffic), pool.run(there_and_back, "flat", traffic)):
        for one, other in zip(ours, flat, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def refused(name: str, across: bool) -> str:
    try:
        exchange_factory(name, mesh() if across else one_node(), 60)
    except ConfigError as error:
        return error.id
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize("name, across, number", [
    ("peer", True, "086"), ("peer_push", True, "086"), ("deepep", False, "087"), ("vdev", False, "087")])
def test_what_a_backend_needs_is_named(ranks, name, across, number):
    assert ranks(4).run(refused, name, across) == [f"E-CONFIG-{number}"] * 4


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="E-CONFIG-088"):
        _package("no_such_package", "deepep")


def test_the_bits_of_a_message_pass_through_rows_of_bfloat16():
    for message in (torch.randn(3, 5, dtype=torch.float64),
                    torch.randint(0, 256, (2, 21), dtype=torch.uint8), torch.zeros(0, 3)):
        units = as_units(message)
        assert units.dtype == torch.bfloat16 and units.shape[1] % 8 == 0
        assert from_units(units.clone(), message.dtype, message.shape[1:]).equal(message)


def test_the_config_knows_every_backend():
    assert set(get_args(get_type_hints(ParallelConfig)["exchange"])) == set(BACKENDS)


def without_room(limit: int) -> str:
    """What comes of sharing more memory than there is, here more than a file may have."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        shared_files(one_node()["ep"])(4 * limit)
    except DiskError as error:
        return f"{error.id} {error.why}"
    except SystemExit as on_send_stream:
        return str(on_send_stream.code)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "shared"


@pytest.mark.ranks
def test_memory_that_is_not_there_is_told_before_it_is_used(ranks):
    """A file that merely has the size is SIGBUS once it is written to."""
    for said in ranks(2).run(without_room, 65536):
        assert said.startswith("E-DISK-042") and "needs 262,144 bytes" in said
