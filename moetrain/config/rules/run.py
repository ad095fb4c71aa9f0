"""Rules about the run: its name and where it stops."""

import os
from collections.abc import Iterator

from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.files import shown

MOST_BYTES = 200         # of 255 that a file system allows: a sweep adds to the name


def run_name(config: Config, ranks: int) -> Iterator[ConfigError]:
    name = config.run.name
    long = len(os.fsencode(name)) > MOST_BYTES
    if not name.strip() or "/" in name or "\\" in name or name.startswith(".") or not name.isprintable() or long:
        yield ConfigError(21, f"run.name={shown(name, 80)} cannot name a directory", where="run.name",
                          why=f"the run's directory is runs/<name>, so a name has no slash, no leading dot, no control character and "
                              f"at most {MOST_BYTES} bytes",
                          next="run.name=demo, or run.dir=<path> for another place")


def stop(config: Config, ranks: int) -> Iterator[ConfigError]:
    run = config.run
    if run.stop_at is not None and run.stop_at > run.steps:
        yield ConfigError(22, f"run.stop_at={run.stop_at} is behind run.steps={run.steps}",
                          where="run.stop_at, run.steps", why="a run ends after run.steps",
                          next=f"run.stop_at={run.steps} or run.steps={run.stop_at}")
