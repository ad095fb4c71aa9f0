"""Every number has bounds, of the schema and of the parts."""

import math
import re
from typing import get_args

import pytest
from hypothesis import given, settings, strategies as st

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
    return bool(kinds & {int, float, list[int],
                         list[float]}) and not any(getattr(kind, "__origin__", None) is dict
                                                   for kind in kinds)


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
    numbers = sorted(path for path, key in keys.items() if numeric(key))
    assert sorted(IN_RANGES) == numbers, "write the key in config/rules/ranges.py"
    for text, paths in RANGES.items():
        for path in paths:
            default = keys[path].default if isinstance(keys[path].default, list) else [keys[path].default]
            assert all(entry is None or parse(text).hold(entry) for entry in default), path


def test_every_number_of_every_part_has_bounds_and_its_default_is_inside() -> None:
    for target, accepted in parts().items():
        for name, key in accepted.items():
            needed = numeric(key) and name not in SIZES
            assert bool(key.bounds) == needed, (target, name, "write it in BOUNDS of the class")
            unset = key.default is None
            assert not key.bounds or unset or parse(key.bounds).hold(key.default), (target, name)


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
    ("1 or more", [1, 2**62], [0, math.nan, math.inf, 2**63]), ("-1 or more", [-1], [-2]),
    ("above 0", [1e-300, 5], [0, -1]),
    ("from 1 to 99", [1, 99], [0, 100]), ("in (0, 1]", [0.5, 1], [0, 1.1]),
    ("in [0, 1)", [0, 0.9], [1, -0.1]),
    ("in [0, 1]", [0, 1], [1.01]), ("1 or more; divides num_experts", [1, 8], [0])])
def test_phrases_mean_what_they_say(text: str, inside: list[float], outside: list[float]) -> None:
    bounds = parse(text)
    assert all(map(bounds.hold, inside)) and not any(map(bounds.hold, outside))
    assert bounds.hold(bounds.example(None,
                                      whole=False)) and (bounds.high <= 1
                                                         or bounds.hold(bounds.example(None, whole=True)))


@pytest.mark.parametrize("text, why", [
    ("at least 1", "at least 1"), ("", "is no bounds"), ("1 or more;", "is no bounds"),
    ("1.2.3 or more", "1.2.3"),
    ("from 9 to 1", "no number is from 9 to 1"), ("in [1, 1)", "no number"), ("in (0, 1)", "is no bounds"),
    ("1 or more; dvides num_experts", "no relation"),
    ("1 or more; divides dim", "divides num_experts, divides top_k")])
def test_a_phrase_that_is_none_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse(text)


# Each form with what it means of a number, written out.
FORMS = {
    "{low:g} or more": lambda low, high, x: x >= low,
    "above {low:g}": lambda low, high, x: x > low,
    "from {low:g} to {high:g}": lambda low, high, x: low <= x <= high,
    "in ({low:g}, {high:g}]": lambda low, high, x: low < x <= high,
    "in [{low:g}, {high:g})": lambda low, high, x: low <= x < high,
    "in [{low:g}, {high:g}]": lambda low, high, x: low <= x <= high,
}
NUMBERS = st.integers(-10**5, 10**5).map(lambda number: number / 1000) | st.sampled_from([0, 1e-6, 1e5, -1e5])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(form=st.sampled_from(sorted(FORMS)),
       ends=st.tuples(NUMBERS, NUMBERS).filter(lambda ends: ends[0] < ends[1]),
       value=NUMBERS | st.integers(),
       relation=st.sampled_from(["", "; divides num_experts", "; divides top_k"]))
def test_a_phrase_holds_for_the_numbers_that_it_describes(form: str, ends: tuple, value: float,
                                                          relation: str) -> None:
    phrase = form.format(low=ends[0], high=ends[1])
    bounds = parse(phrase + relation)
    assert bounds.text == phrase and bounds.divides == relation.removeprefix("; divides ")
    for number in (value, *ends):
        assert bounds.hold(number) == (FORMS[form](*ends, number) and abs(number) < 2**63)
    assert bounds.hold(bounds.example(value, whole=False))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text() | st.text("0123456789.-e ()[],;ormabvftin", max_size=30))
def test_any_other_text_is_refused_with_a_reason(text: str) -> None:
    try:
        bounds = parse(text)
    except ValueError as error:
        assert str(error)
    else:
        assert bounds.text == text and bounds.low <= bounds.high


@pytest.mark.parametrize("path, key, phrase", [
    ("router=topk", "router.scale=-1", "above 0"), ("router=sigmoid", "router.update_rate=-1", "0 or more"),
    ("capacity=prob", "capacity.min_capacity=-1", "0 or more"),
    ("balance=global", "balance.weight=-1", "0 or more"),
    ("loss=[z]", "loss.z.weight=-1", "0 or more"),
    ("parallel=fssdp planner=llep", "planner.min_rows=0", "1 or more")])
def test_a_part_outside_its_bounds_is_refused_with_key_value_and_bound(
        path: str, key: str, phrase: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        compose([*path.split(), key])
    (error,) = caught.value.errors
    assert error.id == "E-CONFIG-064" and error.what == f"{key} is out of range"
    assert error.why == f"it must be {phrase}" and key in error.where
    assert error.next.startswith(f"{key.partition('=')[0]}=")
