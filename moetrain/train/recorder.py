"""Records of a run beside its checkpoints, written by rank 0.

    metrics.jsonl, eval.jsonl     a record for each step, and for each evaluation
    log/saves.jsonl, log/loads    a record for each checkpoint; expert loads of each step
    loads.npz                     all expert loads, built at the end
    specialisation.npz            choices of experts by domain, of the last evaluation
    log/routing                   what experts are chosen for, of each evaluation (log.routing)
    config.yaml, env.json         of the newest attempt
    wandb                         if it is configured

On resume the files with a record for each step are cut to the restored step; the tail is kept as *.lost.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from moetrain import __version__
from moetrain.comm.agreement import all_or_none, on_all
from moetrain.comm.mesh import Mesh
from moetrain.config.compose import to_yaml
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config
from moetrain.config.values import as_tree
from moetrain.errors import CheckpointError, DiskError
from moetrain.files import create, reason
from moetrain.ops import extension
from moetrain.runs.expert_loads import LoadsLog
from moetrain.runs.files import JsonlSink, replace_atomically
from moetrain.runs.routing_record import RoutingLog, collapsed_routers, summary
from moetrain.runs.specialization import mutual_information, write_specialization
from moetrain.train.checkpoint.save import Saved
from moetrain.train.evaluation.evaluate import Evaluation
from moetrain.train.loggers.wandb_settings import wandb_settings
from moetrain.train.loggers.wandb_sink import WandbSink
from moetrain.train.state import Run
from moetrain.train.step import StepResult

log = logging.getLogger(__name__)

PAUSES = ("save", "eval")


class Recorder:
    """Writer of a run's records on rank 0; on other ranks its methods write nothing.

    Its construction is collective: if rank 0 cannot write to the directory, all ranks end with a DiskError.

    Args:
        config: the config of the run.
        directory: directory of the run.
        mesh: all ranks.
    """

    def __init__(self, config: Config, directory: Path, mesh: Mesh) -> None:
        self.config, self.directory, self.main = config, directory, mesh.is_main
        self.metrics = JsonlSink(directory / "metrics.jsonl")
        self.evaluations = JsonlSink(directory / "eval.jsonl")
        self.saves = JsonlSink(directory / "log" / "saves.jsonl")
        self.loads = LoadsLog(directory / "log" / "loads")
        self.routing = RoutingLog(directory / "log" / "routing")
        self.pauses = dict.fromkeys(PAUSES, 0.0)
        _on_all(mesh, directory, lambda: _probe(directory))

    def start(self, run: Run, resumed: Path | None) -> None:
        """Open the records of an attempt, and write config.yaml and env.json. Collective.

        A failure of rank 0 ends all ranks.

        Args:
            run: the run, at the step from which it continues.
            resumed: the checkpoint that was loaded; None for a run that begins.

        Raises:
            CheckpointError: the run has saved checkpoints, and none is there.
            DiskError: the directory cannot be written.
        """
        self.routers, self.experts = run.state.model.num_choices, run.state.model.num_experts
        all_or_none(run.mesh["batch"],
                    lambda: self._look_for_lost(run.state.step if resumed else 0) if self.main else None)
        files = {"config.yaml": to_yaml(with_absolute_paths(self.config)),
                 "env.json": json.dumps(environment(run), indent=1)}
        _on_all(run.mesh, self.directory, lambda: _replace_all(self.directory, files))
        all_or_none(run.mesh["batch"], lambda: self._open(run, resumed) if self.main else None)

    def _look_for_lost(self, step: int) -> None:
        """Compare the step of the loaded checkpoint (0 if none) with the saves on record.

        Raises CheckpointError if saves are on record and no checkpoint is there. Warns if the newest one is
        gone.
        """
        newest = max(self.saves.steps(), default=0)
        if newest and not step:
            raise CheckpointError(
                20, "the run has saved, and none of its checkpoints is there",
                where=str(self.directory / "checkpoints"),
                why=f"{self.saves.path} says that step {newest} was saved",
                next=f"restore the folders, or start another run with run.name; without {self.saves.path} "
                     "the same command begins anew")
        if newest > step and not (self.directory / "checkpoints" / f"step-{newest:08d}.damaged").exists():
            log.warning("step %d was saved and its checkpoint is gone: the run goes on from step %d",
                        newest, step)
        if not step and (seen := max(self.metrics.steps(), default=0)):
            log.warning("the run has taken %d steps and has no checkpoint: it begins anew; "
                        "its records are kept as *.lost", seen)

    def _open(self, run: Run, resumed: Path | None) -> None:
        """Cut the files to the step of the run, and connect to wandb."""
        for sink in (self.metrics, self.evaluations, self.saves, self.loads, self.routing):
            sink.cut_to(run.state.step if resumed else 0)
        if self.routers:
            self.loads.name_routers(self.experts, self.routers)
        if resumed and not self.metrics.has(run.state.step):
            log.warning("metrics.jsonl lacks step %d, from which the run goes on: somebody has changed it",
                        run.state.step)
        settings = wandb_settings(self.config, os.environ)
        self.wandb = settings and WandbSink(settings, dir=self.directory, config=as_tree(self.config))

    def step(self, result: StepResult) -> None:
        """Record a step: metrics, and the loads of experts."""
        if not self.main:
            return
        metrics = {**result.metrics, **self._take_pauses(), "timestamp": time.time()}
        self.metrics.write(metrics)
        if result.counts:
            sources = result.sources and [
                torch.stack(parts) for parts in zip(*map(self._by_router, result.sources))]
            self.loads.write(int(result.metrics["step"]), list(result.counts.values()), sources)
        if self.wandb:
            self.wandb.write(metrics)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Measure a pause of training; the record of the next step has its seconds as `time/<kind>`.

        Args:
            kind: `save` or `eval`.
        """
        began = time.perf_counter()
        yield
        self.pauses[kind] += time.perf_counter() - began

    def _take_pauses(self) -> dict[str, float]:
        taken, self.pauses = self.pauses, dict.fromkeys(PAUSES, 0.0)
        return {f"time/{kind}": seconds for kind, seconds in taken.items()}

    def owes_evaluation(self, step: int) -> bool:
        """Whether eval.jsonl has no record of this step. False on ranks other than 0."""
        return self.main and not self.evaluations.has(step)

    def evaluation(self, run: Run, found: Evaluation, seconds: float) -> None:
        """Record an evaluation, and each router's choices by domain.

        Args:
            run: the run, at the step that was evaluated.
            found: the result.
            seconds: duration of the evaluation.
        """
        if not self.main:
            return
        routers = run.state.model.main_routers
        choices = [part[:, :router.num_experts].numpy() for part, router in zip(found.choices_ML.split(
            [router.num_choices for router in routers.values()], dim=1), routers.values())]
        experts = {name: router.num_experts for name, router in routers.items()}
        record = {"step": run.state.step, "tokens": run.state.tokens, **found.losses, "time/eval": seconds,
                  "timestamp": time.time()}
        if choices and len(run.dataset.measured) > 1:
            record["moe/mutual_information/mean"] = float(
                np.mean([mutual_information(part) for part in choices]))
            write_specialization(self.directory / "specialisation.npz", run.state.step, choices, experts,
                                 run.dataset.measured)
        if found.routing is not None:
            record |= summary(found.routing)
            self.routing.write(found.routing)
            for router, share in collapsed_routers(found.routing).items():
                log.warning("%s has collapsed: %.0f%% of the tokens take one expert", router, 100 * share)
        self.evaluations.write(record)
        if self.wandb:
            self.wandb.write({f"eval/{key}" if "/" in key else key: value for key, value in record.items()})

    def saved(self, save: Saved) -> None:
        """Record a committed checkpoint."""
        if self.main:
            self.saves.write({"step": save.step, "time/save": save.seconds, "time/save_waited": save.held_s})

    def finish(self) -> None:
        """Build loads.npz from the recorded loads, at the last step of the run.

        A failure is only a warning: `moetrain report` can build the file later.
        """
        if self.main and self.routers:
            try:
                self.loads.write_npz(self.directory / "loads.npz")
            except OSError as error:
                log.warning("loads.npz could not be built (%s); `moetrain report` builds it from log/loads",
                            reason(error))

    def close(self) -> None:
        """Close the connection to wandb, after `start`."""
        if self.main and self.wandb:
            self.wandb.close()

    def _by_router(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat.cpu().split(list(self.routers.values()))


def _on_all(mesh: Mesh, directory: Path, action: Callable[[], None]) -> None:
    """Run `action` on rank 0; an OSError ends all ranks with a DiskError. Collective."""
    on_all(mesh, action if mesh.is_main else lambda: None, lambda why: DiskError(
        3, "the run's directory cannot be written", where=str(directory), why=why,
        next="make it writable, or choose another with run.dir"))


def _replace_all(directory: Path, files: dict[str, str]) -> None:
    """Replace the texts of files atomically, one by one: a kill or a full disk leaves the old content."""
    for name, text in files.items():
        with replace_atomically(directory / name) as file:
            file.write(text.encode())


def _probe(directory: Path) -> None:
    """Make the directory if needed, and raise OSError if a file in it cannot be written."""
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".probe"
    with create(probe) as file:
        file.write(b"moetrain")
    probe.unlink()


def environment(run: Run) -> dict[str, object]:
    """Versions, device, kernels, threads, mesh and data of an attempt, for env.json."""
    return {
        "moetrain": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(run.mesh.device),
        "kernels": extension.absent() or "in use",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "mesh": dict(run.mesh.sizes),
        "data": run.dataset.fingerprint,
    }
