"""Two views of the same ranks, and groups that partition them."""

import socket
import time
from math import prod

import pytest
import torch

from moetrain.comm.mesh import (
    DENSE_AXES,
    DERIVED,
    EXPERT_AXES,
    axis_groups,
    build_mesh,
    connect,
    mesh_sizes,
    node_groups,
)
from moetrain.errors import RendezvousError

CPU = torch.device("cpu")
MESHES = [(mode, world, ep) for world in (1, 2, 4, 8) for mode, ep in
          [("ddp", None), ("ep", None), *(("ep", size) for size in (1, 2, 4, 8) if size <= world)]]


@pytest.mark.parametrize("mode, world, ep", MESHES)
def test_every_derived_group_partitions_the_world_in_order(mode, world, ep):
    sizes = mesh_sizes(mode, world, ep)
    for axes, together in DERIVED.values():
        groups = axis_groups(axes, sizes, together)
        assert sorted(sum(groups, ())) == list(range(world))
        assert all(list(group) == sorted(group) for group in groups)
        assert len({len(group) for group in groups}) == 1


@pytest.mark.parametrize("mode, world, ep", MESHES)
def test_an_expert_and_a_gradient_group_meet_in_one_rank(mode, world, ep):
    """Ranks of one `ep` group hold different experts, ranks of one `expert_grad` group the same."""
    sizes = mesh_sizes(mode, world, ep)
    ep_groups, grad_groups = (axis_groups(*DERIVED[name][:1], sizes, DERIVED[name][1])
                              for name in ("ep", "expert_grad"))
    assert len(ep_groups[0]) * len(grad_groups[0]) == world
    assert all(len(set(one) & set(other)) == 1 for one in ep_groups for other in grad_groups)


def test_neighbours_share_experts_and_strides_share_gradients():
    sizes = mesh_sizes("ep", 8, 4)
    assert axis_groups(EXPERT_AXES, sizes, ("ep",)) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert axis_groups(EXPERT_AXES, sizes, ("edp_replicate", "edp_shard")) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert axis_groups(DENSE_AXES, sizes, ("dp_replicate", "dp_shard", "cp")) == [tuple(range(8))]


def test_the_last_axis_is_the_fastest():
    sizes = {"dp_replicate": 2, "cp": 2, "tp": 2}
    assert axis_groups(DENSE_AXES, sizes, ("tp",)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert axis_groups(DENSE_AXES, sizes, ("dp_replicate", "cp")) == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_machines_and_rails_cross(monkeypatch):
    """Eight ranks, four a machine: an ep group of eight has two machines and four rails; one of two, one."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert node_groups(mesh_sizes("ep", 8, None), 8) == {
        "node": [(0, 1, 2, 3), (4, 5, 6, 7)], "ep_node": [(0, 1, 2, 3), (4, 5, 6, 7)],
        "ep_rail": [(0, 4), (1, 5), (2, 6), (3, 7)]}
    assert node_groups(mesh_sizes("ep", 8, 2), 8)["ep_rail"] == [(rank,) for rank in range(8)]


def sizes_of(mode: str, world: int, ep: int | None = None, shard: int | None = None) -> dict[str, int]:
    return {axis: size for axis, size in mesh_sizes(mode, world, ep, shard).items() if size > 1}


def test_the_modes_size_their_axes():
    assert sizes_of("ddp", 4) == {"dp_replicate": 4, "edp_replicate": 4}
    assert sizes_of("ep", 4) == {"dp_replicate": 4, "ep": 4}
    assert sizes_of("ep", 4, 2) == {"dp_replicate": 4, "edp_replicate": 2, "ep": 2}
    assert sizes_of("fsdp", 4) == {"dp_shard": 4, "edp_shard": 4}
    assert sizes_of("fsdp", 8, shard=2) == {
        "dp_replicate": 4, "dp_shard": 2, "edp_replicate": 4, "edp_shard": 2}
    assert sizes_of("ep_fsdp", 8) == {"dp_shard": 8, "ep": 8}
    assert sizes_of("ep_fsdp", 8, 2) == {"dp_shard": 8, "edp_shard": 4, "ep": 2}
    assert sizes_of("ep_fsdp", 8, 2, 4) == {
        "dp_replicate": 2, "dp_shard": 4, "edp_replicate": 2, "edp_shard": 2, "ep": 2}
    assert sizes_of("ep_fsdp", 8, 4, 2) == {"dp_replicate": 4, "dp_shard": 2, "edp_replicate": 2, "ep": 4}


@pytest.mark.parametrize("mode, ep, shard", [
    (mode, ep, shard)
    for mode in ("ddp", "fsdp", "ep", "ep_fsdp") for ep in (1, 2, 4, 8) for shard in (1, 2, 4, 8)
])
def test_both_views_hold_every_rank_once(mode, ep, shard):
    sizes = mesh_sizes(mode, 8, ep, shard)
    for axes in (DENSE_AXES, EXPERT_AXES):
        assert prod(sizes.get(axis, 1) for axis in axes) == 8


def test_one_process_has_groups_of_itself_and_no_process_group():
    mesh = build_mesh({}, CPU)
    assert set(mesh.groups) == {*DERIVED, "node", "ep_node", "ep_rail"} and mesh.is_main
    assert all(group.ranks == (0,) and group.process_group is None for group in mesh.groups.values())
    with pytest.raises(AssertionError):
        build_mesh({"dp_replicate": 2, "edp_replicate": 2}, CPU)


def groups_of_this_rank() -> dict[str, tuple[tuple[int, ...], int, int]]:
    import torch.distributed as dist

    mesh = build_mesh(mesh_sizes("ep", 4, 2), CPU)
    sizes = {name: 1 if group.process_group is None else dist.get_world_size(group.process_group)
             for name, group in mesh.groups.items()}
    return {name: (group.ranks, group.position, sizes[name]) for name, group in mesh.groups.items()}


@pytest.mark.ranks
def test_every_rank_finds_itself_in_its_groups(ranks):
    everyone = (0, 1, 2, 3)
    for rank, groups in enumerate(ranks(4).run(groups_of_this_rank)):
        pair, strided, alone = ((0, 1), (2, 3))[rank // 2], ((0, 2), (1, 3))[rank % 2], ((rank,), 0, 1)
        everywhere, of_pair, of_strided = (everyone, rank, 4), (pair, rank % 2, 2), (strided, rank // 2, 2)
        assert groups == {"batch": everywhere, "dense_grad": everywhere, "dense_replicas": everywhere,
                          "dense_shard": alone,
                          "node": everywhere, "ep": of_pair, "expert_parts": of_pair,
                          "expert_grad": of_strided,
                          "expert_replicas": of_strided, "expert_shard": alone, "ep_node": of_pair,
                          "ep_rail": alone}


def test_a_rendezvous_that_takes_connections_and_says_nothing_is_named_within_the_limit(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        environment = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        began = time.monotonic()
        with pytest.raises(RendezvousError) as caught:
            connect(CPU, 1)
    assert caught.value.id == "E-RENDEZVOUS-020" and f"127.0.0.1:{port}" in str(caught.value)
    assert time.monotonic() - began < 60
