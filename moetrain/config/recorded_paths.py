"""Paths of the data as a run records them: absolute, so that later commands may run in any folder.

Only config.yaml and the manifests of checkpoints hold them; the screen shows paths as they were typed.
"""

import os
import shlex
from dataclasses import replace
from typing import Any

from moetrain.config.schema import Config
from moetrain.config.values import schema_keys

# Values of a path key that name no path.
_NO_PATHS = {"data.tokenizer": ("bytes", "none")}
# Keys that may hold several paths, with data=megatron.
_SEVERAL = ("data.path", "data.held_out")


def with_absolute_paths(config: Config) -> Config:
    """Make every path below `data.` absolute, without following links."""
    changed: dict[str, Any] = {}  # of fields whose names are known at run time alone
    for path, key in schema_keys().items():
        section, _, name = path.partition(".")
        if section != "data" or not key.is_path:
            continue
        value = getattr(config.data, name)
        if value and value not in _NO_PATHS.get(path, ()):
            several = config.data.kind == "megatron" and path in _SEVERAL
            changed[name] = _each_absolute(value) if several else os.path.abspath(value)
    return replace(config, data=replace(config.data, **changed))


def _each_absolute(text: str) -> str:
    """Make the paths of a blend of datasets absolute.

    A blend is a list of paths between spaces, each after its weight or all without one.
    The name of an existing dataset may hold spaces (interop/megatron_blend.py).
    """
    if any(os.path.exists(f"{text}{suffix}") for suffix in ("", ".idx", ".bin")):
        return os.path.abspath(text)
    try:
        words = shlex.split(text)
    except ValueError:  # refused when the data is opened
        return text
    blend = len(words) > 1
    return shlex.join(word if blend and _is_number(word) else os.path.abspath(os.path.expanduser(word))
                      for word in words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
