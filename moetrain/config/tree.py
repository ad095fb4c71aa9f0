"""Check a tree of values against the schema, with the command line applied and references resolved.

`finish` returns a Config or raises ConfigErrors with everything that was found, the command line's mistakes
included.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from moetrain.config import checks, readers, renamed
from moetrain.config.build import SIZES, NoSuchPart, NotAllowed, arguments
from moetrain.config.field_names import keys_meant, values_meant
from moetrain.config.groups import advice, group_of, group_options, options_with
from moetrain.config.origins import Origins, covers
from moetrain.config.overrides import DELETE, Command, Problems, Value, typed
from moetrain.config.schema import Config
from moetrain.config.suggest import nearest, nearest_keys
from moetrain.config.values import (
    Key,
    Misfit,
    expanded,
    fit,
    fits_in_list,
    flatten,
    leaves,
    schema_keys,
    schema_sections,
    show,
    to_config,
    type_name,
)
from moetrain.errors import ConfigError, ConfigErrors

Tree = dict[str, Any]


def finish(tree: Tree, command: Command, problems: Problems, files: list[tuple[str, Path]],
           recorded: Path | None = None, trained: Config | None = None, trains: bool = True) -> Config:
    """Apply the command line to a tree, check it and make a Config of it.

    Args:
        tree: nested values of the yaml files.
        command: the command line.
        problems: mistakes so far; those that are found are added.
        files: (section, file) of each yaml file, the strongest first; "" is a file of whole runs.
        recorded: record of the whole tree, if any: `${` is text there, and rules between keys are skipped.
        trained: the run's own config, where the command is about an existing run. What it reads may be typed.
        trains: whether the command trains, so that the rules of training are asked.
    """
    return _Finisher(command, problems, files, recorded, trained, trains).run(tree)


class _Finisher:
    """Shared state of the checks of one tree: command line, files, keys that may be set, and errors."""

    def __init__(self, command: Command, problems: Problems, files: list[tuple[str, Path]],
                 recorded: Path | None, trained: Config | None, trains: bool) -> None:
        self.command, self.problems = command, problems
        self.recorded, self.trained, self.trains = recorded, trained, trains
        self.origins = Origins(command, files, recorded)
        self.keys: dict[str, Key] = {}

    def run(self, tree: Tree) -> Config:
        for path, key in schema_keys().items():  # so that ${other.key} finds every key
            section, _, name = path.partition(".")
            if isinstance(tree.setdefault(section, {}), dict):
                tree[section].setdefault(name, key.default)
        before = dict(leaves(tree))
        self._refuse_packages_of_files(tree)
        for path, given in self.command.values.items():
            self._lay(tree, path, given)
        tree = tree if self.recorded else self._resolve(tree)
        self.keys = {**schema_keys(), **_part_keys(tree)}
        clean = {section: (self._parts if cls is dict else self._section)(section, tree.get(section))
                 for section, cls in schema_sections().items()}
        for path, value in leaves({name: value for name, value in tree.items() if name not in clean}):
            self._unknown(path, value)
        config = to_config(clean)
        self._unread(before, config)
        ranks = checks.world_size(config)
        for error in [] if self.recorded else checks.check(config, ranks, trains=self.trains):
            involved = error.where.split(", ")
            if not self.problems.doubt(involved):
                error.where = self.origins.of_rule(involved)
                self.problems.add(error)
        if self.problems.errors:
            raise ConfigErrors(self.problems.errors)
        return config

    def _add(self, number: int, what: str, *, where: str, why: str, next: str,
             doubt: Sequence[str] = ()) -> None:
        """Add an error; `doubt` lists the keys whose value it leaves unknown."""
        self.problems.add(ConfigError(number, what, where=where, why=why, next=next), *doubt)

    def _refuse_packages_of_files(self, tree: Tree) -> None:
        """Refuse run.packages in a yaml file, which may be a stranger's: it would allow code."""
        run = tree["run"]
        if isinstance(run, dict) and run.get("packages"):
            self._add(243, "run.packages is set in a file", where=self.origins.of("run.packages"),
                      why="a file may come from somebody else, and packages are code",
                      next=f"remove it there, and type run.packages={show(run['packages'])}")
            run["packages"] = []

    # --- values over the tree

    def _lay(self, tree: Tree, path: str, given: Value) -> None:
        *parents, leaf = path.split(".")
        node = tree
        for depth, name in enumerate(parents, 1):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                key = ".".join(parents[:depth])
                self._add(41, f"{path}: {key} is a value and has no keys", doubt=[key],
                          where=typed(given.text), why=f"{key} is {show(node)}", next=f"{key}=<value>")
                return
        keys = schema_keys()
        if given.value is not DELETE:
            node[leaf] = given.value
        elif path in keys or leaf not in node:
            node[leaf] = keys[path].default if path in keys else None  # the latter is reported as unknown
        else:
            del node[leaf]

    def _resolve(self, tree: Tree) -> Tree:
        """Resolve ${other.key}; refuse resolvers like ${oc.env:NAME}, whose result config.yaml would keep."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        suspects = {path: value for path, value in leaves(tree)
                    if ("${" in str(value) or value == "???") and not self._is_literal(path, value)}
        if not suspects:
            return tree
        plain = {path for path, _ in leaves(tree) if path not in suspects}
        whole = OmegaConf.create(_escaped(tree, plain))
        for path, value in suspects.items():
            try:
                if re.search(r"\$\{[^}]*:", str(value)):
                    raise OmegaConfBaseException(
                        "only ${other.key} may be used, because config.yaml keeps the result")
                found = OmegaConf.select(whole, path, throw_on_missing=True, throw_on_resolution_failure=True)
                if OmegaConf.is_config(found):
                    found = OmegaConf.to_container(found, resolve=True)
                value = Value(found, path)
            except OmegaConfBaseException as error:
                self._add(13, f"{path}={value} has no value", doubt=[path], where=self.origins.of(path),
                          why=str(error).splitlines()[0], next=f"{path}=<a plain value>")
                value = Value(DELETE, path)
            self._lay(tree, path, value)
        return tree

    def _is_literal(self, path: str, value: Any) -> bool:
        """Check whether text was typed or recorded by the run: `${` in it is no reference."""
        given = self.command.values.get(path)
        if given is not None:
            return given.literal
        return self.trained is not None and flatten(self.trained).get(path) == value

    def _unread(self, before: Tree, config: Config) -> None:
        """Add an error for every override that the chosen options do not read."""
        values, others = flatten(config), flatten(self.trained) if self.trained else None
        for found in readers.unread(self.command, before, values):
            if self.problems.doubt([found.key]):
                continue
            if others is not None and self._is_of_the_run(found.key, values, others):
                continue
            kinds = [readers.key_of(condition) for condition in found.unmet]
            if self.problems.doubt(kinds):
                continue
            self.problems.unread.append(found.text)
            here = " and ".join(
                f"{kind} is {show(values[kind])} ({self._origin_of_kind(kind, values, others)})"
                for kind in kinds)
            needed = " and ".join(map(readers.in_words, found.unmet))
            again = shlex.quote(found.text)
            self._add(100, f"{found.text} has no effect", where=typed(found.text), doubt=[found.key],
                      why=f"{found.key} is read with {needed}; here {here}",
                      next=f"{' '.join(map(readers.to_type, found.unmet))} {again}, or leave {again} out")

    def _is_of_the_run(self, name: str, values: Tree, others: Tree) -> bool:
        """Check whether the run reads a key, or all keys of a group, and was trained with these values."""
        if readers.unmet(name, others):
            return False
        return all(values.get(key) == others.get(key) for key in {*values, *others} if covers(name, key))

    def _origin_of_kind(self, kind: str, values: Tree, others: Tree | None) -> str:
        """Name the origin of a group's option; commands that only look at a run have one of their own."""
        chosen = self.origins.override(kind) or group_of(kind.partition(".")[0]) in self.command.choices
        if others is None or values[kind] == others[kind] or chosen:
            return self.origins.of_rule([kind])
        return f"unless it is typed; {show(others[kind])} trained the run"

    # --- sections of the schema

    def _section(self, section: str, values: Any) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        if not isinstance(values, dict | None):
            inside = ", ".join(path for path in self.keys if path.startswith(f"{section}."))
            has_group = group_of(section) in group_options()
            self._add(6, f"{section} is a section, not a value", doubt=[section],
                      where=self.origins.of(section), why=f"it holds {inside}",
                      next=advice(group_of(section)) if has_group else
                      f"run.name={show(values)}" if section == "run" else f"{section}.<key>=<value>")
            return clean
        for name, value in (values or {}).items():
            path = f"{section}.{name}"
            if path in self.keys:
                self._fit(clean, name, path, value)
            else:
                for leaf, inner in leaves({name: value}, section):
                    self._unknown(leaf, inner)
        return clean

    def _fit(self, clean: dict[str, Any], name: str, path: str, value: Any) -> None:
        key = self.keys[path]
        try:
            clean[name] = fit(value, key.type)
            if key.is_path and isinstance(value, str):
                clean[name] = expanded(value)
        except Misfit as misfit:
            meant = values_meant(path, show(value))
            choices = [] if meant else nearest(str(value), misfit.choices) or list(misfit.choices)
            number = _whole_number(value) if type_name(key.type).startswith("int") else None
            default = [] if key.default is MISSING else [show(key.default)]
            listed = [f"[{show(value)}]"] if key.default == [] and fits_in_list(value, key.type) else []
            examples = choices or listed or ([str(number)] if number is not None else default)
            kind = f"{'a ' * type_name(key.type).startswith('list')}{type_name(key.type)}"
            what = "is not one of its values" if misfit.choices else f"is not {kind}"
            advised = " or ".join(meant or [f"{path}={example}" for example in examples])
            given = self.command.values.get(path)  # shown as typed: 1e3 would be shown as 1000, which fits
            text = given.text if given else f"{path}={show(value)}"
            self._add(
                5 if misfit.choices else 4, f"{text} {what}",
                doubt=[path],
                where=self.origins.of(path),
                why=f"{path} is {kind}: {key.help}",
                next=advised or f"{path}=<{type_name(key.type)}>")

    def _unknown(self, path: str, value: Any) -> None:
        if self._renamed(path, value):
            return
        # A run does not mistype, and the search for a near key takes milliseconds for each of thousands of
        # keys.
        meant = [] if self.recorded else [name for name in keys_meant(path) if name != path]
        near = [] if self.recorded or meant else [self.keys[key] for key in nearest_keys(path, self.keys)]
        section, _, rest = path.partition(".")
        groups = [] if rest or self.recorded or meant else nearest(path, group_options(), count=1)
        advised = [*(str(self.keys.get(name, name)) for name in meant),
                   *(f"{group}=<option>: {advice(group)}" for group in groups), *map(str, near)]
        known = rest and section in schema_sections()
        self._add(
            3, f"unknown key {path}",
            doubt=[key.path for key in near],
            where=self.origins.of(path),
            why=f"the section {section} has no such key" if known else "there is no such section or key",
            next=_lines(advised) or "moetrain train --help")

    def _renamed(self, path: str, value: Any) -> bool:
        """Add an error for an old name of a key, with the new one; False where it is none."""
        if self.recorded or not renamed.renaming(path):
            return False
        given, new = self.command.values.get(path), renamed.new_path(path)
        section, _, name = new.rpartition(".")
        options = [] if new in self.keys else options_with(section, name)
        value = given.value if given else value
        self.problems.add(renamed.error(path, value, self.origins.of(path), options), new)
        return True

    # --- parts chosen by class

    def _parts(self, section: str, node: Any) -> Tree:
        node = {} if node is None else node
        if not isinstance(node, dict):
            self._add(6, f"{section} is a section, not a value", doubt=[section],
                      where=self.origins.of(section), why="it holds a part: _target_ and its arguments",
                      next=advice(section))
            return {}
        if section != "loss":
            return self._part(section, node)
        return {name: self._part(f"loss.{name}", part) for name, part in node.items()}

    def _part(self, path: str, node: Any) -> Tree:
        section, _, name = path.partition(".")
        target = node.get("_target_") if isinstance(node, dict) else None
        if not isinstance(target, str):
            first = next(leaves(node, path))[0] if isinstance(node, dict) and node else path
            self._add(7, f"{path} names no class", doubt=[path], where=self.origins.of(first),
                      why="a part is a mapping with _target_, which an option of the group brings",
                      next=f"loss=[{name}]" if name in group_options()["loss"] else advice(section))
            return {}
        try:
            accepted = arguments(target, section)
        except NotAllowed as error:
            self._add(244, f"{path}._target_={target} is not allowed", doubt=[path],
                      where=self.origins.of(f"{path}._target_"), why=str(error),
                      next=f"if the package is yours: run.packages=[{error.package}]; do not allow a "
                           "stranger's")
            return {}
        except NoSuchPart as error:
            self._add(8, f"{path}._target_={target} is not a part of moetrain", doubt=[path],
                      where=self.origins.of(f"{path}._target_"), why=str(error), next=advice(section))
            return {}
        clean = {"_target_": target}
        chosen = self.command.values.get(f"{path}._target_")
        for name, value in node.items():
            # Another class was typed in the place of an option's: arguments that only the option set go.
            left_over = chosen is not None and name not in accepted and (
                f"{path}.{name}" not in self.command.values)
            if name != "_target_" and not left_over:
                self._argument(clean, path, name, value, accepted)
        for name, key in accepted.items():
            if key.default is MISSING and name not in node and name not in SIZES:
                self._add(
                    11, f"{path}.{name} is missing",
                    doubt=[path],
                    where=self.origins.of(f"{path}._target_"),
                    why=f"{target} needs it",
                    next=f"{path}.{name}=<{type_name(key.type)}>")
        return clean

    def _argument(self, clean: Tree, path: str, name: str, value: Any, accepted: dict[str, Key]) -> None:
        key = f"{path}.{name}"
        if name in accepted and name in SIZES:
            whole = SIZES[name]
            self._add(
                10, f"{key} is set by {whole or 'the model: it is that of the layer'}",
                doubt=[key],
                where=self.origins.of(key),
                why="a size that several parts share is written once",
                next=f"{whole}={show(value)}" if whole else f"leave {key} out")
        elif name in accepted:
            self._fit(clean, name, key, value)
        elif not self._renamed(key, value):
            siblings = {known: record for known, record in self.keys.items() if known.startswith(f"{path}.")}
            others = [] if self.recorded else options_with(path.partition(".")[0], name)
            near = []
            if not self.recorded and not others:
                near = nearest_keys(key, siblings) or nearest_keys(key, self.keys)
            takes = ", ".join(name for name in accepted if name not in SIZES) or "no arguments"
            self._add(
                9, f"unknown key {key}",
                doubt=near,
                where=self.origins.of(key),
                why=f"{clean['_target_'].rpartition('.')[2]} takes {takes}",
                next=_lines([*(f"{option} {key}={show(value)}" for option in others),
                             *(str(self.keys[known]) for known in near)]) or f"leave {key} out")


