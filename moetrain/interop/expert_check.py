"""Whether every expert of a checkpoint is there, and differs from the others.

Expert-parallel training holds different experts under one name on every rank. A program that saves them as
plain tensors keeps those of one rank: the file is sound, and most experts are gone. What can be seen of it:

    missing      ids with gaps; a matrix that an expert lacks; fewer experts than the router chooses from, or
                 than config.json says; layers with different numbers where no router says that it must be so
    the same     two experts of a layer with equal bytes, or one matrix of theirs
    no values    an expert, or a matrix of it, that is zero throughout, or holds NaN or infinity

A folder without router and config does not say how many experts there should be: this is said, too. Biases,
scales and adapters may be zero or equal. Moments of an optimizer may be zero: an expert that no token has
chosen. No torch is imported; elements are unsigned numbers of their width.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from moetrain.interop.expert_names import Bank, Place, is_minor

_SHOWN = 8  # ids in a sentence


class _Bits(NamedTuple):
    """Which elements of a dtype are zero, and which are no number."""

    magnitude: int  # all bits but the sign
    exponent: int   # elements that have all of these bits are no finite number


_FLOATS = {"F64": _Bits((1 << 63) - 1, 0x7FF << 52), "F32": _Bits((1 << 31) - 1, 0xFF << 23),
           "F16": _Bits(0x7FFF, 0x7C00), "BF16": _Bits(0x7FFF, 0x7F80),
           "F8_E5M2": _Bits(0x7F, 0x7C), "F8_E4M3": _Bits(0x7F, 0x7F)}


class Weights(Protocol):
    """Tensors by name, read in rows of their first dim as unsigned numbers."""

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, as safetensors names it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Read rows [first, first + rows)."""


class Verdict(NamedTuple):
    """What was found about the experts of a layer.

    Attributes:
        lost: experts that are missing, or are no numbers.
        alike: experts that are zero, or equal to others.
    """

    bank: Bank
    lost: list[str]
    alike: list[str]


def check_experts(banks: list[Bank], weights: Weights, *, expected: int | None = None,
                  routers: bool = True, progress: Callable[[int], None] = lambda count: None,
                  ) -> Iterator[Verdict]:
    """Check the experts of a checkpoint, bank by bank; every matrix of every expert is read once.

    Args:
        banks: experts by name (expert_names.py).
        weights: reads them.
        expected: number of experts of a layer that a config says; None where none does.
        routers: whether a router's rows are experts, every one.
        progress: called with the number of bytes read since the last call.
    """
    counts = {bank.name: max(bank.ids) + 1 for bank in banks}
    for bank in banks:
        lost = [*_missing(bank, expected, routers), *_unlike_shapes(bank, weights)]
        if _is_told(bank, expected, routers) is None and len(
                {counts[other.name] for other in banks if _family(other) == _family(bank)}) > 1:
            lost.append(f"it has {counts[bank.name]} experts, and other layers have another number")
        found, alike = _values(bank, weights, progress)
        yield Verdict(bank, lost + found, alike)


def unseen(banks: list[Bank], tensors: Iterable[str], expected: int | None) -> Iterator[str]:
    """Say what the check cannot tell.

    Args:
        banks: that were checked.
        tensors: of experts, whose names and shapes do not say which expert's they are.
        expected: number of experts that a config says.
    """
    untold = [bank.name for bank in banks if not bank.is_optimizer and _is_told(bank, expected, True) is None]
    if untold:
        yield (f"no router and no config.json says how many experts {_listed(untold)} should have: experts "
               "behind the last one that is there would not be missed")
    names = list(tensors)
    if names:
        yield f"{_listed(names)}: two dims do not say where one expert ends, so experts are not compared"


def _is_told(bank: Bank, expected: int | None, routers: bool) -> int | None:
    """Number of experts that a layer must have, as far as something says it."""
    return bank.chosen_from if routers and bank.chosen_from is not None else expected


def _family(bank: Bank) -> tuple[bool, frozenset[str]]:
    """What banks have in common that should have equal numbers of experts."""
    return bank.is_optimizer, frozenset(bank.matrices)


