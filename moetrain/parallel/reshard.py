"""Homes that move: whole experts, with their moments, from position to position by one exchange.

The only step that moves optimizer state, and a rare one. A Parameter keeps its identity and gets other rows, so whoever
holds it (optimizer, reducer, hooks) need not hear of it; the moments are stored like their parameter and move alike. Step
counters are one number for all parameters (train/optim.py) and stay. What is moved is moved bit by bit: the state gathered by
name is the same before and after.

Shapes: h homes here before, n after, s experts sent, r received, W numbers of an expert with its moments.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import Flight
from moetrain.moe.bank import MATRICES, ExpertBank
from moetrain.plan.placement import ExpertPlacement, LayerPlacement


@torch.no_grad()
def reshard(banks: Mapping[str, ExpertBank], optimizer: torch.optim.Optimizer, before: ExpertPlacement,
            after: ExpertPlacement, group: Group) -> int:
    """Move every expert to its home in `after`; how many moved. Between steps, on every position of the group.

    All banks hold experts of one size. Gradients must have been cleared or be of no more use: they are dropped.
    """
    if before.homes == after.homes:
        return 0
    leaving, coming = _moves(before, after, group)
    rows = {name: _rows(bank, optimizer) for name, bank in banks.items()}
    sent = [rows[name][banks[name].experts.index(expert)] for moves in leaving for name, expert in moves]
    any_row = next(iter(rows.values()))
    message_sW = torch.stack(sent) if sent else any_row.new_empty(0, any_row.shape[1])
    received_rW = Flight(message_sW, tuple(map(len, leaving)), tuple(map(len, coming)), group).wait()
    arrived = dict(zip([move for moves in coming for move in moves], received_rW))
    for name, layer in after.layers:
        bank = banks[name]
        experts = layer.experts_of(group.position)
        kept = dict(zip(bank.experts, rows[name]))
        new = [kept[expert] if expert in kept else arrived[name, expert] for expert in experts]
        _refill(bank, optimizer, torch.stack(new) if new else any_row.new_empty(0, any_row.shape[1]))
        bank.experts = experts
    return sum(_moved(before[name], layer) for name, layer in after.layers)


def _moves(before: ExpertPlacement, after: ExpertPlacement, group: Group) -> tuple[list[list], list[list]]:
    """(router, expert) that leave here for each position, and that come from each: by layer, then by expert."""
    leaving: list[list[tuple[str, int]]] = [[] for _ in range(group.size)]
    coming: list[list[tuple[str, int]]] = [[] for _ in range(group.size)]
    for name, layer in after.layers:
        for expert, (old, new) in enumerate(zip(before[name].home, layer.home)):
            if old != new and old == group.position:
                leaving[new].append((name, expert))
            if old != new and new == group.position:
                coming[old].append((name, expert))
    return leaving, coming


def _moved(before: LayerPlacement, after: LayerPlacement) -> int:
    return sum(old != new for old, new in zip(before.home, after.home))


def _tensors(bank: ExpertBank, optimizer: torch.optim.Optimizer) -> list[tuple[torch.nn.Parameter, str | None]]:
    """The bank's parameters and their moments, in one order everywhere; None stands for the parameter itself."""
    found: list[tuple[torch.nn.Parameter, str | None]] = []
    for matrix in MATRICES:
        parameter = getattr(bank, matrix)
        moments = sorted(name for name in optimizer.state[parameter] if name != "step")
        found += [(parameter, None), *((parameter, name) for name in moments)]
    return found


def _rows(bank: ExpertBank, optimizer: torch.optim.Optimizer) -> Tensor:
    """Everything of each expert here, side by side: [h, W]."""
    return torch.cat([(parameter.data if moment is None else optimizer.state[parameter][moment]).flatten(1)
                      for parameter, moment in _tensors(bank, optimizer)], dim=1)


def _refill(bank: ExpertBank, optimizer: torch.optim.Optimizer, rows_nW: Tensor) -> None:
    """Parameters and moments of other experts: rows as `_rows` lays them out."""
    tensors = _tensors(bank, optimizer)
    shapes = [parameter.shape[1:] for parameter, _ in tensors]
    for (parameter, moment), part, shape in zip(tensors, rows_nW.split([shape.numel() for shape in shapes], dim=1), shapes):
        whole = part.reshape(len(rows_nW), *shape).clone(memory_format=torch.contiguous_format)
        if moment is None:
            parameter.grad = None
            parameter.data = whole
        else:
            optimizer.state[parameter][moment] = whole
