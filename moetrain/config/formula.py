"""Formulas over sizes and arguments of a part, written as text in its class and read without importing it.

    hidden      proj_dim or max(1, E // 2)      D if noise == 'normal' else 0      K * E / (E + num_null)

Names are letters of sizes and arguments of the class. One that is not given is None, as an argument that a
subclass does not take.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BETWEEN: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.Gt: operator.gt}
_CALLED = {"min": min, "max": max}


def evaluate(formula: str | float, names: Mapping[str, Any]) -> Any:
    """Compute a formula.

    Args:
        formula: the text, or a number.
        names: values of the names that may occur.

    Raises:
        ValueError: the text is no such formula, or has no value.
    """
    try:
        return _value(ast.parse(str(formula), mode="eval").body, names)
    except (SyntaxError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{formula!r} has no value: {type(error).__name__}: {error}") from error


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names.get(name)
        case ast.BinOp(left=left, op=between, right=right):
            return _BETWEEN[type(between)](_value(left, names), _value(right, names))
        case ast.Compare(left=left, ops=[between], comparators=[right]):
            return _BETWEEN[type(between)](_value(left, names), _value(right, names))
        case ast.BoolOp(op=ast.Or(), values=[first, *others]):
            return next((found for each in (first, *others) if (found := _value(each, names))), 0)
        case ast.IfExp(test=test, body=body, orelse=other):
            return _value(body if _value(test, names) else other, names)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _CALLED[name](*(_value(argument, names) for argument in arguments))
    raise ValueError(f"{ast.unparse(node)} is no part of a formula")
