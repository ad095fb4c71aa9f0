"""From yaml and command line to a `Config`, or to every mistake at once.

    compose(overrides)      a new run: conf/ and the command line
    for_run(overrides)      an existing run to look at: its own config.yaml and the command line on top
    typed_keys(overrides)   what a command line sets
    from_yaml, to_yaml      the resolved config of a run; recorded: from what a checkpoint says of it
    resume_conflicts        what a resumed run may not change

Order of precedence, the last one counts: defaults of the schema, conf/config.yaml, the options of the groups, experiments,
options that were typed, values that were typed. A typed option brings its section whole, so `logging=wandb` beside an
experiment turns off all that the experiment says of logging. The place on the command line does not matter, except that
of two values of one key the later one counts.

How: config/overrides.py reads the command line with Hydra's parser and checks choices against the files of conf/; Hydra
composes the valid ones; config/tree.py lays the values on top, compares every leaf with the schema or with the
constructor of its part, and runs the rules between keys (config/checks.py). No torch here.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from moetrain import __version__
from moetrain.config import tree
from moetrain.config.groups import broken_files, config_dir, group_of, section_of, wrong_in
from moetrain.config.overrides import Command, Problems, read
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.run_names import RUN_KEYS, bare_run, find_run
from moetrain.config.schema import Config, ParallelConfig
from moetrain.config.values import flatten, show
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.files import read_json, shown

# What a resumed run may change; a trailing dot means the whole section.
_FREE_ON_RESUME = ("run.steps", "run.stop_at", "run.nproc", "run.timeout_s", "run.max_restarts", "run.grace_s", "run.name", "run.dir", "run.device",
                   "run.share_gpu", "log.", "checkpoint.", "eval.", "generate.", "parallel.", "schedule.", "planner.", "hardware.", "engine.",
                   "train.micro_batch", "train.count_pass", "train.activation_checkpointing", "train.loss_carrier", "train.head_chunk", "data.cache",
                   "data.overlap", "router.centre")
_PATHS = ("data.path", "data.held_out", "data.tokenizer")
_MOST_ERRORS = 20           # of a recorded config: one of another release may differ in everything
# What evaluation and sampling may change of the model.
_FREE_AFTER_TRAINING = ("model.top_k",)
# What is in the checkpoint, or of training alone.
_OF_TRAINING = ("model.", "optim.", "balance.", "loss")


def compose(overrides: Sequence[str]) -> Config:
    """The config of a new run, or of one that goes on. Raises ConfigErrors with everything that is wrong.

    A bare word names a run that is there: its own config.yaml is then the base, not conf/.
    """
    overrides, named = bare_run(overrides, known=True)
    command, problems = read(overrides)
    values, files = _compose_yaml(command.choices)
    if named is None:
        return tree.finish(values, command, problems, files)
    directory, trained = _trained(named, problems)
    return _on_recorded(asdict(trained), trained, directory, values, command, problems, files)


def idle_overrides(overrides: Sequence[str]) -> set[str]:
    """Those that the chosen options do not read: an error of one run, not of a sweep in which another job reads them."""
    command, problems = read(overrides)
    try:
        tree.finish(_compose_yaml(command.choices)[0], command, problems, [])
    except ConfigErrors:                                     # compose() says them
        pass
    return set(problems.unread)


def for_run(overrides: Sequence[str]) -> Config:
    """The config of the run that a bare word, run.name, run.dir or experiment names, with the other overrides on top.

    One process and no process group unless the overrides say otherwise: a checkpoint fits any number of ranks. Of
    model.* only top_k may differ from what was trained, and nothing of what training alone reads: it would have no effect.
    """
    overrides, named = bare_run(overrides, known=False)
    command, problems = read(overrides)
    values, files = _compose_yaml(command.choices)
    run = {"dir": None, **values["run"]}
    run |= {name: command.values[f"run.{name}"].value for name in ("name", "dir") if f"run.{name}" in command.values}
    directory, trained = _trained(named or str(run["dir"] or run["name"]), problems)
    base = asdict(trained)
    base["run"]["nproc"] = 1
    base["parallel"] = asdict(ParallelConfig())
    base["engine"]["name"] = "torch"
    config = _on_recorded(base, trained, directory, values, command, problems, files)
    conflicts = _conflicts(trained, config, _FREE_AFTER_TRAINING)
    if of_training := [error for error in conflicts if error.where.startswith(_OF_TRAINING)]:
        for error in of_training:
            error.why = "the run was trained with the first value, and this command does not train"
            group = group_of(error.where.partition(".")[0])
            option = group in command.choices and error.where not in command.values
            error.next = f"leave {group if option else error.where} out"
        raise ConfigErrors(of_training)
    return config


def typed_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The keys that a command line sets, and the groups that it chooses options of."""
    command, _ = read(bare_run(overrides, known=False)[0])
    return frozenset([*command.choices, *command.values])


