"""Everything a run carries from one step to the next. What is not in `TrainState` is not saved.

Data order, learning rate and initialisation are pure functions of (seed, step), and nothing draws from a
global generator, so this is all there is:

    model.<name>             parameters, float32 or better
    buffer.<name>            persistent buffers: selection biases of routers
    optim.<name>.<moment>    moments of the optimizer, which move with their parameter
    prior.<what>             tokens per expert of the last step, which stand for those to come (balance.mode=warm)
    plan.<table>             tokens per expert of the last steps, from which copies are planned, homes, and which of them are in
                             pieces (parallel=fssdp)
    step, tokens             counters

tests/train/test_state.py walks a run and fails on any tensor, generator or counter that changes from step to
step and is neither here nor in `REBUILT`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config
from moetrain.data.batches.batch import Dataset
from moetrain.data.loader import Loader
from moetrain.model.parallelize import Parallel
from moetrain.model.transformer import Transformer
from moetrain.parallel.fssdp.replanner import Replanner
from moetrain.parallel.state_shards import StateShard, buffers, state_shards
from moetrain.train.count_pool import PreviousStepCounts
from moetrain.train.loggers.router_dump import RouterDump
from moetrain.train.loggers.stopwatch import Stopwatch
from moetrain.train.objective import Objective
from moetrain.train.optim.optimizer import moments, restore_steps

# What changes from step to step and is not saved, because it follows from what is: a pattern of its path in
# the run, and why.
REBUILT = {
    r"optimizer.*\.step$": "every parameter is stepped at every step, so its counter equals `step`",
    r"optimizer.*\.lr$": "the learning rate is a function of `step`, set before each update",
    r"optimizer.*\.gradient_norm$": "the norm of the step's gradients, set before each update",
    r"watch\.": "times of this attempt: they are reported, and nothing follows from them",
    r"planning\.(placement|_check)|dispatcher\.|bank\.((experts|sliced)\.|copies\.(?!_))":
        "where experts are follows from the homes, the loads and the planner",
    r"\.grad(\.|$)": "gradients are cleared at the start of every step",
}
# What only some meshes have: neither missed in a checkpoint nor in the way.
OPTIONAL = ("plan.", "prior.")


@dataclass
class TrainState:
    """step: optimizer steps taken; tokens: valid tokens trained on."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    planning: Replanner | None = None
    prior: PreviousStepCounts | None = None

    def state_shards(self) -> Iterator[StateShard]:
        """All tensor state this rank holds, by global name; writing into a shard's rows restores it."""
        yield from self.weights()
        for moment in moments(self.optimizer):
            of = lambda parameter: self.optimizer.state[parameter].get(moment)  # noqa: E731, B023 (used at once)
            yield from (p._replace(name=f"optim.{p.name}.{moment}") for p in state_shards(self.model, of))
        for part in (self.planning, self.prior):
            if part is not None:
                yield from part.state_shards()

    def weights(self) -> Iterator[StateShard]:
        """What evaluation and sampling need of it."""
        return weights(self.model)

    def values(self) -> dict[str, int]:
        """The state that is not tensors."""
        return {"step": self.step, "tokens": self.tokens}

    def restore(self, values: dict[str, int]) -> None:
        """Take over the counters of a checkpoint."""
        self.step, self.tokens = values["step"], values["tokens"]
        restore_steps(self.optimizer, self.step)
        if self.planning is not None:
            self.planning.restored()


def weights(model: Transformer) -> Iterator[StateShard]:
    """Parameters and persistent buffers of a model, by the names they are saved under."""
    yield from (shard._replace(name=f"model.{shard.name}") for shard in state_shards(model))
    yield from (shard._replace(name=f"buffer.{shard.name}") for shard in buffers(model))


class Graphs(NamedTuple):
    """How exact balance gets the counts of a step (train/micro_batches.py)."""

    kept: bool                               # of all micro-batches of a step; otherwise a pass that only counts comes first
    graph: int | None = None                 # bytes of one, the most of all ranks, where memory has decided (train/memory/graph_memory.py)
    free: int | None = None                  # bytes, the least of all ranks


@dataclass
class Run:
    """Everything that training works on, on this rank."""

    config: Config
    directory: Path
    mesh: Mesh
    dataset: Dataset
    loader: Loader
    state: TrainState
    parallel: Parallel
    objective: Objective
    graphs: Graphs
    dump: RouterDump | None = None
    peak_tokens_per_s: float | None = None   # of all ranks, at the peak of their chips; None where that is not known
    watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.mesh.device)
