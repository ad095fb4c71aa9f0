"""Formulas of parts: what they may hold, and what has no value."""

import pytest

from moetrain.config.formula import evaluate

NAMES = {"E": 8, "K": 2, "hidden": 5, "kind": "mlp", "p": 0.25, "none": None, "yes": True}


@pytest.mark.parametrize("formula, value", [
    (3, 3), ("E", 8), ("none or max(1, E // 2)", 4), ("hidden or E", 5), ("K * E / (E + 8)", 1.0),
    ("hidden if kind == 'mlp' else 0", 5), ("E if absent else K - 1", 1),
    ("(3 if kind == 'gru' else yes) * K", 2),
    ("min(none or E, max(K, p * E))", 2.0), ("none or 0", 0), ("0 if kind != 'mlp' else E", 8)])
def test_a_formula_has_its_value(formula, value) -> None:
    assert evaluate(formula, NAMES) == value


@pytest.mark.parametrize("formula", ["E +", "E / 0", "none + 1", "open('x')", "E.real", "[E]", "2 ** 64",
                                     "len(kind)"])
def test_other_text_has_none(formula: str) -> None:
    with pytest.raises(ValueError):
        evaluate(formula, NAMES)