def _missing(bank: Bank, expected: int | None, routers: bool) -> Iterator[str]:
    ids, told = bank.ids, _is_told(bank, expected, routers)
    count = max(ids) + 1
    gaps = sorted(set(range(count)) - ids)
    if gaps:
        yield f"{_experts(gaps)} missing among {count}"
    if told is not None and told > count:
        by = f"the router ({bank.router}) chooses from" if told == bank.chosen_from and routers else \
            "config.json speaks of"
        yield f"{by} {told} experts, and {count} are there: {_experts(list(range(count, told)))} missing"
    if told is not None and told < count:
        yield f"{count} experts are there, and {bank.router or 'config.json'} knows {told}"
    for matrix, places in bank.matrices.items():
        without = sorted(ids - places.keys())
        if without:
            yield f"{_experts(without)} without {matrix}"


def _unlike_shapes(bank: Bank, weights: Weights) -> Iterator[str]:
    for matrix, places in bank.matrices.items():
        shapes = {weights.shape(place.tensor)[len(place.indices):] for place in places.values()}
        if len(shapes) > 1:
            yield f"{matrix} has the shapes {', '.join(sorted(str(list(shape)) for shape in shapes))}"


def _values(bank: Bank, weights: Weights, progress: Callable[[int], None]) -> tuple[list[str], list[str]]:
    """Read every matrix once: what is no number, and what is zero or equal to that of another expert."""
    whole = {expert: hashlib.blake2b() for expert in bank.ids}
    empty = dict.fromkeys(bank.ids, True)  # every matrix is zero
    broken: dict[int, list[str]] = {}
    zeros: dict[str, list[int]] = {}
    same: dict[str, dict[bytes, list[int]]] = {}
    for matrix, places in sorted(bank.matrices.items()):
        for expert in sorted(places):
            values = _read(weights, places[expert])
            progress(values.nbytes)
            content = values.tobytes()
            whole[expert].update(content)
            bits = _FLOATS.get(weights.dtype(places[expert].tensor))
            if bits and bool(((values & bits.exponent) == bits.exponent).any()):
                broken.setdefault(expert, []).append(matrix)
            zero = not bool((values & bits.magnitude if bits else values).any())
            empty[expert] &= zero
            if not is_minor(matrix):
                if zero:
                    zeros.setdefault(matrix, []).append(expert)
                else:
                    digest = hashlib.blake2b(content).digest()
                    same.setdefault(matrix, {}).setdefault(digest, []).append(expert)
    lost = [f"expert {expert} has NaN or infinity in {', '.join(matrices)}"
            for expert, matrices in sorted(broken.items())]
    return lost, list(_alike(bank, whole, empty, zeros, same))


def _alike(bank: Bank, whole: dict[int, "hashlib.blake2b"], empty: dict[int, bool],
           zeros: dict[str, list[int]], same: dict[str, dict[bytes, list[int]]]) -> Iterator[str]:
    """Yield experts that are zero or equal; single matrices only where the experts are not so as a whole."""
    if not bank.is_optimizer:
        nothing = sorted(expert for expert, zero in empty.items() if zero)
        if nothing:
            yield f"{_experts(nothing)} zero throughout"
        for matrix, experts in zeros.items():
            part = [expert for expert in experts if not empty[expert]]
            if part:
                yield f"{_experts(part)} zero in {matrix}"
    groups: dict[bytes, list[int]] = {}
    for expert, digest in whole.items():
        if not empty[expert]:
            groups.setdefault(digest.digest(), []).append(expert)
    equal = {tuple(sorted(experts)) for experts in groups.values() if len(experts) > 1}
    for group in sorted(equal):
        yield f"{_experts(list(group))} equal to each other, byte for byte"
    for matrix, digests in same.items():
        for found in digests.values():
            if len(found) > 1 and not any(set(found) <= set(group) for group in equal):
                yield f"{_experts(found)} equal to each other in {matrix}"


def _read(weights: Weights, place: Place) -> np.ndarray:
    """Read one matrix of one expert."""
    if not place.indices:
        return weights.read(place.tensor)
    rows = weights.read(place.tensor, place.indices[0], 1)[0]
    return rows[place.indices[1]] if len(place.indices) > 1 else rows


def _experts(ids: list[int]) -> str:
    """Subject and verb of a sentence about experts."""
    return f"{'expert' if len(ids) == 1 else 'experts'} {_listed(ids)} {'is' if len(ids) == 1 else 'are'}"


def _listed(values: list[int] | list[str]) -> str:
    shown = ", ".join(map(str, values[:_SHOWN]))
    return f"{shown} and {len(values) - _SHOWN} more" if len(values) > _SHOWN else shown
