"""Pieces: what checkpoints, initialisation and tests see of the parameters on a rank."""

import pytest
import torch
from torch import nn

from moetrain.moe.bank import ExpertBank
from moetrain.moe.expert_form import SwigluExpert
from moetrain.parallel.state_shards import StateShard, buffers, shard_of, state_shards
from tests.support.bank_layer import Layer


def named(model: nn.Module, of=lambda parameter: parameter.data) -> dict[str, StateShard]:
    return {shard.name: shard for shard in state_shards(model, of)}


def test_every_expert_has_its_global_id_in_its_names():
    assert {name: (shard.shape, shard.begin, shard.held_by)
            for name, shard in named(Layer((4, 7))).items()} == {
        "scale": ((2,), 0, "dense_grad"),
        "layers.0.moe.experts.4.gate_up": ((4, 3), 0, "expert_grad"),
        "layers.0.moe.experts.7.gate_up": ((4, 3), 0, "expert_grad"),
        "layers.0.moe.experts.4.down": ((3, 2), 0, "expert_grad"),
        "layers.0.moe.experts.7.down": ((3, 2), 0, "expert_grad"),
    }


def test_a_piece_is_a_view_of_its_experts_memory():
    model = Layer((4, 7))
    named(model)["layers.0.moe.experts.7.down"].rows.fill_(5)
    assert (model.bank.down[1] == 5).all()


def test_a_sliced_expert_is_rows_of_the_same_tensors():
    """Positions 1 and 0 of 4: each has one of gate_up's four rows; position 0 has none of down's three."""
    for position, rows in ((1, {"gate_up": 1, "down": 0}), (0, {"gate_up": 0})):
        model = Layer((4,))
        bank = model.layers[0]["moe"]["experts"].bank = ExpertBank(
            experts=(4,), form=SwigluExpert(dim=3, expert_dim=2), cut=(position, 4))
        assert not [name for name in named(model) if ".7." in name]
        bank.sliced = (7,)
        for parameter in (bank.gate_up_slices, bank.down_slices):
            parameter.data = torch.zeros(1, *parameter.shape[1:])
        held = {name: shard for name, shard in named(model).items() if ".7." in name}
        assert {name.rpartition(".")[2]: shard.begin for name, shard in held.items()} == rows
        assert all(shard.held_by == "expert_grad" and len(shard.rows) == 1 for shard in held.values())
        assert held["layers.0.moe.experts.7.gate_up"].shape == (4, 3)
        held["layers.0.moe.experts.7.gate_up"].rows.fill_(5)
        assert (bank.gate_up_slices == 5).all()


def test_other_tensors_of_the_same_shape_go_by_the_same_names():
    model = Layer((4, 7))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2)
    model.bank.gate_up.grad[0] = 3
    gradients = named(model, lambda parameter: parameter.grad)
    assert (gradients["layers.0.moe.experts.4.gate_up"].rows == 3).all()
    assert ((gradients["layers.0.moe.experts.7.gate_up"].rows == 2).all()
            and (gradients["scale"].rows == 2).all())


def test_what_a_parameter_has_not_is_passed_over():
    model = Layer((4,))
    assert list(named(model, lambda parameter: None if parameter.ndim == 3 else parameter)) == ["scale"]


def test_buffers_are_pieces_unless_they_are_not_persistent():
    model = Layer((4,))
    model.register_buffer("bias", torch.ones(3))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    assert [(shard.name, shard.held_by) for shard in buffers(model)] == [("bias", "batch")]


def rows_held(sizes: list[tuple[int, ...]], dims: list[int]) -> list[tuple[int, int, int]]:
    """(sharded dim, first index, length) of tensors that FSDP2 would cut over all ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    found = []
    for size, dim in zip(sizes, dims):
        tensor = distribute_tensor(torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size),
                                   mesh, [Shard(dim)])
        begin, length = shard_of(tensor)[1], tensor.to_local().shape[dim]
        full = torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size)
        assert torch.equal(tensor.to_local(), full.narrow(dim, begin, length))
        found.append((*shard_of(tensor), length))
    return found


@pytest.mark.ranks
def test_a_rank_knows_which_rows_it_holds(ranks):
    """Uneven, fewer rows than ranks, and a cut along dim 1."""
    held = ranks(4).run(rows_held, [(10, 3), (2, 3), (3, 8, 2), (5,)], [0, 0, 1, 0])
    assert [rank[0] for rank in held] == [(0, 0, 3), (0, 3, 3), (0, 6, 3), (0, 9, 1)]
    assert [rank[1][1:] for rank in held] == [(0, 1), (1, 1), (2, 0), (2, 0)]
    assert [rank[2] for rank in held] == [(1, 0, 2), (1, 2, 2), (1, 4, 2), (1, 6, 2)]
