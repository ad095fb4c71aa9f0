"""Names under which held-out loss is measured: each domain, or the largest ones by name and the rest as one.

Two thousand domains would be two thousand figures, each of a handful of windows, on a line, in every record
and down a picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_NAMED = 32                  # domains by name; an evaluation reports at most one part more
OTHERS = "other domains"


class Part(NamedTuple):
    """A name, and the indices of the domains whose held-out text is measured under it."""

    name: str
    domains: list[int]


def measured_parts(domains: Sequence[str], sizes: Sequence[int]) -> list[Part]:
    """Group domains into the parts that are measured.

    Args:
        domains: names of the domains.
        sizes: held-out tokens of each; of equal sizes the first counts as the larger.
    """
    if len(domains) <= MOST_NAMED + 1:
        return [Part(name, [index]) for index, name in enumerate(domains)]
    largest = np.argsort(-np.asarray(sizes, np.int64), kind="stable")[:MOST_NAMED]
    named = sorted(largest.tolist())
    others = sorted(set(range(len(domains))) - set(named))
    pooled = OTHERS
    while pooled in domains:
        pooled += " (pooled)"
    return [*(Part(domains[index], [index]) for index in named), Part(pooled, others)]