def _trained(run: str, problems: Problems) -> tuple[Path, Config]:
    """Directory and own config of a run that is there. Raises what is wrong with it, and with the command line."""
    try:
        directory = find_run(run)
        return directory, from_yaml(directory / "config.yaml")
    except ConfigError as error:
        raise ConfigErrors([*problems.errors, *getattr(error, "errors", [error])]) from None


def _on_recorded(base: tree.Tree, trained: Config, directory: Path, values: tree.Tree, command: Command, problems: Problems,
                 files: list[tuple[str, Path]]) -> Config:
    """`base`, what is kept of a run's own config, with a command on top; values: what the command's options compose to."""
    below_runs = directory == Path("runs") / directory.name
    base["run"] |= {"name": directory.name, "dir": None} if below_runs else {"dir": str(directory)}
    changed = {section_of(group) for group in command.choices} - {"experiment"}
    base |= {section: values.get(section) for section in changed}
    files = [(section, file) for section, file in files if section in changed] + [("", directory / "config.yaml")]
    typed = {path: given for path, given in command.values.items() if path not in RUN_KEYS}
    return tree.finish(base, command._replace(values=typed), problems, files, trained=trained)


def run_dir(config: Config) -> Path:
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def to_yaml(config: Config) -> str:
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path | str) -> Config:
    """The config in a run's config.yaml, checked key by key; no rules between keys, because the mesh may differ."""
    path = Path(path)
    try:
        wrote = read_json(path.with_name("env.json"))["moetrain"]
    except (OSError, ValueError, LookupError, TypeError):
        wrote = None
    return recorded(load(path), path, wrote)


def recorded(values: dict[str, Any], where: Path, wrote: object) -> Config:
    """The same from values that were read already.

    where: the file or checkpoint that they are from. wrote: the release of moetrain that it names.
    """
    try:
        return tree.finish(values, Command({}, {}), Problems(), [], recorded=where)
    except ConfigErrors as found:
        raise ConfigErrors([_of_another_release(error, where, wrote) for error in found.errors[:_MOST_ERRORS]]) from None


def _of_another_release(error: ConfigError, where: Path, wrote: object) -> ConfigError:
    """The same error, for something that was not typed but recorded: a key, a value or a part that is not known here."""
    release = f"moetrain {shown(wrote, 40)}" if isinstance(wrote, str) else "an unknown release of moetrain"
    if wrote == __version__:
        said, advice = f"{release}, this release, wrote the run, so it was changed since", "restore what was changed"
    else:
        said, advice = f"{release} wrote it, and this is moetrain {__version__}", f"use {release} for this run"
    error.why = f"{error.why}; {said}"
    error.next = f"{advice}; or {f'correct it in {where}' if where.is_file() else 'train anew with another run.name'}"
    return error


def resume_conflicts(old: Config, new: Config) -> list[ConfigError]:
    """One error for each key that a resumed run may not change and that differs. `old` is the run's own config."""
    return _conflicts(old, new, _FREE_ON_RESUME)


