"""Parts chosen by class: what a `_target_` accepts, and the only caller of Hydra's `instantiate`.

    _target_: moetrain.routers.topk.TopKRouter     the class, defined in moetrain
    weights: renorm                                its arguments, but for the sizes (dim, num_experts, top_k)

`arguments` reads a constructor from its source, so that a wrong argument is found before torch is imported. `build`
imports. Both refuse a class that is only reachable through moetrain and defined elsewhere: Hydra would call anything.
"""

import ast
import importlib
import inspect
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

import moetrain
from moetrain.config.values import Key
from moetrain.errors import ConfigError, MoETrainError

# Handed over at build time from model.*, never written in a part's yaml.
SIZES = ("dim", "num_experts", "top_k")

_PACKAGE = Path(moetrain.__file__).parent
_TYPES = {"bool": bool, "float": float, "int": int, "str": str}


class NoSuchPart(ValueError):
    """The `_target_` names no class or function that moetrain defines."""


def build(node: dict[str, Any], **sizes: Any) -> Any:
    """The object that a part's mapping describes; of `sizes` it gets those that its constructor takes."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    target = str(node.get("_target_", ""))
    made = _resolve(target)
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


def arguments(target: str) -> dict[str, Key]:
    """The arguments a part may be given in yaml, sizes included, read from source without importing it.

    Raises NoSuchPart with the reason. A constructor with **kwargs accepts only what it names.
    """
    module, _, name = target.rpartition(".")
    definition = _definition(module, name)
    if isinstance(definition, ast.ClassDef):
        definition = _constructor(module, definition)
    return _parameters(definition) if definition else {}


def _resolve(target: str) -> Any:
    module, _, name = target.rpartition(".")
    problem = None if target.startswith("moetrain.") else "is outside moetrain"
    try:
        made = None if problem else getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        problem = f"cannot be found ({error})"
    if not problem and (not callable(made) or not str(getattr(made, "__module__", "")).startswith("moetrain.")):
        problem = "is not defined in moetrain"
    if problem:
        raise ConfigError(52, f"_target_ {target!r} {problem}", where=f"_target_: {target}",
                          why="a part is a class or function that moetrain defines",
                          next="choose an option of the group; moetrain train --help lists them")
    return made


def _definition(module: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    if not module.startswith("moetrain."):
        raise NoSuchPart(f"{module or name} is outside moetrain")
    tree = _source(module)
    if tree is None:
        raise NoSuchPart(f"there is no module {module}")
    for statement in tree.body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and statement.name == name:
            return statement
    raise NoSuchPart(f"{module} defines no {name}")


def _source(module: str) -> ast.Module | None:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def _constructor(module: str, cls: ast.ClassDef) -> ast.FunctionDef | None:
    """`__init__` of the class or of the first base that moetrain defines and that has one."""
    for statement in cls.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return statement
    tree = _source(module)
    for base in cls.bases:
        home = _home(tree, base.id) if isinstance(base, ast.Name) else None
        try:
            definition = _definition(home or module, base.id) if isinstance(base, ast.Name) else None
        except NoSuchPart:
            continue
        if isinstance(definition, ast.ClassDef) and (found := _constructor(home or module, definition)):
            return found
    return None


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
