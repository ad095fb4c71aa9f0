"""Read a yaml file of unknown origin: a run's config.yaml may have come with a stranger's checkpoint.

`load` is the only reader of yaml besides Hydra, which reads conf/. Size, depth and aliases are counted on the
parser's events, before objects exist. An alias counts as many values as its anchor holds, so that nine lines
cannot become a billion values. References `${...}` are plain text here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.errors import ConfigError, ConfigErrors
from moetrain.files import read_text, reason, shown

# A resolved config has about 6 kB and 200 values, 3 deep.
MOST_BYTES = 1 << 16
MOST_VALUES = 20_000
MOST_DEPTH = 32


class Refused(ValueError):
    """Reason why a text is no config."""


def load(path: Path) -> dict[str, Any]:
    """Read the mapping of plain values in a yaml file; ConfigErrors where it holds anything else."""
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
    """Read the mapping in a yaml text. Raises YAMLError, or ValueError with a reason."""
    import yaml

    # A private name of omegaconf 2.3, and the only way to read a file exactly as Hydra does: 1e-3 is a
    # number, a date is text, and no key occurs twice.
    from omegaconf._utils import get_yaml_loader

    loader = get_yaml_loader()
    _bounded(yaml.parse(text, Loader=loader))
    tree = plain(yaml.load(text, Loader=loader))
    if not isinstance(tree, dict):
        raise Refused("it holds no mapping")
    return tree


def _bounded(events: Any) -> None:
    """Refuse a document that is too large or endless once its aliases are expanded."""
    from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

    named: dict[str, list[int]] = {}                         # anchor -> [values, depth]
    unfinished: list[tuple[str | None, list[int]]] = [(None, [0, 0])]
    for event in events:
        if isinstance(event, AliasEvent):
            if any(event.anchor == anchor for anchor, _ in unfinished):
                line = event.start_mark.line + 1
                raise Refused(f"{shown(event.anchor, 40)} refers to itself (line {line})")
            node = named.get(event.anchor, [1, 0])  # the composer reports an undefined anchor
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
    """Copy mappings with text as keys, lists, text, numbers, true, false and null; the copy shares nothing.

    Raises Refused where the node holds anything else, too much, or is nested too deep.
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
