"""Plain values against declared types: the keys of the schema, what fits them, and the way into the dataclasses.

    int      a whole number; True is not one        float    any number
    str      text; a number in yaml is text too     list[x]  every entry fits x
    dict[str, x]  names, and a value that fits x for each: one key, whose names are the user's
    x | None null or x                              Literal  one of the values; yaml's `off` is "off" where that is one

Used for the schema (config/schema.py) and for the arguments of parts (config/build.py). Where values come from, and
the errors a user sees, are config/compose.py.
"""

import os
import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from moetrain.config.schema import Config


class Key(NamedTuple):
    """One key a user may set. `default` is MISSING where it must be given.

    is_path: whether its value is a path. bounds: what a number must be, as config/bounds.py reads it.
    """

    path: str
    type: Any
    default: Any
    help: str
    is_path: bool = False
    bounds: str = ""

    def __str__(self) -> str:
        default = "" if self.default is MISSING else f", default {show(self.default)}"
        help = f": {self.help}" if self.help else ""
        return f"{self.path} ({type_name(self.type)}{default}){help}"


class Misfit(ValueError):
    """A value that does not fit; `choices` when it had the right type but is not one of the allowed values."""

    def __init__(self, value: Any, type: Any, choices: tuple = ()) -> None:
        self.choices = choices
        super().__init__(f"{show(value)} is not {type_name(type)}")


def schema_sections() -> dict[str, type]:
    """Name to dataclass, or `dict` for the sections that hold parts (`router`, `capacity`, `balance`, `planner`, `loss`)."""
    hints = get_type_hints(Config)
    return {field.name: hints[field.name] if is_dataclass(hints[field.name]) else dict for field in fields(Config)}


def schema_keys() -> dict[str, Key]:
    """Every key of the schema by path, in the order of the schema. Arguments of parts are not among them."""
    found = {}
    for section, cls in schema_sections().items():
        if cls is dict:
            continue
        hints = get_type_hints(cls)
        for field in fields(cls):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            path = f"{section}.{field.name}"
            found[path] = Key(path, hints[field.name], default, field.metadata.get("help", ""),
                              field.metadata.get("path", False))
    return found


def fit(value: Any, kind: Any) -> Any:
    """The value as `kind`, or Misfit. Only loss-free conversions: whole number to float, a number to text."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_union(value, kind)
    if origin is Literal:
        value = "off" if value is False and "off" in get_args(kind) else value
        if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            raise Misfit(value, kind, choices=get_args(kind) if isinstance(value, str) else ())
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise Misfit(value, kind)
        return [fit(entry, get_args(kind)[0]) for entry in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise Misfit(value, kind)
        return {fit(name, str): fit(entry, get_args(kind)[1]) for name, entry in value.items()}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is str and number:
        return str(value)
    if kind is type(None) and value is None or isinstance(kind, type) and type(value) is kind:
        return value
    raise Misfit(value, kind)


def expanded(path: str) -> str:
    """A path whose leading `~` is the home directory: a shell leaves it alone behind a `=`."""
    return os.path.expanduser(path)


def to_config(tree: dict[str, Any]) -> Config:
    """The dataclasses of a tree that holds known keys and fitting values only."""
    parts = {}
    for section, cls in schema_sections().items():
        if section in tree:
            parts[section] = tree[section] if cls is dict else cls(**tree[section])
    return Config(**parts)


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf of a config by path. A list is a leaf."""
    return dict(leaves(asdict(config)))


def leaves(tree: Any, prefix: str = "") -> Any:
    """(path, value) of every leaf of nested mappings; an empty mapping is a leaf."""
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def type_name(kind: Any) -> str:
    """A type in the user's words: `int or null`, `list of float`, `off|offline|online`."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in get_args(kind))
    if origin is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if origin is list:
        return f"list of {type_name(get_args(kind)[0])}"
    if origin is dict:
        return f"{{name: {type_name(get_args(kind)[1])}, ...}}"
    if kind is type(None):
        return "null"
    return {bool: "true|false", str: "text", Any: "any"}.get(kind, getattr(kind, "__name__", str(kind)))


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(show(entry) for entry in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}: {show(entry)}' for name, entry in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value) or '""'


def _fit_union(value: Any, kind: Any) -> Any:
    choices = ()
    for member in sorted(get_args(kind), key=lambda member: member is not type(value)):
        try:
            return fit(value, member)
        except Misfit as misfit:
            choices = choices or misfit.choices
    raise Misfit(value, kind, choices)
