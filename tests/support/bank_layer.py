"""A layer with a bank of experts and little else."""

import torch
from torch import nn

from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.plan.placement import contiguous


class Layer(nn.Module):
    """A module whose paths look like the model's: layers.0.moe.experts.bank."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        bank = ExpertBank(experts=experts, form=SwigluExpert(dim=3, expert_dim=2))
        routed = RoutedExperts(bank, alone(max(experts, default=0) + 1))
        self.layers = nn.ModuleList([nn.ModuleDict({"moe": nn.ModuleDict({"experts": routed})})])

    @property
    def bank(self) -> ExpertBank:
        return self.layers[0]["moe"]["experts"].bank


def alone(num_experts: int) -> TokenDispatcher:
    """Dispatch without other positions."""
    exchange = FlatExchange(Group("ep", (0,), 0))
    return TokenDispatcher(contiguous(num_experts, 1), exchange, torch.device("cpu"))
