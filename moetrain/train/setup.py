"""From a config to everything a training step needs, on this rank.

`single` has no process group at all, nor has a run that nobody launched; otherwise the environment (torchrun, launch/local.py)
says who the ranks are.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from moetrain.comm.agreement import all_or_none
from moetrain.comm.device import pick_device, take_device
from moetrain.comm.mesh import Mesh, build_mesh, connect, mesh_sizes
from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.config.size_check import too_full, too_large
from moetrain.data.batches.batch import Dataset
from moetrain.data.loader import Loader
from moetrain.errors import ConfigError
from moetrain.model.build import build_model, compute_dtype
from moetrain.model.flops import peak_flops, training_flops
from moetrain.model.parallelize import Parallel, parallelize
from moetrain.train.count_pool import PreviousStepCounts
from moetrain.train.data_setup import open_on_ranks, prepare_on_main
from moetrain.train.fssdp_setup import build_fssdp
from moetrain.train.loggers.router_dump import RouterDump
from moetrain.train.memory.device_memory import available_memory, free_memory
from moetrain.train.objective import Objective
from moetrain.train.optim.optimizer import allocate_state, build_optimizer
from moetrain.train.state import TrainState
from moetrain.train.stopwatch import Stopwatch


class Graphs(NamedTuple):
    """How exact balance comes by the counts of a step (train/micro_batches.py)."""

    kept: bool                               # of all micro-batches of a step; otherwise a pass that only counts comes first
    graph: int | None = None                 # bytes of one, the most of all ranks, where memory has decided (train/memory/graph_memory.py)
    free: int | None = None                  # bytes, the least of all ranks


@dataclass
class Run:
    """What the loop works on."""

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


def join(config: Config) -> Mesh:
    """This process's place: device, process group (unless `single`), mesh. Collective."""
    device = pick_device(config)
    take_device(device)
    if config.parallel.mode != "single" and "RANK" in os.environ and not dist.is_initialized():
        if config.run.share_gpu:
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")     # read by torch for the peer wire
        connect(device, config.run.timeout_s, over_host=config.run.share_gpu)
    world = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(mesh_sizes(config.parallel.mode, world, config.parallel.ep, config.parallel.shard), device)


def check_alone(config: Config) -> None:
    """ConfigError for one process of a run that wants several, and that nobody has started."""
    if config.run.nproc > 1 and "RANK" not in os.environ and not dist.is_initialized():
        raise ConfigError(125, f"run.nproc={config.run.nproc}, and this process is alone", where="run.nproc",
                          why="train() is one rank and starts no others, and no launcher has set RANK",
                          next="moetrain.launch.train_on_ranks([...]) with the same overrides; or run.nproc=1")


def set_up(config: Config, directory: Path, mesh: Mesh) -> Run:
    """Data, model, optimizer and objective, before any checkpoint is read. Collective: rank 0 prepares the data."""
    all_or_none(mesh["batch"], lambda: refuse_what_cannot_fit(config, mesh))
    dataset = open_on_ranks(config, directory, mesh, prepare_on_main(config, directory, mesh))
    model = build_model(config, dataset.vocab_size, mesh)
    optimizer = build_optimizer(model, config.optim)
    allocate_state(optimizer)
    batch = mesh["batch"]
    loader = Loader(dataset, global_batch=config.train.global_batch, micro_batch=config.train.per_forward(batch.size),
                    rank=batch.position, ranks=batch.size)
    copies, planning = build_fssdp(config, model, optimizer, mesh) if config.parallel.mode == "fssdp" else (None, None)
    losses = {"balance": build(config.balance, "balance"), **{name: build(node, "loss") for name, node in config.loss.items()}}
    objective = Objective(losses, len(model.routers), attached=config.train.aux_loss == "injected")
    prior = None
    if objective.pool is not None and objective.pool.mode == "warm":
        prior = PreviousStepCounts(model.routers, losses["balance"].drift, mesh.device)
    dump = RouterDump(directory, mesh, dataset.domains) if config.log.router_dump else None
    return Run(config, directory, mesh, dataset, loader, TrainState(model, optimizer, planning=planning, prior=prior),
               parallelize(model, mesh, copies), objective, Graphs(kept=not config.train.count_pass), dump,
               peak_rate(config, dataset.vocab_size, mesh))


def refuse_what_cannot_fit(config: Config, mesh: Mesh) -> None:
    """ConfigError for sizes that this rank's memory cannot hold, by formula, or not with what other programs hold of its GPU."""
    available = available_memory(mesh, share_gpu=config.run.share_gpu)
    error = too_large(config, mesh.size, available)
    if error is None and available.gpu:
        error = too_full(config, mesh.size, available.gpu, free_memory(mesh, share_gpu=config.run.share_gpu))
    if error:
        raise error


def peak_rate(config: Config, vocab_size: int, mesh: Mesh) -> float | None:
    """Tokens per second of all ranks if chips did nothing but the products of training, at their peak."""
    peak = None if config.run.share_gpu else peak_flops(mesh.device, compute_dtype(config, mesh.device))
    return peak and peak * mesh.size / training_flops(config.model, vocab_size, config.train.seq_len)
