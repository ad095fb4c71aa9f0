"""DeepSpeed engine (engine=deepspeed): ZeRO sums the dense gradients and shards the update of the parameters.

    wrap_engine(run) -> the same run with two parts changed

    run.parallel   reducer: ZeRO sums dense gradients, and each rank keeps the shard that it will update;
                   expert gradients are summed as before
                   dense: that shard, as tensors with a `grad`, so that norm and clipping stay in moetrain
    run.state      optimizer: ZeRO's AdamW for the dense parameters, torch's AdamW for the experts
                   state_shards: whole moments by parameter, so that any engine and any number of ranks can
                   read a checkpoint

The training step, its metrics, checkpoints, resume and exit codes are those of engine=torch. DeepSpeed
averages gradients by default. Here the denominators of the losses are global already, so its
`gradient_allreduce_op` is `sum`. It neither clips nor computes a norm. There is one reduction a step,
whatever the gradient accumulation: all backward passes run inside `coalesce_grad_reduction`, so gradients
are whole until the last of them.

ZeRO's layout: the parameters of an optimizer group lie end to end in their order, padded at the end, and are
cut into equal parts, part r on rank r. `_check_layout` verifies that once.
"""

import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.comm.mesh import Group
from moetrain.errors import ConfigError
from moetrain.parallel.data_parallel import BUCKET_BYTES, GradientReducer
from moetrain.parallel.state_shards import StateShard
from moetrain.train.optim.optimizer import OF_EXPERTS, allocate_state, restore_steps
from moetrain.train.state import Run, TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap_engine(run: Run) -> Run:
    """Hand the dense parameters of a run to ZeRO, before a checkpoint is read. Collective."""
    group = run.mesh["dense_grad"]
    assert group.size == dist.get_world_size(), "config/rules/parallel.py: ZeRO shards over all ranks"
    experts, dense = _split(run.state.optimizer)
    zero = Zero(_start_engine(run, dense), group)
    reducer = ZeroReducer(zero, GradientReducer([(run.parallel.experts, run.mesh["expert_grad"])]))
    parallel = run.parallel._replace(dense=zero.parts, reducer=reducer)
    # The gradient norm sums over this group, because dense gradients are sharded now.
    mesh = replace(run.mesh, groups={**run.mesh.groups, "dense_shard": group})
    state = ZeroState(run.state.model, ZeroOptimizer(zero, experts), prior=run.state.prior)
    return replace(run, mesh=mesh, parallel=parallel, state=state)


class Zero:
    """ZeRO over the dense parameters: the parameters of each optimizer group, and this rank's part of them.

    Args:
        engine: DeepSpeed's engine.
        group: the ranks over which it shards.
    """

    def __init__(self, engine: Any, group: Group) -> None:
        self.engine, self.group = engine, group
        self.param_groups: list[dict[str, Any]] = engine.optimizer.param_groups
        self.parameters: list[list[nn.Parameter]] = [list(some) for some in engine.optimizer.bit16_groups]
        self.parts: list[Tensor] = [some["params"][0] for some in self.param_groups]
        self.inner: torch.optim.AdamW = engine.optimizer.optimizer
        allocate_state(self.inner)
        self._check_layout()
        self._accumulating = ExitStack()

    def accumulate(self) -> None:
        """Clear the gradients, and let them accumulate locally until `reduce`."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        self._accumulating.enter_context(self.engine.coalesce_grad_reduction())

    def reduce(self) -> None:
        """Sum the gradients over the ranks; `grad` of each part becomes this rank's, padded with zeros."""
        for parameter in (parameter for some in self.parameters for parameter in some):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._accumulating.close()
        averaged = self.engine.optimizer.averaged_gradients
        for index, part in enumerate(self.parts):
            flat = part.new_zeros(part.shape)
            found = torch.cat([gradient.flatten() for gradient in averaged[index]])
            part.grad = flat
            flat[:found.numel()].copy_(found)
            averaged[index] = [flat]  # ZeRO updates with this tensor, which is clipped in place

    def whole(self, moment: str) -> dict[nn.Parameter, Tensor]:
        """Gather a moment of every dense parameter from all ranks. Collective."""
        found: dict[nn.Parameter, Tensor] = {}
        for parameters, part in zip(self.parameters, self.parts):
            own = self.inner.state[part][moment]
            flat = own.new_empty(own.numel() * self.group.size)
            dist.all_gather(list(flat.chunk(self.group.size)), own, group=self.group.process_group)
            found |= dict(zip(parameters, _views(flat, parameters)))
        return found

    def take(self, whole: dict[str, dict[nn.Parameter, Tensor]]) -> None:
        """Copy this rank's part of whole moments, and of the model's parameters as they are now."""
        for parameters, part in zip(self.parameters, self.parts):
            part.data.copy_(self._own_part(parameters, part))
            for moment, tensors in whole.items():
                self.inner.state[part][moment].copy_(self._own_part([tensors[p] for p in parameters], part))

    @torch.no_grad()
    def _own_part(self, tensors: list[Tensor], part: Tensor) -> Tensor:
        flat = part.new_zeros(part.numel() * self.group.size)
        for view, tensor in zip(_views(flat, tensors), tensors):
            view.copy_(tensor)
        return flat[part.numel() * self.group.position:][:part.numel()]

    def _check_layout(self) -> None:
        for parameters, part in zip(self.parameters, self.parts):
            assert torch.equal(self._own_part(parameters, part), part), (
                "this DeepSpeed lays ZeRO's parts out in another way")


