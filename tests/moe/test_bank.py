"""The bank: which parameters are experts', and its hooks."""

from contextlib import nullcontext

import torch
from torch import nn

from moetrain.moe.bank import ExpertBank, is_expert_parameter
from moetrain.moe.dispatch_records import DispatchedRows
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import ChunkedComputation, RoutedExperts
from moetrain.ops.permute import Permutation
from tests.support.bank_layer import Layer, alone


def test_a_position_without_experts_still_runs():
    model = Layer(())
    experts = model.layers[0]["moe"]["experts"]
    out_RD = experts.compute(sent(torch.zeros(0, 3, requires_grad=True), torch.zeros(0), []))
    out_RD.sum().backward()
    assert out_RD.shape == (0, 3)


def test_only_the_banks_parameters_are_expert_parameters():
    model = Layer((0,))
    is_expert = is_expert_parameter(model)
    assert [name for name, parameter in model.named_parameters() if is_expert(parameter)] == [
        "layers.0.moe.experts.bank.gate_up", "layers.0.moe.experts.bank.down"]


def sent(x_RD: torch.Tensor, weights_R: torch.Tensor, counts_e: list[int]) -> DispatchedRows:
    """Rows that lie in expert order."""
    return DispatchedRows(x_RD, Permutation(torch.arange(len(x_RD)), torch.arange(len(x_RD))[:, None], None),
                          weights_R, counts_e, None)


class Elsewhere:
    """Copies of experts 1 and 2, handed over by the hooks; notes the order of calls."""

    def __init__(self, copies: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.copies, self.called = copies, []

    def prefetch(self):
        self.called.append("prefetch")

    def wait(self, x_ND):
        self.called.append("wait")
        return x_ND, self.copies

    def regather_in_backward(self):
        self.called.append("regather_in_backward")
        return nullcontext()

    def release_after_forward(self, rows_RD):
        self.called.append("release_after_forward")
        return rows_RD


def test_copies_are_computed_after_the_homes():
    torch.manual_seed(0)
    whole, part = (ExpertBank(experts=experts, form=SwigluExpert(dim=3, expert_dim=2))
                   for experts in ((0, 1, 2), (0,)))
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    part.gate_up.data, part.down.data = whole.gate_up.data[:1], whole.down.data[:1]
    part.copies = Elsewhere((whole.gate_up.data[1:], whole.down.data[1:]))
    part.prefetch()
    chunks = [sent(torch.randn(5, 3), torch.rand(5), [2, 0, 3]),
              sent(torch.randn(2, 3), torch.rand(2), [1, 1, 0])]
    ours = ChunkedComputation(part, num_chunks=2)
    ours.begin()
    experts = RoutedExperts(whole, alone(3))
    for chunk in chunks:
        assert ours(chunk).equal(experts.compute(chunk))
    assert part.copies.called == ["prefetch", "wait", *2 * ["regather_in_backward"], "release_after_forward"]


def test_prefetching_without_copies_does_nothing():
    ExpertBank(experts=(0,), form=SwigluExpert(dim=3, expert_dim=2)).prefetch()
