"""Packages of the user whose parts a config may name: routers, forms of experts, losses, planners and others.

A config is data and may come from a stranger, so a `_target_` names classes of moetrain alone. The user's own
command or code widens that by the name of a package:

    moetrain.allow("my_moe")                     in code, before `compose` or `main`
    moetrain train run.packages=[my_moe] ...     on the command line; no yaml file can say it
    MOETRAIN_PACKAGES=my_moe moetrain train ...  in the environment

The names are kept in that environment variable, so the ranks that this process starts allow them too.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from moetrain.errors import ConfigError

VARIABLE = "MOETRAIN_PACKAGES"


def allow(*packages: str) -> None:
    """Allow configs to name classes of these packages, in this process and in the ranks that it starts.

    Nothing is imported. A package that cannot be found is refused when a config is composed (`missing`).
    """
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*allowed(), *packages]))


def missing(packages: Iterable[str]) -> list[ConfigError]:
    """List an error for every package that cannot be found."""
    return [ConfigError(
        242, f"there is no package {package!r}", where=f"run.packages, moetrain.allow or {VARIABLE}",
        why="it is not on the path of this Python, or it is a single file",
        next="pip install -e <its folder>, or PYTHONPATH=<the folder that holds it>")
        for package in packages if folder_of(package) is None]


def allowed() -> tuple[str, ...]:
    """List the allowed packages."""
    return tuple(name for name in os.environ.get(VARIABLE, "").split(",") if name)


def folder_of(package: str) -> Path | None:
    """Find the folder of a top-level package without importing it; None where there is none."""
    if not package.isidentifier():
        return None
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or []) if found else []
    return Path(folders[0]).resolve() if folders else None


def option_folders() -> list[Path]:
    """List the folders `conf` of the allowed packages, whose options stand beside those of moetrain."""
    folders = (folder_of(package) for package in allowed())
    return [folder / "conf" for folder in folders if folder and (folder / "conf").is_dir()]


def roots_to_pass_on() -> list[str]:
    """List the folders that ranks need on their path to import the allowed packages.

    A script finds what lies beside it because Python puts its folder first; ranks run another program.
    """
    roots = (str(folder.parent) for package in allowed() if (folder := folder_of(package)))
    return [root for root in dict.fromkeys(roots) if root == str(Path(sys.path[0] or ".").resolve())]
