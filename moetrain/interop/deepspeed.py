"""engine=deepspeed: DeepSpeed's ZeRO sums the gradients of the dense part and steps it, in shards.

    adopt(run) -> the same run with two parts changed

    run.parallel   reducer: ZeRO sums dense gradients; each rank keeps the part it will step (experts: ours, as before)
                   dense: that part, as tensors with a `grad`, so that norm and clipping stay ours
    run.state      optimizer: ZeRO's AdamW for the dense part, torch's AdamW for the experts
                   pieces: moments whole and by parameter, so that any engine and any number of ranks reads the checkpoint

The training step, its metrics, checkpoints, resume and exit codes are those of engine=torch. DeepSpeed would average
gradients; ours carry global denominators, so its `gradient_allreduce_op` is `sum` and nothing has to be undone. It neither
clips nor computes a norm. One reduction a step, whatever the accumulation: all backward passes run inside
`coalesce_grad_reduction`, so gradients are whole until the last of them.

ZeRO's layout, which `_check_layout` verifies once: the parameters of an optimizer group end to end in their order, padded
at the end, cut into equal parts, part r on rank r.
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
from moetrain.parallel.data_parallel import BUCKET_BYTES, GradientReducer
from moetrain.parallel.state_shards import Piece
from moetrain.train.optim.optimizer import allocate_state, restore_steps
from moetrain.train.setup import Run
from moetrain.train.state import TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")


def adopt(run: Run) -> Run:
    """Hand the dense part of a run to ZeRO, before any checkpoint is read. Collective."""
    group = run.mesh["dense_grad"]
    assert group.size == dist.get_world_size(), "config/rules/parallel.py: ZeRO shards over all ranks"
    experts, dense = _split(run.state.optimizer)
    zero = Zero(_start_engine(run, dense), group)
    reducer = ZeroReducer(zero, GradientReducer([(run.parallel.experts, run.mesh["expert_grad"])]))
    parallel = run.parallel._replace(dense=zero.parts, reducer=reducer)
    mesh = replace(run.mesh, groups={**run.mesh.groups, "dense_shard": group})      # norm: dense gradients are cut up
    state = ZeroState(run.state.model, ZeroOptimizer(zero, experts), prior=run.state.prior)
    return replace(run, mesh=mesh, parallel=parallel, state=state)


class Zero:
    """ZeRO's engine over the dense parameters, seen as groups of parameters and this rank's part of each."""

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
        """From here on gradients add up locally; `reduce` ends it."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        self._accumulating.enter_context(self.engine.coalesce_grad_reduction())

    def reduce(self) -> None:
        """Sum over the ranks; `grad` of each part is this rank's, padded with zeros."""
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
            averaged[index] = [flat]                 # ZeRO steps with what is clipped in place

    def whole(self, moment: str) -> dict[nn.Parameter, Tensor]:
        """A moment of every dense parameter, put together from all ranks. Collective."""
        found = {}
        for parameters, part in zip(self.parameters, self.parts):
            mine = self.inner.state[part][moment]
            flat = mine.new_empty(mine.numel() * self.group.size)
            dist.all_gather(list(flat.chunk(self.group.size)), mine, group=self.group.process_group)
            found |= dict(zip(parameters, _views(flat, parameters)))
        return found

    def take(self, whole: dict[str, dict[nn.Parameter, Tensor]]) -> None:
        """Keep this rank's part of moments, and of the parameters as they are in the model now."""
        for parameters, part in zip(self.parameters, self.parts):
            part.data.copy_(self._mine(parameters, part))
            for moment, tensors in whole.items():
                self.inner.state[part][moment].copy_(self._mine([tensors[p] for p in parameters], part))

    @torch.no_grad()
    def _mine(self, tensors: list[Tensor], part: Tensor) -> Tensor:
        flat = part.new_zeros(part.numel() * self.group.size)
        for view, tensor in zip(_views(flat, tensors), tensors):
            view.copy_(tensor)
        return flat[part.numel() * self.group.position:][:part.numel()]

    def _check_layout(self) -> None:
        for parameters, part in zip(self.parameters, self.parts):
            assert torch.equal(self._mine(parameters, part), part), "this DeepSpeed lays ZeRO's parts out in another way"


