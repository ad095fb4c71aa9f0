"""Parts chosen by class: what a `_target_` accepts, and the only caller of Hydra's `instantiate`.

    _target_: moetrain.routers.topk.TopKRouter     a class of the family that the section holds
    weights: renorm                                its arguments, except the sizes (SIZES)

A config is data and may come from a stranger, with a run or a checkpoint. So a `_target_` chooses among the
classes of one family, in moetrain or in a package that the user's own command or code allows (packages.py),
and cannot name other code. `arguments` finds the class, its constructor and its BOUNDS in the source, before
torch is imported. `build` makes the same check, imports the module, and checks the imported class as well.
"""

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, NamedTuple, get_args

import moetrain
from moetrain import packages
from moetrain.config.bounds import parse
from moetrain.config.schema import Config
from moetrain.config.values import Key
from moetrain.errors import ConfigError, MoETrainError


class Family(NamedTuple):
    """Interchangeable parts: `base` and the classes that descend from it, in modules of `package`.

    `needs` names what a part has to define because the base does not; nothing where the base is a part
    itself.
    """

    package: str
    base: str
    needs: tuple[str, ...] = ()


# By the section of the config that holds the part. `indexed` is used by data=megatron and named in no yaml.
FAMILIES = {
    "router": Family("moetrain.routers", "moetrain.routers.base.Router", ("scores",)),
    "expert": Family("moetrain.moe", "moetrain.moe.expert_form.ExpertForm", ("rows",)),
    "capacity": Family("moetrain.moe", "moetrain.moe.capacity.CapacityPolicy"),
    "language_loss": Family("moetrain.losses", "moetrain.losses.language.LanguageLoss", ("score",)),
    "balance": Family("moetrain.losses", "moetrain.losses.load_balance.LoadBalanceLoss"),
    "loss": Family("moetrain.losses", "moetrain.losses.base.AuxLoss", ("pool", "value", "slopes")),
    "planner": Family("moetrain.plan.planners", "moetrain.plan.planners.base.Planner", ("plan",)),
    "indexed": Family("moetrain.interop.megatron", "moetrain.interop.megatron.open_indexed"),
}
# Given to the constructors that take them, never written in a part's yaml: the key that sets each of them.
SIZES = {"dim": "model.dim", "num_experts": "model.num_experts", "top_k": "model.top_k",
         "num_layers": "model.num_layers", "total_steps": "run.steps", "layer": None, "name": None,
         "expert_dim": "model.expert_dim", "vocab_size": "model.vocab_size"}

_PACKAGE = Path(moetrain.__file__).parent
_TYPES = {"bool": bool, "float": float, "int": int, "str": str}


class NoSuchPart(ValueError):
    """A `_target_` that names no part of the family."""


class NotAllowed(NoSuchPart):
    """A `_target_` in a package that is there and has not been allowed (packages.py)."""

    def __init__(self, target: str) -> None:
        self.package = target.partition(".")[0]
        super().__init__(f"{target} is code of the package {self.package}, which nobody has allowed")


