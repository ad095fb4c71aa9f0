"""Is there anything left to do? Asked before torch is imported and before a process or a file exists.

The command of a finished run says so and changes nothing; a command that goes on with a run may not change what the run
is about (config/compose.py lists what may change).
"""

import shlex
from pathlib import Path

from moetrain.checkpoint.manifest import checkpoints_of, read_manifest, step_of
from moetrain.checkpoint.records import Manifest
from moetrain.checkpoint.verify import is_sound, problems
from moetrain.config.compose import from_yaml, recorded, resume_conflicts
from moetrain.config.run_names import has_config
from moetrain.config.schema import Config
from moetrain.config.yaml_file import plain
from moetrain.errors import CheckpointError, ConfigErrors
from moetrain.runs.files import JsonlSink


def finished(config: Config, directory: Path) -> int | None:
    """The step at which the run ended, if nothing is left to do; ConfigErrors when the command contradicts the run."""
    checkpoint = newest_sound(directory)
    if checkpoint is None:                               # none, or none to be trusted: resuming says which
        return None
    conflicts = resume_conflicts(trained_config(directory, checkpoint), config)
    if conflicts:
        raise ConfigErrors(conflicts)
    step = step_of(checkpoint)
    last = last_step(config)
    if step < last or step == last and not JsonlSink(directory / "eval.jsonl").has(step):
        return None
    if config.checkpoint.verify == "full" and next(problems(checkpoint), None) is not None:
        return None                                      # resuming passes over it and goes on from an older one
    return step


def newest_sound(directory: Path) -> Path | None:
    """The newest checkpoint of a run whose files have their sizes; None without one."""
    return next((path for path in reversed(checkpoints_of(directory)) if is_sound(path)), None)


def trained_config(directory: Path, checkpoint: Path) -> Config:
    """What a run was trained with: its config.yaml, or where that is lost what its checkpoint says."""
    if has_config(directory):
        return from_yaml(directory / "config.yaml")
    return trained_with(read_manifest(checkpoint), checkpoint)


def trained_with(manifest: Manifest, checkpoint: Path) -> Config:
    """The config of the run that wrote a checkpoint."""
    try:
        values = plain(manifest.facts.get("config"))
        why = None if isinstance(values, dict) else "its manifest holds no config"
    except ValueError as error:
        why = f"the config in its manifest cannot be read: {error}"
    if why:
        raise CheckpointError(8, "the checkpoint does not say of which run it is", where=str(checkpoint), why=why,
                              next="take it out of the folder, or start another run with run.name")
    return recorded(values, checkpoint, manifest.facts.get("moetrain"))


def last_step(config: Config) -> int:
    """Where this command stops."""
    return config.run.steps if config.run.stop_at is None else min(config.run.steps, config.run.stop_at)


def next_commands(config: Config) -> list[str]:
    """What a user may type when a run has ended."""
    run = f"run.name={config.run.name}" if config.run.dir is None else f"run.dir={config.run.dir}"
    readable = config.data.kind != "synthetic" and config.data.tokenizer != "none"
    return [shlex.join(["moetrain", verb, run]) for verb in ("eval", "report", *(["generate"] if readable else []))]
