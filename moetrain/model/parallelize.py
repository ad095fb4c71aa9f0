"""Which parameter of the model is spread how: dense parts on the dense view of the mesh, experts on the expert view."""

from typing import NamedTuple

from torch import nn

from moetrain.comm.mesh import Mesh
from moetrain.model.transformer import Transformer
from moetrain.moe.bank import is_expert_parameter
from moetrain.moe.experts import RoutedExperts
from moetrain.parallel.data_parallel import GradientReducer
from moetrain.parallel.fsdp import shard
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.plan.cost.machine import Topology


class Parallel(NamedTuple):
    """The parameters of this rank, and how their gradients become those of the whole model."""

    dense: list[nn.Parameter]
    experts: list[nn.Parameter]
    reducer: GradientReducer
    copies: CopyManager | None = None        # of experts, with parallel=fssdp

    def begin(self, backwards: int) -> None:
        """A step with so many micro-batches begins."""
        if self.copies is not None:
            self.copies.begin(backwards)

    def reduce(self) -> None:
        """After the last backward: gradients of copies go home, then those of replicas are summed. Collective."""
        if self.copies is not None:
            self.copies.finish()
        self.reducer.reduce()


def shard_parameters(model: Transformer, mesh: Mesh) -> None:
    """FSDP2 where the mesh has a sharding axis: the experts of each layer, then each block, then the rest."""
    if mesh["dense_shard"].size == 1:
        return
    is_expert = is_expert_parameter(model)
    experts = {parameter for parameter in model.parameters() if is_expert(parameter)}
    if mesh["expert_shard"].size > 1:
        shard([module for module in model.modules() if isinstance(module, RoutedExperts)],
              over=mesh["expert_shard"], replicated=mesh["expert_replicas"], device=mesh.device)
    shard([*model.layers, model], over=mesh["dense_shard"], replicated=mesh["dense_replicas"], device=mesh.device,
          ignore=experts)


def copy_experts(model: Transformer, mesh: Mesh, *, rematerialize: bool, form: str, topology: Topology) -> CopyManager:
    """Let the experts of every layer be copied to other positions."""
    sparse = [block for block in model.layers if block.moe is not None]
    return CopyManager({block.moe.name: block.moe.experts.bank for block in sparse}, mesh["ep"], dtype=model.dtype,
                       rematerialize=rematerialize, recompute=any(block.recompute is not None for block in sparse),
                       form=form, topology=topology)


def parallelize(model: nn.Module, mesh: Mesh, copies: CopyManager | None = None) -> Parallel:
    """Sort the parameters of this rank's model and say over which ranks the gradients that FSDP does not reduce are summed."""
    is_expert = is_expert_parameter(model)
    dense = [parameter for parameter in model.parameters() if not is_expert(parameter)]
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    reducer = GradientReducer([(dense, mesh["dense_grad"]), (experts, mesh["expert_grad"])])
    return Parallel(dense, experts, reducer, copies)
