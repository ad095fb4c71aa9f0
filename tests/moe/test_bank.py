"""The bank: which parameters are experts', and the seams of the layer."""

from contextlib import nullcontext

import torch
from torch import nn

from moetrain.moe.bank import ExpertBank, Taken, is_expert_parameter
from moetrain.moe.dispatch import Sent
from moetrain.moe.experts import Computation
from moetrain.ops.permute import Permutation
from tests.support.bank_layer import Layer


def test_a_position_without_experts_still_runs():
    model = Layer(())
    experts = model.layers[0]["moe"]["experts"]
    out_RD = Computation(experts.bank)(sent(torch.zeros(0, 3, requires_grad=True), torch.zeros(0), []))
    out_RD.sum().backward()
    assert out_RD.shape == (0, 3)


def test_only_the_banks_parameters_are_expert_parameters():
    model = Layer((0,))
    is_expert = is_expert_parameter(model)
    assert [name for name, parameter in model.named_parameters() if is_expert(parameter)] == [
        "layers.0.moe.experts.bank.gate_up", "layers.0.moe.experts.bank.down"]


def sent(x_RD: torch.Tensor, weights_R: torch.Tensor, counts_e: list[int]) -> Sent:
    """Rows that lie in expert order."""
    return Sent(x_RD, Permutation(torch.arange(len(x_RD)), torch.arange(len(x_RD))[:, None], None), weights_R, counts_e, None)


class Elsewhere:
    """Copies of experts 1 and 2, handed over by their seams; notes the order of calls."""

    def __init__(self, copies: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.copies, self.called = copies, []

    def post(self):
        self.called.append("post")

    def take(self, x_ND):
        self.called.append("take")
        return Taken(x_ND, self.copies)

    def saving(self):
        self.called.append("saving")
        return nullcontext()

    def leave(self, rows_RD):
        self.called.append("leave")
        return rows_RD


def test_copies_are_computed_after_the_homes():
    torch.manual_seed(0)
    whole, part = (ExpertBank(experts=experts, dim=3, expert_dim=2) for experts in ((0, 1, 2), (0,)))
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    part.gate_up.data, part.down.data = whole.gate_up.data[:1], whole.down.data[:1]
    part.copies = Elsewhere((whole.gate_up.data[1:], whole.down.data[1:]))
    part.post()
    chunks = [sent(torch.randn(5, 3), torch.rand(5), [2, 0, 3]), sent(torch.randn(2, 3), torch.rand(2), [1, 1, 0])]
    ours = Computation(part, chunks=2)
    ours.begin()
    for chunk in chunks:
        assert ours(chunk).equal(Computation(whole)(chunk))
    assert part.copies.called == ["post", "take", "saving", "saving", "leave"]


def test_posting_without_copies_does_nothing():
    ExpertBank(experts=(0,), dim=3, expert_dim=2).post()
