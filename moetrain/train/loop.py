"""The training loop: set up, resume, step, report, evaluate, save.

    train(config) -> join the ranks -> set_up -> resume -> for each step: train_step, log, evaluate, save

One step is train/step.py. The same command resumes a run; the command of a finished run says so and changes nothing.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path

from moetrain import __version__
from moetrain.comm.mesh import Mesh, disconnect
from moetrain.config.compose import from_yaml, resume_conflicts, run_dir
from moetrain.config.schema import Config
from moetrain.errors import ConfigErrors
from moetrain.train.checkpoint.manifest import read_manifest
from moetrain.train.checkpoint.reader import load, newest
from moetrain.train.checkpoint.writer import save
from moetrain.train.console import Console
from moetrain.train.evaluate import evaluate
from moetrain.train.record import Recorder, banner_lines
from moetrain.train.setup import Run, join, set_up
from moetrain.train.step import train_step

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train to run.steps (or run.stop_at), saving on the way and at the end. Collective over the ranks of the run."""
    directory = run_dir(config)
    console = Console(progress=config.log.progress)
    if finished(config, directory):
        console.say(f"run {directory} is finished: {last_step(config)} steps. Nothing was changed.")
        console.say(f"go on: moetrain train … run.steps={2 * config.run.steps}   "
                    f"look: moetrain report {config.run.name}   try: moetrain generate run.name={config.run.name}")
        return
    mesh = join(config)
    try:
        _train(config, directory, mesh, console)
    finally:
        console.close()
    disconnect()


def _train(config: Config, directory: Path, mesh: Mesh, console: Console) -> None:
    recorder = Recorder(config, directory, mesh)             # rank 0 writes; refuses an unwritable directory on all ranks
    run = set_up(config, directory, mesh)
    resumed = resume(run)
    recorder.start(run, resumed)
    console.banner(banner_lines(run, resumed, __version__))
    last = last_step(config)
    console.start(total=config.run.steps, done=run.state.step)
    for step in range(run.state.step + 1, last + 1):
        result = train_step(run, step)
        recorder.step(result)
        console.step(result.metrics, interval=config.log.interval)
        if due(step, config.log.heatmap_every) or (step == last and result.counts):
            console.heatmap(result.counts)
        if step == last or due(step, config.eval.interval):
            measure(run, recorder, console)
        if step == last or due(step, config.checkpoint.interval):
            began = time.perf_counter()
            where = save(run.state, directory, mesh, {"moetrain": __version__, "config": asdict(config)})
            recorder.saved()
            console.event("save", f"step {step} -> {where} ({time.perf_counter() - began:.2f} s)")
    recorder.close()
    console.finish(run.state.step, run.state.tokens, directory)


def measure(run: Run, recorder: Recorder, console: Console) -> None:
    """Evaluate per domain; to eval.jsonl and the screen."""
    results = evaluate(run.state.model, run.dataset, run.mesh, run.config)
    recorder.evaluation({"step": run.state.step, "tokens": run.state.tokens, **results})
    console.evaluation(run.state.step, results)


def last_step(config: Config) -> int:
    return config.run.steps if config.run.stop_at is None else min(config.run.steps, config.run.stop_at)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def finished(config: Config, directory: Path) -> bool:
    """Whether the newest checkpoint is at the last step already; refuses a changed config either way."""
    checkpoint = newest(directory)
    if checkpoint is None:
        return False
    conflicts = resume_conflicts(from_yaml(directory / "config.yaml"), config)
    if conflicts:
        raise ConfigErrors(conflicts)
    return read_manifest(checkpoint).values["step"] >= last_step(config)


def resume(run: Run) -> Path | None:
    """Load the newest checkpoint of the run directory, if there is one."""
    checkpoint = newest(run.directory)
    if checkpoint is not None:
        load(run.state, checkpoint)
    return checkpoint