def _compose_yaml(choices: Mapping[str, Any]) -> tuple[tree.Tree, list[tuple[str, Path]]]:
    """The tree of conf/ with these choices, and its files, the strongest first (see tree.finish).

    Hydra lays the values of an experiment over those of every option. An option that was typed brings its section whole:
    where the experiment has changed that, it is composed once more without the experiment.
    """
    folder = config_dir()
    if broken := [error for name in _names(choices.get("loss")) for error in wrong_in(folder / "loss" / f"{name}.yaml")]:
        raise ConfigErrors(broken)                           # Hydra would take a loss of any name
    values, chosen = _hydra_compose(folder, choices)
    typed = [group for group in choices if group != "experiment"]
    if chosen.get("experiment") and any(_differs(values, folder, group, choices[group]) for group in typed):
        alone, _ = _hydra_compose(folder, {**choices, "experiment": []})
        values |= {section_of(group): alone.get(section_of(group)) for group in typed}
    ranked: list[tuple[int, str, Path]] = []
    for group, option in chosen.items():                     # Hydra lists them last applied first
        if option and (folder / group).is_dir():
            rank = 0 if group in typed else 1 if group == "experiment" else 2
            section = "" if group == "experiment" else section_of(group)
            ranked += [(rank, section, folder / group / f"{name}.yaml") for name in _names(option)]
    ranked.sort(key=lambda entry: entry[0])
    files = [(section, file) for _, section, file in ranked]
    return {**values, "loss": values.get("loss") or {}}, [*files, ("", folder / "config.yaml")]


def _names(option: str | list[str] | None) -> list[str]:
    """The options that were chosen of a group: one, several, or none."""
    return option if isinstance(option, list) else [option] if option else []


def _differs(values: tree.Tree, folder: Path, group: str, option: str | list[str]) -> bool:
    """Whether a section holds anything else than the files of its options."""
    written: tree.Tree = {}
    for name in _names(option):
        written |= load(folder / group / f"{name}.yaml")
    return (values.get(section_of(group)) or {}) != written


def _hydra_compose(folder: Path, choices: Mapping[str, Any]) -> tuple[tree.Tree, dict[str, Any]]:
    """The composed tree, references left as they are, and the option of each group."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigErrors([ConfigError(141, "the current folder is gone", where=os.environ.get("PWD", "."),
                                        why="it was removed or renamed while this shell stood in it; runs/ and relative paths are looked "
                                            "for there", next="cd <a folder that is there>")]) from error
    values = copy.deepcopy(_composed(folder, tuple(f"{group}={show(option)}" for group, option in choices.items())))
    return values, values.pop("hydra")["runtime"]["choices"]


@lru_cache(maxsize=256)
def _composed(folder: Path, arguments: tuple[str, ...]) -> tree.Tree:
    """Hydra takes a quarter of a second for what the jobs of a sweep ask for again and again."""
    from hydra import compose as hydra_compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            composed = hydra_compose("config", list(arguments), return_hydra_config=True)
        return OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        broken = broken_files(folder)
        raise ConfigErrors(broken or [ConfigError(18, "the yaml files do not compose", where=str(folder),
                                                  why=str(error).splitlines()[0],
                                                  next="correct the file that is named")]) from error


def _conflicts(old: Config, new: Config, free: Sequence[str]) -> list[ConfigError]:
    before, now = ({**flatten(config), "loss": sorted(config.loss)} for config in (old, new))
    places = [flatten(with_absolute_paths(config)) for config in (old, new)]
    if before["loss"] != now["loss"]:                    # said once; not key by key of what is there on one side alone
        before, now = ({path: value for path, value in values.items() if not path.startswith("loss.")}
                       for values in (before, now))
    if old.run.seed == new.run.seed:                     # null and the number that it stands for are the same data
        before["data.seed"], now["data.seed"] = old.data_seed, new.data_seed
    errors = []
    for path in dict.fromkeys([*before, *now]):
        if any(path == key or key.endswith(".") and path.startswith(key) for key in free):
            continue
        if path == "run.dtype" and now[path] == "auto":  # the run's own (train/precision.py)
            continue
        if path in _PATHS and _same_place(*(values.get(path) for values in places)):
            continue
        if before.get(path, MISSING) != now.get(path, MISSING):
            was, becomes = ("absent" if path not in values else show(values[path]) for values in (before, now))
            errors.append(ConfigError(16, f"{path} was {was} and is {becomes} now", where=path,
                                      why="the run was trained with the first value and cannot go on with another",
                                      next=f"{path}={was}, or another run.name" if path in before else
                                           f"leave {path} out, or another run.name"))
    return errors


def _same_place(old: str | None, new: str | None) -> bool:
    """Whether two paths may lead to the same data: of what has moved its fingerprint decides (train/loop.py)."""
    gone = bool(old and new) and os.path.isabs(old) and os.path.isabs(new) and not any(map(os.path.exists, (old, f"{old}.idx")))
    return old == new or gone
