"""Who holds what: the record that expert parallelism, replication and sharded experts have in common.

`ExpertPlacement` gives every expert of every layer a home: a *position* on the `ep` axis, never a rank; and, where a plan
says so, copies on further positions. Plain expert parallelism is the placement without copies that never changes
(`contiguous`). Pure data: hashable, comparable.

A position's *slots* are the experts it can compute, in the order of its weights: its homes by id, then its copies by the
position they come from and by id, which is the order in which they arrive (comm/sparse/). Physical slot id = position *
slots_per_position + slot.

The parameters of a *sliced* expert lie nowhere whole: every position has a piece, rows of each of its matrices. Its home is
the position that always computes it, with a copy put together from all pieces, as those on further positions are. These
copies come last in the order of slots, by id.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class LayerPlacement:
    """One layer's experts.

    home: position of each expert, by global id. positions: size of the `ep` axis.
    copies: pairs (expert, position) beside the homes, in any order; kept sorted.
    sliced: experts whose parameters lie in pieces, in any order; kept sorted.
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
        """Global ids of the experts that lie here whole, ascending; may be empty."""
        return self._homes[position]

    def copies_at(self, position: int) -> tuple[int, ...]:
        """Global ids of the experts copied to this position, by their home and then by id; not the sliced ones."""
        return self._copies[position]

    def assembled_at(self, position: int) -> tuple[int, ...]:
        """Global ids of the sliced experts that this position computes, as their home or as a copy, ascending."""
        return self._assembled[position]

    def gathered_at(self, position: int) -> tuple[int, ...]:
        """Global ids of all experts that are brought to this position, in the order of their slots."""
        return self._copies[position] + self._assembled[position]

    def slots_of(self, position: int) -> tuple[int, ...]:
        """Global ids of all experts that this position computes, in the order of its slots."""
        return self._homes[position] + self.gathered_at(position)

    def holders(self, expert: int) -> tuple[int, ...]:
        """Positions that hold an expert, ascending."""
        return tuple(sorted((self.home[expert], *(at for copied, at in self.copies if copied == expert))))

    @cached_property
    def slots_per_position(self) -> int:
        return max(len(self.slots_of(position)) for position in range(self.positions))

    @cached_property
    def physical(self) -> tuple[int, ...]:
        """Physical slot id of every expert at its home, by global id."""
        ids = {(expert, position): physical for expert, position, physical in self.replicas}
        return tuple(ids[expert, home] for expert, home in enumerate(self.home))

    @cached_property
    def replicas(self) -> tuple[tuple[int, int, int], ...]:
        """(expert, position, physical slot id) of every home and copy, by expert and then by position."""
        return tuple(sorted(
            (expert, position, position * self.slots_per_position + slot)
            for position in range(self.positions) for slot, expert in enumerate(self.slots_of(position))))

    @cached_property
    def whole_copies(self) -> tuple[tuple[int, int], ...]:
        """The copies of experts that are not sliced: they come from their homes."""
        return tuple((expert, position) for expert, position in self.copies if expert not in self._sliced)

    def without_copies(self) -> "LayerPlacement":
        return LayerPlacement(self.home, self.positions, sliced=self.sliced)

    @property
    def whole(self) -> "LayerPlacement":
        """The same with no expert in pieces."""
        return self.with_sliced(())

    def with_sliced(self, sliced: tuple[int, ...]) -> "LayerPlacement":
        """The same homes and copies, and these experts in pieces."""
        return LayerPlacement(self.home, self.positions, self.copies, sliced)

    @cached_property
    def _sliced(self) -> frozenset[int]:
        return frozenset(self.sliced)

    def beyond(self, other: "LayerPlacement") -> "LayerPlacement":
        """The same with only those copies that another one does not have."""
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
        return tuple(tuple(sorted(experts, key=lambda expert: (self.home[expert], expert))) for experts in held)

    @cached_property
    def _assembled(self) -> tuple[tuple[int, ...], ...]:
        held: list[list[int]] = [[] for _ in range(self.positions)]
        for expert in self.sliced:
            for position in self.holders(expert):
                held[position].append(expert)
        return tuple(map(tuple, held))


@dataclass(frozen=True)
class ExpertPlacement:
    """The placements of all layers with experts, by router name; layers may differ in size."""

    layers: tuple[tuple[str, LayerPlacement], ...]

    def __getitem__(self, router: str) -> LayerPlacement:
        return dict(self.layers)[router]

    @property
    def homes(self) -> "ExpertPlacement":
        """The same without copies."""
        return ExpertPlacement(tuple((name, layer.without_copies()) for name, layer in self.layers))

    @property
    def whole(self) -> "ExpertPlacement":
        """The same with no expert in pieces."""
        return ExpertPlacement(tuple((name, layer.whole) for name, layer in self.layers))

    @property
    def num_copies(self) -> int:
        return sum(len(layer.copies) for _, layer in self.layers)

    @cached_property
    def digest(self) -> int:
        """63 bits that ranks compare before they act on it."""
        text = repr(tuple((name, layer.home, layer.positions, layer.copies, layer.sliced) for name, layer in self.layers))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def slice_rows(rows: int, position: int, positions: int) -> range:
    """Which rows of a matrix are a position's piece of it: as equal as they can be; none where there are fewer rows."""
    return range(rows * position // positions, rows * (position + 1) // positions)


def slice_columns(shapes: Sequence[tuple[int, int]], position: int, positions: int) -> list[slice]:
    """Where a position's piece lies in a row of numbers of an expert, whose tensors of these (rows, columns) lie side by side."""
    begins = accumulate((rows * columns for rows, columns in shapes), initial=0)
    held = [slice_rows(rows, position, positions) for rows, _ in shapes]
    return [slice(begin + rows.start * columns, begin + rows.stop * columns)
            for begin, rows, (_, columns) in zip(begins, held, shapes)]


def contiguous(num_experts: int, positions: int) -> LayerPlacement:
    """Plain expert parallelism: blocks of neighbouring experts, equal, or longer by one where they cannot be."""
    return LayerPlacement(tuple(expert * positions // num_experts for expert in range(num_experts)), positions)
