"""The folder conf/: where it lies, and the groups and options that it offers.

Folders `conf` of the user's own packages (packages.py) add options to its groups.
"""

from functools import cache
from pathlib import Path
from typing import Any

import moetrain
from moetrain.config.build import NoSuchPart, arguments
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.packages import option_folders

# Sections of the config whose group has a different name.
_GROUP_OF = {"log": "logging"}


def config_dir() -> Path:
    """Find conf/: inside the package in a wheel, beside it in a checkout."""
    package = Path(moetrain.__file__).resolve().parent
    return package / "conf" if (package / "conf" / "config.yaml").is_file() else package.parent / "conf"


def group_options() -> dict[str, list[str]]:
    """List every group with its options, those of allowed packages included."""
    groups = {folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
              for folder in sorted(config_dir().iterdir()) if any(folder.glob("*.yaml"))}
    for folder in option_folders():
        for group, options in groups.items():
            groups[group] = sorted({*options, *(file.stem for file in folder.glob(f"{group}/*.yaml"))})
    return groups


def option_file(group: str, option: str) -> Path:
    """Find the file of an option: that of moetrain, else that of an allowed package."""
    files = [folder / group / f"{option}.yaml" for folder in (config_dir(), *option_folders())]
    return next((file for file in files if file.is_file()), files[0])


def default_options() -> dict[str, Any]:
    """List the default option of each group; None or an empty list for groups that may be empty."""
    return dict(_default_options(config_dir()))


@cache
def _default_options(folder: Path) -> dict[str, Any]:
    return {group: option for entry in load(folder / "config.yaml")["defaults"] if isinstance(entry, dict)
            for group, option in entry.items()}


def broken_files(*folders: Path) -> list[ConfigError]:
    """List the errors of all yaml files below folders."""
    return [error for folder in folders for file in sorted(folder.rglob("*.yaml"))
            for error in wrong_in(file)]


def wrong_in(file: Path) -> list[ConfigError]:
    """List the errors of one yaml file: unreadable, or a loss under another name than the file's."""
    try:
        tree = load(file)
    except ConfigErrors as found:
        return [ConfigError(107, f"{file.name} cannot be read", where=str(file), why=error.why,
                            next="correct the line that is named") for error in found.errors]
    if file.parent.name != "loss" or set(tree) == {file.stem}:
        return []
    return [ConfigError(
        105, f"{file.name} describes {', '.join(tree) or 'nothing'}", where=f"{file}, line {_line_of(file)}",
        why="a loss is chosen by the name of its file and described below the same name",
        next=f"{file.stem}: in that line, or rename the file to {next(iter(tree), file.stem)}.yaml")]


def _line_of(file: Path) -> int:
    """Find the first line that is neither empty nor a comment."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return next((number for number, line in enumerate(lines, 1) if line and not line.startswith("#")), 1)


def group_of(section: str) -> str:
    """Return the group whose options fill a section."""
    return _GROUP_OF.get(section, section)


def section_of(group: str) -> str:
    """Return the section that the options of a group fill."""
    return next((section for section, name in _GROUP_OF.items() if name == group), group)


def written_by(group: str, option: str) -> dict[str, dict[str, Any]]:
    """Read the values that the file of an option sets, by section.

    The file of a public model (`@package _global_`) also sets keys of its router and its experts; those
    sections are in the result, if only by the options that it chooses for them.
    """
    file = option_file(group, option)
    values = load(file)
    chosen = [name.removeprefix("override /") for entry in values.pop("defaults", [])
              for name in (entry if isinstance(entry, dict) else ())]
    if not is_global(file):
        return {section_of(group): values}
    return {**{section_of(name): {} for name in chosen}, **values}


def is_global(file: Path) -> bool:
    """Whether the file of an option names the sections whose keys it sets."""
    with file.open(encoding="utf-8") as lines:
        return next(lines, "").strip() == "# @package _global_"


def advice(group: str) -> str:
    """Say what to type to choose an option."""
    options = group_options().get(group, [])
    return f"{group}={options[0]}" if len(options) == 1 else f"choose {group} from {', '.join(options)}"


def options_with(section: str, argument: str) -> list[str]:
    """List the options of a group whose part takes an argument; none of `loss`, whose options add up."""
    found = []
    for option in group_options().get(section, []) if section != "loss" else []:
        target = str(load(option_file(section, option)).get("_target_"))
        try:
            found += [f"{section}={option}"] if argument in arguments(target, section) else []
        except NoSuchPart:
            continue
    return found
