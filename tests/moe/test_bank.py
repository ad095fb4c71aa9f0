"""The bank's logical names: what a checkpoint is keyed by."""

import torch
from torch import nn

from moetrain.moe.bank import ExpertBank, is_expert_parameter, logical_tensors
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


def test_every_expert_has_its_global_id_in_its_names():
    named = dict(logical_tensors(Layer((4, 7))))
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {
        "scale": (2,),
        "layers.0.moe.experts.4.gate_up": (4, 3), "layers.0.moe.experts.7.gate_up": (4, 3),
        "layers.0.moe.experts.4.down": (3, 2), "layers.0.moe.experts.7.down": (3, 2),
    }


def test_a_logical_tensor_is_a_view_of_its_experts_memory():
    model = Layer((4, 7))
    dict(logical_tensors(model))["layers.0.moe.experts.7.down"].fill_(5)
    assert (model.bank.down[1] == 5).all()


def test_other_tensors_of_the_same_shape_go_by_the_same_names():
    model = Layer((4, 7))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2)
    model.bank.gate_up.grad[0] = 3
    gradients = dict(logical_tensors(model, lambda parameter: parameter.grad))
    assert (gradients["layers.0.moe.experts.4.gate_up"] == 3).all()
    assert (gradients["layers.0.moe.experts.7.gate_up"] == 2).all() and (gradients["scale"] == 2).all()


def test_a_position_without_experts_has_no_names_and_still_runs():
    model = Layer(())
    assert [name for name, _ in logical_tensors(model)] == ["scale"]
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
