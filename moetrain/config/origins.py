"""Origin of a value, for the `where` of an error: the override or the yaml file that set it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.config.groups import config_dir, group_of
from moetrain.config.overrides import Command, typed
from moetrain.config.values import show
from moetrain.config.yaml_file import load


class Origins(NamedTuple):
    """The places that set the values of one tree."""

    command: Command
    files: Sequence[tuple[str, Path]]   # (section, file), "" for a file of whole runs; the strongest first
    recorded: Path | None               # the record that the whole tree comes from, if any

    def of(self, path: str) -> str:
        """Name the override that sets a key, else the file."""
        return self.override(path) or self._file(path)

    def of_rule(self, paths: Sequence[str]) -> str:
        """Name all overrides that take part; without any, the file that sets the first key."""
        choices, values = self.command
        texts = [given.text for path in paths for key, given in values.items() if covers(key, path)]
        for path in paths:
            group = group_of(path.partition(".")[0])
            if group in choices and not self.override(path):
                texts.append(f"{group}={show(choices[group])}")
        return typed(*dict.fromkeys(texts)) if texts else self._file(paths[0])

    def override(self, path: str) -> str | None:
        """Name the override that sets a key or a mapping that holds it; None without one."""
        values = self.command.values
        return next((typed(given.text) for key, given in values.items() if covers(key, path)), None)

    def _file(self, path: str) -> str:
        if self.recorded:
            return f"{path} in {self.recorded}"
        for section, file in self.files:
            inside = path.removeprefix(f"{section}.") if section else path
            tree = load(file)
            # The config.yaml of a run that a section was taken over from has its other sections, too.
            if (not section or inside != path) and (
                    _holds(tree, inside.split(".")) or _holds(tree, path.split("."))):
                shown = file.relative_to(config_dir().parent) if file.is_relative_to(config_dir()) else file
                return f"{path} in {shown}"
        return f"{path}, at its default"


def covers(key: str, path: str) -> bool:
    """Check whether a path is a key or lies below it."""
    return path == key or path.startswith(f"{key}.")


def _holds(tree: Any, path: list[str]) -> bool:
    """Check whether nested mappings have a path."""
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True
