"""How many rows of each source go to which replica of their expert: rules over counts, before any row moves.

A *replica* is a home or a copy; `LayerPlacement.replicas` lists all of a layer's by (expert, position), and S_PC counts the
rows that source p sends to replica c, the sum over an expert's replicas being what the source has for that expert.

    local_first   own replica, else evenly over those on the source's node, else evenly over all (Hecate, arXiv 2502.02581):
                  a source's row depends on itself alone, so a rank needs nobody's counts
    waterfill     fills the least-loaded replica, and lets rows leave their node only while that pays: needs all counts
    shares        a planner's own quotas, by global offset (LLEP), blind to where rows are

Everything is int64 and exact; where modelled times decide (`waterfill`), every rank computes them from the same integers
in the same way, so that ranks with equal counts choose equally.

Shapes: P sources (= positions), E experts, C replicas, N nodes.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.plan.assign import replica_table
from moetrain.plan.costs import Costs, Topology
from moetrain.plan.levels import Choices, choices, level
from moetrain.plan.modelled import modelled, modelled_each
from moetrain.plan.placement import LayerPlacement

SWEEPS = 12         # at most, over all groups of rows; loads settle sooner, except along chains of copies
STEPS = 2           # mixtures tried on the way from one split to a better balanced one


class Reach(NamedTuple):
    """Where a placement's replicas are to sources, all int64."""

    expert_C: Tensor
    position_C: Tensor
    node_C: Tensor
    first_C: Tensor        # index of the first replica of the same expert
    beside_C: Tensor       # index of the first replica of the same expert on the same node
    first_E: Tensor        # index of each expert's first replica
    near: Choices          # where rows of each node may be computed while they stay on it wherever it holds their expert
    free: Choices          # and if they may go anywhere


@lru_cache(maxsize=256)
def reach(placement: LayerPlacement, topology: Topology, device: torch.device) -> Reach:
    """Tables of a placement; kept, because a plan lives for many micro-batches. Not to be written to."""
    assert placement.positions == topology.positions, (placement.positions, topology)
    expert_C, position_C, _ = replica_table(placement, device)
    node_C = position_C // topology.per_node
    first_E = torch.searchsorted(expert_C, torch.arange(placement.num_experts, device=device))
    cell_C = expert_C * topology.nodes + node_C
    return Reach(expert_C, position_C, node_C, first_E[expert_C], torch.searchsorted(cell_C, cell_C), first_E,
                 choices(expert_C, position_C, topology, stay=True), choices(expert_C, position_C, topology, stay=False))