def build(node: dict[str, Any], family: str, **sizes: Any) -> Any:
    """Build the object that a part's mapping describes.

    Args:
        node: `_target_` and the arguments from the config.
        family: a key of FAMILIES.
        **sizes: values for names of SIZES; the constructor gets those that it takes.

    Raises:
        ConfigError: for a `_target_` outside the family, and for wrong arguments.
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
            reason = "comes from other keys" if name in accepted else "is not an argument of it"
            raise ConfigError(
                50, f"{target} cannot be given {name}", where=f"key {name} beside _target_: {target}",
                why=f"{name} {reason}",
                next=f"remove {name}; it takes {_listed(accepted, sizes)}")
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
    """Raise ConfigError for a config without parts, such as a bare `Config()`."""
    for family in FAMILIES:
        node = getattr(config, family, {"_target_": ""})
        if family != "loss" and "_target_" not in node:
            raise _not_composed(family)


def _not_composed(family: str) -> ConfigError:
    return ConfigError(
        122, f"the config has no {family}", where=f"{family}, which names no _target_",
        why="a Config() made by hand holds no parts: they come with the options of the groups",
        next="from moetrain.config.compose import compose; config = compose(['experiment=debug'])")


def arguments(target: str, family: str) -> dict[str, Key]:
    """Read the arguments of a part from its source, sizes included, without importing it.

    Of a constructor with **kwargs only the named parameters count. Raises NoSuchPart with the reason, and
    ConfigError for a BOUNDS that cannot be read.
    """
    found = _part(target, family)
    definitions = list(found.values())
    if isinstance(definitions[0], ast.FunctionDef):
        return _parameters(definitions[0])
    bounds: dict[str, str] = {}
    for place, (path, cls) in reversed([*enumerate(found.items())]):  # those of the class itself last
        bounds |= _bounds(path, cls, _accepted(definitions[place:]))
    return {name: key._replace(bounds=bounds.get(name, "")) for name, key in _accepted(definitions).items()}


def declared(target: str, family: str, name: str) -> Any:
    """Read the literal that a part's class, or its nearest ancestor, assigns to a name; or None.

    Raises NoSuchPart with the reason, and ConfigError for what is no literal.
    """
    for path, cls in _part(target, family).items():
        found = _assigned(cls.body, name)
        if found is not None:
            try:
                return ast.literal_eval(found)
            except ValueError as error:
                module, _, owner = path.rpartition(".")
                raise ConfigError(
                    216, f"{name} of {owner} cannot be read",
                    where=f"{module.replace('.', '/')}.py, line {found.lineno}",
                    why="it is computed; it is read from source, as a literal",
                    next=f"write {name} out, as classes of moetrain do") from error
    return None


def constant_weights(target: str) -> dict[str, list[Any]] | None:
    """Read with which arguments a token's gate weights sum to a constant (`Router.CONSTANT_WEIGHTS`).

    Args:
        target: dotted name of a router.

    Returns:
        Values by argument; empty for always, None where the class does not say, or says it of arguments that
        it does not take. Such a router is tried out (model/constant_gates.py).
    """
    told, accepted = declared(target, "router", "CONSTANT_WEIGHTS"), arguments(target, "router")
    return told if isinstance(told, dict) and told.keys() <= accepted.keys() else None


def _part(target: str, family: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Find the definition of a part and those of its ancestors, by dotted name.

    Raises NoSuchPart where the target is no part of the family.
    """
    package, base, needs = FAMILIES[family]
    module, _, name = target.rpartition(".")
    dotted = all(part.isidentifier() for part in target.split("."))
    theirs = target.partition(".")[0] in packages.allowed()
    if not dotted or not (theirs or f"{module}.".startswith(f"{package}.")):
        if dotted and packages.folder_of(target.partition(".")[0]) not in (None, _PACKAGE):
            raise NotAllowed(target)
        raise NoSuchPart(f"{target or 'nothing'} is outside {package}, where every {family} is defined")
    definitions = dict(_ancestry(module, name))
    if not definitions:
        raise NoSuchPart(_undefined(module, name))
    if base not in definitions:
        raise NoSuchPart(f"{target} is no {family}: those descend from {base}")
    own = [node for path, cls in definitions.items() if path != base for node in cls.body]
    for need in needs:
        if not any(getattr(node, "name", None) == need for node in own) and _assigned(own, need) is None:
            raise NoSuchPart(f"{target} does not define {need}, as every {family} does")
    return definitions


def _undefined(module: str, name: str) -> str:
    """Say why a module defines no such class: there is no module, or it imports the class from elsewhere."""
    tree = _source(module)
    if tree is None:
        return f"there is no module {module}"
    home = _home(tree, name, module)
    return f"{module} defines no {name}" + (f", it imports {'.'.join(home)}: name that" if home else "")


