"""State of a training run: what is carried from one step to the next. Only `TrainState` is saved.

Data order, learning rate and initialization are pure functions of (seed, step), and nothing draws from a
global generator, so the state is complete with:

    model.<name>             parameters, float32 or better
    buffer.<name>            persistent buffers: selection biases of routers
    optim.<name>.<moment>    moments of the optimizer, which move with their parameter
    prior.<table>            counts of the last step, which stand for micro-batches to come
                             (balance.mode=warm)
    plan.<table>             loads of the last steps, from which copies are planned; homes of experts, and
                             which experts are sliced (parallel=fssdp)
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
from moetrain.parallel.state_shards import StateShard, state_shards, weights
from moetrain.train.count_pool import PreviousStepCounts
from moetrain.train.loggers.router_dump import RouterDump
from moetrain.train.loggers.stopwatch import Stopwatch
from moetrain.train.objective import Objective
from moetrain.train.optim.optimizer import moments, restore_steps

# State that changes from step to step and is not saved, because it follows from what is saved: a pattern of
# its path in the run, and the reason.
REBUILT = {
    r"optimizer.*\.step$": "every trainable parameter is stepped at every step, so its counter equals `step`",
    r"optimizer.*\.lr$": "the learning rate is a function of `step`, set before each update",
    r"optimizer.*\.gradient_norm$": "the norm of the step's gradients, set before each update",
    r"watch\.": "times of this attempt: they are reported, and nothing follows from them",
    r"planning\.(placement|_check)|dispatcher\.|bank\.((experts|sliced)\.|copies\.(?!_))":
        "where experts are follows from the homes, the loads and the planner",
    r"\.grad(\.|$)": "gradients are cleared at the start of every step",
}
# Prefixes of state that only some meshes have. A checkpoint need not have it, and a run need not load it.
OPTIONAL = ("plan.", "prior.")


@dataclass
class TrainState:
    """The state that a checkpoint holds, on this rank.

    Args:
        model: this rank's part of the model.
        optimizer: holds the moments of the model's parameters.
        step: optimizer steps taken.
        tokens: valid tokens trained on, over all ranks.
        planning: loads and homes of experts, with `parallel=fssdp`.
        prior: counts of the previous step, with `balance.mode=warm`.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    planning: Replanner | None = None
    prior: PreviousStepCounts | None = None

    def state_shards(self) -> Iterator[StateShard]:
        """Iterate over all tensor state of this rank, by global name.

        The rows of a shard are views, so writing into them restores the state.
        """
        yield from self.weights()
        for moment in moments(self.optimizer):
            of = lambda parameter: self.optimizer.state.get(parameter, {}).get(moment)  # noqa: E731, B023 (used at once)
            yield from (p._replace(name=f"optim.{p.name}.{moment}") for p in state_shards(self.model, of))
        for part in (self.planning, self.prior):
            if part is not None:
                yield from part.state_shards()

    def weights(self) -> Iterator[StateShard]:
        """Iterate over the part of the state that evaluation and generation need."""
        return weights(self.model)

    def values(self) -> dict[str, int]:
        """Return the state that is not tensors: the counters."""
        return {"step": self.step, "tokens": self.tokens}

    def restore(self, values: dict[str, int]) -> None:
        """Set the counters to a checkpoint's, after its tensors have been loaded. Collective with copies."""
        self.step, self.tokens = values["step"], values["tokens"]
        restore_steps(self.optimizer, self.step)
        if self.planning is not None:
            self.planning.restored()


class Graphs(NamedTuple):
    """How an exact balance loss obtains the counts of a whole step (train/micro_batches.py).

    `graph` and `free` are known only if the choice was made by memory (train/memory/graph_memory.py).
    """

    kept: bool                 # the graphs of all micro-batches are kept; otherwise a count pass comes first
    graph: int | None = None   # bytes of the graph of one micro-batch, the largest over ranks
    free: int | None = None    # bytes that are free, the smallest over ranks


@dataclass
class Run:
    """A training run on this rank: its state, and everything that a step needs.

    Args:
        config: the config of the run, with a concrete dtype.
        directory: directory of the run.
        mesh: all ranks.
        dataset: training and held-out sequences.
        loader: reads the micro-batches of this rank.
        state: what changes from step to step and is saved.
        parallel: parameters, reducer of their gradients, and copies of experts.
        objective: the loss.
        graphs: how an exact balance loss obtains its counts.
        dump: writes routing decisions, with `log.router_dump`.
        peak_tokens_per_s: throughput of all ranks at the peak of their chips; None where no peak is known.
    """

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
    peak_tokens_per_s: float | None = None
    watch: Stopwatch = field(init=False)     # phases of the step

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.mesh.device)
