"""Bytes that copies of experts take on a position at their peak, by formulas for what parallel/fssdp/copies.py allocates.

    copies     weights of the copies that are here. Kept: those of all layers. Gathered again: those of the layer that
               computes; where its graph was kept, backward has also begun to gather the layer below
    sending    weights of homes on their way to copies, until they have arrived: those of one layer, or of these two
    sums       gradients of copies over all micro-batches: all layers, from a layer's first backward of a step to its end
    returned   what homes receive of them at the end of a step, all layers
    beside     homes and copies side by side while a layer computes, one matrix at a time: the larger has two thirds of an
               expert's numbers

For `packed` collectives of whole homes. Beside these a layer's copies are there once more for a moment where they are laid in the
order of slots (`two_level`) or put together from pieces, and twice more where calibration had them come in two waves.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moetrain.plan.placement import LayerPlacement


class HeldExperts(NamedTuple):
    """Experts of one layer on one position. sent: homes that leave from here, once for each copy."""

    homes: int
    copies: int
    sent: int


class CopyMemory(NamedTuple):
    """Bytes; each at its own peak."""

    copies: int
    sending: int
    sums: int
    returned: int
    beside: int


def held_at(placement: LayerPlacement, position: int) -> HeldExperts:
    """What a position holds of a layer under a placement."""
    sent = sum(placement.home[expert] == position for expert, _ in placement.copies)
    return HeldExperts(len(placement.experts_of(position)), len(placement.copies_at(position)), sent)


def copy_memory(layers: Sequence[HeldExperts], numbers: int, *, weight: int, gradient: int, rematerialize: bool,
                recompute: bool) -> CopyMemory:
    """layers: in order. numbers: of an expert. weight, gradient: bytes of one number, in the dtype of the computation and of
    the parameters. rematerialize: copies are gathered again for backward. recompute: activation checkpointing."""
    copies, sent = [layer.copies for layer in layers], [layer.sent for layer in layers]
    layers_at_once = 2 if rematerialize and not recompute else 1
    copies_here = _largest_sum(copies, layers_at_once) if rematerialize else sum(copies)
    side_by_side = max((layer.homes + layer.copies for layer in layers if layer.copies), default=0)
    return CopyMemory(copies_here * numbers * weight, _largest_sum(sent, layers_at_once) * numbers * weight, sum(copies) * numbers * gradient,
                      sum(sent) * numbers * gradient, side_by_side * (numbers * 2 // 3) * weight)


def _largest_sum(experts: list[int], layers_at_once: int) -> int:
    """The largest sum over so many neighbouring layers."""
    return max((sum(experts[first:first + layers_at_once]) for first in range(len(experts))), default=0)
