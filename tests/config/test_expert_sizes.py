"""Sizes of experts counted from the source of their form, without torch."""

import pytest

from moetrain import packages
from moetrain.config.expert_sizes import ExpertSizes, expert_sizes
from moetrain.config.schema import SWIGLU
from moetrain.errors import ConfigError
from moetrain.moe.clamped_swiglu import ClampedSwiglu
from tests.support.expert_forms import BiasedExpert, TernaryExpert

FORMS = "tests.support.expert_forms"
KEPT = {BiasedExpert: 4 + 4 * 6, TernaryExpert: 4 + 4 * 6, ClampedSwiglu: 2 * 4 + 3 * 6}


@pytest.fixture(autouse=True)
def allowed(monkeypatch) -> None:
    monkeypatch.setenv(packages.VARIABLE, "tests")


def test_swiglu_has_three_matrices_and_keeps_what_two_of_them_give() -> None:
    assert expert_sizes(SWIGLU, 4, 6) == ExpertSizes(numbers=72, in_matrices=72, kept=12)


@pytest.mark.parametrize("form", KEPT)
def test_the_source_says_what_the_class_says(form) -> None:
    target = f"{form.__module__}.{form.__name__}"
    made, counted = form(dim=4, expert_dim=6), expert_sizes({"_target_": target}, 4, 6)
    assert (counted.numbers, 2 * counted.in_matrices) == (made.numbers, made.row_flops)
    assert counted.kept == KEPT[form]


def test_what_is_no_form_counts_nothing_because_it_is_refused_elsewhere() -> None:
    assert expert_sizes({"_target_": "moetrain.moe.capacity.CapacityPolicy"}, 4, 6) == ExpertSizes(0, 0, 0)


@pytest.mark.parametrize("name, code", [("ComputedShapes", 216), ("StrangeWidth", 217)])
def test_shapes_that_cannot_be_read_are_refused(name: str, code: int) -> None:
    with pytest.raises(ConfigError, match=f"E-CONFIG-{code}"):
        expert_sizes({"_target_": f"{FORMS}.{name}"}, 4, 6)
