"""Names of runs on the command line, and where those runs are.

    mine                  an existing run: a name below runs/, or a folder
    run.name=mine         the same as a key
    run.dir=/data/mine    a folder as a key

Every verb takes all three. `train`, `slurm` and `data prepare` can start a run. They take a bare word for a
run only where it exists, so that a word typed by mistake starts none.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from moetrain.config.suggest import nearest
from moetrain.config.values import expanded
from moetrain.errors import ConfigError, ConfigErrors

RUN_KEYS = ("run.name", "run.dir")


def reference(word: str) -> str | None:
    """Return the name or folder of a run that a word of the command line gives; None for other words."""
    key, given, value = word.partition("=")
    if given:
        return value if key in RUN_KEYS else None
    return None if not word or word[0] in "-~+" else word


def bare_run(overrides: Sequence[str], *, known: bool) -> tuple[list[str], str | None]:
    """Split overrides into the bare word that names a run, if any, and the rest.

    `known` says that the word has to name an existing run; other bare words then stay, to be refused as
    overrides.
    """
    runs = [word for word in overrides
            if reference(word) is not None and ("=" in word or not known or is_run(word))]
    bare = [word for word in runs if "=" not in word]
    if not bare:
        return list(overrides), None
    if len(runs) > 1:
        raise ConfigErrors([ConfigError(
            120, f"{len(runs)} runs are named: {', '.join(runs)}", where="the command line",
            why="a word without = names a run, and a command is about one",
            next=f"leave {runs[-1]} out")])
    return [word for word in overrides if word != bare[0]], bare[0]


def is_run(name: str) -> bool:
    """Check whether there is a run of that name, with a config or with checkpoints."""
    return any(has_config(place) or (place / "checkpoints").is_dir() for place in places(name))


def find_run(name: str) -> Path:
    """Find the directory of an existing run by its name or its path."""
    for directory in places(name):
        if has_config(directory):
            return directory
    if is_run(name):
        raise ConfigError(
            65, f"the run {name} has lost its config.yaml", where=name,
            why="it has checkpoints and no config.yaml",
            next="the command that trained it writes it again: moetrain train …")
    known = runs_here()
    near = nearest(name, known) or known[:8]
    raise ConfigError(15, f"there is no run {name}", where=f"{Path('runs') / name}/config.yaml",
                      why=f"the runs here are {', '.join(known[:8])}" if known else "there are no runs here",
                      next=" or ".join(near) if near else "moetrain train experiment=debug starts one")


def runs_here() -> list[str]:
    """List the names of the runs below runs/."""
    return sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))


def has_config(directory: Path) -> bool:
    """Check whether a run's config.yaml exists and is not empty."""
    path = directory / "config.yaml"
    return path.is_file() and path.stat().st_size > 0


def refuse_shared_directories(directories: Sequence[Path]) -> None:
    """Raise ConfigErrors where two runs of a sweep share a directory: the second would resume the first."""
    first: dict[str, int] = {}
    errors = []
    for number, directory in enumerate(directories, 1):
        other = first.setdefault(os.path.realpath(directory), number)
        if other != number:
            errors.append(ConfigError(
                124, f"runs {other} and {number} of the sweep have one directory", where=str(directory),
                why="the second would go on with what the first has trained, or find it finished",
                next="leave run.dir and run.name out, and each run gets a name of its own; name no value "
                     "twice"))
    if errors:
        raise ConfigErrors(errors)


def places(name: str) -> tuple[Path, Path]:
    """List where a run of that name may be, the likelier place first."""
    return Path("runs") / expanded(name), Path(expanded(name))
