"""Runs of a sweep: one for each combination of the listed values, each in a directory of its own."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from moetrain.config import renamed
from moetrain.config.compose import compose, idle_overrides
from moetrain.config.overrides import sweep
from moetrain.config.run_names import refuse_shared_directories
from moetrain.config.schema import Config
from moetrain.errors import ConfigError, ConfigErrors


class SweptRun(NamedTuple):
    """One run of a sweep."""

    words: list[str]             # its overrides, its own name among them
    config: Config               # what they compose to without that name


def sweep_jobs(overrides: Sequence[str],
               composed: Callable[[Sequence[str]], Config] = compose) -> list[SweptRun]:
    """Compose all runs of a sweep, before any starts. Raises ConfigErrors with each mistake once."""
    overrides, old = renamed.take_out(overrides)
    found: list[SweptRun] = []
    errors: dict[str, ConfigError] = {str(error): error for error in old}
    for words in _without_idle(sweep(overrides)):
        try:
            config = composed(words)
        except ConfigErrors as caught:
            errors |= {str(error): error for error in caught.errors}
            continue
        swept = [word for word in words if word not in overrides]
        found.append(SweptRun([*words, *_own_directory(config, swept), *_tracker_group(config)], config))
    if errors:
        raise ConfigErrors(list(errors.values()))
    refuse_shared_directories([_directory(run) for run in found])
    return found


def _without_idle(jobs: list[list[str]]) -> list[list[str]]:
    """Remove from each job the overrides that it would not read.

    One is optim.muon_lr in `-m optim=adamw,muon optim.muon_lr=0.02`. Overrides that no job reads stay and
    are an error.
    """
    idle = [idle_overrides(job) for job in jobs]
    everywhere = set.intersection(*idle)
    return [[word for word in job if word in everywhere or word not in unread]
            for job, unread in zip(jobs, idle)]


def _tracker_group(config: Config) -> list[str]:
    """Give the override that groups the jobs of a sweep in a tracker, unless a group is chosen already."""
    if config.log.wandb == "off" or config.log.wandb_group or os.environ.get("WANDB_RUN_GROUP"):
        return []
    return [f"log.wandb_group={config.run.name}"]


def _directory(run: SweptRun) -> Path:
    """Return the directory of a run, whose config does not have the run's own name yet."""
    typed = {key: value for key, _, value in (word.partition("=") for word in run.words)}
    folder = typed.get("run.dir") or run.config.run.dir
    return Path(folder or Path("runs") / typed.get("run.name", run.config.run.name))


def _own_directory(config: Config, swept: list[str]) -> list[str]:
    """Give the overrides that name a run after the values that are its own, as default-lr-0.001-seed-1."""
    if any(word.startswith(("run.name=", "run.dir=")) for word in swept) or not swept:
        return []
    parts = [re.sub(r"[^\w.+-]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")
             for key, _, value in (word.partition("=") for word in swept)]
    suffix = "-".join(parts)
    named = [f"run.name={config.run.name}-{suffix}"]
    return [*named, f"run.dir={config.run.dir}-{suffix}"] if config.run.dir else named
