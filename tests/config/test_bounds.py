"""Every number has bounds, of the schema and of the parts."""

import math
from typing import get_args

import pytest

from moetrain.config.bounds import parse
from moetrain.config.build import FAMILIES, SIZES, arguments
from moetrain.config.compose import compose
from moetrain.config.groups import config_dir, group_options
from moetrain.config.rules.ranges import RANGES
from moetrain.config.values import Key, schema_keys
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigErrors

IN_RANGES = [path for paths in RANGES.values() for path in paths]


def numeric(key: Key) -> bool:
    kinds = {key.type, *get_args(key.type)}
    return bool(kinds & {int, float, list[int], list[float]}) and not any(getattr(kind, "__origin__", None) is dict for kind in kinds)


def parts() -> dict[str, dict[str, Key]]:
    """Target -> arguments of every part that an option names."""
    found = {}
    for family in set(FAMILIES) & set(group_options()):
        for option in group_options()[family]:
            tree = load(config_dir() / family / f"{option}.yaml")
            for node in [tree] if family != "loss" else tree.values():
                found[node["_target_"]] = arguments(node["_target_"], family)
    return found


def test_every_number_of_the_schema_has_bounds_and_its_default_is_inside() -> None:
    keys = schema_keys()
    assert sorted(IN_RANGES) == sorted(path for path, key in keys.items() if numeric(key)), "write the key in config/rules/ranges.py"
    for text, paths in RANGES.items():
        for path in paths:
            default = keys[path].default if isinstance(keys[path].default, list) else [keys[path].default]
            assert all(entry is None or parse(text).hold(entry) for entry in default), path


def test_every_number_of_every_part_has_bounds_and_its_default_is_inside() -> None:
    for target, accepted in parts().items():
        for name, key in accepted.items():
            assert bool(key.bounds) == (numeric(key) and name not in SIZES), (target, name, "write it in BOUNDS of the class")
            assert not key.bounds or parse(key.bounds).hold(key.default), (target, name)


@pytest.mark.parametrize("path", IN_RANGES)
def test_no_key_takes_what_no_machine_holds(path: str) -> None:
    """Far too large, and not a number; in the ways in which a list and a whole number are typed."""
    key = schema_keys()[path]
    is_list, whole = "list[" in str(key.type) and int not in get_args(key.type), "int" in str(key.type)
    for value in [str(2**64)] if whole else ["nan", "inf"]:
        with pytest.raises(ConfigErrors) as caught:
            compose([f"{path}=[{value},{value}]" if is_list else f"{path}={value}"])
        assert any(error.id in ("E-CONFIG-020", "E-CONFIG-100") for error in caught.value.errors)


@pytest.mark.parametrize("text, inside, outside", [
    ("1 or more", [1, 2**62], [0, math.nan, math.inf, 2**63]), ("-1 or more", [-1], [-2]), ("above 0", [1e-300, 5], [0, -1]),
    ("from 1 to 99", [1, 99], [0, 100]), ("in (0, 1]", [0.5, 1], [0, 1.1]), ("in [0, 1)", [0, 0.9], [1, -0.1]),
    ("in [0, 1]", [0, 1], [1.01]), ("1 or more; divides num_experts", [1, 8], [0])])
def test_phrases_mean_what_they_say(text: str, inside: list[float], outside: list[float]) -> None:
    bounds = parse(text)
    assert all(map(bounds.hold, inside)) and not any(map(bounds.hold, outside))
    assert bounds.hold(bounds.example(None, whole=False)) and (bounds.high <= 1 or bounds.hold(bounds.example(None, whole=True)))


def test_a_phrase_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        parse("at least 1")
