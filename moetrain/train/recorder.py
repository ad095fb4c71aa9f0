"""What a run writes beside its checkpoints, on rank 0: metrics.jsonl, eval.jsonl, loads.npz, config.yaml,
env.json, wandb.

On resume the step files are cut to the restored step; the tail is kept as *.lost.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from moetrain import __version__
from moetrain.comm.agreement import all_or_none, on_all
from moetrain.comm.mesh import Mesh
from moetrain.config.compose import to_yaml
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config
from moetrain.errors import CheckpointError, DiskError
from moetrain.files import create, reason
from moetrain.ops import extension
from moetrain.runs.expert_loads import LoadsLog
from moetrain.runs.files import JsonlSink, replace_atomically
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
    """Silent on ranks other than 0.

    Making one checks on all ranks that the run's directory can be written.
    """

    def __init__(self, config: Config, directory: Path, mesh: Mesh) -> None:
        self.config, self.directory, self.main = config, directory, mesh.is_main
        self.metrics = JsonlSink(directory / "metrics.jsonl")
        self.evaluations = JsonlSink(directory / "eval.jsonl")
        self.saves = JsonlSink(directory / "log" / "saves.jsonl")
        self.loads = LoadsLog(directory / "log" / "loads")
        self.pauses = dict.fromkeys(PAUSES, 0.0)
        _on_all(mesh, directory, lambda: _probe(directory))

    def start(self, run: Run, resumed: Path | None) -> None:
        """Collective: a directory that cannot be written ends all ranks."""
        self.routers = run.state.model.routers
        all_or_none(run.mesh["batch"], lambda: self._look_for_lost(run.state.step if resumed else 0) if self.main else None)
        files = {"config.yaml": to_yaml(with_absolute_paths(self.config)), "env.json": json.dumps(environment(run), indent=1)}
        _on_all(run.mesh, self.directory, lambda: [_replace(self.directory / name, text) for name, text in files.items()])
        all_or_none(run.mesh["batch"], lambda: self._open(run, resumed) if self.main else None)

    def _look_for_lost(self, step: int) -> None:
        """Compare the checkpoint that the run goes on from with the saves on record; step 0:

        none was found.
        """
        newest = max(self.saves.steps(), default=0)
        if newest and not step:
            raise CheckpointError(
                20, "the run has saved, and none of its checkpoints is there", where=str(self.directory / "checkpoints"),
                why=f"{self.saves.path} says that step {newest} was saved",
                next=f"restore the folders, or start another run with run.name; without {self.saves.path} the same command begins anew")
        if newest > step and not (self.directory / "checkpoints" / f"step-{newest:08d}.damaged").exists():
            log.warning("step %d was saved and its checkpoint is gone: the run goes on from step %d", newest, step)
        if not step and (seen := max(self.metrics.steps(), default=0)):
            log.warning("the run has taken %d steps and has no checkpoint: it begins anew; its records are kept as *.lost", seen)

    def _open(self, run: Run, resumed: Path | None) -> None:
        for sink in (self.metrics, self.evaluations, self.saves, self.loads):
            sink.cut_to(run.state.step if resumed else 0)
        if self.routers:
            self.loads.name_routers(self.routers)
        if resumed and not self.metrics.has(run.state.step):
            log.warning("metrics.jsonl lacks step %d, from which the run goes on: somebody has changed it", run.state.step)
        settings = wandb_settings(self.config, os.environ)
        self.wandb = settings and WandbSink(settings, dir=self.directory, config=asdict(self.config))

    def step(self, result: StepResult) -> None:
        if not self.main:
            return
        metrics = {**result.metrics, **self._take_pauses(), "timestamp": time.time()}
        self.metrics.write(metrics)
        if result.counts:
            sources = result.sources and [torch.stack(parts) for parts in zip(*map(self._by_router, result.sources))]
            self.loads.write(int(result.metrics["step"]), list(result.counts.values()), sources)
        if self.wandb:
            self.wandb.write(metrics)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Around a save or an evaluation, while no step runs: the next record says how long they took."""
        began = time.perf_counter()
        yield
        self.pauses[kind] += time.perf_counter() - began

    def _take_pauses(self) -> dict[str, float]:
        taken, self.pauses = self.pauses, dict.fromkeys(PAUSES, 0.0)
        return {f"time/{kind}": seconds for kind, seconds in taken.items()}

    def owes_evaluation(self, step: int) -> bool:
        """Whether eval.jsonl lacks this step: a run that was told to stop saves first."""
        return self.main and not self.evaluations.has(step)

    def evaluation(self, run: Run, found: Evaluation, seconds: float) -> None:
        if not self.main:
            return
        choices = [part.numpy() for part in found.choices_ML.split(list(self.routers.values()), dim=1)]
        record = {"step": run.state.step, "tokens": run.state.tokens, **found.losses, "time/eval": seconds, "timestamp": time.time()}
        if choices and len(run.dataset.measured) > 1:
            record["moe/mutual_information/mean"] = float(np.mean([mutual_information(part) for part in choices]))
            write_specialization(self.directory / "specialisation.npz", run.state.step, choices, self.routers, run.dataset.measured)
        self.evaluations.write(record)
        if self.wandb:
            self.wandb.write({f"eval/{key}" if "/" in key else key: value for key, value in record.items()})

    def saved(self, save: Saved) -> None:
        """A checkpoint was committed."""
        if self.main:
            self.saves.write({"step": save.step, "time/save": save.seconds, "time/save_waited": save.held_s})

    def finish(self) -> None:
        """The run has reached its last step:

        loads.npz is built from the records. It can be built later as well.
        """
        if self.main and self.routers:
            try:
                self.loads.write_npz(self.directory / "loads.npz")
            except OSError as error:
                log.warning("loads.npz could not be built (%s); `moetrain report` builds it from log/loads", reason(error))

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
    with replace_atomically(path) as file:
        file.write(text.encode())


def _probe(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".probe"
    with create(probe) as file:
        file.write(b"moetrain")
    probe.unlink()


def environment(run: Run) -> dict[str, object]:
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
