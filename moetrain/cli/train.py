"""moetrain train [<run>] [key=value ...]: train a model, or go on with a run of the same name.

An existing run may be named as it is; its own config is then the base, and `moetrain train mine` goes on with
it.

    --cfg job        print the resolved config and stop
    -m, --multirun   one run for each combination of comma-separated values, one after another:
                     moetrain train -m router=topk run.seed=1,2,3

What the words of banner and step lines mean: docs/reference/output.md
"""

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain import streams
from moetrain.config.compose import compose, run_dir, to_yaml
from moetrain.config.recipes import advice
from moetrain.config.schema import Config
from moetrain.config.size_check import refuse_too_large
from moetrain.config.sweep import sweep_jobs
from moetrain.errors import ConfigError
from moetrain.interop.packages import check_installed
from moetrain.launch.foreign_ranks import check_ranks
from moetrain.launch.local import run_command, train_on_ranks
from moetrain.launch.program import Program
from moetrain.launch.rank import is_worker, rank, under_torchrun
from moetrain.launch.status import record_early_exit, record_ending
from moetrain.runs.completion import finished_step, next_commands

log = logging.getLogger(__name__)


def run(argv: list[str], program: Program) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    overrides, show_config, multirun = _flags(argv)
    if multirun:
        return _multirun(overrides, show_config, program)
    config = compose(overrides)
    if show_config:
        print(to_yaml(config), end="")
        return 0
    check_ranks("train", overrides, config)
    step = finished_step(config, run_dir(config))
    if step is not None:
        if rank() == 0:
            print("\n  ".join([f"run {run_dir(config)} is finished: step {step}. Nothing was changed. Next:",
                                 *next_commands(config)]))
        return 0
    check_installed(config)
    streams.outlive()
    if not is_worker():  # ranks check when they know their device (train/setup.py)
        refuse_too_large(config, config.run.nproc, config.run.nproc)
    if not is_worker() or under_torchrun() and rank() == 0:
        if text := advice(config):
            print(text, file=sys.stderr)
    if not is_worker() and config.run.nproc > 1:
        return train_on_ranks(overrides, program)
    with record_ending(run_dir(config)):
        command = shlex.join(["moetrain", "train", *overrides])
        _train(config, program, "the same command goes on" if under_torchrun() else command)
    return 0


def _train(config: Config, program: Program, again: str) -> None:
    from moetrain.train.loop import train

    train(config, convert_model=program.convert_model, language_loss=program.language_loss,
          wrap_engine=_engine(config), again=again,
          on_exit=lambda code, reason: record_early_exit(run_dir(config), code, reason))
    if rank() == 0:
        draw(run_dir(config))


def _engine(config: Config) -> Callable[[Any], Any] | None:
    """The function that hands the run to another engine; None for our own."""
    if config.engine.name != "deepspeed":
        return None
    from moetrain.interop.deepspeed import wrap_engine

    return wrap_engine


def draw(directory: Path) -> None:
    """Draw the pictures of the run. Failing only warns, because the run is complete without them."""
    try:
        from moetrain.report import run

        run.draw(directory)
    except Exception as error:
        log.warning("[warn] the pictures could not be drawn: %s", error)


def _flags(argv: list[str]) -> tuple[list[str], bool, bool]:
    """Split the words into overrides, whether --cfg job is among them, and whether --multirun is."""
    overrides, show_config, multirun = [], False, False
    rest = iter(argv)
    for word in rest:
        if word in ("-m", "--multirun"):
            multirun = True
        elif word in ("-c", "--cfg") or word.startswith("--cfg="):
            what = word.partition("=")[2] or next(rest, "")
            if what not in ("job", "all"):
                raise ConfigError(19, f"--cfg {what}".rstrip(), where="the command line",
                                  why="there is one config to print", next="--cfg job")
            show_config = True
        elif word != "--resolve":  # Hydra's flag; references are always resolved here
            overrides.append(word)
    return overrides, show_config, multirun


def _multirun(overrides: list[str], show_config: bool, program: Program) -> int:
    """Train the runs of a sweep, a process each, one after another, once all of them are checked."""
    named = [job.words for job in sweep_jobs(overrides)]
    codes = []
    for number, job in enumerate(named, 1):
        print(f"[{number}/{len(named)}] moetrain train {shlex.join(job)}", flush=True)
        codes.append(run_command(["train", *job, *(["--cfg", "job"] if show_config else [])], program))
        if codes[-1] == 10 or codes[-1] > 128 or codes[-1] < 0:  # told to stop
            break
    return next((code if code > 0 else 128 - code for code in codes if code), 0)
