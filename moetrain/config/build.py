"""Parts chosen by class: what a `_target_` accepts, and the only caller of Hydra's `instantiate`.

    _target_: moetrain.routers.topk.TopKRouter     a class of the family that the section holds
    weights: renorm                                its arguments, but for the sizes (dim, num_experts, top_k)

A config is data that may come from somebody else, with a run or a checkpoint. So a `_target_` chooses among the classes of
one family and names no code. `arguments` finds class and constructor in the source, before torch is imported; `build`
asks it again, imports, and compares the class itself.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import moetrain
from moetrain.config.bounds import parse
from moetrain.config.schema import Config
from moetrain.config.values import Key
from moetrain.errors import ConfigError, MoETrainError


class Family(NamedTuple):
    """Parts that may stand in for each other: `base`, and what descends from it, in a module of `package`.

    method: what a part has to define because the base does not. None: the base is a part itself.
    """

    package: str
    base: str
    method: str | None = None


# By the section of the config that holds the part.
FAMILIES = {
    "router": Family("moetrain.routers", "moetrain.routers.base.Router", "route"),
    "capacity": Family("moetrain.moe", "moetrain.moe.capacity.CapacityPolicy"),
    "balance": Family("moetrain.losses", "moetrain.losses.load_balance.LoadBalanceLoss"),
    "loss": Family("moetrain.losses", "moetrain.losses.base.AuxLoss", "value"),
    "planner": Family("moetrain.plan.planners", "moetrain.plan.planners.base.Planner", "plan"),
    "indexed": Family("moetrain.interop.megatron", "moetrain.interop.megatron.open_indexed"),    # by data=megatron, in no yaml
}
# Handed over at build time from model.*, never written in a part's yaml.
SIZES = ("dim", "num_experts", "top_k")

_PACKAGE = Path(moetrain.__file__).parent
_TYPES = {"bool": bool, "float": float, "int": int, "str": str}


class NoSuchPart(ValueError):
    """The `_target_` names no part of the family."""


def build(node: dict[str, Any], family: str, **sizes: Any) -> Any:
    """The object that a part's mapping describes; of `sizes` it gets those that its constructor takes.

    family: a name of FAMILIES. Raises ConfigError for anything else than a part of it, and for wrong arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    target = str(node.get("_target_", ""))
    if not target:
        raise _not_composed(family)
    made = part(target, family)
    accepted = inspect.signature(made).parameters
    for name in node:
        if name != "_target_" and (name not in accepted or name in sizes):
            reason = "comes from model.*" if name in accepted else "is not an argument of it"
            raise ConfigError(50, f"{target} cannot be given {name}", where=f"key {name} beside _target_: {target}",
                              why=f"{name} {reason}", next=f"remove {name}; it takes {_listed(accepted, sizes)}")
    given = {name: size for name, size in sizes.items() if name in accepted}
    try:
        return instantiate({**node, **given}, _convert_="all", _recursive_=False)
    except InstantiationException as error:
        if isinstance(error.__cause__, MoETrainError):
            raise error.__cause__
        arguments = ", ".join(f"{name}={value}" for name, value in node.items() if name != "_target_")
        raise ConfigError(51, f"{target} cannot be built", where=f"its arguments: {arguments or 'none'}",
                          why=f"{type(error.__cause__).__name__}: {error.__cause__}",
                          next="correct the argument; moetrain train --help lists them") from error


def check_composed(config: Config) -> None:
    """ConfigError for a config without parts, as `Config()` is."""
    for family in FAMILIES:
        node = getattr(config, family, {"_target_": ""})
        if family != "loss" and "_target_" not in node:
            raise _not_composed(family)


def _not_composed(family: str) -> ConfigError:
    return ConfigError(122, f"the config has no {family}", where=f"{family}, which names no _target_",
                       why="a Config() made by hand holds no parts: they come with the options of the groups",
                       next="from moetrain.config.compose import compose; config = compose(['experiment=debug'])")


def arguments(target: str, family: str) -> dict[str, Key]:
    """The arguments a part may be given in yaml, sizes included, read from source without importing it.

    Raises NoSuchPart with the reason, and ConfigError for a BOUNDS that cannot be read. A constructor with **kwargs
    accepts only what it names.
    """
    found = _part(target, family)
    definitions = list(found.values())
    if isinstance(definitions[0], ast.FunctionDef):
        return _parameters(definitions[0])
    bounds: dict[str, str] = {}
    for place, (path, cls) in reversed([*enumerate(found.items())]):               # the class's own come last
        bounds |= _bounds(path, cls, _accepted(definitions[place:]))
    return {name: key._replace(bounds=bounds.get(name, "")) for name, key in _accepted(definitions).items()}


