"""A layer with a bank of experts and little else."""

import torch
from torch import nn

from moetrain.moe.bank import ExpertBank
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
