"""Phrases that several rules use in their advice."""

import math

# Limit of trial division, so that a number of any size is answered at once.
_LARGEST_TRIED = 10**6


def divisors(n: int) -> list[int]:
    """List the divisors of a number in order.

    Of a number above _LARGEST_TRIED squared, those below _LARGEST_TRIED and their cofactors.
    """
    small = [d for d in range(1, min(math.isqrt(max(n, 0)), _LARGEST_TRIED) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}) or [1]


def choose(key: str, values: list[int]) -> str:
    """Advise the values of a key that work."""
    shown = ", ".join(str(value) for value in values[:16])
    return f"{key}={values[0]}" if len(values) == 1 else f"choose {key} from {shown}"


def counted_ranks(ranks: int) -> str:
    """Word a number of ranks."""
    return "one rank" if ranks == 1 else f"{ranks} ranks"
