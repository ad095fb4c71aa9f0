"""Keys that have had another name: read as the new one in a record, answered with it on a command line.

    parallel.room          parallel.max_copies
    parallel.fallback      parallel.max_forecast_error       thousandths -> a fraction
    parallel.sliced        parallel.max_sliced_experts
    train.loss_carrier     train.aux_loss                    returned, attached -> added, injected
    router.centre          router.center
    balance.normalisation  balance.normalization             and of every loss

    model.qk_norm          false, true -> none, head         the values alone

The config.yaml of a run and the manifests of its checkpoints keep the names of the release that wrote them.
`translate` reads those, so that old runs resume, evaluate and generate. A user who types an old name, or
keeps it in a yaml file of conf/, gets an error with what to type now.
"""

from collections.abc import Callable, Sequence
from dataclasses import MISSING
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from moetrain.config.build import SIZES, NoSuchPart, arguments
from moetrain.config.groups import default_options, option_file
from moetrain.config.overrides import DELETE, typed
from moetrain.config.values import schema_keys, show
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError


class Renaming(NamedTuple):
    """The new name of a key, and how its values are written now."""

    new: str
    convert: Callable[[Any], Any]
    why: str


def _same(value: Any) -> Any:
    return value


def _fraction(thousandths: Any) -> Any:
    """Convert thousandths to a fraction. Only integers were thousandths; anything else is left as it is."""
    return thousandths / 1000 if type(thousandths) is int else thousandths


def _aux_loss(value: Any) -> Any:
    words = {"returned": "added", "attached": "injected"}
    return words.get(value, value) if isinstance(value, str) else value


_RENAMED_ONLY = "the key was renamed; its values mean what they meant"
# Old key -> last part of the new one; a star stands for the name of a loss.
_RENAMED: dict[str, Renaming] = {
    "parallel.room": Renaming("max_copies", _same, _RENAMED_ONLY),
    "parallel.fallback": Renaming("max_forecast_error", _fraction,
                                  "the key was renamed, and is a fraction instead of thousandths"),
    "parallel.sliced": Renaming("max_sliced_experts", _same, _RENAMED_ONLY),
    "train.loss_carrier": Renaming("aux_loss", _aux_loss,
                                   "the key was renamed, and returned is added, attached is injected"),
    "router.centre": Renaming("center", _same, _RENAMED_ONLY),
    "balance.normalisation": Renaming("normalization", _same, _RENAMED_ONLY),
    "loss.*.normalisation": Renaming("normalization", _same, _RENAMED_ONLY),
}


def renaming(path: str) -> Renaming | None:
    """Look up an old key; None for any other."""
    return next((found for pattern, found in _RENAMED.items() if fnmatchcase(path, pattern)), None)


def new_path(path: str) -> str:
    """Return the path of the key that took the place of an old one."""
    found = renaming(path)
    return f"{path.rpartition('.')[0]}.{found.new}" if found else path


def error(path: str, value: Any, where: str, options: Sequence[str] = ()) -> ConfigError:
    """Word the error of an old key.

    Args:
        path: the old key.
        value: its value, for which that of the new key is advised; text may list several for a sweep.
        where: the override or the file that sets it.
        options: options of a group that have the key, where the chosen one has not.
    """
    found = renaming(path)
    assert found is not None, path
    new = new_path(path)
    entries = value.split(",") if isinstance(value, str) else [value]
    values = ",".join(show(found.convert(_plain(entry))) for entry in entries)
    said = f"~{new}" if value is DELETE else f"{new}={values}"
    return ConfigError(55, f"{path} is called {new} now", where=where, why=found.why,
                       next=" or ".join(f"{option} {said}" for option in options) or said)


def take_out(overrides: Sequence[str]) -> tuple[list[str], list[ConfigError]]:
    """Split the overrides of a sweep into those with keys of today, and the errors of the others.

    An old key with several values is one mistake here, not one for each job.
    """
    kept, errors = [], []
    for text in overrides:
        key, given, value = text.partition("=")
        if given and renaming(key.lstrip("+")):
            errors.append(error(key.lstrip("+"), value, typed(text)))
        else:
            kept.append(text)
    return kept, errors


# Values that records of older releases write otherwise, by key.
_REVALUED: dict[str, dict[Any, Any]] = {"model.qk_norm": {False: "none", True: "head"}}
# Sections that records of older releases do not have: what could not be chosen is the default now.
LATER_PARTS = ("expert", "language_loss")


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """Copy a recorded tree with old names of keys replaced; one with both names keeps both, to be refused.

    Parts that could not be chosen when it was written are added, and arguments of parts that there were not.
    """
    later = {section: load(option_file(section, default_options()[section]))
             for section in LATER_PARTS if section not in values}
    read = {section: _translated(section, node) for section, node in values.items()}
    return {**{section: _completed(section, node) for section, node in read.items()}, **later}


def _completed(path: str, node: Any) -> Any:
    """Add the arguments of a part that its record lacks, with their defaults: what it did without them."""
    if not isinstance(node, dict):
        return node
    if path == "loss":
        return {name: _completed(f"loss.{name}", part) for name, part in node.items()}
    try:
        accepted = arguments(str(node.get("_target_")), path.partition(".")[0])
    except (NoSuchPart, KeyError):
        return node
    return node | {name: key.default for name, key in accepted.items()
                   if name not in node and name not in SIZES and key.default is not MISSING}


def _translated(path: str, node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if path == "loss":
        return {name: _translated(f"loss.{name}", part) for name, part in node.items()}
    read = {}
    for name, value in node.items():
        found = renaming(f"{path}.{name}")
        if found and found.new not in node and _is_taken(path, found.new, node):
            read[found.new] = found.convert(value)
        else:
            values = _REVALUED.get(f"{path}.{name}", {})
            read[name] = values[value] if isinstance(value, bool) and value in values else value
    return read


def _is_taken(path: str, name: str, node: dict[str, Any]) -> bool:
    """Check that the schema, or the part that is chosen, has a key of the new name."""
    if f"{path}.{name}" in schema_keys():
        return True
    try:
        return name in arguments(str(node.get("_target_")), path.partition(".")[0])
    except NoSuchPart:
        return False


def _plain(value: Any) -> Any:
    """Return the integer that a text of digits stands for, else the value."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value
