"""Peak bytes that copies of experts take on one position.

These are formulas for what parallel/fssdp/copies.py allocates:

    copies     matrices of the copies on this position. Where they are kept for backward: those of all
               layers. Where they are gathered again: those of the layer that computes; if its graph was kept,
               backward has also begun to gather the layer below
    sending    matrices of homes on their way to copies, until they have arrived: those of one layer, or of
               these two
    sums       gradients of copies over all micro-batches: all layers, from a layer's first backward of a step
               to its end
    returned   gradients that homes receive at the end of a step, all layers
    beside     homes and copies side by side while a layer computes, one parameter at a time: the largest

They hold for `packed` collectives of whole homes. `two_level` lays a layer's copies in the order of physical
slots, and sliced experts are put together from their slices: either takes the layer's copies once more for a
moment, and twice more where calibration brought them in two gathers.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moetrain.plan.placement import LayerPlacement


class HeldExperts(NamedTuple):
    """Experts of one layer on one position.

    Attributes:
        homes: experts at home here.
        copies: copies here.
        sent: experts sent from here, counted once for each copy.
        numbers: parameters of one expert.
        largest: numbers of its largest parameter.
    """

    homes: int
    copies: int
    sent: int
    numbers: int
    largest: int


class CopyMemory(NamedTuple):
    """Bytes, each at its own peak; the module's docstring says what each is."""

    copies: int
    sending: int
    sums: int
    returned: int
    beside: int


def held_at(placement: LayerPlacement, position: int, parameters: Sequence[int]) -> HeldExperts:
    """Experts that a position holds of a layer under a placement.

    Args:
        placement: homes and copies of the layer.
        position: the position.
        parameters: numbers of each parameter of an expert.
    """
    sent = sum(placement.home[expert] == position for expert, _ in placement.copies)
    return HeldExperts(len(placement.experts_of(position)), len(placement.copies_at(position)), sent,
                       sum(parameters), max(parameters))


def copy_memory(layers: Sequence[HeldExperts], *, weight: int, gradient: int,
                rematerialize: bool, recompute: bool) -> CopyMemory:
    """Peak bytes of copies on one position.

    Args:
        layers: experts that the position holds, in the order of layers.
        weight: bytes of one number in the dtype of the computation.
        gradient: bytes of one number in the dtype of the parameters.
        rematerialize: copies are gathered again for backward.
        recompute: layers are under activation checkpointing.
    """
    copies = [layer.copies * layer.numbers for layer in layers]
    sent = [layer.sent * layer.numbers for layer in layers]
    at_once = 2 if rematerialize and not recompute else 1
    copies_here = _largest_sum(copies, at_once) if rematerialize else sum(copies)
    side_by_side = max(((layer.homes + layer.copies) * layer.largest for layer in layers if layer.copies),
                       default=0)
    return CopyMemory(copies=copies_here * weight, sending=_largest_sum(sent, at_once) * weight,
                      sums=sum(copies) * gradient, returned=sum(sent) * gradient,
                      beside=side_by_side * weight)


def _largest_sum(numbers: list[int], layers: int) -> int:
    """Largest sum over so many neighboring layers."""
    return max((sum(numbers[first:first + layers]) for first in range(len(numbers))), default=0)
