"""Bounds of a number, written as a phrase that a message shows and that a rule asks.

    1 or more      above 0      from 1 to 99      in (0, 1]      in [0, 1)

A part declares them beside its constructor, as literals, so that they are read without importing it:

    BOUNDS = {"p": "in (0, 1]", "groups": "1 or more; divides num_experts"}

Behind a semicolon stands what the number has to do with a size that comes from `model.*`.
"""

import math
import re
from typing import Any, NamedTuple

# What the formats of checkpoints and torch's seeds hold.
MOST = 2**63 - 1

_NUMBER = r"(-?[\d.e-]+)"
_FORMS = (
    (re.compile(rf"{_NUMBER} or more"), lambda low: (low, math.inf, True, True)),
    (re.compile(rf"above {_NUMBER}"), lambda low: (low, math.inf, False, True)),
    (re.compile(rf"from {_NUMBER} to {_NUMBER}"), lambda low, high: (low, high, True, True)),
    (re.compile(rf"in \({_NUMBER}, {_NUMBER}\]"), lambda low, high: (low, high, False, True)),
    (re.compile(rf"in \[{_NUMBER}, {_NUMBER}\)"), lambda low, high: (low, high, True, False)),
    (re.compile(rf"in \[{_NUMBER}, {_NUMBER}\]"), lambda low, high: (low, high, True, True)),
)


class Bounds(NamedTuple):
    """Ends of an interval, whether they belong to it, and the size that the number divides, if it has to."""

    text: str
    low: float
    high: float
    closed_low: bool
    closed_high: bool
    divides: str = ""

    def hold(self, value: float) -> bool:
        """Whether a number lies inside. Whole numbers fit in 64 bits, others are finite."""
        if isinstance(value, int) and abs(value) > MOST or not math.isfinite(value):
            return False
        above = value >= self.low if self.closed_low else value > self.low
        return above and (value <= self.high if self.closed_high else value < self.high)

    def example(self, default: Any, whole: bool) -> float:
        """A value that passes: the default if it does, else one near the lower end."""
        if isinstance(default, (int, float)) and self.hold(default):
            return default
        if self.closed_low:
            return int(self.low) if self.low.is_integer() else self.low
        return int(self.low) + 1 if whole else self.low + (1e-3 if self.high == math.inf else (self.high - self.low) / 2)


def parse(text: str) -> Bounds:
    """The bounds of a phrase; ValueError if it is none."""
    phrase, _, relation = text.partition("; ")
    for form, ends in _FORMS:
        if found := form.fullmatch(phrase):
            return Bounds(phrase, *ends(*map(float, found.groups())), divides=relation.removeprefix("divides "))
    raise ValueError(f"{text!r} is no bounds")
