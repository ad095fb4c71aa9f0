"""What a run writes beside its checkpoints, on rank 0: metrics.jsonl, eval.jsonl, loads.npz, config.yaml, env.json, wandb.

On resume the step files are cut to the restored step; the tail is kept as *.lost.
"""

import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from moetrain import __version__
from moetrain.comm.mesh import Mesh
from moetrain.config.compose import to_yaml
from moetrain.config.schema import Config
from moetrain.errors import DiskError
from moetrain.moe.bank import is_expert_parameter
from moetrain.plan.memory import CopyMemory, Held, copy_memory
from moetrain.train.checkpoint.writer import on_all
from moetrain.train.evaluate import Evaluation
from moetrain.train.files import JsonlSink, replacing
from moetrain.train.setup import Run
from moetrain.train.sinks import LoadsLog, WandbSink
from moetrain.train.specialisation import mutual_information, write_specialisation
from moetrain.train.step import StepResult


log = logging.getLogger(__name__)


class Recorder:
    """Silent on ranks other than 0. Making one checks on all ranks that the run's directory can be written."""

    def __init__(self, config: Config, directory: Path, mesh: Mesh) -> None:
        self.config, self.directory, self.main = config, directory, mesh.is_main
        _on_all(mesh, directory, lambda: _probe(directory))

    def start(self, run: Run, resumed: Path | None) -> None:
        """Collective: a directory that cannot be written ends all ranks."""
        self.routers = run.state.model.routers
        files = {"config.yaml": to_yaml(self.config), "env.json": json.dumps(environment(run), indent=1)}
        _on_all(run.mesh, self.directory, lambda: [_replace(self.directory / name, text) for name, text in files.items()])
        if not self.main:
            return
        self.metrics = JsonlSink(self.directory / "metrics.jsonl")
        self.evaluations = JsonlSink(self.directory / "eval.jsonl")
        self.loads = LoadsLog(self.directory / "log" / "loads")
        for sink in (self.metrics, self.evaluations, self.loads):
            sink.cut_to(run.state.step if resumed else 0)
        if resumed and not self.metrics.has(run.state.step):
            log.warning("metrics.jsonl lacks step %d, from which the run goes on: somebody has changed it", run.state.step)
        self.wandb = None
        if self.config.log.wandb != "off":
            self.wandb = WandbSink(project=self.config.log.wandb_project, name=self.config.run.name,
                                   dir=self.directory, mode=self.config.log.wandb, config=asdict(self.config))

    def step(self, result: StepResult) -> None:
        if not self.main:
            return
        self.metrics.write(result.metrics)
        if result.counts:
            sources = result.sources and [torch.stack(parts) for parts in zip(*map(self._by_router, result.sources))]
            self.loads.write(int(result.metrics["step"]), list(result.counts.values()), sources)
        if self.wandb:
            self.wandb.write(result.metrics)

    def owes_evaluation(self, step: int) -> bool:
        """Whether eval.jsonl lacks this step: a run that was told to stop saves first."""
        return self.main and not self.evaluations.has(step)

    def evaluation(self, run: Run, found: Evaluation) -> None:
        if not self.main:
            return
        choices = [part.numpy() for part in found.choices_ML.split(list(self.routers.values()), dim=1)]
        record = {"step": run.state.step, "tokens": run.state.tokens, **found.losses}
        if choices and len(run.dataset.domains) > 1:
            record["moe/mutual_information/mean"] = float(np.mean([mutual_information(part) for part in choices]))
            write_specialisation(self.directory / "specialisation.npz", run.state.step, choices, self.routers, run.dataset.domains)
        self.evaluations.write(record)
        if self.wandb:
            self.wandb.write({f"eval/{key}" if "/" in key else key: value for key, value in record.items()})

    def saved(self) -> None:
        """A checkpoint was committed: loads.npz is brought up to date too."""
        if self.main and self.routers:
            self.loads.write_npz(self.directory / "loads.npz", list(self.routers), list(self.routers.values()))

    def close(self) -> None:
        if self.main and self.wandb:
            self.wandb.close()

    def _by_router(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat.cpu().split(list(self.routers.values()))


def _on_all(mesh: Mesh, directory: Path, action: Callable[[], object]) -> None:
    """What rank 0 does in the run's directory; DiskError on all ranks where it cannot. Collective."""
    on_all(mesh, lambda: action() if mesh.is_main else None, lambda why: DiskError(
        3, "the run's directory cannot be written", where=str(directory), why=why,
        next="make it writable, or choose another with run.dir"))


def _replace(path: Path, text: str) -> None:
    """The old content or the new one, whenever the process is killed or the disk is full."""
    with replacing(path) as file:
        file.write(text.encode())


def _probe(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".probe"
    probe.unlink(missing_ok=True)                        # a link goes, what it leads to stays
    with probe.open("xb") as file:
        file.write(b"moetrain")
    probe.unlink()


def environment(run: Run) -> dict[str, object]:
    return {
        "moetrain": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(run.mesh.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "mesh": dict(run.mesh.sizes),
        "data": run.dataset.fingerprint,
    }


def banner_lines(run: Run, resumed: Path | None) -> list[tuple[str, str]]:
    """The start banner, as (label, text) rows."""
    config, sizes = run.config, run.config.model
    ranks, ep = run.mesh["batch"].size, run.mesh["ep"].size
    per_step = config.train.global_batch * config.train.seq_len
    micro_batch = config.train.per_forward(ranks)
    accumulation = config.train.global_batch // (micro_batch * ranks)
    total, active = parameter_counts(run)
    rows = [
        ("", f"moetrain {__version__} | run {run.directory} | " + (f"resumed from step {run.state.step}" if resumed else "new run")),
        ("model", f"{sizes.num_layers} layers  d {sizes.dim}  {sizes.num_experts} experts top-{sizes.top_k}"
                  f" + {sizes.num_shared_experts} shared   total {human(total)}   active {human(active)}"),
        ("parallel", f"{ranks} rank{'s' * (ranks > 1)} = EP {ep} x DP {ranks // ep}   {config.parallel.mode}{sharding(run)}"
                     f" on {run.mesh.device.type}, {config.run.dtype}"),
        ("batch", f"{per_step:,} tokens = {ranks} ranks x {micro_batch} seq x {config.train.seq_len}"
                  f" x accum {accumulation}"),
        ("balance", balance_line(run, accumulation)),
        ("copies", copies_line(run)),
        ("capacity", capacity_line(run)),
        ("data", f"{config.data.kind} {run.dataset.fingerprint[:12]}  {len(run.dataset.domains)} domains"
                 f" ({', '.join(run.dataset.domains[:6])})  vocabulary {run.dataset.vocab_size}"),
        ("memory", {"none": "", "selective": "recomputes norms, activations and orders", "full": "recomputes whole blocks"}
                   [config.train.activation_checkpointing]),
        ("saves", f"every {config.checkpoint.interval} steps and at the end" if config.checkpoint.interval else "at the end"),
    ]
    return [row for row in rows if row[1]]


def sharding(run: Run) -> str:
    """Over how many ranks FSDP cuts parameters up."""
    dense, experts = run.mesh["dense_shard"].size, run.mesh["expert_shard"].size
    return f" (dense over {dense}, experts over {experts})" if dense > 1 else ""


def copies_line(run: Run) -> str:
    """How experts are copied to other ranks, with parallel=fssdp."""
    parallel = run.config.parallel
    if run.state.planning is None:
        return ""
    planner = str(run.config.planner["_target_"]).rpartition(".")[2]
    homes = f"homes looked at every {parallel.rehome_interval} steps" if parallel.rehome_interval else "homes stay"
    loads = f"the mean of {parallel.window} steps" if parallel.forecast == "mean" else "the trend of loads"
    memory = most_memory(run)
    return (f"planned by {planner} from {loads}{', more after the gate' * parallel.calibrate}, up to {parallel.room} a rank"
            f" and layer{', passed on inside nodes' * (parallel.collective == 'two_level')}"
            f"{', gathered again for backward' * parallel.rematerialize}: at most {human(memory.copies)}B of copies and "
            f"{human(memory.sums)}B of their gradients; {homes}"
            f"{f', the hottest {parallel.sliced} of a layer cut up' * bool(parallel.sliced)}")


def most_memory(run: Run) -> CopyMemory:
    """What copies take on this rank when every layer has as many as there is room for."""
    config, ep, model = run.config, run.mesh["ep"], run.state.model
    layers = []
    for moe in (block.moe for block in model.layers if block.moe is not None):
        homes = len(moe.experts.bank.experts)
        room = min(config.parallel.room, moe.router.num_experts - homes) + min(config.parallel.sliced, homes)
        layers.append(Held(homes, room, (ep.size - 1) * min(config.parallel.room, homes)))
    return copy_memory(layers, 3 * config.model.dim * config.model.expert_dim, weight=model.dtype.itemsize,
                       gradient=max(4, model.dtype.itemsize), rematerialize=config.parallel.rematerialize,
                       recompute=config.train.activation_checkpointing != "none")


def capacity_line(run: Run) -> str:
    """What may be dropped; nothing to say when nothing is."""
    policies = {block.moe.capacity.describe() for block in run.state.model.layers if block.moe is not None}
    return "; ".join(sorted(policies - {"dropless"}))


def balance_line(run: Run, accumulation: int) -> str:
    loss = run.objective.losses["balance"]
    if not loss.weight:
        return "no balance loss"
    rule = run.objective.pool
    text = f"{loss.scope} loss, weight {loss.weight:g}" if rule is None else f"{loss.scope}-batch loss, {rule.mode}, weight {loss.weight:g}"
    depends = {"micro": ["ranks", "accumulation"], "node": ["ranks of a machine"]}.get(loss.scope, [])
    if rule is not None and rule.mode != "exact" and accumulation > 1:
        depends = [*depends, "accumulation"]
    if depends:
        text += f"   depends on: {', '.join(depends)}"
    if rule is None or rule.mode != "exact" or accumulation == 1:
        return text
    return text + ("   counts in a pass of its own" if run.config.train.count_pass else
                   f"   keeps the graphs of {accumulation} micro-batches")


def parameter_counts(run: Run) -> tuple[int, int]:
    """(all, used by one token) of the whole model, experts of other ranks included."""
    model, sizes = run.state.model, run.config.model
    experts = sum(model.routers.values())
    is_expert = is_expert_parameter(model)
    dense = sum(parameter.numel() for parameter in model.parameters() if not is_expert(parameter))
    one = 3 * sizes.dim * sizes.expert_dim
    active = sum(block.moe.router.max_slots() for block in model.layers if block.moe is not None)
    return dense + experts * one, dense + active * one


def human(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
