"""The bank: which parameters are experts', and the seams of the layer."""

import torch
from torch import nn

from moetrain.moe.bank import ExpertBank, is_expert_parameter
from moetrain.moe.experts import GroupedExperts


class Layer(nn.Module):
    """A module whose paths look like the model's: layers.0.moe.experts.bank."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.layers = nn.ModuleList([nn.ModuleDict({"moe": nn.ModuleDict({
            "experts": GroupedExperts(ExpertBank(experts=experts, dim=3, expert_dim=2))})})])

    @property
    def bank(self) -> ExpertBank:
        return self.layers[0]["moe"]["experts"].bank


def test_a_position_without_experts_still_runs():
    model = Layer(())
    experts = model.layers[0]["moe"]["experts"]
    out_RD = experts(torch.zeros(0, 3, requires_grad=True), torch.zeros(0), [])
    out_RD.sum().backward()
    assert out_RD.shape == (0, 3)


def test_only_the_banks_parameters_are_expert_parameters():
    model = Layer((0,))
    is_expert = is_expert_parameter(model)
    assert [name for name, parameter in model.named_parameters() if is_expert(parameter)] == [
        "layers.0.moe.experts.bank.gate_up", "layers.0.moe.experts.bank.down"]


def test_the_seams_do_nothing_here():
    bank, rows_RD = ExpertBank(experts=(0,), dim=3, expert_dim=2), torch.randn(2, 3)
    bank.post()
    assert bank.take(rows_RD) is rows_RD
