"""Groups of tensors that are converted together between our names and those of a public layout.

    map.to_ours(tensors of map.theirs)     tensors of map.ours, in that order
    map.to_theirs(tensors of map.ours)     tensors of map.theirs, in that order

A group is what one conversion needs at once: a matrix that is stored under another name, three projections
that are one matrix here, or the experts of a layer that are one tensor there. The functions are pure, keep
the dtype, may return views, and undo each other to the bit. They work on the meta device, too, so shapes on
either side follow from those on the other (`shapes_of_theirs`).

Our names are those of a checkpoint: `model.` before parameters, `buffer.` before buffers.

Shapes: E experts, F expert width, D model width, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.errors import CheckpointError

Tensors = tuple[Tensor, ...]
Convert = Callable[[Tensors], Tensors]
Shape = tuple[int, ...]


class TensorMap(NamedTuple):
    """Tensors that are converted together.

    Attributes:
        ours: names in a checkpoint of ours.
        theirs: names in a folder of Hugging Face's layout.
        to_ours: converts tensors in the order of `theirs`.
        to_theirs: converts tensors in the order of `ours`.
        float32: they are float32 in a folder whose other tensors have fewer bits.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Convert
    to_theirs: Convert
    float32: bool = False

    def shapes_of_theirs(self, shapes_of_ours: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of `theirs` by name, from those of `ours`."""
        on_meta = tuple(torch.empty(shapes_of_ours[name], device="meta") for name in self.ours)
        return {name: tuple(tensor.shape) for name, tensor in zip(self.theirs, self.to_theirs(on_meta))}

    def shapes_of_ours(self, shapes_of_theirs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of `ours` by name, from those of `theirs`."""
        on_meta = tuple(torch.empty(shapes_of_theirs[name], device="meta") for name in self.theirs)
        return {name: tuple(tensor.shape) for name, tensor in zip(self.ours, self.to_ours(on_meta))}


class Transform(NamedTuple):
    """A change of one tensor, and the change that undoes it."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def renamed(ours: str, theirs: str, *, float32: bool = False) -> TensorMap:
    """Map a tensor that differs in its name alone."""
    return TensorMap((ours,), (theirs,), _as_it_is, _as_it_is, float32)


def joined(ours: str, theirs: Sequence[str], rows: Sequence[int]) -> TensorMap:
    """Map a tensor that is stored there in several, of which each has the next rows of ours.

    Args:
        ours: name here.
        theirs: names there, in the order of the rows.
        rows: number of rows of each.
    """
    return TensorMap((ours,), tuple(theirs), _joined, partial(_divided, rows=tuple(rows)))


def stacked(ours: Sequence[str], theirs: str, each: Transform) -> TensorMap:
    """Map tensors of the experts of a layer that are one tensor there, [E, …].

    Args:
        ours: names here, in the order of the experts.
        theirs: name there.
        each: how the tensor of an expert differs.
    """
    return TensorMap(tuple(ours), (theirs,), partial(_unstacked, change=each.to_ours),
                     partial(_stacked, change=each.to_theirs))


def expert_maps(ours: Mapping[str, str], gate: str, up: str, down: str, expert_dim: int) -> list[TensorMap]:
    """Map one expert that is stored in three matrices, gate [F, D], up [F, D] and down [D, F].

    Args:
        ours: names here of `gate_up` and `down`.
        gate: name there.
        up: name there.
        down: name there.
        expert_dim: F.
    """
    return [joined(ours["gate_up"], (gate, up), (expert_dim, expert_dim)), renamed(ours["down"], down)]


def copied(ours: str, theirs: Sequence[str]) -> TensorMap:
    """Map a tensor that is stored there once or several times, equal each time.

    Args:
        ours: name here.
        theirs: names there.
    """
    if len(theirs) == 1:
        return renamed(ours, theirs[0])
    return TensorMap((ours,), tuple(theirs), partial(_first, names=tuple(theirs)),
                     partial(_repeated, times=len(theirs)))


def _as_it_is(tensors: Tensors) -> Tensors:
    return tensors


def _joined(tensors: Tensors) -> Tensors:
    return (torch.cat(tensors),)


def _divided(tensors: Tensors, rows: tuple[int, ...]) -> Tensors:
    (tensor,) = tensors
    return tensor.split(rows)


def _first(tensors: Tensors, names: tuple[str, ...]) -> Tensors:
    for name, tensor in zip(names[1:], tensors[1:]):
        if not tensor.is_meta and not torch.equal(tensor, tensors[0]):
            raise CheckpointError(
                38, f"{name} differs from {names[0]}", where=name,
                why="they are one tensor here: a module of multi-token prediction uses the embedding and "
                    "the head of the model", next="import without model.mtp_layers: the module is then kept "
                                                  "as it is")
    return tensors[:1]


def _repeated(tensors: Tensors, times: int) -> Tensors:
    return tensors * times


def _unstacked(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    (tensor,) = tensors
    return tuple(change(of_expert) for of_expert in tensor)


def _stacked(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    return (torch.stack([change(of_expert) for of_expert in tensors]),)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T


def _halves(rows: Tensor) -> Tensor:
    """Put the even rows before the odd ones."""
    return torch.cat([rows[0::2], rows[1::2]])


def _alternating(rows: Tensor) -> Tensor:
    """Take rows of the first half and of the second in turn."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)


UNCHANGED = Transform(lambda tensor: tensor, lambda tensor: tensor)
# [I, O] there, [O, I] here.
TRANSPOSED = Transform(_transposed, _transposed)
# Gate and up in turn there, gate before up here.
DEINTERLEAVED = Transform(_halves, _alternating)
# Both: [D, 2F] with gate and up columns in turn there, [2F, D] here.
TRANSPOSED_DEINTERLEAVED = Transform(lambda tensor: _halves(tensor.T), lambda tensor: _alternating(tensor).T)