def _part(target: str, family: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Definition of a part of the family, then those of its ancestors in moetrain, by dotted name; NoSuchPart if it is none."""
    package, base, method = FAMILIES[family]
    module, _, name = target.rpartition(".")
    if not all(part.isidentifier() for part in target.split(".")) or not f"{module}.".startswith(f"{package}."):
        raise NoSuchPart(f"{target or 'nothing'} is outside {package}, where every {family} is defined")
    definitions = dict(_ancestry(module, name))
    if not definitions:
        raise NoSuchPart(f"{module} defines no {name}" if _source(module) else f"there is no module {module}")
    if base not in definitions or name.startswith("_"):
        raise NoSuchPart(f"{target} is no {family}: those descend from {base}")
    if method and not any(_own(definitions[path], method) for path in definitions if path != base):
        raise NoSuchPart(f"{target} does not define {method}, as every {family} does")
    return definitions


def _ancestry(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """(dotted name, definition) of what moetrain defines by that name, and of its bases, nearest first."""
    tree = _source(module)
    for statement in tree.body if tree else ():
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and statement.name == name:
            yield f"{module}.{name}", statement
            for base in getattr(statement, "bases", ()):
                if isinstance(base, ast.Name):
                    yield from _ancestry(_home(tree, base.id) or module, base.id)


def _own(cls: ast.ClassDef | ast.FunctionDef, method: str) -> ast.FunctionDef | None:
    """The method as the class itself defines it."""
    return next((node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == method), None)


def _accepted(definitions: list[ast.ClassDef | ast.FunctionDef]) -> dict[str, Key]:
    """The parameters of the constructor that the first of these classes has or inherits."""
    return next((_parameters(method) for cls in definitions if (method := _own(cls, "__init__"))), {})


def _bounds(path: str, cls: ast.ClassDef | ast.FunctionDef, accepted: dict[str, Key]) -> dict[str, str]:
    """The literal that a class itself assigns to BOUNDS; ConfigError unless each entry bounds a number that it takes."""
    declared = next((node for node in cls.body if _assigns(node, "BOUNDS")), None)
    if declared is None:
        return {}
    try:
        bounds = ast.literal_eval(declared.value)
        for name, text in bounds.items():
            if name not in accepted:
                raise ValueError(f"the constructor has no argument {name!r}")
            if not _is_number(accepted[name].type):
                raise ValueError(f"{name} is not annotated as a number")
            parse(text)
    except (ValueError, TypeError, AttributeError) as error:
        module, _, name = path.rpartition(".")
        said = "it is computed, not a literal" if "malformed node" in str(error) else str(error)
        example = next((name for name, key in accepted.items() if name not in SIZES and _is_number(key.type)), "<argument>")
        raise ConfigError(
            54, f"BOUNDS of {name} cannot be read", where=f"{module.replace('.', '/')}.py, line {declared.lineno}",
            why=f"{said}; it is read from source, as a dict of literals",
            next=f'BOUNDS = {{"{example}": "in (0, 1]"}}; moetrain/config/bounds.py lists the phrases. Those of a base class are '
                 f"inherited") from error
    return bounds


def _assigns(node: ast.stmt, name: str) -> bool:
    """Whether a statement assigns to a name, with or without an annotation."""
    annotated = isinstance(node, ast.AnnAssign) and node.value is not None
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if annotated else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _is_number(kind: Any) -> bool:
    """Whether a declared type takes numbers, or lists of them."""
    return not {int, float, list[int], list[float]}.isdisjoint({kind, *get_args(kind)})


def part(target: str, family: str) -> Any:
    """The class or function that a `_target_` names, to be called with what cannot stand in a config.

    The source is asked first, so nothing is imported but a module of the family's package. ConfigError where it names no part of it.
    """
    try:
        _part(target, family)
        made, base = _imported(target), _imported(FAMILIES[family].base)
        if base not in getattr(made, "__mro__", (made,)) or f"{made.__module__}.{made.__qualname__}" != target:
            raise NoSuchPart(f"{target} is no {family} once it is imported")
    except (NoSuchPart, ImportError, AttributeError) as error:
        raise ConfigError(52, f"_target_ {target!r} is not a {family}", where=f"_target_: {target}", why=str(error),
                          next="choose an option of the group; moetrain train --help lists them") from error
    return made


def _imported(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _source(module: str) -> ast.Module | None:
    """None where moetrain has no such module."""
    package, *parts = module.split(".")
    path = _PACKAGE.joinpath(*parts)
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return _parsed(file) if package == "moetrain" and file.is_file() else None


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _home(tree: ast.Module, name: str) -> str | None:
    """The module that `name` is imported from."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and any((a.asname or a.name) == name for a in statement.names):
            return statement.module
    return None


def _parameters(function: ast.FunctionDef) -> dict[str, Key]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = [*zip(positional, defaults), *zip(spec.kwonlyargs, spec.kw_defaults)]
    return {argument.arg: Key(argument.arg, _type(argument.annotation), _value(default), "")
            for argument, default in pairs if argument.arg != "self"}


def _type(annotation: ast.expr | None) -> Any:
    """The annotation when it is made of plain types; Any otherwise, which checks nothing."""
    match annotation:
        case ast.Name(id=name):
            return _TYPES.get(name, Any)
        case ast.Constant(value=None):
            return type(None)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Any if Any in (_type(left), _type(right)) else _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
        case ast.Subscript(value=ast.Name(id="list"), slice=entry):
            return list[_type(entry)]
    return Any


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return MISSING
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)


def _listed(accepted: Any, sizes: dict[str, Any]) -> str:
    return ", ".join(name for name in accepted if name not in sizes) or "no arguments"
