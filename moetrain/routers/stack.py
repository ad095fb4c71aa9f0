"""Statistics of several routers as one: a loss costs the same for one layer and for fifty.

Shapes: R routers, E experts (choices, where a router has choices that are no experts).
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.routers.base import RoutingStats


class Stack(NamedTuple):
    """Statistics of consecutive routers with the same number of experts."""

    routers: tuple[str, ...]                 # their names
    stats: RoutingStats                      # each field has a leading R: counts [R, E], tokens [R]


def stacks(stats: Mapping[str, RoutingStats]) -> list[Stack]:
    """Stack the statistics of routers, in their order: one stack if all have the same number of experts."""
    found = []
    for _, alike in groupby(stats.items(), key=lambda item: len(item[1].counts_E)):
        routers, parts = zip(*alike)
        found.append(Stack(routers, RoutingStats(*map(_stacked, zip(*parts)))))
    return found


def _stacked(values: tuple[Any, ...]) -> Any:
    missing = [value is None for value in values]
    assert all(missing) or not any(missing), "some routers have sums that others have not"
    if missing[0] or isinstance(values[0], Tensor):
        return None if missing[0] else torch.stack(values)
    assert all(value.keys() == values[0].keys() for value in values), "routers bring sums of different names"
    return {name: torch.stack([value[name] for value in values]) for name in values[0]}


def by_stack(flat_L: Tensor, routers: Mapping[str, int]) -> list[Tensor]:
    """Split a flat buffer of all routers into views [R, E], one for each stack of `stacks`.

    Args:
        flat_L: one number for each expert of each router, in their order.
        routers: number of experts by router.
    """
    alike = [(experts, len(list(group))) for experts, group in groupby(routers.values())]
    parts = flat_L.split([experts * many for experts, many in alike])
    return [part.view(many, experts) for part, (experts, many) in zip(parts, alike)]
