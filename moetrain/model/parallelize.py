"""Which parameter of the model is spread how: dense parts over `dense_grad`, experts over `expert_grad`."""

from typing import NamedTuple

from torch import nn

from moetrain.comm.mesh import Mesh
from moetrain.moe.bank import is_expert_parameter
from moetrain.parallel.data_parallel import GradientReducer


class Parallel(NamedTuple):
    dense: list[nn.Parameter]
    experts: list[nn.Parameter]
    reducer: GradientReducer


def parallelize(model: nn.Module, mesh: Mesh) -> Parallel:
    """Sort the parameters of this rank's model and say over which ranks each gradient is summed."""
    is_expert = is_expert_parameter(model)
    dense = [parameter for parameter in model.parameters() if not is_expert(parameter)]
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    reducer = GradientReducer([(dense, mesh["dense_grad"]), (experts, mesh["expert_grad"])])
    return Parallel(dense, experts, reducer)
