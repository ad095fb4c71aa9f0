"""Phrases that several rules use in their advice."""

import math

_LARGEST_TRIED = 10**6       # so that a number of any size is answered at once


def divisors(n: int) -> list[int]:
    """In order. Of a number above _LARGEST_TRIED squared those that it has below that, and their counterparts."""
    small = [d for d in range(1, min(math.isqrt(max(n, 0)), _LARGEST_TRIED) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}) or [1]


def choose(key: str, values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:16])
    return f"{key}={values[0]}" if len(values) == 1 else f"choose {key} from {shown}"


def counted_ranks(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks} ranks"
