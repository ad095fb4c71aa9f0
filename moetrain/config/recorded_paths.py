"""Paths of the data as a run records them: absolute, so that its record means the same wherever a later command is typed.

What is shown stays as it was typed; only config.yaml and the manifests of checkpoints hold these.
"""

import os
import shlex
from dataclasses import replace

from moetrain.config.schema import Config
from moetrain.config.values import schema_keys

# Values of a key that name no path.
_NO_PATHS = {"data.tokenizer": ("bytes", "none")}
# Keys that may hold several paths, with data=megatron.
_SEVERAL = ("data.path", "data.held_out")


def with_absolute_paths(config: Config) -> Config:
    """The config with every path below `data.` absolute. Links are not followed."""
    changed = {}
    for path, key in schema_keys().items():
        section, _, name = path.partition(".")
        if section == "data" and key.is_path and (value := getattr(config.data, name)) and value not in _NO_PATHS.get(path, ()):
            several = config.data.kind == "megatron" and path in _SEVERAL
            changed[name] = _each_absolute(value) if several else os.path.abspath(value)
    return replace(config, data=replace(config.data, **changed))


def _each_absolute(text: str) -> str:
    """A blend of datasets: paths between spaces, with a number before each that weighs it, or without.

    The name of one that is there may hold spaces (interop/megatron_blend.py).
    """
    if any(os.path.exists(f"{text}{suffix}") for suffix in ("", ".idx", ".bin")):
        return os.path.abspath(text)
    try:
        words = shlex.split(text)
    except ValueError:                                   # refused when the data is opened
        return text
    return shlex.join(word if len(words) > 1 and _is_number(word) else os.path.abspath(os.path.expanduser(word))
                      for word in words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