def _ancestry(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Yield (dotted name, definition) of a definition, then of its bases, nearest first.

    Bases outside of moetrain and the allowed packages are left out.
    """
    tree = _source(module)
    if tree is None:
        return
    for statement in tree.body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and statement.name == name:
            yield f"{module}.{name}", statement
            for base in getattr(statement, "bases", ()):
                home = _home(tree, ast.unparse(base), module)
                yield from _ancestry(*(home or (module, ast.unparse(base))))


def _own(cls: ast.ClassDef | ast.FunctionDef, method: str) -> ast.FunctionDef | None:
    """Find a method that the class itself defines; None where it is inherited or absent."""
    methods = (node for node in cls.body if isinstance(node, ast.FunctionDef))
    return next((node for node in methods if node.name == method), None)


def _accepted(definitions: list[ast.ClassDef | ast.FunctionDef]) -> dict[str, Key]:
    """Read the parameters of the constructor that the first of these classes defines or inherits."""
    return next((_parameters(method) for cls in definitions if (method := _own(cls, "__init__"))), {})


def _bounds(path: str, cls: ast.ClassDef | ast.FunctionDef, accepted: dict[str, Key]) -> dict[str, str]:
    """Read the literal that a class itself assigns to BOUNDS.

    Raises ConfigError unless every entry is a phrase of config/bounds.py for a numeric argument of the
    constructor.
    """
    declared = _assigned(cls.body, "BOUNDS")
    if declared is None:
        return {}
    try:
        bounds = ast.literal_eval(declared)
        for name, text in bounds.items():
            if name not in accepted:
                raise ValueError(f"the constructor has no argument {name!r}")
            if not _is_number(accepted[name].type):
                raise ValueError(f"{name} is not annotated as a number")
            parse(text)
    except (ValueError, TypeError, AttributeError) as error:
        module, _, name = path.rpartition(".")
        said = "it is computed, not a literal" if "malformed node" in str(error) else str(error)
        numbers = [name for name, key in accepted.items() if name not in SIZES and _is_number(key.type)]
        raise ConfigError(
            54, f"BOUNDS of {name} cannot be read",
            where=f"{module.replace('.', '/')}.py, line {declared.lineno}",
            why=f"{said}; it is read from source, as a dict of literals",
            next=f'BOUNDS = {{"{[*numbers, "<argument>"][0]}": "in (0, 1]"}}; moetrain/config/bounds.py '
                 'lists the '
                 f"phrases. Those of a base class are inherited") from error
    return bounds


def _assigned(statements: Iterable[ast.AST], name: str) -> ast.expr | None:
    """Return what statements assign to a name first, with or without an annotation."""
    for node in statements:
        targets = (node.targets if isinstance(node, ast.Assign) else
                   [node.target] if isinstance(node, ast.AnnAssign) else [])
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and any(
                isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    return None


def _is_number(kind: Any) -> bool:
    """Check whether a declared type takes numbers, or lists of numbers."""
    return not {int, float, list[int], list[float]}.isdisjoint({kind, *get_args(kind)})


def part(target: str, family: str) -> Any:
    """Import the class or function that a `_target_` names.

    `build` calls it with arguments of the config; data/loader.py calls it with objects that no config can
    hold. The source is checked before the import, so only modules of the family's package are ever imported.
    Raises ConfigError where the target is no part of the family.
    """
    try:
        _part(target, family)
        made, base = _imported(target), _imported(FAMILIES[family].base)
        descends = base in getattr(made, "__mro__", (made,))
        if not descends or f"{made.__module__}.{made.__qualname__}" != target:
            raise NoSuchPart(f"{target} is no {family} once it is imported")
    except (NoSuchPart, ImportError, AttributeError) as error:
        raise ConfigError(
            52, f"_target_ {target!r} is not a {family}", where=f"_target_: {target}",
            why=str(error),
            next=f"if it is yours: run.packages=[{error.package}]" if isinstance(error, NotAllowed) else
                 "choose an option of the group; moetrain train --help lists them") from error
    return made


def _imported(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _source(module: str) -> ast.Module | None:
    """Parse a module of moetrain or of an allowed package; None where there is none of that name."""
    package, *parts = module.split(".")
    folder = _PACKAGE if package == "moetrain" else None
    if package in packages.allowed():
        folder = packages.folder_of(package)
    if folder is None or not all(part.isidentifier() for part in parts):
        return None
    path = folder.joinpath(*parts)
    file = path.with_suffix(".py") if parts and path.with_suffix(".py").is_file() else path / "__init__.py"
    return _parsed(file) if file.is_file() else None


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _home(tree: ast.Module, name: str, module: str) -> tuple[str, str] | None:
    """Find module and name of what `name`, perhaps dotted, stands for in a module that imports it."""
    head, _, rest = name.partition(".")
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            source = _absolute(statement, module)
            for alias in statement.names:
                if (alias.asname or alias.name) == head:
                    whole = f"{source}.{alias.name}.{rest}" if rest else f"{source}.{alias.name}"
                    return whole.rpartition(".")[::2]
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.asname == head and rest:
                    return f"{alias.name}.{rest}".rpartition(".")[::2]
                if alias.asname is None and name.startswith(f"{alias.name}."):
                    return name.rpartition(".")[::2]
    return None


def _absolute(statement: ast.ImportFrom, module: str) -> str:
    """Name the module that a from-import reads, relative ones too."""
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    folder = _PACKAGE if parts[0] == "moetrain" else packages.folder_of(parts[0])
    is_package = folder is not None and folder.joinpath(*parts[1:], "__init__.py").is_file()
    above = parts[:len(parts) - statement.level + is_package]
    return ".".join(filter(None, [*above, statement.module]))


def _parameters(function: ast.FunctionDef) -> dict[str, Key]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = [*zip(positional, defaults), *zip(spec.kwonlyargs, spec.kw_defaults)]
    return {argument.arg: Key(argument.arg, _type(argument.annotation), _value(default), "")
            for argument, default in pairs if argument.arg != "self"}


def _type(annotation: ast.expr | None) -> Any:
    """Turn an annotation of plain types into the type; Any, which checks nothing, for other annotations."""
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
            return GenericAlias(list, (_type(entry),))
    return Any


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return MISSING
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)


def _listed(accepted: Iterable[str], sizes: dict[str, Any]) -> str:
    return ", ".join(name for name in accepted if name not in sizes) or "no arguments"
