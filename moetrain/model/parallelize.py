"""Which parameter of the model is spread how: dense parts on the dense view of the mesh, experts on the expert view."""

from typing import NamedTuple

from torch import nn

from moetrain.comm.mesh import Mesh
from moetrain.model.transformer import Transformer
from moetrain.moe.bank import is_expert_parameter
from moetrain.moe.experts import GroupedExperts
from moetrain.parallel.data_parallel import GradientReducer
from moetrain.parallel.fsdp import shard


class Parallel(NamedTuple):
    dense: list[nn.Parameter]
    experts: list[nn.Parameter]
    reducer: GradientReducer


def shard_parameters(model: Transformer, mesh: Mesh) -> None:
    """FSDP2 where the mesh has a sharding axis: the experts of each layer, then each block, then the rest."""
    if mesh["dense_shard"].size == 1:
        return
    is_expert = is_expert_parameter(model)
    experts = {parameter for parameter in model.parameters() if is_expert(parameter)}
    if mesh["expert_shard"].size > 1:
        shard([module for module in model.modules() if isinstance(module, GroupedExperts)],
              over=mesh["expert_shard"], replicated=mesh["expert_replicas"], device=mesh.device)
    shard([*model.layers, model], over=mesh["dense_shard"], replicated=mesh["dense_replicas"], device=mesh.device,
          ignore=experts)


def parallelize(model: nn.Module, mesh: Mesh) -> Parallel:
    """Sort the parameters of this rank's model and say over which ranks the gradients that FSDP does not reduce are summed."""
    is_expert = is_expert_parameter(model)
    dense = [parameter for parameter in model.parameters() if not is_expert(parameter)]
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    reducer = GradientReducer([(dense, mesh["dense_grad"]), (experts, mesh["expert_grad"])])
    return Parallel(dense, experts, reducer)
