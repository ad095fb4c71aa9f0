"""Start values of parameters and buffers, declared by the module that owns them.

A model is built on the meta device, so a value that a constructor gives is lost. Instead a module says how
each of its tensors starts:

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "temperature": constant(0.07), "down": residual_normal()}

    normal            standard deviation of the model (`model.init_std`), or its own
    residual_normal   the same, divided by sqrt(2 * number of layers): matrices that write to the residual
                      stream
    constant          one number
    values            what a function returns: a table, or numbers drawn from the generator that it gets

Names are those of the module's parameters and buffers, dotted where a tensor belongs to a module inside it.
model/initialization.py applies the rules. Random numbers depend on the seed and the tensor's name alone, so
a tensor has the same bits on every mesh, and after other layers have come or gone.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.ops.pinned import to_device


class Place(NamedTuple):
    """Rows of a logical tensor that a rank holds, and what their start may depend on.

    Attributes:
        name: name of the logical tensor, the key of its random numbers.
        shape: shape of the whole tensor.
        begin: first row that the rank holds.
        seed: seed of the run.
        std: standard deviation of the model's matrices.
        num_layers: blocks of the model.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    seed: int
    std: float
    num_layers: int

    def generator(self) -> torch.Generator:
        """Make the generator of this tensor on the host."""
        digest = hashlib.blake2b(f"{self.seed}/{self.name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def rows_of(self, whole: Tensor, rows: Tensor) -> Tensor:
        """Cut the rows that the rank holds out of the whole tensor. A number without dimensions is whole."""
        return whole[self.begin:self.begin + len(rows)] if self.shape else whole


class Start(Protocol):
    """Rule by which a tensor starts.

    `drawn_as` is the name by which random numbers are keyed, relative to the module that declares the rule;
    "" is that module's own name, None the tensor's. It keeps the numbers of a tensor that was renamed.
    """

    @property
    def drawn_as(self) -> str | None: ...

    def fill(self, rows: Tensor, place: Place) -> None:
        """Fill the rows, a view of the stored tensor, in place."""


@dataclass(frozen=True)
class _Normal:
    std: float | None
    residual: bool
    drawn_as: str | None

    def fill(self, rows: Tensor, place: Place) -> None:
        std = place.std if self.std is None else self.std
        scale = std / (2 * place.num_layers) ** 0.5 if self.residual else std
        whole = torch.randn(place.shape, generator=place.generator(), dtype=torch.float32)
        rows.copy_(to_device(place.rows_of(whole, rows) * scale, rows.device))


@dataclass(frozen=True)
class _Constant:
    value: float
    drawn_as: str | None = None

    def fill(self, rows: Tensor, place: Place) -> None:
        rows.fill_(self.value)


@dataclass(frozen=True)
class _Values:
    function: Callable[[torch.Generator], Tensor]
    drawn_as: str | None

    def fill(self, rows: Tensor, place: Place) -> None:
        with torch.device("cpu"):
            whole = self.function(place.generator())
        if tuple(whole.shape) != place.shape:
            raise ValueError(f"the start of {place.name} has shape {tuple(whole.shape)}, "
                             f"the tensor {place.shape}")
        rows.copy_(to_device(place.rows_of(whole, rows).to(rows.dtype), rows.device))


def normal(std: float | None = None, *, drawn_as: str | None = None) -> Start:
    """Normal numbers; without `std` they have the standard deviation of the model's matrices."""
    return _Normal(std, False, drawn_as)


def residual_normal(std: float | None = None, *, drawn_as: str | None = None) -> Start:
    """Normal numbers divided by sqrt(2 * number of layers), for what writes to the residual stream."""
    return _Normal(std, True, drawn_as)


def constant(value: float) -> Start:
    """The same number everywhere."""
    return _Constant(value)


def values(function: Callable[[torch.Generator], Tensor], *, drawn_as: str | None = None) -> Start:
    """What a function returns: the whole tensor, on the host.

    Args:
        function: gets a generator that is keyed by the seed of the run and the name of the tensor. It must
            return the same tensor on every rank.
        drawn_as: name that keys the generator instead (`Start`).
    """
    return _Values(function, drawn_as)