def local_first(n_PE: Tensor, placement: LayerPlacement, topology: Topology, first_source: int = 0) -> Tensor:
    """Rows that go to each replica, int64 [P, C], by the paper's rule.

    n_PE: any block of consecutive sources, the first of them at position `first_source`. What does not divide evenly starts
    at a replica that depends on source and expert, so that not all sources favour the same one.
    """
    held = reach(placement, topology, n_PE.device)
    source_P1 = torch.arange(first_source, first_source + len(n_PE), device=n_PE.device)[:, None]
    far_PC = torch.where(held.position_C == source_P1, 0, torch.where(held.node_C == source_P1 // topology.per_node, 1, 2))
    nearest_PE = torch.full_like(n_PE, 2).scatter_reduce(1, held.expert_C.expand_as(far_PC), far_PC, "amin")
    open_PC = (far_PC == nearest_PE[:, held.expert_C]).long()
    before_PC = open_PC.cumsum(1) - open_PC
    turn_PC = before_PC - before_PC[:, held.first_C] - source_P1 - held.expert_C
    many_PC = torch.zeros_like(n_PE).index_add_(1, held.expert_C, open_PC)[:, held.expert_C]
    rows_PC = n_PE[:, held.expert_C]
    return (rows_PC // many_PC + (turn_PC % many_PC < rows_PC % many_PC)) * open_PC


def waterfill(n_PE: Tensor, placement: LayerPlacement, topology: Topology, costs: Costs) -> Tensor:
    """Rows that go to each replica, int64 [P, C]: never a larger load nor a longer modelled time than `local_first`.

    n_PE: the counts of all sources. Quotas per replica are levelled twice: with rows kept on their node wherever it holds
    their expert, and freely. Both, and mixtures on the way from `local_first` to the first and on to the second, are
    matched to sources and timed by the model, which is convex along that way; the shortest is taken.
    Runs on the host (the exchange needs the counts there anyway) and returns on the device of n_PE.
    """
    n_PE, device = n_PE.cpu(), n_PE.device
    held = reach(placement, topology, n_PE.device)
    best_PC = local_first(n_PE, placement, topology)
    best_P = _loads(best_PC, held, topology)
    if len(held.expert_C) == placement.num_experts or int(best_P.max()) <= -(-int(n_PE.sum()) // topology.positions):
        return best_PC.to(device)
    highest, best_s = int(best_P.max()), modelled(best_PC, placement, topology, costs).total_s
    split_KPC = match(n_PE, _candidates(best_PC, held, topology), held, topology)
    load_K = _loads(split_KPC, held, topology).amax(1).tolist()
    took_K = modelled_each(split_KPC, placement, topology, costs)
    for split_PC, load, took in zip(split_KPC, load_K, took_K, strict=True):
        if took.total_s < best_s and load <= highest:
            best_PC, best_s = split_PC, took.total_s
    return best_PC.to(device)


def shares(n_PE: Tensor, quotas_C: Tensor, placement: LayerPlacement, topology: Topology) -> Tensor:
    """Rows that go to each replica, int64 [P, C], in proportion to quotas planned for other counts.

    n_PE: the counts of all sources. An expert's rows, in the order of their sources, are cut where the quotas' running sums
    say; rows of an expert without any quota go to its home.
    """
    held = reach(placement, topology, n_PE.device)
    home_E = torch.tensor(placement.home, device=n_PE.device)
    quotas_C = quotas_C.to(n_PE.device)
    planned_E = torch.zeros_like(home_E).index_add_(0, held.expert_C, quotas_C)
    unplanned_C = (planned_E == 0)[held.expert_C] & (held.position_C == home_E[held.expert_C])
    quotas_C = quotas_C.where(~unplanned_C, 1)
    end_C = _within(quotas_C.cumsum(0), quotas_C, held.first_C)
    whole_C = planned_E.clamp(min=1)[held.expert_C]
    rows_C = n_PE.sum(0)[held.expert_C]
    cut_C = end_C * rows_C // whole_C - (end_C - quotas_C) * rows_C // whole_C
    return _overlap(n_PE, cut_C, held, torch.zeros(len(n_PE), dtype=torch.int64, device=n_PE.device), held.first_C)


def match(n_PE: Tensor, quotas_KC: Tensor, held: Reach, topology: Topology) -> Tensor:
    """Sources to quotas, int64 [K, P, C]: own replica first, then the same node, then the rest in order.

    quotas_KC: K times quotas whose sum is every expert's rows.
    """
    sources, replicas = len(n_PE), torch.arange(quotas_KC.shape[1], device=quotas_KC.device)
    own_KC = torch.minimum(n_PE[held.position_C, held.expert_C], quotas_KC)
    split_KPC = n_PE.new_zeros(len(quotas_KC), sources, len(replicas))
    split_KPC[:, held.position_C, replicas] = own_KC
    left_KPE = n_PE.repeat(len(quotas_KC), 1, 1)
    left_KPE[:, held.position_C, held.expert_C] -= own_KC                 # no pair comes twice
    left_KC = quotas_KC - own_KC
    source_P = torch.arange(sources, device=n_PE.device)
    if topology.nodes > 1:
        node_P = source_P // topology.per_node
        near_PC = node_P[:, None] == held.node_C
        beside_KPC = _overlap(left_KPE, left_KC, held, node_P * topology.per_node, held.beside_C) * near_PC
        split_KPC += beside_KPC
        left_KPE.index_add_(2, held.expert_C, -beside_KPC)
        left_KC = left_KC - beside_KPC.sum(1)
    split_KPC += _overlap(left_KPE, left_KC, held, torch.zeros_like(source_P), held.first_C)
    return split_KPC


def _candidates(split_PC: Tensor, held: Reach, topology: Topology) -> Tensor:
    """Quotas [K, C], from those of `local_first` towards the best balanced."""
    by_node_NC = split_PC.new_zeros(topology.nodes, split_PC.shape[1])
    by_node_NC.index_add_(0, torch.arange(len(split_PC)) // topology.per_node, split_PC)
    start_C = by_node_NC.sum(0)
    position = held.position_C.tolist()
    ways = [level(by_node_NC, position, held.near, topology.positions, SWEEPS)] if topology.nodes > 1 else []
    ways += [level(start_C[None], position, held.free, topology.positions, SWEEPS)]
    found = []
    for end_C in ways:
        found += [_between(start_C, end_C, step) for step in range(1, STEPS)] + [end_C]
        start_C = end_C
    return torch.stack(found)


def _between(start_C: Tensor, end_C: Tensor, step: int) -> Tensor:
    """Quotas at step / STEPS of the way. Running sums are mixed, so that every expert's sum stays what it is."""
    mixed_C = start_C.cumsum(0) + (end_C - start_C).cumsum(0) * step // STEPS
    return mixed_C.diff(prepend=mixed_C.new_zeros(1))


def _overlap(left_PE: Tensor, left_C: Tensor, held: Reach, first_P: Tensor, first_C: Tensor) -> Tensor:
    """[…, P, C]: sources laid end to end against replicas laid end to end, from a first source and a first replica on."""
    end_PE = left_PE.cumsum(-2)
    end_PE = end_PE - (end_PE - left_PE)[..., first_P, :]
    end_C = _within(left_C.cumsum(-1), left_C, first_C)
    end_PC, start_PC = end_PE[..., held.expert_C], (end_PE - left_PE)[..., held.expert_C]
    begin_C = (end_C - left_C)[..., None, :]
    return (torch.minimum(end_PC, end_C[..., None, :]) - torch.maximum(start_PC, begin_C)).clamp_(min=0)


def _within(end_C: Tensor, rows_C: Tensor, first_C: Tensor) -> Tensor:
    """Running sums that start anew at every first replica."""
    return end_C - (end_C - rows_C)[..., first_C]


def _loads(split_PC: Tensor, held: Reach, topology: Topology) -> Tensor:
    """Rows by position, […, P]."""
    rows_C = split_PC.sum(-2)
    return rows_C.new_zeros(*rows_C.shape[:-1], topology.positions).index_add_(-1, held.position_C, rows_C)
