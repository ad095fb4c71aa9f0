"""What a run that begins from weights takes over from the run they come from (`init.from`).

    sections model, router, expert            unless an option of their group, or an experiment, sets them
    data.tokenizer, end_token, parse_special  with data=text, unless one of them is typed

Values that are typed lie on top, as they do on the options of conf/. So `moetrain train init.from=mine`
trains the model of `mine`, and a value that contradicts its weights is refused when they are compared
(train/initial_weights.py). Once the new run has a checkpoint, its own config.yaml is read in their place:
what it began from is not needed any more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.config.groups import group_of
from moetrain.config.overrides import DELETE, Command
from moetrain.config.run_names import has_config, places

SECTIONS = ("model", "router", "expert")
TOKENIZER = ("tokenizer", "end_token", "parse_special")


def source_config(values: Mapping[str, Any], command: Command) -> Path | None:
    """Find the config.yaml from which a command takes the model over; None where it begins from no weights.

    Args:
        values: what the options of the command compose to.
        command: the command line.
    """
    word = _value(values, command, "init.from")
    if not isinstance(word, str) or not word:
        return None
    own = _value(values, command, "run.dir") or f"runs/{_value(values, command, 'run.name')}"
    if any(Path(str(own)).glob("checkpoints/step-*")) and has_config(Path(str(own))):
        return Path(str(own)) / "config.yaml"
    runs = [run for place in places(word) for run in (place, place.parent.parent)]
    return next((run / "config.yaml" for run in runs if has_config(run)), None)


def take_over(values: dict[str, Any], source: Mapping[str, Any], command: Command,
              of_experiment: frozenset[str] = frozenset()) -> list[str]:
    """Replace sections of a composed tree by those of the run that the weights come from.

    Args:
        values: the tree, which is changed.
        source: the tree of that run.
        command: the command line.
        of_experiment: sections that the chosen experiment sets.

    Returns:
        The sections that were replaced whole.
    """
    taken = [section for section in SECTIONS
             if group_of(section) not in command.choices and section not in of_experiment]
    values |= {section: source[section] for section in taken}
    typed = any(f"data.{name}" in command.values for name in TOKENIZER)
    kinds = {_value(values, command, "data.kind"), source["data"]["kind"]}
    if kinds == {"text"} and not typed and "data" not in of_experiment:
        values["data"] = {**values["data"], **{name: source["data"][name] for name in TOKENIZER}}
    return taken


def _value(values: Mapping[str, Any], command: Command, path: str) -> Any:
    if (given := command.values.get(path)) is not None:
        return None if given.value is DELETE else given.value
    section, _, name = path.partition(".")
    return (values.get(section) or {}).get(name)
