"""What held-out loss is told of: each domain, or, of many, the largest by name and the rest as one.

Two thousand domains would be two thousand figures on a line, in every record and down a picture, each of a handful of windows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_NAMED = 32  # domains; the line, the records and the picture of an evaluation have one more at most
OTHERS = "other domains"


class Part(NamedTuple):
    """A name, and the domains whose held-out text is measured under it, by index."""

    name: str
    domains: list[int]


def measured_parts(domains: Sequence[str], sizes: Sequence[int]) -> list[Part]:
    """sizes: held-out tokens of each domain; of equal ones the first is the larger."""
    if len(domains) <= MOST_NAMED + 1:
        return [Part(name, [index]) for index, name in enumerate(domains)]
    largest = np.argsort(-np.asarray(sizes, np.int64), kind="stable")[:MOST_NAMED]
    named = sorted(largest.tolist())
    others = sorted(set(range(len(domains))) - set(named))
    pooled = OTHERS
    while pooled in domains:
        pooled += " (pooled)"
    return [*(Part(domains[index], [index]) for index in named), Part(pooled, others)]
