"""Words of verbs that take keys of their own: `out=DIR`, `--json`."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moetrain.config.suggest import nearest
from moetrain.errors import ConfigError, ConfigErrors

_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000 ** power for power, letter in enumerate("KMGT", 1)},
          **{f"{letter}IB": 1024 ** power for power, letter in enumerate("KMGT", 1)}}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


class Words(NamedTuple):
    """The words behind a verb, sorted.

    Attributes:
        names: words without `=`.
        keys: values by key.
        others: words that set keys of a run, where the verb takes them.
        as_json: whether --json is among them.
    """

    names: list[str]
    keys: dict[str, str]
    others: list[str]
    as_json: bool


def read_words(verb: str, argv: Sequence[str], keys: Mapping[str, str],
               sections: Sequence[str] = ()) -> Words:
    """Sort the words behind a verb; raises ConfigErrors with every one that is not known.

    Args:
        verb: the verb.
        argv: the words.
        keys: its keys, each with an example of a value.
        sections: sections of a run's config whose keys it takes, too.
    """
    found, errors = Words([], {}, [], "--json" in argv), []
    for word in argv:
        key, given, value = word.partition("=")
        if word == "--json":
            continue
        if not given and not word.startswith("-"):
            found.names.append(word)
        elif key in keys and value and key not in found.keys:
            found.keys[key] = value
        elif given and key.lstrip("+").partition(".")[0] in sections:
            found.others.append(word)
        else:
            why = (f"{key} has no value" if key in keys and not value else f"{key} is given twice"
                   if key in keys else f"its keys are {', '.join(keys)}")
            near = [key] if key in keys else nearest(key, keys) or list(keys)
            errors.append(ConfigError(
                317, f"moetrain {verb} cannot read {word}", where="the command line", why=why,
                next=" or ".join(f"{name}={keys[name]}" for name in near)))
    if errors:
        raise ConfigErrors(errors)
    return found


def one_of(key: str, value: str, choices: Sequence[str]) -> str:
    """Return a value that is one of several; raises ConfigError for another."""
    if value not in choices:
        near = nearest(value, choices) or list(choices)
        raise ConfigError(318, f"{key}={value} is not one of its values", where="the command line",
                          why=f"it is one of {', '.join(choices)}",
                          next=" or ".join(f"{key}={choice}" for choice in near))
    return value


def byte_count(key: str, value: str) -> int:
    """Read a number of bytes: 5GB, 500MB, 2GiB; raises ConfigError where it is none."""
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(318, f"{key}={value} is no size", where="the command line",
                          why="it is a number of bytes above 0, with a unit or without", next=f"{key}=5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
