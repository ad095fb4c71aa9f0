"""Rules about the run: its name and where it stops."""

import os
from collections.abc import Iterator

from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.files import shown

# A file system allows 255; a sweep adds to the name.
MOST_BYTES = 200


def run_name(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that run.name can name a directory."""
    name = config.run.name
    plain = name.strip() and name.isprintable() and not name.startswith(".")
    if not plain or "/" in name or "\\" in name or len(os.fsencode(name)) > MOST_BYTES:
        yield ConfigError(
            21, f"run.name={shown(name, 80)} cannot name a directory", where="run.name",
            why="the run's directory is runs/<name>, so a name has no slash, no leading dot, no control "
                "character and "
                f"at most {MOST_BYTES} bytes",
            next="run.name=demo, or run.dir=<path> for another place")


def stop(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse to stop after the last step."""
    run = config.run
    if run.stop_at is not None and run.stop_at > run.steps:
        yield ConfigError(22, f"run.stop_at={run.stop_at} is behind run.steps={run.steps}",
                          where="run.stop_at, run.steps", why="a run ends after run.steps",
                          next=f"run.stop_at={run.steps} or run.steps={run.stop_at}")
