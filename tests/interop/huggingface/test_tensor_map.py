"""Every map undoes itself to the bit, and tells the shapes of the other side."""

import pytest
import torch

from moetrain.interop.huggingface.tensor_map import (
    DEINTERLEAVED,
    TRANSPOSED,
    TRANSPOSED_DEINTERLEAVED,
    UNCHANGED,
    TensorMap,
    copied,
    expert_maps,
    joined,
    renamed,
    stacked,
)

EXPERTS = ("experts.0.gate_up", "experts.1.gate_up")
MAPS = {
    "renamed": (renamed("a", "b"), [(3, 2)]),
    "joined": (joined("qkv", ["q", "k", "v"], [4, 2, 2]), [(8, 5)]),
    "expert": (expert_maps({"gate_up": "g", "down": "d"}, "w1", "w3", "w2", 3)[0], [(6, 4)]),
    "stacked": (stacked(EXPERTS, "gate_up_proj", UNCHANGED), [(6, 4)] * 2),
    "transposed": (stacked(EXPERTS, "gate_up_proj", TRANSPOSED), [(6, 4)] * 2),
    "interleaved": (stacked(EXPERTS, "gate_up_proj", TRANSPOSED_DEINTERLEAVED), [(6, 4)] * 2),
    "biases": (stacked(EXPERTS, "gate_up_proj_bias", DEINTERLEAVED), [(6,)] * 2),
    "copied": (copied("a", ["b", "c"]), [(3, 2)]),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_undoes_itself_and_tells_shapes(name: str) -> None:
    one, shapes = MAPS[name]
    ours = tuple(torch.randn(shape) for shape in shapes)
    theirs = one.to_theirs(ours)
    assert len(theirs) == len(one.theirs)
    assert all(torch.equal(a, b) for a, b in zip(one.to_ours(theirs), ours, strict=True))
    told = one.shapes_of_theirs(dict(zip(one.ours, shapes)))
    assert told == {name: tuple(tensor.shape) for name, tensor in zip(one.theirs, theirs)}
    assert one.shapes_of_ours(told) == dict(zip(one.ours, shapes))


def test_gate_rows_come_first_and_gpt_oss_stores_columns_in_turn() -> None:
    first, _ = expert_maps({"gate_up": "g", "down": "d"}, "w1", "w3", "w2", 2)
    gate, up = torch.ones(2, 3), 2 * torch.ones(2, 3)
    assert first.theirs == ("w1", "w3")
    assert first.to_ours((gate, up))[0][:, 0].tolist() == [1, 1, 2, 2]
    fused = torch.tensor([[0, 10, 1, 11], [2, 12, 3, 13]])   # [D, 2F] of one expert: gate, up, gate, up
    one = stacked(("e.0",), "gate_up_proj", TRANSPOSED_DEINTERLEAVED)
    assert one.to_ours((fused[None],))[0].tolist() == [[0, 2], [1, 3], [10, 12], [11, 13]]


def test_a_number_of_rows_that_does_not_fit_is_an_error() -> None:
    one: TensorMap = joined("qkv", ["q", "k", "v"], [4, 2, 2])
    with pytest.raises(RuntimeError):
        one.to_theirs((torch.zeros(9, 2),))
