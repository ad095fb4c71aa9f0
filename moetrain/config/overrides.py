"""Read overrides from the command line with Hydra's grammar, into one record and a list of mistakes.

    model=debug           an option of a group of conf/; loss=[z] takes several
    optim.lr=3e-4         a value
    run.dir=a b, "c"      text (prompt, paths, names): as the shell hands it over; quotes are kept
    ~optim.lr             back to the default
    +key=..., ++key=...   the same as key=...
    run.seed=1,2          several runs, only with --multirun (`sweep`); in text, quotes keep a comma
"""

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from moetrain import packages
from moetrain.config.field_names import values_meant
from moetrain.config.groups import advice, group_options
from moetrain.config.run_names import runs_here
from moetrain.config.suggest import nearest, nearest_keys
from moetrain.config.values import schema_keys, schema_sections, show, type_name
from moetrain.errors import ConfigError

# Groups that may be empty.
_OPTIONAL = ("loss", "experiment")


class Value(NamedTuple):
    """A value from the command line."""

    value: Any                    # DELETE: back to the default
    text: str                     # the override as typed
    literal: bool = False         # text as the shell handed it over: `${` in it is no reference


class Command(NamedTuple):
    """A command line: chosen options and set values."""

    choices: dict[str, Any]       # group -> option, or a list of options, which may be empty
    values: dict[str, Value]      # path -> value


class Problems:
    """Errors so far, and the keys whose value they leave in doubt: rules between keys skip those."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []
        self.unread: list[str] = []                # overrides that the chosen options do not read
        self._doubtful: set[str] = set()

    def add(self, error: ConfigError, *doubtful: str) -> None:
        """Add an error and the keys that it leaves in doubt."""
        self.errors.append(error)
        self._doubtful.update(doubtful)

    def doubt(self, keys: Sequence[str]) -> bool:
        """Check whether one of the keys, or a section that holds it, is in doubt."""
        return any(key == doubt or key.startswith(f"{doubt}.") for key in keys for doubt in self._doubtful)


DELETE = object()


def read(overrides: Sequence[str]) -> tuple[Command, Problems]:
    """Read overrides; what cannot be read becomes a problem, and the rest is still read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    command, problems = Command({}, {}), Problems()
    _allow_packages(overrides, problems)
    parser, groups, texts = OverridesParser.create(), group_options(), _text_keys()
    for text in overrides:
        key, given, raw = text.partition("=")
        if given and (name := key.lstrip("+")) in texts:
            command.values.pop(name, None)
            command.values[name] = Value(None if raw == "null" and texts[name] else raw, text, literal=True)
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.add(_malformed(text, str(error), groups))
            continue
        key = override.key_or_group
        if override.package is not None or "/" in key:
            problems.add(_malformed(text, "groups are chosen by their plain name here", groups))
        elif override.is_delete():
            _delete(key, text, groups, command, problems)
        elif override.is_sweep_override() and (key in groups or _is_possible(key)):
            problems.add(_several(key, raw, text, overrides), key)
        elif key in groups and not isinstance(override.value(), dict):
            _choose(key, override.value(), text, groups, command, problems)
        else:
            value = raw if override.is_sweep_override() else override.value()
            _set(key, value, raw, text, command, texts)
    return command, problems


def _allow_packages(overrides: Sequence[str], problems: Problems) -> None:
    """Allow the packages that the command line names, before the options of theirs are looked up."""
    for text in overrides:
        key, _, value = text.partition("=")
        if key.lstrip("+") == "run.packages":
            names = [name for word in value.strip("[]").split(",") if (name := word.strip(" '\""))]
            for error in packages.missing(names):
                problems.add(error, *schema_sections())
            packages.allow(*(name for name in names if packages.folder_of(name) is not None))
    for error in packages.missing(packages.allowed()):
        problems.add(error, *schema_sections())


def _is_possible(key: str) -> bool:
    """Check whether a key of that name may exist: parts and mappings have names of their own."""
    section, *names = key.split(".")
    above = (".".join([section, *names[:length]]) for length in range(len(names) + 1))
    return schema_sections().get(section) is dict or any(name in schema_keys() for name in above)


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Split overrides into the jobs of --multirun like Hydra's basic sweeper: `a=1,2 b=3,4` gives four."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, texts = OverridesParser.create(), _text_keys()
    jobs: list[list[str]] = [[]]
    for text in overrides:
        choices = [text]
        try:
            parsed = parser.parse_override(text)
            swept, quoted = parsed.is_sweep_override(), text.partition("=")[2][:1] in ("'", '"')
            if swept:
                choices = [job[0] for job in BasicSweeper.split_arguments([parsed], None)[0]]
            if parsed.key_or_group in texts and (swept or quoted):
                choices = [_plain(choice, parser) for choice in choices]
        except HydraException:
            pass  # `read` reports it, with the others
        jobs = [[*job, choice] for job in jobs for choice in choices]
    return jobs


