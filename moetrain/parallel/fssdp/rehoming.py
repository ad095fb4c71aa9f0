"""Rehoming: move experts with their optimizer state to other positions, slice them, or reassemble them.

This is the only step that moves optimizer state, and a rare one. A Parameter keeps its identity and gets
other rows, so optimizer, gradient reducer and hooks keep their references. The moments have the layout of
their parameter and move with it. Step counters are one number for all parameters (train/optim/optimizer.py)
and stay. Values are moved bit by bit: the state gathered by name is the same before and after.

Experts that stay whole travel in one exchange of rows of equal width. Slices of experts that become sliced,
or whole again (plan/placement.py), travel in a second exchange, as flat numbers, because slices differ in
width. Layers whose rows differ in layout, as where experts have other shapes, or are frozen and have no
moments, take turns.

Shapes: h experts here, s experts sent, W numbers of an expert with its moments, w numbers of this position's
slice of one.
"""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import AsyncAllToAll
from moetrain.moe.bank import ExpertBank
from moetrain.plan.placement import ExpertPlacement, LayerPlacement, slice_columns

Rows = dict[tuple[str, int], Tensor]         # state [W] of an expert, or [w] of its slice, by bank and id
Shapes = list[tuple[int, ...]]               # of the tensors that lie side by side in a row


@torch.no_grad()
def reshard(banks: Mapping[str, ExpertBank], optimizer: torch.optim.Optimizer, before: ExpertPlacement,
            after: ExpertPlacement, group: Group) -> int:
    """Move the state of all experts from one placement to another, in place. Waits.

    Every position of the group calls it, between steps. Gradients are dropped, so they must have been used.

    Args:
        banks: experts by bank name; their `experts` and `sliced` follow.
        optimizer: optimizer whose moments move with the parameters.
        before: placement in force.
        after: placement to move to; copies in either do not matter.
        group: the positions, `ep`.

    Returns:
        Number of experts that moved, became sliced, or became whole.
    """
    if before.homes == after.homes:
        return 0
    alike: dict[tuple, list[str]] = {}
    for name, bank in banks.items():
        alike.setdefault(_layout(bank, optimizer), []).append(name)
    for names in alike.values():
        some = {name: banks[name] for name in names}
        _reshard_alike(some, optimizer, before.only(names), after.only(names), group)
    return sum(_moved(before[name], layer) for name, layer in after.layers)


def _reshard_alike(banks: Mapping[str, ExpertBank], optimizer: torch.optim.Optimizer, before: ExpertPlacement,
                   after: ExpertPlacement, group: Group) -> None:
    """Move the state of experts whose rows have one layout. Arguments as of `reshard`."""
    whole: Rows = {}
    parts: Rows = {}
    for name, bank in banks.items():
        whole.update({(name, expert): row
                      for expert, row in zip(bank.experts, _rows(bank, bank.names, optimizer))})
        if bank.cut is not None:
            parts.update({(name, expert): row
                          for expert, row in zip(bank.sliced, _rows(bank, bank.slices, optimizer))})
    any_bank = next(iter(banks.values()))
    shapes = [tuple(parameter.shape[1:]) for parameter, _ in _tensors(any_bank, any_bank.names, optimizer)]
    like = _rows(any_bank, any_bank.names, optimizer)
    _move(whole, sum(map(prod, shapes)), like, before, after, group)
    _recut(whole, parts, shapes, like, before, after, group)
    for name, layer in after.layers:
        bank, bank_experts = banks[name], layer.experts_of(group.position)
        _refill(bank, bank.names, optimizer, [whole[name, expert] for expert in bank_experts])
        bank.experts = bank_experts
        if bank.cut is not None:
            _refill(bank, bank.slices, optimizer, [parts[name, expert] for expert in layer.sliced])
            bank.sliced = layer.sliced


def _move(whole: Rows, width: int, like: Tensor, before: ExpertPlacement, after: ExpertPlacement,
          group: Group) -> None:
    """Exchange the experts that are whole before and after and change their home; add those that come here.

    Args:
        whole: rows [W] of the experts that are whole here; extended.
        width: W.
        like: tensor with the dtype and device of the rows.
        before: placement in force.
        after: placement to move to.
        group: the positions, `ep`.
    """
    leaving: list[list[tuple[str, int]]] = [[] for _ in range(group.size)]
    coming: list[list[tuple[str, int]]] = [[] for _ in range(group.size)]
    for name, expert, old, new in _places(before, after):
        if old is not None and new is not None and old != new:
            if old == group.position:
                leaving[new].append((name, expert))
            if new == group.position:
                coming[old].append((name, expert))
    sent = [whole[move] for moves in leaving for move in moves]
    message_sW = torch.stack(sent) if sent else like.new_empty(0, width)
    received = AsyncAllToAll(message_sW, tuple(map(len, leaving)), tuple(map(len, coming)), group).wait()
    whole.update(zip([move for moves in coming for move in moves], received))


