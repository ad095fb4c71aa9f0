"""Parallelization of the model: which parameters are sharded, copied and summed over which groups.

    shard_parameters    FSDP2: dense parameters over `dense_shard`, experts over `expert_shard`
    copy_experts        FSSDP: copies of experts on other positions of `ep`
    parallelize         sums of the gradients that FSDP2 does not reduce

The groups are those of comm/mesh.py.
"""

from collections import Counter
from typing import NamedTuple

from torch import nn

from moetrain.comm.mesh import Mesh
from moetrain.errors import ConfigError
from moetrain.model.transformer import Transformer
from moetrain.moe.bank import is_expert_parameter
from moetrain.moe.experts import RoutedExperts
from moetrain.parallel.data_parallel import GradientReducer, Reducer
from moetrain.parallel.fsdp import shard
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.plan.cost.machine import Topology


class Parallel(NamedTuple):
    """Trainable parameters of this rank, and the reduction of their gradients over ranks."""

    dense: list[nn.Parameter]
    experts: list[nn.Parameter]
    reducer: Reducer
    copies: CopyManager | None = None        # copies of experts, with parallel=fssdp

    def begin(self, micro_batches: int) -> None:
        """Begin a step of so many micro-batches."""
        if self.copies is not None:
            self.copies.begin(micro_batches)

    def reduce(self) -> None:
        """Reduce gradients after the last backward: from copies to homes, then over replicas. Collective."""
        if self.copies is not None:
            self.copies.finish()
        self.reducer.reduce()


def shard_parameters(model: Transformer, mesh: Mesh) -> None:
    """Apply FSDP2 if the mesh has a sharding axis: to the experts of each layer, each block, then the rest.

    Args:
        model: this rank's model, usually still on the meta device; its modules are wrapped in place.
        mesh: all ranks.
    """
    if mesh["dense_shard"].size == 1:
        return
    _refuse_shared_by_blocks(model)
    is_expert = is_expert_parameter(model)
    experts = {parameter for parameter in model.parameters() if is_expert(parameter)}
    if mesh["expert_shard"].size > 1:
        shard([module for module in model.modules() if isinstance(module, RoutedExperts)],
              over=mesh["expert_shard"], replicated=mesh["expert_replicas"], device=mesh.device)
    shard([*model.blocks, model], over=mesh["dense_shard"], replicated=mesh["dense_replicas"],
          device=mesh.device, ignore=experts)


def _refuse_shared_by_blocks(model: Transformer) -> None:
    """Raise ConfigError where a parameter of a block is used outside of it, too: FSDP2 gathers it for one.

    A bank of experts is gathered by itself, so layers may share its module.
    """
    banks = Counter(parameter for module in model.modules() if isinstance(module, RoutedExperts)
                    for parameter in module.parameters())
    found: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if banks[parameter] == 1:
            continue
        parts = name.split(".")
        place = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else "the root"
        first, there = found.setdefault(parameter, (name, place))
        if place != there:
            raise ConfigError(
                236, f"{first} and {name} are one parameter", where="parallel",
                why=f"FSDP2 gathers it while {there} runs, and {place} would read a shard",
                next="make it in shared_modules of the routers, for the model to keep in model.tied, and "
                     "take it from there by router.shared; or train with parallel=ddp or ep")


def copy_experts(model: Transformer, mesh: Mesh, *, rematerialize: bool, form: str,
                 topology: Topology) -> CopyManager:
    """Build the manager of expert copies on other positions, for every bank of experts.

    Args:
        model: this rank's part of the model.
        mesh: all ranks.
        rematerialize: drop copies after forward and gather them again for backward.
        form: form of the sparse collectives, a value of `parallel.collective`.
        topology: positions, and how many of them are on a node.

    Returns:
        The manager, without copies.
    """
    return CopyManager({name: experts.bank for name, experts in model.banks.items()}, mesh["ep"],
                       passes=model.passes,
                       dtype=model.dtype, rematerialize=rematerialize,
                       recompute=any(block.recompute is not None for block in model.blocks),
                       form=form, topology=topology)


def parallelize(model: nn.Module, mesh: Mesh, copies: CopyManager | None = None) -> Parallel:
    """Set up the reduction of gradients: dense parameters and experts, each over the ranks that replicate it.

    The reducer passes over gradients that FSDP2 reduces. Frozen parameters have no gradient.

    Args:
        model: this rank's part of the model.
        mesh: all ranks.
        copies: manager of expert copies, with `parallel=fssdp`.

    Returns:
        The trainable parameters and their reduction.
    """
    is_expert = is_expert_parameter(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dense = [parameter for parameter in trainable if not is_expert(parameter)]
    experts = [parameter for parameter in trainable if is_expert(parameter)]
    reducer = GradientReducer([(dense, mesh["dense_grad"]), (experts, mesh["expert_grad"])])
    return Parallel(dense, experts, reducer, copies)
