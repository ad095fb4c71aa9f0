"""Decide whether a run is already complete.

Imports no torch, so the CLI can answer before any process starts.

The command of a finished run says so and changes nothing. A command that continues a run may change only some
keys of its config (config/compose.py lists them).
"""

import shlex
from pathlib import Path

from moetrain.checkpoint.manifest import checkpoints_of, read_manifest, step_of
from moetrain.checkpoint.records import Manifest
from moetrain.checkpoint.verify import is_sound, problems
from moetrain.config.compose import from_yaml, recorded
from moetrain.config.resumed import resume_conflicts
from moetrain.config.run_names import has_config
from moetrain.config.schema import Config
from moetrain.config.yaml_file import plain
from moetrain.errors import CheckpointError, ConfigErrors
from moetrain.runs.files import JsonlSink


def finished_step(config: Config, directory: Path) -> int | None:
    """Return the step at which a finished run ended; None where work is left.

    Raises ConfigErrors when the command contradicts the run.
    """
    checkpoint = newest_sound_checkpoint(directory)
    if checkpoint is None:  # there is none, or none is sound: resuming reports which
        return None
    conflicts = resume_conflicts(trained_config(directory, checkpoint), config)
    if conflicts:
        raise ConfigErrors(conflicts)
    step = step_of(checkpoint)
    last = last_step(config)
    if step < last or step == last and not JsonlSink(directory / "eval.jsonl").has(step):
        return None
    if config.checkpoint.verify == "full" and next(problems(checkpoint), None) is not None:
        return None  # resuming skips this damaged checkpoint and starts from an older one
    return step


def newest_sound_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint of a run with a valid manifest and files of the right sizes; None without one."""
    return next((path for path in reversed(checkpoints_of(directory)) if is_sound(path)), None)


def trained_config(directory: Path, checkpoint: Path) -> Config:
    """The config that a run was trained with: its config.yaml, or where that is lost the checkpoint's."""
    if has_config(directory):
        return from_yaml(directory / "config.yaml")
    return config_of(read_manifest(checkpoint), checkpoint)


def config_of(manifest: Manifest, checkpoint: Path) -> Config:
    """The config that a checkpoint's manifest records.

    Args:
        manifest: manifest of the checkpoint.
        checkpoint: its directory, for error messages.
    """
    try:
        values = plain(manifest.facts.get("config"))
        why = None if isinstance(values, dict) else "its manifest holds no config"
    except ValueError as error:
        why = f"the config in its manifest cannot be read: {error}"
    if why:
        raise CheckpointError(
            8, "the checkpoint does not say of which run it is", where=str(checkpoint), why=why,
            next="take it out of the folder, or start another run with run.name")
    return recorded(values, checkpoint, manifest.facts.get("moetrain"))


def last_step(config: Config) -> int:
    """The step after which this command stops: run.steps, or run.stop_at where that is smaller."""
    return config.run.steps if config.run.stop_at is None else min(config.run.steps, config.run.stop_at)


def next_commands(config: Config) -> list[str]:
    """Commands to suggest to the user when a run has ended."""
    run = f"run.name={config.run.name}" if config.run.dir is None else f"run.dir={config.run.dir}"
    readable = config.data.kind != "synthetic" and config.data.tokenizer != "none"
    return [shlex.join(["moetrain", verb, run])
            for verb in ("eval", "report", *(["generate"] if readable else []))]
