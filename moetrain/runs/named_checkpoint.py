"""Checkpoints that a word names: those of a run, by its name or directory, or one by its own directory."""

from pathlib import Path

from moetrain.checkpoint.manifest import NAME, checkpoints_of, is_step
from moetrain.config.run_names import find_run, places
from moetrain.errors import CheckpointError


def named_checkpoints(word: str) -> list[Path]:
    """List the checkpoints that a word names, oldest first: all of a run, or one by its directory.

    Raises ConfigError where no run is named so, CheckpointError where the run has no checkpoint.
    """
    if (Path(word) / NAME).exists() or is_step(Path(word).name) and Path(word).exists():
        return [Path(word)]
    saved = (folder for folder in places(word) if (folder / "checkpoints").is_dir())
    run_dir = next(saved, None) or find_run(word)
    found = checkpoints_of(run_dir)
    if not found:
        raise CheckpointError(
            2, "the run has no checkpoint yet", where=str(run_dir / "checkpoints"),
            why="a run saves at its end and every checkpoint.interval steps",
            next="the command that trains the run; it saves at run.stop_at, too")
    return found
