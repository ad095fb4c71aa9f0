"""Compose yaml files and command line into a `Config`, or report every mistake at once.

    compose(overrides)      config of a new run: conf/ and the command line
    for_run(overrides)      config to look at an existing run: its own config.yaml, the command line on top
    typed_keys(overrides)   keys and groups that a command line sets
    from_yaml, to_yaml      the resolved config of a run, in its config.yaml
    recorded                the same from the manifest of a checkpoint

Precedence, the last one wins: defaults of the schema, conf/config.yaml, options of the groups, experiments,
options on the command line, values on the command line. An option on the command line replaces its whole
section, so `logging=wandb` beside an experiment turns off everything that the experiment sets for logging.
The file of a public model brings a router and experts, too; `router=topk` beside it replaces that router.
The order on the command line does not matter, except that of two values of one key the later one wins.

config/overrides.py reads the command line with Hydra's parser and checks choices against the files of conf/.
Hydra composes the valid choices. config/tree.py lays the values on top, checks every leaf against the schema
or the constructor of its part, and runs the rules between keys (config/checks.py). No torch here.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from moetrain import __version__
from moetrain.config import tree
from moetrain.config.groups import (
    broken_files,
    config_dir,
    default_options,
    group_of,
    is_global,
    option_file,
    section_of,
    written_by,
    wrong_in,
)
from moetrain.config.overrides import Command, Problems, read
from moetrain.config.parallel_schema import ParallelConfig
from moetrain.config.renamed import translate
from moetrain.config.resumed import conflicts
from moetrain.config.run_names import RUN_KEYS, bare_run, find_run
from moetrain.config.schema import Config
from moetrain.config.taken_over import source_config, take_over
from moetrain.config.trained_keys import is_fixed, refuse_starts, with_trained_widths
from moetrain.config.values import as_tree, show
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.files import read_json, shown
from moetrain.packages import option_folders

# Errors shown of a recorded config: one of another release may differ in every key.
_MOST_ERRORS = 20


def compose(overrides: Sequence[str]) -> Config:
    """Compose the config of a run that starts or resumes. Raises ConfigErrors with everything that is wrong.

    A bare word names an existing run; its config.yaml is then the base instead of conf/.
    """
    overrides, named = bare_run(overrides, known=True)
    command, problems = read(overrides)
    values, files = _compose_yaml(command.choices)
    if named is None:
        files = _from_source(values, files, command, problems)
        return tree.finish(values, command, problems, files)
    directory, trained = _trained(named, problems)
    return _on_recorded(as_tree(trained), trained, directory, values, command, problems, files)


def _from_source(values: tree.Tree, files: list[tuple[str, Path]], command: Command,
                 problems: Problems) -> list[tuple[str, Path]]:
    """Take the model over from the run that `init.from` names (config/taken_over.py).

    Args:
        values: what the options of the command compose to, which is changed.
        files: their yaml files, the strongest first.
        command: the command line.
        problems: its mistakes so far, which are raised together with those of that run's config.

    Returns:
        The yaml files, with that run's.
    """
    path = source_config(values, command)
    if path is None:
        return files
    of_experiment = frozenset[str]()
    if command.choices.get("experiment"):
        without, _ = _hydra_compose(config_dir(), {**command.choices, "experiment": []})
        of_experiment = frozenset(name for name in values if values[name] != without.get(name))
    try:
        source = as_tree(from_yaml(path))
    except ConfigError as error:
        raise ConfigErrors([*problems.errors, *getattr(error, "errors", [error])]) from None
    taken = take_over(values, source, command, of_experiment)
    return [*((section, path) for section in taken), *files]


def idle_overrides(overrides: Sequence[str]) -> set[str]:
    """Find overrides that the chosen options do not read.

    That is an error in a single run, but not in a sweep where another job reads them.
    """
    command, problems = read(overrides)
    try:
        values, files = _compose_yaml(command.choices)
        tree.finish(values, command, problems, _from_source(values, files, command, problems))
    except ConfigErrors:  # compose() reports them
        pass
    return set(problems.unread)


def for_run(overrides: Sequence[str]) -> Config:
    """Compose the config to look at an existing run: its own config with the overrides on top.

    A bare word, run.name, run.dir or experiment names the run. It is read in one process without process
    group unless the overrides say otherwise, because a checkpoint loads on any number of ranks. The rules of
    training are not asked. Keys whose effect the checkpoint holds, or that only training reads, may not
    differ from the run's (config/trained_keys.py).
    """
    overrides, named = bare_run(overrides, known=False)
    command, problems = read(overrides)
    values, files = _compose_yaml(command.choices)
    run = {"dir": None, **values["run"]}
    run |= {key.removeprefix("run."): command.values[key].value for key in RUN_KEYS if key in command.values}
    directory, trained = _trained(named or str(run["dir"] or run["name"]), problems)
    base = as_tree(trained)
    base["run"]["nproc"] = 1
    base["parallel"] = as_tree(ParallelConfig())
    base["engine"]["name"] = "torch"
    config = _on_recorded(base, trained, directory, values, command, problems, files, trains=False)
    fixed = [error for error in conflicts(trained, config) if is_fixed(error.where)]
    for error in fixed:
        error.why = "the run was trained with the first value, and this command does not train"
        group = group_of(error.where.partition(".")[0])
        option = group in command.choices and error.where not in command.values
        error.next = f"leave {group if option else error.where} out"
    if refused := [*fixed, *refuse_starts(trained, config)]:
        raise ConfigErrors(refused)
    return with_trained_widths(trained, config)


def typed_keys(overrides: Sequence[str]) -> frozenset[str]:
    """List the keys that a command line sets and the groups that it chooses options of."""
    command, _ = read(bare_run(overrides, known=False)[0])
    return frozenset([*command.choices, *command.values])


def _trained(run: str, problems: Problems) -> tuple[Path, Config]:
    """Find the directory and the config of an existing run.

    Its errors are raised together with those of the command line.
    """
    try:
        directory = find_run(run)
        return directory, from_yaml(directory / "config.yaml")
    except ConfigError as error:
        raise ConfigErrors([*problems.errors, *getattr(error, "errors", [error])]) from None


def _on_recorded(base: tree.Tree, trained: Config, directory: Path, values: tree.Tree, command: Command,
                 problems: Problems, files: list[tuple[str, Path]], trains: bool = True) -> Config:
    """Lay a command line over the recorded config of a run.

    Args:
        base: the part of the run's config that is kept.
        trained: the run's own config.
        directory: the run's directory.
        values: what the options of the command compose to; they replace their sections of `base`.
        command: the command line.
        problems: its mistakes so far.
        files: yaml files of the options, as tree.finish takes them.
        trains: whether the command trains.
    """
    below_runs = directory == Path("runs") / directory.name
    base["run"] |= {"name": directory.name, "dir": None} if below_runs else {"dir": str(directory)}
    changed = {section for group, option in command.choices.items() if group != "experiment"
               for name in _names(option) for section in written_by(group, name)}
    base |= {section: values.get(section) for section in changed}
    files = [*(entry for entry in files if entry[0] in changed), ("", directory / "config.yaml")]
    typed = {path: given for path, given in command.values.items() if path not in RUN_KEYS}
    return tree.finish(base, command._replace(values=typed), problems, files, trained=trained,
                       trains=trains)


def run_dir(config: Config) -> Path:
    """Return the directory of a run."""
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def to_yaml(config: Config) -> str:
    """Write a resolved config as the text of a config.yaml."""
    import yaml

    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path | str) -> Config:
    """Read a run's config.yaml, checked key by key.

    The rules between keys are skipped, because the mesh may differ.
    """
    path = Path(path)
    try:
        wrote = read_json(path.with_name("env.json"))["moetrain"]
    except (OSError, ValueError, LookupError, TypeError):
        wrote = None
    return recorded(load(path), path, wrote)


def recorded(values: dict[str, Any], where: Path, wrote: object) -> Config:
    """Check the values of a recorded config, like `from_yaml`, and make a Config of them.

    Old names of keys are read as the new ones. Packages that it names are not allowed by that: the reader's
    own command allows them (packages.py).

    Args:
        values: the recorded tree.
        where: the file or checkpoint that holds it.
        wrote: the release of moetrain that the record names.
    """
    try:
        return tree.finish(_without_packages(translate(values)), Command({}, {}), Problems(), [],
                           recorded=where)
    except ConfigErrors as found:
        errors = [_of_another_release(error, where, wrote) for error in found.errors[:_MOST_ERRORS]]
        raise ConfigErrors(errors) from None


def _without_packages(values: tree.Tree) -> tree.Tree:
    run = values.get("run")
    return {**values, "run": {**run, "packages": []}} if isinstance(run, dict) else values


def _of_another_release(error: ConfigError, where: Path, wrote: object) -> ConfigError:
    """Reword an error about a key, value or part that was recorded, not typed, and is unknown here."""
    if error.id == "E-CONFIG-244":  # a package of the user's own is allowed by the command alone
        return error
    release = f"moetrain {shown(wrote, 40)}" if isinstance(wrote, str) else "an unknown release of moetrain"
    if wrote == __version__:
        said = f"{release}, this release, wrote the run, so it was changed since"
        advice = "restore what was changed"
    else:
        said = f"{release} wrote it, and this is moetrain {__version__}"
        advice = f"use {release} for this run"
    error.why = f"{error.why}; {said}"
    otherwise = f"correct it in {where}" if where.is_file() else "train anew with another run.name"
    error.next = f"{advice}; or {otherwise}"
    return error


def _compose_yaml(choices: Mapping[str, Any]) -> tuple[tree.Tree, list[tuple[str, Path]]]:
    """Compose conf/ with these choices: the tree, and its files, the strongest first (see tree.finish).

    Hydra lays the values of an experiment over those of every option, and those of a model over those of a
    router. An option on the command line replaces its whole section, so where another file has changed that
    section, it is composed once more without that file.
    """
    folder = config_dir()
    losses = [option_file("loss", name) for name in _names(choices.get("loss"))]
    if broken := [error for file in losses for error in wrong_in(file)]:
        raise ConfigErrors(broken)  # Hydra would accept a loss of any name
    values, chosen = _hydra_compose(folder, choices)
    typed = [group for group in choices if group != "experiment"]
    without = {**choices, "experiment": []}
    if chosen.get("experiment") and "model" in choices:
        values |= _sections(_hydra_compose(folder, without)[0], written_by("model", choices["model"]))
    others = {section_of(group): group for group in typed if group != "model"}
    if any(_differs(values, group, choices[group]) for group in others.values()):
        plain = {**without, "model": default_options()["model"]}
        values |= _sections(_hydra_compose(folder, plain)[0], others)
    ranked: list[tuple[int, str, Path]] = []
    for group, option in chosen.items():  # Hydra lists the last applied first
        if option and (folder / group).is_dir():
            rank = 2 if group == "experiment" else 3 if group not in typed else 1 if group == "model" else 0
            for name in _names(option):
                file = option_file(group, name)
                ranked.append((rank, "" if is_global(file) else section_of(group), file))
    ranked.sort(key=lambda entry: entry[0])
    files = [(section, file) for _, section, file in ranked]
    return {**values, "loss": values.get("loss") or {}}, [*files, ("", folder / "config.yaml")]


def _sections(values: tree.Tree, names: Iterable[str]) -> tree.Tree:
    """Take sections out of a tree."""
    return {name: values.get(name) for name in names}


def _names(option: str | list[str] | None) -> list[str]:
    """List the chosen options of a group: one, several or none."""
    return option if isinstance(option, list) else [option] if option else []


def _differs(values: tree.Tree, group: str, option: str | list[str]) -> bool:
    """Check whether a section differs from the files of its options."""
    written: tree.Tree = {}
    for name in _names(option):
        written |= written_by(group, name)[section_of(group)]
    return (values.get(section_of(group)) or {}) != written


def _hydra_compose(folder: Path, choices: Mapping[str, Any]) -> tuple[tree.Tree, dict[str, Any]]:
    """Let Hydra compose: the tree with unresolved references, and the option of each group."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigErrors([ConfigError(
            141, "the current folder is gone", where=os.environ.get("PWD", "."),
            why="it was removed or renamed while this shell stood in it; runs/ and relative paths are "
                "looked for there",
            next="cd <a folder that is there>")]) from error
    arguments = [f"{group}={show(option)}" for group, option in choices.items()]
    if folders := option_folders():
        paths = (str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in folders)
        searched = ",".join(f"'file://{path}'" for path in paths)
        arguments.append(f"hydra.searchpath=[{searched}]")
    values = copy.deepcopy(_composed(folder, tuple(arguments)))
    return values, values.pop("hydra")["runtime"]["choices"]


@lru_cache(maxsize=256)
def _composed(folder: Path, arguments: tuple[str, ...]) -> tree.Tree:
    """Compose, cached: Hydra takes a quarter of a second, and the jobs of a sweep repeat their choices."""
    from hydra import compose as hydra_compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            composed = hydra_compose("config", list(arguments), return_hydra_config=True)
        container = OmegaConf.to_container(composed, resolve=False)
        assert isinstance(container, dict)
        return {str(name): value for name, value in container.items()}
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        broken = broken_files(folder, *option_folders())
        raise ConfigErrors(broken or [ConfigError(18, "the yaml files do not compose", where=str(folder),
                                                  why=str(error).splitlines()[0],
                                                  next="correct the file that is named")]) from error
