"""Bounds of a number, written as a phrase that an error message shows and a rule checks.

    1 or more      above 0      from 1 to 99      in (0, 1]      in [0, 1)      in [0, 1]

A part declares the bounds of its arguments as literals beside its constructor, so that config/build.py reads
them from source without importing the part:

    BOUNDS = {"p": "in (0, 1]", "groups": "1 or more; divides num_experts"}

A relation to a size of the model follows a semicolon.
"""

import math
import re
from typing import Any, NamedTuple

# The largest integer that the checkpoint format and torch's seeds can hold.
MOST = 2**63 - 1
# Sizes of model.* that an argument may have to divide.
DIVIDED = ("num_experts", "top_k")

_NUMBER = r"(-?[\d.]+(?:e-?\d+)?)"
_FORMS = (
    (re.compile(rf"{_NUMBER} or more"), lambda low: (low, math.inf, True, True)),
    (re.compile(rf"above {_NUMBER}"), lambda low: (low, math.inf, False, True)),
    (re.compile(rf"from {_NUMBER} to {_NUMBER}"), lambda low, high: (low, high, True, True)),
    (re.compile(rf"in \({_NUMBER}, {_NUMBER}\]"), lambda low, high: (low, high, False, True)),
    (re.compile(rf"in \[{_NUMBER}, {_NUMBER}\)"), lambda low, high: (low, high, True, False)),
    (re.compile(rf"in \[{_NUMBER}, {_NUMBER}\]"), lambda low, high: (low, high, True, True)),
)
_RELATION = re.compile(rf"divides ({'|'.join(DIVIDED)})")


class Bounds(NamedTuple):
    """An interval, and the size of the model that the number has to divide, if any.

    `closed_low` and `closed_high` say whether an end belongs to the interval.
    """

    text: str
    low: float
    high: float
    closed_low: bool
    closed_high: bool
    divides: str = ""

    def hold(self, value: float) -> bool:
        """Check that a number lies inside. Integers have to fit in 64 bits, floats have to be finite."""
        if isinstance(value, int) and abs(value) > MOST or not math.isfinite(value):
            return False
        above = value >= self.low if self.closed_low else value > self.low
        return above and (value <= self.high if self.closed_high else value < self.high)

    def example(self, default: Any, whole: bool) -> float:
        """Return a value that passes: the default if it does, else one near the lower end."""
        if isinstance(default, (int, float)) and self.hold(default):
            return default
        if self.closed_low:
            return int(self.low) if self.low.is_integer() else self.low
        if whole:
            return int(self.low) + 1
        return self.low + (1e-3 if self.high == math.inf else (self.high - self.low) / 2)


def parse(text: str) -> Bounds:
    """Parse a phrase; ValueError with the reason if it is malformed or if no number fits it."""
    phrase, semicolon, relation = text.partition("; ")
    divided = _RELATION.fullmatch(relation)
    if semicolon and not divided:
        known = ", ".join(f"divides {size}" for size in DIVIDED)
        raise ValueError(f"{relation!r} is no relation; known are {known}")
    for form, ends in _FORMS:
        if found := form.fullmatch(phrase):
            low, high, closed_low, closed_high = ends(*map(float, found.groups()))
            bounds = Bounds(phrase, low, high, closed_low, closed_high, divided[1] if divided else "")
            point = bounds.closed_low and bounds.closed_high
            if bounds.low > bounds.high or bounds.low == bounds.high and not point:
                raise ValueError(f"no number is {phrase}")
            return bounds
    raise ValueError(f"{text!r} is no bounds")