def _plain(text: str, parser: Any) -> str:
    """Remove the quotes and backslashes of the grammar, because `read` takes text as it stands."""
    value = parser.parse_override(text).value()
    return f"{text.partition('=')[0]}={value}" if isinstance(value, str) else text


def typed(*texts: str) -> str:
    """Name overrides as the place of an error."""
    quoted = ", ".join(f'"{text}"' for text in texts)
    return f"override{'s' if len(texts) > 1 else ''} {quoted} on the command line"


def _choose(group: str, value: Any, text: str, groups: dict, command: Command, problems: Problems) -> None:
    """Record the chosen option of a group, or the problem with it."""
    if group in _OPTIONAL and value in (None, []):
        command.choices[group] = []
        return
    options = [show(option) for option in value] if isinstance(value, list) else [show(value)]
    unknown = [option for option in options if option not in groups[group]]
    doubtful = (group, *schema_sections()) if group == "experiment" else (group,)
    for option in unknown:
        meant = values_meant(group, option)
        near = [] if meant else nearest(option, groups[group])
        problems.add(ConfigError(
            2, f"{group} has no option {option}", where=typed(text),
            why=f"the options of {group} are {', '.join(groups[group])}",
            next=" or ".join([*meant, *(f"{group}={name}" for name in near)]) or advice(group)), *doubtful)
    if unknown:
        return
    if isinstance(value, list) and group not in _OPTIONAL:
        problems.add(ConfigError(14, f"{group} takes one option, not a list", where=typed(text),
                                 why="only losses add up", next=advice(group)), group)
        return
    command.choices[group] = options if isinstance(value, list) else options[0]


def _delete(key: str, text: str, groups: dict, command: Command, problems: Problems) -> None:
    if key not in groups:
        command.values[key] = Value(DELETE, text)
    elif key in _OPTIONAL:
        command.choices[key] = []
    else:
        problems.add(ConfigError(40, f"{key} cannot be removed", where=typed(text), why="every run needs one",
                                 next=advice(key)), key)


def _set(path: str, value: Any, raw: str, text: str, command: Command, texts: dict[str, bool]) -> None:
    if isinstance(value, dict) and value and path not in schema_keys():
        for name, entry in value.items():
            _set(f"{path}.{name}", entry, str(entry), text, command, texts)
        return
    if path in texts and not isinstance(value, str) and not (value is None and texts[path]):
        value = raw
    command.values.pop(path, None)  # the last one counts, and comes last
    command.values[path] = Value(value, text)


def _text_keys() -> dict[str, bool]:
    """List the keys whose value is free text; true where it may be null."""
    return {path: key.type != str for path, key in schema_keys().items() if key.type in (str, str | None)}


def _several(key: str, raw: str, text: str, overrides: Sequence[str]) -> ConfigError:
    """Refuse several values for one run; advise a sweep, and a list where the key takes one."""
    kind = type_name(schema_keys()[key].type) if key in schema_keys() else ""
    a_list = [shlex.quote(f"{key}=[{raw}]")] if key == "loss" or "list" in kind else []
    swept = [] if kind.startswith("list") else [f"moetrain train --multirun {shlex.join(overrides)}"]
    return ConfigError(12, f"several values for {key}", where=typed(text),
                       why="one run has one value" + "; a list is written in brackets" * bool(a_list),
                       next="\n          or ".join([*swept, *a_list]))


def _meant(word: str, groups: dict[str, list[str]]) -> list[str]:
    """Guess what a word without = stands for: a group, an option, a section, a run or a key."""
    if word in groups:
        return [advice(word)]
    if word in schema_sections():
        return [f"{word}.<key>=<value>"]
    chosen = [f"{group}={word}" for group, options in groups.items() if word in options]
    keys = [f"{key}=<value>" for key in nearest_keys(word, schema_keys())]
    return chosen or nearest(word, runs_here()) or keys


def _malformed(text: str, reason: str, groups: dict[str, list[str]]) -> ConfigError:
    if text.startswith("-"):
        without = text.lstrip("-")
        return ConfigError(
            19, f"unknown flag {text}", where="the command line",
            why="values are set by key=value",
            next=shlex.quote(without) if _is_possible(without.partition("=")[0]) and "=" in without else
                 "moetrain train --help lists flags, and the pages of keys")
    if "=" not in text:
        return ConfigError(1, f"{text!r} is not an override", where=typed(text),
                           why="an override is written key=value, and no run here has that name",
                           next=" or ".join(_meant(text, groups)) or "moetrain train --help")
    key, _, value = text.partition("=")
    return ConfigError(1, f"{text!r} cannot be read", where=typed(text),
                       why=reason.splitlines()[0].partition(" expecting")[0],
                       next=f"quote the value: '{key}=\"{value}\"'")