class ZeroReducer:
    """Takes the place of parallel.data_parallel.GradientReducer."""

    def __init__(self, zero: Zero, experts: GradientReducer) -> None:
        self.zero, self.experts = zero, experts

    def reduce(self) -> None:
        self.experts.reduce()
        self.zero.reduce()


class ZeroOptimizer:
    """ZeRO's AdamW for the dense part and torch's for the experts, as one: what the training step asks of an optimizer.

    `state` holds the moments of experts by parameter; those of the dense part join it while a ZeroState shows them.
    """

    def __init__(self, zero: Zero, experts: torch.optim.AdamW) -> None:
        self.zero, self.experts = zero, experts
        self.state: dict[nn.Parameter, dict[str, Tensor]] = dict(experts.state)
        self.param_groups = [*zero.param_groups, *experts.param_groups]
        self.to_fill: dict[str, dict[nn.Parameter, Tensor]] = {}     # moments that a checkpoint is being read into

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.experts.zero_grad(set_to_none=set_to_none)
        self.zero.accumulate()

    def step(self) -> None:
        self.to_fill = {}
        self.zero.engine.step()
        self.experts.step()


class ZeroState(TrainState):
    """The state of a run whose dense moments lie in parts: shown whole, taken over in parts."""

    optimizer: ZeroOptimizer

    def pieces(self) -> Iterator[Piece]:
        """Collective once a step was taken; before that, when a checkpoint is read into the pieces, it is not."""
        zero, state = self.optimizer.zero, self.optimizer.state
        dense = [parameter for parameters in zero.parameters for parameter in parameters]
        if self.step:
            whole = {moment: zero.whole(moment) for moment in MOMENTS}
        else:
            whole = self.optimizer.to_fill = {moment: {p: torch.zeros_like(p) for p in dense} for moment in MOMENTS}
        state |= {parameter: {moment: whole[moment][parameter] for moment in MOMENTS} for parameter in dense}
        yield from super().pieces()
        for parameter in dense:
            del state[parameter]

    def restore(self, values: dict[str, int]) -> None:
        super().restore(values)
        self.optimizer.zero.take(self.optimizer.to_fill)
        restore_steps(self.optimizer.zero.inner, self.step)
        self.optimizer.to_fill = {}


def _views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The beginning of `flat` as tensors of these shapes, end to end."""
    sizes = [tensor.numel() for tensor in tensors]
    return [view.view(tensor.shape) for view, tensor in zip(flat[:sum(sizes)].split(sizes), tensors)]


def _split(optimizer: torch.optim.AdamW) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    """(the same optimizer with the experts' groups alone, a new one with the others)."""
    assert type(optimizer) is torch.optim.AdamW, type(optimizer)
    groups = optimizer.param_groups
    dense = [group for group in groups if group["name"] != "expert"]
    for parameter in (parameter for group in dense for parameter in group["params"]):
        del optimizer.state[parameter]
    optimizer.param_groups = [group for group in groups if group["name"] == "expert"]
    return optimizer, torch.optim.AdamW([dict(group) for group in dense], fused=True)


def _start_engine(run: Run, optimizer: torch.optim.AdamW) -> Any:
    """A DeepSpeed engine whose module is the dense parameters alone: it is never called forward."""
    os.environ.setdefault("DS_ACCELERATOR", run.mesh.device.type)
    put_ninja_on_path()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": run.config.train.per_forward(run.mesh["batch"].size),
        "gradient_accumulation_steps": 1,            # ours: the engine sees one backward phase a step
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,       # torch's AdamW: the update of engine=torch, nothing to compile
        "zero_optimization": {
            "stage": run.config.engine.zero_stage,
            "overlap_comm": False,
            "compute_grad_norm": False,
            "reduce_bucket_size": BUCKET_BYTES // 4,
        },
        "steps_per_print": None,
    }
    module = nn.ParameterList([parameter for group in optimizer.param_groups for parameter in group["params"]])
    with redirect_stdout(io.StringIO()):             # it prints what it has compiled; a failure to compile is an exception
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def put_ninja_on_path() -> None:
    """Beside the interpreter when the environment is not activated."""
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
