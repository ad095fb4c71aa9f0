"""Placement of experts: one record of homes, copies and sliced experts for all forms of expert parallelism.

`ExpertPlacement` gives every expert of every layer a home, and copies on further positions where a plan says
so. A home is a *position* on the `ep` axis, never a rank. Plain expert parallelism is a placement without
copies that never changes (`contiguous`). Placements are pure data: hashable and comparable.

The *physical slots* of a position are the experts that it can compute, in the order in which its matrices are
stacked: its homes by id, then its copies by the position they come from and by id, which is the order in
which they arrive (comm/sparse/). The id of a physical slot is position * slots_per_position + index of the
slot.

The parameters of a *sliced* expert are nowhere whole: every position has a slice, rows of each of its
matrices. Its home is the position that always computes it, with a copy assembled from all slices; its copies
on further positions are assembled in the same way. Assembled copies come last in the order of slots, by id.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod


@dataclass(frozen=True)
class LayerPlacement:
    """Homes, copies and sliced experts of one layer.

    Args:
        home: position of each expert, by global id.
        positions: size of the `ep` axis.
        copies: pairs (expert, position) beside the homes, in any order; kept sorted.
        sliced: experts whose parameters lie in slices, in any order; kept sorted.
    """

    home: tuple[int, ...]
    positions: int
    copies: tuple[tuple[int, int], ...] = ()
    sliced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert all(0 <= position < self.positions for position in self.home), (self.home, self.positions)
        object.__setattr__(self, "copies", tuple(sorted(self.copies)))
        assert len(set(self.copies)) == len(self.copies), self.copies
        for expert, position in self.copies:
            assert 0 <= expert < self.num_experts and 0 <= position < self.positions, (expert, position)
            assert position != self.home[expert], (expert, position)
        object.__setattr__(self, "sliced", tuple(sorted(self.sliced)))
        assert len(set(self.sliced)) == len(self.sliced), self.sliced
        assert all(0 <= expert < self.num_experts for expert in self.sliced), (self.sliced, self.num_experts)

    @property
    def num_experts(self) -> int:
        return len(self.home)

    def experts_of(self, position: int) -> tuple[int, ...]:
        """Global ids of the experts whose parameters are here, whole, ascending; may be empty."""
        return self._homes[position]

    def copies_at(self, position: int) -> tuple[int, ...]:
        """Global ids of the experts copied whole to this position, by their home and then by id."""
        return self._copies[position]

    def assembled_at(self, position: int) -> tuple[int, ...]:
        """Global ids of the sliced experts that this position computes, as home or as copy, ascending."""
        return self._assembled[position]

    def gathered_at(self, position: int) -> tuple[int, ...]:
        """Global ids of all experts that are gathered to this position, in the order of their slots."""
        return self._copies[position] + self._assembled[position]

    def slots_of(self, position: int) -> tuple[int, ...]:
        """Global ids of all experts that this position computes, in the order of its slots."""
        return self._homes[position] + self.gathered_at(position)

    def holders(self, expert: int) -> tuple[int, ...]:
        """Positions that compute an expert, its home and its copies, ascending."""
        return tuple(sorted((self.home[expert], *(at for copied, at in self.copies if copied == expert))))

    @cached_property
    def slots_per_position(self) -> int:
        return max(len(self.slots_of(position)) for position in range(self.positions))

    @cached_property
    def physical(self) -> tuple[int, ...]:
        """Physical slot of every expert at its home, by global id."""
        ids = {(expert, position): physical for expert, position, physical in self.replicas}
        return tuple(ids[expert, home] for expert, home in enumerate(self.home))

    @cached_property
    def replicas(self) -> tuple[tuple[int, int, int], ...]:
        """(expert, position, physical slot) of every home and copy, by expert and then by position."""
        return tuple(sorted(
            (expert, position, position * self.slots_per_position + slot)
            for position in range(self.positions) for slot, expert in enumerate(self.slots_of(position))))

    @cached_property
    def whole_copies(self) -> tuple[tuple[int, int], ...]:
        """Copies of the experts that are not sliced. These come from their homes."""
        return tuple((expert, position) for expert, position in self.copies if expert not in self._sliced)

    def without_copies(self) -> "LayerPlacement":
        """The same homes and sliced experts, and no copies."""
        return LayerPlacement(self.home, self.positions, sliced=self.sliced)

    @property
    def whole(self) -> "LayerPlacement":
        """The same homes and copies, and no sliced experts."""
        return self.with_sliced(())

    def with_sliced(self, sliced: tuple[int, ...]) -> "LayerPlacement":
        """The same homes and copies, with these experts sliced."""
        return LayerPlacement(self.home, self.positions, self.copies, sliced)

    @cached_property
    def _sliced(self) -> frozenset[int]:
        return frozenset(self.sliced)

    def beyond(self, other: "LayerPlacement") -> "LayerPlacement":
        """The same homes, with only those copies that the other placement does not have."""
        return replace(self, copies=tuple(set(self.copies) - set(other.copies)))

    @cached_property
    def _homes(self) -> tuple[tuple[int, ...], ...]:
        held: list[list[int]] = [[] for _ in range(self.positions)]
        for expert, position in enumerate(self.home):
            if expert not in self._sliced:
                held[position].append(expert)
        return tuple(map(tuple, held))

    @cached_property
    def _copies(self) -> tuple[tuple[int, ...], ...]:
        held: list[list[int]] = [[] for _ in range(self.positions)]
        for expert, position in self.whole_copies:
            held[position].append(expert)
        return tuple(tuple(sorted(experts, key=lambda expert: (self.home[expert], expert)))
                     for experts in held)

    @cached_property
    def _assembled(self) -> tuple[tuple[int, ...], ...]:
        held: list[list[int]] = [[] for _ in range(self.positions)]
        for expert in self.sliced:
            for position in self.holders(expert):
                held[position].append(expert)
        return tuple(map(tuple, held))


@dataclass(frozen=True)
class ExpertPlacement:
    """Placements of all banks of experts, by name. They may differ in their number of experts."""

    layers: tuple[tuple[str, LayerPlacement], ...]

    def __getitem__(self, bank: str) -> LayerPlacement:
        return dict(self.layers)[bank]

    def only(self, names: Sequence[str]) -> "ExpertPlacement":
        """The placements of some layers, in the order of the names."""
        return ExpertPlacement(tuple((name, self[name]) for name in names))

    @property
    def homes(self) -> "ExpertPlacement":
        """The same placements without copies."""
        return ExpertPlacement(tuple((name, layer.without_copies()) for name, layer in self.layers))

    @property
    def whole(self) -> "ExpertPlacement":
        """The same placements without sliced experts."""
        return ExpertPlacement(tuple((name, layer.whole) for name, layer in self.layers))

    @property
    def num_copies(self) -> int:
        return sum(len(layer.copies) for _, layer in self.layers)

    @cached_property
    def digest(self) -> int:
        """63-bit hash that ranks compare before they act on a placement."""
        text = repr(tuple((name, layer.home, layer.positions, layer.copies, layer.sliced)
                          for name, layer in self.layers))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def slice_rows(rows: int, position: int, positions: int) -> range:
    """Rows of a matrix that make up a position's slice of it.

    Slices are as equal as they can be, and empty at some positions where there are fewer rows than positions.

    Args:
        rows: rows of the whole matrix.
        position: position that holds the slice.
        positions: size of the `ep` axis.
    """
    return range(rows * position // positions, rows * (position + 1) // positions)


def slice_columns(shapes: Sequence[tuple[int, ...]], position: int, positions: int) -> list[slice]:
    """Where a position's slice lies in the flattened parameters of an expert.

    Args:
        shapes: shapes of the expert's parameters, which lie side by side in one row of numbers; a vector is
            a matrix of one column.
        position: position that holds the slice.
        positions: size of the `ep` axis.

    Returns:
        One `slice` of that row for each parameter.
    """
    begins = accumulate(map(prod, shapes), initial=0)
    held = [slice_rows(shape[0], position, positions) for shape in shapes]
    return [slice(begin + rows.start * prod(shape[1:]), begin + rows.stop * prod(shape[1:]))
            for begin, rows, shape in zip(begins, held, shapes)]


def contiguous(num_experts: int, positions: int) -> LayerPlacement:
    """Plain expert parallelism: blocks of neighboring experts whose sizes differ by one at most."""
    home = tuple(expert * positions // num_experts for expert in range(num_experts))
    return LayerPlacement(home, positions)
