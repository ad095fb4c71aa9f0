"""Choice between keeping autograd graphs and a counting pass, by memory, before the first step.

With gradient accumulation an exact balance loss needs the counts of all micro-batches before the
first backward pass:

    keep the graphs of all micro-batches    where they fit: nothing runs twice
    count in a pass of its own              where they do not: the memory of one micro-batch
                                            (train/micro_batches.py)

Both give the same numbers, so the choice may depend on the machine; `train.count_pass` overrides it. The size
of a graph is measured, not modeled: one micro-batch of the next step runs forward, with its real routing, and
the memory that it keeps is counted. The rank with the least free memory decides for all:

    (micro-batches + 1) graphs + gradients to be allocated  <=  MAX_SHARE of the free memory

The additional graph stands for a backward pass, which takes about as much again. The rest of the free memory
is left for loads that drift and for fragmentation.
"""

import weakref
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.comm.agreement import all_or_none
from moetrain.comm.reduce import largest_over
from moetrain.plan.cost.memory import CopyMemory, HeldExperts, copy_memory
from moetrain.train.memory.device_memory import free_memory
from moetrain.train.micro_batches import forward_pass
from moetrain.train.state import Graphs, Run

MAX_SHARE = 0.8


def choose_graphs(run: Run) -> Graphs:
    """Choose between steps whether a run keeps graphs, where the config leaves the choice. Collective."""
    config, rule = run.config, run.objective.pool
    micro_batches = run.loader.micro_batches
    if config.train.count_pass is not None or rule is None or rule.mode != "exact" or micro_batches == 1:
        return run.graphs
    all_ranks = run.mesh["batch"]
    free = -largest_over(all_ranks, -free_memory(run.mesh, share_gpu=config.run.share_gpu))
    graph = largest_over(all_ranks, measure_graph(run))
    wanted = largest_over(all_ranks, (micro_batches + 1) * graph + gradient_bytes(run))
    return Graphs(kept=wanted <= MAX_SHARE * free, graph=int(graph), free=int(free))


def measure_graph(run: Run) -> int:
    """Measure the bytes that a micro-batch of the next step keeps for backward on this rank.

    Collective. The state of the run does not change.
    """
    step = run.state.step + 1
    batch = all_or_none(run.mesh["batch"], lambda: run.loader.step(step)[0]).to(run.mesh.device)
    batch = batch.repeated(run.objective.language.draws)
    unrecorded = replace(run, dump=None)
    # This pass allocates what stays for the whole step, such as expert copies, so that it is not counted.
    with torch.no_grad():
        forward_pass(unrecorded, step, batch, lambda found: [])
    with AllocationTracker() as tracker:
        forward = forward_pass(unrecorded, step, batch, lambda found: [])
        kept = tracker.alive(run.mesh.device)
    del forward
    if run.parallel.copies is not None:
        run.parallel.copies.release()
    return kept


class AllocationTracker(TorchDispatchMode):
    """Dispatch mode that tracks the storages that operators allocate, as long as they are referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs))
                 if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in given:
                storage = leaf.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage)
        return result

    def alive(self, device: torch.device) -> int:
        """Bytes of the living storages on a device, by their present size."""
        held = (reference() for reference in self.storages.values())
        return sum(storage.nbytes() for storage in held
                   if storage is not None and storage.device.type == device.type)


def gradient_bytes(run: Run) -> int:
    """Bytes of this rank's gradients, including those of expert copies. Frozen parameters have none."""
    own = (parameter.to_local() if isinstance(parameter, DTensor) else parameter
           for parameter in run.state.model.parameters() if parameter.requires_grad)
    copies = max_copy_memory(run)
    return sum(parameter.nbytes for parameter in own) + copies.sums + copies.returned


def max_copy_memory(run: Run) -> CopyMemory:
    """Memory of expert copies on this rank when every bank has its largest number of copies."""
    config, ep, model = run.config, run.mesh["ep"], run.state.model
    layers = []
    for experts in model.banks.values() if run.state.planning is not None else ():
        homes = len(experts.bank.experts)
        max_copies = (min(config.parallel.max_copies, experts.dispatcher.placement.num_experts - homes)
                      + min(config.parallel.max_sliced_experts, homes))
        parameters = [prod(shape) for shape in experts.bank.shapes]
        layers.append(HeldExperts(homes, max_copies, (ep.size - 1) * min(config.parallel.max_copies, homes),
                                  sum(parameters), max(parameters)))
    return copy_memory(layers, weight=model.dtype.itemsize, gradient=max(4, model.dtype.itemsize),
                       rematerialize=config.parallel.rematerialize,
                       recompute=config.train.activation_checkpointing != "none")
