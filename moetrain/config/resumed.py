"""Keys that differ between the config of a run and the one that it is to go on with."""

import os
from collections.abc import Sequence
from dataclasses import MISSING

from moetrain.config.groups import group_of, group_options, option_file
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config
from moetrain.config.values import flatten, show
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError

# Keys that a resumed run may change; a trailing dot means the whole section.
FREE_ON_RESUME = (
    "run.packages", "run.steps", "run.stop_at", "run.nproc", "run.timeout_s", "run.max_restarts",
    "run.grace_s", "run.name", "run.dir", "run.device", "run.share_gpu", "init.", "log.", "checkpoint.",
    "eval.", "generate.", "parallel.", "schedule.", "planner.", "hardware.", "engine.", "train.micro_batch",
    "train.count_pass",
    "train.activation_checkpointing", "train.aux_loss", "train.head_chunk", "data.cache", "data.overlap",
    "router.center", "router.growth_steps")
_PATHS = ("data.path", "data.held_out", "data.tokenizer")


def resume_conflicts(old: Config, new: Config) -> list[ConfigError]:
    """List an error for each key that differs although a resumed run may not change it.

    `old` is the run's own config.
    """
    return conflicts(old, new, FREE_ON_RESUME)


def conflicts(old: Config, new: Config, free: Sequence[str] = ()) -> list[ConfigError]:
    """List an error for each key that differs and is not among `free`."""
    before, now = ({**flatten(config), "loss": sorted(config.loss)} for config in (old, new))
    places = [flatten(with_absolute_paths(config)) for config in (old, new)]
    if before["loss"] != now["loss"]:  # reported once, not for every key of a loss that one side alone has
        before, now = ({path: value for path, value in values.items() if not path.startswith("loss.")}
                       for values in (before, now))
    if old.run.seed == new.run.seed:  # null and the number that it stands for are the same data
        before["data.seed"], now["data.seed"] = old.data_seed, new.data_seed
    other_parts = {path.removesuffix("_target_") for path in {*before, *now} if path.endswith("._target_")
                   and not path.startswith("loss.") and before.get(path) != now.get(path)}
    errors = []
    for path in dict.fromkeys([*before, *now]):
        section, _, argument = path.partition(".")
        if f"{section}." in other_parts and argument != "_target_":  # arguments of two parts do not compare
            continue
        if any(path == key or key.endswith(".") and path.startswith(key) for key in free):
            continue
        if path == "run.dtype" and now[path] == "auto":  # resolves to that of the run (train/session.py)
            continue
        if path in _PATHS and _same_place(*(values.get(path) for values in places)):
            continue
        if before.get(path, MISSING) != now.get(path, MISSING):
            was, becomes = (show(values[path]) if path in values else "absent" for values in (before, now))
            errors.append(ConfigError(
                16, f"{path} was {was} and is {becomes} now", where=path,
                why="the run was trained with the first value and cannot go on with another",
                next=f"{_chosen_by(path, was) or f'{path}={was}'}, or another run.name" if path in before else
                     f"leave {path} out, or another run.name"))
    return errors


def _chosen_by(path: str, value: str) -> str | None:
    """Name the option of a group that chooses a part, as one types it; None if none or several do."""
    group = group_of(path.partition(".")[0])
    if path.partition(".")[2] != "_target_":
        return None
    found = [option for option in group_options().get(group, [])
             if load(option_file(group, option)).get("_target_") == value]
    return f"{group}={found[0]}" if len(found) == 1 else None


def _same_place(old: str | None, new: str | None) -> bool:
    """Check whether two paths may lead to the same data.

    Where the data has moved, its fingerprint decides later (train/loop.py).
    """
    if old == new:
        return True
    if not old or not new or not os.path.isabs(old) or not os.path.isabs(new):
        return False
    return not any(map(os.path.exists, (old, f"{old}.idx")))