def _whole_number(value: Any) -> int | None:
    """Return the integer that 1e3 and '1000' mean."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def _escaped(tree: Any, literal: set[str], prefix: str = "") -> Any:
    """Copy a tree so that OmegaConf takes the leaves at these paths for plain text."""
    if isinstance(tree, dict):
        return {name: _escaped(value, literal, f"{prefix}.{name}" if prefix else name)
                for name, value in tree.items()}
    if prefix in literal and isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", tree)
    return tree


def _part_keys(tree: Tree) -> dict[str, Key]:
    """List the arguments of the chosen parts by path."""
    found: dict[str, Key] = {}
    for path, node in _part_nodes(tree):
        try:
            accepted = arguments(str(node.get("_target_")), path.partition(".")[0])
        except NoSuchPart:
            continue
        cls = str(node["_target_"]).rpartition(".")[2]
        found |= {f"{path}.{name}": Key(f"{path}.{name}", key.type, key.default, f"argument of {cls}")
                  for name, key in accepted.items() if name not in SIZES}
    return found


def _part_nodes(tree: Tree) -> Iterator[tuple[str, Tree]]:
    for section, cls in schema_sections().items():
        node = tree.get(section)
        if cls is dict and isinstance(node, dict):
            losses = {f"loss.{name}": part for name, part in node.items()}
            nodes = losses if section == "loss" else {section: node}
            yield from ((path, part) for path, part in nodes.items() if isinstance(part, dict))


def _lines(entries: list[str]) -> str:
    return "\n          ".join(entries)
