"""Who holds what: the record that expert parallelism, replication and sharded experts have in common.

`ExpertPlacement` gives every expert of every layer a home: a *position* on the `ep` axis, never a rank. Plain expert
parallelism is the placement without copies that never changes (`contiguous`). Pure data: hashable, comparable.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerPlacement:
    """Homes of one layer's experts.

    home: position of each expert, by global id. positions: size of the `ep` axis.
    Physical slot id of an expert = position * slots_per_position + its index among the experts of that position.
    """

    home: tuple[int, ...]
    positions: int

    def __post_init__(self) -> None:
        assert all(0 <= position < self.positions for position in self.home), (self.home, self.positions)

    @property
    def num_experts(self) -> int:
        return len(self.home)

    @cached_property
    def slots_per_position(self) -> int:
        return max(self.home.count(position) for position in range(self.positions))

    def experts_of(self, position: int) -> tuple[int, ...]:
        """Global ids of the experts whose home is this position, ascending; may be empty."""
        return tuple(expert for expert, home in enumerate(self.home) if home == position)

    @cached_property
    def physical(self) -> tuple[int, ...]:
        """Physical slot id of every expert, by global id."""
        taken = [0] * self.positions
        slots = []
        for home in self.home:
            slots.append(home * self.slots_per_position + taken[home])
            taken[home] += 1
        return tuple(slots)


@dataclass(frozen=True)
class ExpertPlacement:
    """Homes of all experts, by router name; layers may differ in size."""

    layers: tuple[tuple[str, LayerPlacement], ...]

    def __getitem__(self, router: str) -> LayerPlacement:
        return dict(self.layers)[router]


def contiguous(num_experts: int, positions: int) -> LayerPlacement:
    """Plain expert parallelism: equal blocks of neighbouring experts."""
    assert num_experts % positions == 0, (num_experts, positions)     # config/checks.py refuses it with advice
    block = num_experts // positions
    return LayerPlacement(tuple(expert // block for expert in range(num_experts)), positions)