class ZeroReducer:
    """Reducer of all gradients: ZeRO's for dense parameters, that of data parallelism for experts."""

    def __init__(self, zero: Zero, experts: GradientReducer) -> None:
        self.zero, self.experts = zero, experts

    def reduce(self) -> None:
        """Sum the gradients of the experts and of the dense parameters."""
        self.experts.reduce()
        self.zero.reduce()


class ZeroOptimizer:
    """One optimizer of two: ZeRO's AdamW for the dense parameters, torch's AdamW for the experts.

    `state` holds the moments of the experts by parameter; `ZeroState` adds those of the
    dense parameters for a moment.
    """

    def __init__(self, zero: Zero, experts: torch.optim.AdamW) -> None:
        self.zero, self.experts = zero, experts
        self.state: dict[nn.Parameter, dict[str, Tensor]] = dict(experts.state)
        self.param_groups = [*zero.param_groups, *experts.param_groups]
        # Whole moments of dense parameters, into which a checkpoint is read.
        self.to_fill: dict[str, dict[nn.Parameter, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, and let ZeRO accumulate from here on."""
        self.experts.zero_grad(set_to_none=set_to_none)
        self.zero.accumulate()

    def step(self) -> None:
        """Update all parameters."""
        self.to_fill = {}
        self.zero.engine.step()
        self.experts.step()


class ZeroState(TrainState):
    """Training state whose dense moments are sharded by ZeRO: saved whole, restored in parts."""

    optimizer: ZeroOptimizer

    def state_shards(self) -> Iterator[StateShard]:
        """Yield all shards of the state, with whole moments of dense parameters.

        Collective once a step was taken, because the moments are gathered. Before the first step a checkpoint
        is read into the moments, which are empty then and need no communication.
        """
        zero, state = self.optimizer.zero, self.optimizer.state
        dense = [parameter for parameters in zero.parameters for parameter in parameters]
        if self.step:
            whole = {moment: zero.whole(moment) for moment in MOMENTS}
        else:
            whole = self.optimizer.to_fill = {
                moment: {p: torch.zeros_like(p) for p in dense} for moment in MOMENTS}
        state |= {parameter: {moment: whole[moment][parameter] for moment in MOMENTS} for parameter in dense}
        yield from super().state_shards()
        for parameter in dense:
            del state[parameter]

    def restore(self, values: dict[str, int]) -> None:
        """Restore the counters, and this rank's part of the moments that were read."""
        super().restore(values)
        self.optimizer.zero.take(self.optimizer.to_fill)
        restore_steps(self.optimizer.zero.inner, self.step)
        self.optimizer.to_fill = {}


def _views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of a flat tensor with the shapes of `tensors`, end to end from its beginning."""
    sizes = [tensor.numel() for tensor in tensors]
    return [view.view(tensor.shape) for view, tensor in zip(flat[:sum(sizes)].split(sizes), tensors)]


def _split(optimizer: torch.optim.AdamW) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    """Split an optimizer into itself, with the groups of experts alone, and a new one with all others."""
    assert type(optimizer) is torch.optim.AdamW, type(optimizer)
    groups = optimizer.param_groups
    dense = [group for group in groups if group["name"] not in OF_EXPERTS]
    if not dense:
        raise ConfigError(
            230, "engine=deepspeed, and all parameters but those of experts are frozen",
            where="engine.name, train.frozen", why="ZeRO has nothing to shard: it leaves experts to torch",
            next="engine=torch, or fewer patterns in train.frozen")
    for parameter in (parameter for group in dense for parameter in group["params"]):
        del optimizer.state[parameter]
    optimizer.param_groups = [group for group in groups if group["name"] in OF_EXPERTS]
    return optimizer, torch.optim.AdamW([dict(group) for group in dense], fused=True)


def _start_engine(run: Run, optimizer: torch.optim.AdamW) -> Any:
    """Start a DeepSpeed engine over the dense parameters alone; its forward is never called."""
    os.environ.setdefault("DS_ACCELERATOR", run.mesh.device.type)
    put_ninja_on_path()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": run.config.train.per_forward(run.mesh["batch"].size),
        "gradient_accumulation_steps": 1,  # moetrain accumulates: the engine sees one backward phase a step
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as with engine=torch: nothing to compile
        "zero_optimization": {
            "stage": run.config.engine.zero_stage,
            "overlap_comm": False,
            "compute_grad_norm": False,
            "reduce_bucket_size": BUCKET_BYTES // 4,
        },
        "steps_per_print": None,
    }
    module = nn.ParameterList(
        [parameter for group in optimizer.param_groups for parameter in group["params"]])
    # DeepSpeed prints what it compiles. A failure to compile raises an exception.
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config,
                                          dist_init_required=False)
    return engine


def put_ninja_on_path() -> None:
    """Put ninja on PATH where it lies beside the interpreter: the environment may not be activated."""
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
