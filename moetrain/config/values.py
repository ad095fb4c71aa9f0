"""Values and declared types: keys of the schema, values that fit them, and the conversion to dataclasses.

    int             a whole number; True is not one
    float           any number
    str             text; a number in yaml is text too
    list[x]         every entry fits x
    dict[str, x]    one key with names of the user's, and a value that fits x for each
    x | None        null or x
    Literal         one of the values; yaml's `off` is "off" where that is one of them

Used for the schema (config/schema.py) and for the arguments of parts (config/build.py). config/compose.py
says where values come from; config/tree.py words the errors that a user sees.
"""

import copy
import os
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from moetrain.config.schema import Config


class Key(NamedTuple):
    """One key that a user may set."""

    path: str
    type: Any
    default: Any                 # MISSING where it must be given
    help: str
    is_path: bool = False        # whether its value is a path
    bounds: str = ""             # of a number, as a phrase of config/bounds.py

    def __str__(self) -> str:
        default = "" if self.default is MISSING else f", default {show(self.default)}"
        help = f": {self.help}" if self.help else ""
        return f"{self.path} ({type_name(self.type)}{default}){help}"


class Misfit(ValueError):
    """A value that does not fit its type; `choices` has the allowed values where only the value is wrong."""

    def __init__(self, value: Any, type: Any, choices: tuple = ()) -> None:
        self.choices = choices
        super().__init__(f"{show(value)} is not {type_name(type)}")


def schema_sections() -> dict[str, type]:
    """List the sections with their dataclass, or `dict` where a section holds parts.

    Those are `router`, `expert`, `capacity`, `balance`, `planner` and `loss`.
    """
    hints = get_type_hints(Config)
    kinds = {field.name: hints[field.name] for field in fields(Config)}
    return {name: kind if isinstance(kind, type) and is_dataclass(kind) else dict
            for name, kind in kinds.items()}


def key_name(field: str) -> str:
    """Return the key of a dataclass field: its name, without the underscore that follows a keyword."""
    return field.removesuffix("_")


def as_tree(config: Any) -> dict[str, Any]:
    """Copy a config, or a section of one, to the mappings that yaml and manifests hold."""
    return {key_name(name): as_tree(value) if is_dataclass(value) else copy.deepcopy(value)
            for name, value in vars(config).items()}


def schema_keys() -> dict[str, Key]:
    """List every key of the schema by path, in its order. Arguments of parts are not among them."""
    found = {}
    for section, cls in schema_sections().items():
        if cls is dict:
            continue
        hints = get_type_hints(cls)
        for field in fields(cls):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            path = f"{section}.{key_name(field.name)}"
            found[path] = Key(path, hints[field.name], default, field.metadata.get("help", ""),
                              field.metadata.get("path", False))
    return found


def fit(value: Any, kind: Any) -> Any:
    """Convert a value to `kind` without loss, as an integer to float or a number to text; or raise Misfit."""
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
    """Expand a leading `~` to the home directory, which a shell does not do after a `=`."""
    return os.path.expanduser(path)


def to_config(tree: dict[str, Any]) -> Config:
    """Make the dataclasses of a tree that holds only known keys and fitting values."""
    parts = {}
    for section, cls in schema_sections().items():
        if section in tree:
            names = {key_name(field.name): field.name for field in fields(cls)} if cls is not dict else {}
            parts[section] = tree[section] if cls is dict else cls(
                **{names[key]: value for key, value in tree[section].items()})
    return Config(**parts)


def flatten(config: Config) -> dict[str, Any]:
    """List every leaf of a config by path. A list is a leaf."""
    return dict(leaves(as_tree(config)))


def leaves(tree: Any, prefix: str = "") -> Any:
    """Yield (path, value) of every leaf of nested mappings; an empty mapping is a leaf."""
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def fits_in_list(value: Any, kind: Any) -> bool:
    """Check whether a value that is no list could be the only entry of one of this type."""
    if isinstance(value, (list, dict)) or get_origin(kind) is not list:
        return False
    try:
        fit([value], kind)
    except Misfit:
        return False
    return True


def type_name(kind: Any) -> str:
    """Name a type in a user's words: `int or null`, `list of float`, `off|offline|online`."""
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
    """Write a value as it is typed on the command line."""
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