def _recut(whole: Rows, parts: Rows, shapes: Shapes, like: Tensor, before: ExpertPlacement,
           after: ExpertPlacement, group: Group) -> None:
    """Exchange slices of the experts that become sliced or whole, and assemble those that become whole here.

    Args:
        whole: rows [W] of the experts that are whole here; extended by those assembled.
        parts: rows [w] of the slices held here; extended by those of experts that become sliced.
        shapes: of the tensors in a row.
        like: tensor with the dtype and device of the rows.
        before: placement in force.
        after: placement to move to.
        group: the positions, `ep`.
    """
    position, positions = group.position, group.size
    changed = [place for place in _places(before, after) if (place[2] is None) != (place[3] is None)]
    if not changed:
        return
    leaving: list[list[Tensor]] = [[] for _ in range(positions)]
    coming: list[list[int]] = [[] for _ in range(positions)]                 # width of each slice that comes
    widths = [sum(part.stop - part.start for part in slice_columns(shapes, at, positions))
              for at in range(positions)]
    for name, expert, old, new in changed:
        if old is None:                                                      # becomes whole at `new`
            assert new is not None
            leaving[new].append(parts[name, expert])
            if new == position:
                for at in range(positions):
                    coming[at].append(widths[at])
        else:
            coming[old].append(widths[position])
            if old == position:
                for at in range(positions):
                    leaving[at].append(cut(whole[name, expert], shapes, at, positions))
    numbers = torch.cat([like.new_empty(0), *(part for moves in leaving for part in moves)])
    sent, received = tuple(sum(map(len, moves)) for moves in leaving), tuple(map(sum, coming))
    flat = AsyncAllToAll(numbers[:, None], sent, received, group).wait().flatten()
    arrived = [list(block.split(lengths)) if lengths else []
               for block, lengths in zip(flat.split(received), coming)]
    for name, expert, old, new in changed:
        if old is not None:
            parts[name, expert] = arrived[old].pop(0)
        elif new == position:
            whole[name, expert] = together([pieces.pop(0) for pieces in arrived], shapes)


def _places(before: ExpertPlacement,
            after: ExpertPlacement) -> Iterator[tuple[str, int, int | None, int | None]]:
    """Iterate over (bank, expert, home before, home after), by bank and then by expert.

    A home is None where the expert is sliced.
    """
    for name, layer in after.layers:
        old = before[name]
        for expert in range(layer.num_experts):
            yield (name, expert, None if expert in old.sliced else old.home[expert],
                   None if expert in layer.sliced else layer.home[expert])


def cut(row_W: Tensor, shapes: Shapes, position: int, positions: int) -> Tensor:
    """Cut a position's slice out of an expert: some rows of each of its tensors, flat.

    Args:
        row_W: [W], the whole expert.
        shapes: of the tensors in a row.
        position: position that gets the slice.
        positions: size of the `ep` axis.

    Returns:
        [w], numbers of the slice.
    """
    return torch.cat([row_W[part] for part in slice_columns(shapes, position, positions)])


def together(pieces: list[Tensor], shapes: Shapes) -> Tensor:
    """Assemble an expert [W] from its slices of all positions, in order of position: the inverse of `cut`."""
    row_W = pieces[0].new_empty(sum(map(prod, shapes)))
    for position, piece in enumerate(pieces):
        parts = slice_columns(shapes, position, len(pieces))
        for part, numbers in zip(parts, piece.split([part.stop - part.start for part in parts])):
            row_W[part] = numbers
    return row_W


def _moved(before: LayerPlacement, after: LayerPlacement) -> int:
    """Count the experts of a layer whose parameters move, are cut into slices, or are reassembled."""
    return sum(old != new or (expert in before.sliced) != (expert in after.sliced)
               for expert, (old, new) in enumerate(zip(before.home, after.home))
               if not (expert in before.sliced and expert in after.sliced))


def _tensors(bank: ExpertBank, names: tuple[str, ...],
             optimizer: torch.optim.Optimizer) -> list[tuple[torch.nn.Parameter, str | None]]:
    """List the tensors of a bank as (parameter, name of a moment), None for the parameter itself.

    The order is the same on every position.
    """
    found: list[tuple[torch.nn.Parameter, str | None]] = []
    for name in names:
        parameter = bank.stacked(name)
        moments = sorted(set(optimizer.state.get(parameter, {})) - {"step"})
        found += [(parameter, None), *((parameter, moment) for moment in moments)]
    return found


def _layout(bank: ExpertBank, optimizer: torch.optim.Optimizer) -> tuple:
    """Layout of the row of an expert: shape, dtype and moment of each of its tensors."""
    return tuple((parameter.shape[1:], parameter.dtype, moment)
                 for parameter, moment in _tensors(bank, bank.names, optimizer))


def _rows(bank: ExpertBank, names: tuple[str, ...], optimizer: torch.optim.Optimizer) -> Tensor:
    """Lay the parameters and moments of each expert here side by side: [h, W], or [h, w] for slices.

    A frozen matrix in a smaller dtype takes that of the others on the way.
    """
    return torch.cat([(parameter.data if moment is None else optimizer.state[parameter][moment]).flatten(1)
                      for parameter, moment in _tensors(bank, names, optimizer)], dim=1)


def _refill(bank: ExpertBank, names: tuple[str, ...], optimizer: torch.optim.Optimizer,
            rows: list[Tensor]) -> None:
    """Replace the parameters and moments of a bank by those of other experts, and drop its gradients.

    Args:
        bank: bank to change; its Parameters keep their identity.
        names: parameters of the bank, its `names` or `slices`.
        optimizer: optimizer that holds the moments.
        rows: a row for each expert, in the layout of `_rows`.
    """
    tensors = _tensors(bank, names, optimizer)
    shapes = [parameter.shape[1:] for parameter, _ in tensors]
    widths = [shape.numel() for shape in shapes]
    stacked = torch.stack(rows) if rows else bank.like.new_empty(0, sum(widths))
    for (parameter, moment), part, shape in zip(tensors, stacked.split(widths, dim=1), shapes):
        full = part.reshape(len(rows), *shape).to(
            parameter.dtype, copy=True, memory_format=torch.contiguous_format)
        if moment is None:
            parameter.grad = None
            parameter.data = full
        else:
            optimizer.state[parameter][moment] = full
