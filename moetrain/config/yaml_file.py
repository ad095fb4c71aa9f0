"""Read a yaml file whose author is unknown: a run's config.yaml may have come with somebody else's checkpoint.

`load` is the only reader of yaml besides Hydra, which reads conf/. Size, depth and aliases are counted on the parser's
events, before an object is made of them: an alias stands for as many values as what it names, so that nine lines cannot
become a billion values. References `${...}` are plain text here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.errors import ConfigError, ConfigErrors
from moetrain.files import read_text, reason, shown

# A resolved config has about 6 kB, 200 values, and is 3 deep.
MOST_BYTES = 1 << 16
MOST_VALUES = 20_000
MOST_DEPTH = 32


class Refused(ValueError):
    """What keeps a text from being a config."""


def load(path: Path) -> dict[str, Any]:
    """The mapping that a yaml file holds, made of plain values; ConfigErrors when it holds anything else."""
    from yaml import YAMLError

    try:
        return parse(read_text(path, limit=MOST_BYTES))
    except YAMLError as error:
        why = " ".join(str(error).split())
    except (OSError, ValueError) as error:
        why = reason(error)
    raise ConfigErrors([ConfigError(17, "a yaml file cannot be read", where=str(path), why=shown(why, 300),
                                    next="restore the file; for a run, another run.name starts a new one")])


def parse(text: str) -> dict[str, Any]:
    """The mapping in a yaml text. Raises YAMLError, or ValueError with a reason."""
    import yaml

    # Private, and the only way to read a file exactly as Hydra does: 1e-3 is a number, a date is text, no key twice.
    from omegaconf._utils import get_yaml_loader  # seen in omegaconf 2.3

    loader = get_yaml_loader()
    _bounded(yaml.parse(text, Loader=loader))
    tree = plain(yaml.load(text, Loader=loader))
    if not isinstance(tree, dict):
        raise Refused("it holds no mapping")
    return tree


def _bounded(events: Any) -> None:
    """Refuse what would take too long, or never end, once aliases are filled in."""
    from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

    named: dict[str, list[int]] = {}                         # anchor -> [values, depth]
    unfinished: list[tuple[str | None, list[int]]] = [(None, [0, 0])]
    for event in events:
        if isinstance(event, AliasEvent):
            if any(event.anchor == anchor for anchor, _ in unfinished):
                raise Refused(f"{shown(event.anchor, 40)} refers to itself (line {event.start_mark.line + 1})")
            node = named.get(event.anchor, [1, 0])           # the composer reports one that is not defined
        elif isinstance(event, CollectionStartEvent):
            unfinished.append((event.anchor, [1, 0]))
            node = None
        elif isinstance(event, CollectionEndEvent):
            anchor, node = unfinished.pop()
            named[anchor or ""] = node
        elif isinstance(event, NodeEvent):
            node = named[event.anchor or ""] = [1, 0]
        else:
            continue
        inside = unfinished[-1][1]
        if node:
            inside[0] += node[0]
            inside[1] = max(inside[1], node[1] + 1)
        if inside[0] > MOST_VALUES:
            raise Refused(f"it holds more than {MOST_VALUES:,} values (line {event.start_mark.line + 1})")
        if len(unfinished) + inside[1] > MOST_DEPTH:
            raise Refused(f"it is nested more than {MOST_DEPTH} deep (line {event.start_mark.line + 1})")


def plain(node: Any) -> Any:
    """A copy that shares nothing, of mappings with text as keys, lists, text, numbers, true, false and null.

    Refused where it holds anything else, too much, or is nested too deep.
    """
    return _plain(node, iter(range(MOST_VALUES)), MOST_DEPTH)


def _plain(node: Any, left: Iterator[int], depth: int) -> Any:
    if depth == 0:
        raise Refused(f"it is nested more than {MOST_DEPTH} deep")
    if next(left, None) is None:
        raise Refused(f"it holds more than {MOST_VALUES:,} values")
    if isinstance(node, dict):
        if wrong := [key for key in node if not isinstance(key, str)]:
            raise Refused(f"the key {shown(wrong[0], 40)} is not text")
        return {key: _plain(value, left, depth - 1) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value, left, depth - 1) for value in node]
    if node is not None and type(node) not in (str, int, float, bool):
        raise Refused(f"{shown(node, 40)} is a {type(node).__name__}")
    return node
