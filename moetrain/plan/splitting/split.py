"""How many rows of each source go to which replica of their expert: rules over counts, before any row moves.

A *replica* is a home or a copy; `LayerPlacement.replicas` lists all of a layer's by (expert, position), and S_PC counts the
rows that source p sends to replica c, the sum over an expert's replicas being what the source has for that expert.

    local_first   own replica, else evenly over those on the source's node, else evenly over all (Hecate, arXiv 2502.02581):
                  a source's row depends on itself alone, so a rank needs nobody's counts
    waterfill     fills the least-loaded replica, and lets rows leave their node only while that pays: needs all counts
    shares        a planner's own quotas, by global offset (LLEP), blind to where rows are

Everything is int64 and exact; where modelled times decide (`waterfill`), every rank computes them from the same integers
in the same way, so that ranks with equal counts choose equally. The rules that look at all counts run on the host, where the
exchange needs these counts anyway, in numpy: on arrays this small an operation of torch costs three times as much.

Shapes: P sources (= positions), E experts, C replicas, N nodes, K candidates.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import step_time, step_times
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.splitting.water_filling import (
    SplitChoices,
    level_quotas,
    shed_between_nodes,
    split_choices,
)

SWEEPS = 12         # at most, over all groups of rows; loads settle sooner, except along chains of copies
BALANCED_WITHIN = 64         # local_first stands where its largest load is that close to the mean: no more is to be won


class ReplicaIndex(NamedTuple):
    """Where a placement's replicas are to sources, all int64."""

    expert_C: np.ndarray
    position_C: np.ndarray
    node_C: np.ndarray
    first_C: np.ndarray    # index of the first replica of the same expert
    node_first_C: np.ndarray   # index of the first replica of the same expert on the same node
    cell_C: np.ndarray     # index into [N, E] flattened
    split_choices: SplitChoices


@lru_cache(maxsize=256)
def replica_index(placement: LayerPlacement, topology: Topology) -> ReplicaIndex:
    """Tables of a placement; kept, because a plan lives for many micro-batches. Not to be written to."""
    assert placement.positions == topology.positions, (placement.positions, topology)
    expert_C, position_C, _ = np.array(placement.replicas, dtype=np.int64).T
    node_C = position_C // topology.per_node
    by_node_C = expert_C * topology.nodes + node_C
    return ReplicaIndex(expert_C, position_C, node_C, np.searchsorted(expert_C, expert_C), np.searchsorted(by_node_C, by_node_C),
                 node_C * placement.num_experts + expert_C, split_choices(expert_C, position_C, _within_nodes(topology)))


@lru_cache(maxsize=256)
def _tables(placement: LayerPlacement, topology: Topology, device: torch.device) -> tuple[Tensor, ...]:
    """expert_C, position_C, node_C, first_C on the device."""
    tables_4C = torch.from_numpy(np.stack(replica_index(placement, topology)[:4]))
    if device.type == "cuda":
        tables_4C = tables_4C.pin_memory().to(device, non_blocking=True)                     # nobody waits for it
    return tables_4C.unbind()


def local_first(n_PE: Tensor, placement: LayerPlacement, topology: Topology, first_source: int = 0) -> Tensor:
    """Rows that go to each replica, int64 [P, C], by the paper's rule. On the device of n_PE.

    n_PE: any block of consecutive sources, the first of them at position `first_source`. What does not divide evenly starts
    at a replica that depends on source and expert, so that not all sources favour the same one.
    """
    expert_C, position_C, node_C, first_C = _tables(placement, topology, n_PE.device)
    source_P1 = torch.arange(first_source, first_source + len(n_PE), device=n_PE.device)[:, None]
    distance_PC = torch.where(position_C == source_P1, 0, torch.where(node_C == source_P1 // topology.per_node, 1, 2))
    nearest_PE = torch.full_like(n_PE, 2).scatter_reduce(1, expert_C.expand_as(distance_PC), distance_PC, "amin")
    eligible_PC = (distance_PC == nearest_PE[:, expert_C]).long()
    before_PC = eligible_PC.cumsum(1) - eligible_PC
    offset_PC = before_PC - before_PC[:, first_C] - source_P1 - expert_C
    num_eligible_PC = torch.zeros_like(n_PE).index_add_(1, expert_C, eligible_PC)[:, expert_C]
    rows_PC = n_PE[:, expert_C]
    return (rows_PC // num_eligible_PC + (offset_PC % num_eligible_PC < rows_PC % num_eligible_PC)) * eligible_PC


def waterfill(n_PE: Tensor, placement: LayerPlacement, topology: Topology, costs: Costs) -> Tensor:
    """Rows that go to each replica, int64 [P, C]: never a larger load nor a longer modelled time than `local_first`.

    n_PE: the counts of all sources. Quotas per replica are levelled with rows kept on their node wherever it holds their
    expert, freely, and in between (plan/splitting/water_filling.py). All are matched to sources and timed by the model; the shortest is taken.
    Runs on the host, n_PE and the result are there.
    """
    index, rows_PE = replica_index(placement, topology), n_PE.numpy()
    local_PC = local_first(n_PE, placement, topology)
    best_PC = local_PC.numpy()
    highest = int(_loads(best_PC, index, topology).max())
    if len(index.expert_C) == placement.num_experts or highest * topology.positions * BALANCED_WITHIN <= int(rows_PE.sum()) * (BALANCED_WITHIN + 1):
        return local_PC
    split_KPC = match_sources(rows_PE, _candidate_quotas(best_PC, index, topology), index, topology)
    load_K = _loads(split_KPC, index, topology).max(1).tolist()
    times_K = step_times(split_KPC, placement, topology, costs)
    best_s = step_time(best_PC, placement, topology, costs).total_s
    for split_PC, load, times in zip(split_KPC, load_K, times_K, strict=True):
        if times.total_s < best_s and load <= highest:
            best_PC, best_s = split_PC, times.total_s
    return torch.from_numpy(best_PC)


def shares(n_PE: Tensor, quotas_C: Tensor, placement: LayerPlacement, topology: Topology) -> Tensor:
    """Rows that go to each replica, int64 [P, C], in proportion to quotas planned for other counts.

    n_PE: the counts of all sources. An expert's rows, in the order of their sources, are cut where the quotas' running sums
    say; rows of an expert without any quota go to its home. On the host.
    """
    index, rows_PE, quotas_C = replica_index(placement, topology), n_PE.numpy(), quotas_C.numpy()
    home_E = np.asarray(placement.home)
    planned_C = _sum_over(index.expert_C, quotas_C, placement.num_experts)[index.expert_C]
    quotas_C = np.where((planned_C == 0) & (index.position_C == home_E[index.expert_C]), 1, quotas_C)
    cut_C = _proportional_parts(_running_sums(quotas_C, index.first_C), quotas_C, rows_PE.sum(0)[index.expert_C], np.maximum(planned_C, 1), 0)
    split_PC = _overlap(rows_PE, cut_C, index, np.zeros(len(rows_PE), dtype=np.int64), index.first_C)
    return torch.from_numpy(split_PC)


def match_sources(n_PE: np.ndarray, quotas_KC: np.ndarray, index: ReplicaIndex, topology: Topology) -> np.ndarray:
    """Sources to quotas, int64 [K, P, C]. quotas_KC: K times quotas whose sum is every expert's rows.

    As many rows stay on their node as it has quotas for. Where a node has more rows than that, each of its sources sends
    away an equal part of what it has; where it has more quotas, each of its replicas takes in an equal part of its own:
    no link carries much more than others. Rows that stay go to their own position first.
    """
    sources, experts = n_PE.shape
    node_P, replicas = np.arange(sources) // topology.per_node, np.arange(quotas_KC.shape[1])
    first_P = node_P * topology.per_node
    wanted_NE = np.add.reduceat(n_PE, np.arange(topology.nodes) * topology.per_node)
    offered_KX = _sum_over(index.cell_C, quotas_KC, wanted_NE.size)
    staying_KX = np.minimum(wanted_NE.reshape(-1), offered_KX)

    end_PE = n_PE.cumsum(0)
    end_PE = end_PE - (end_PE - n_PE)[first_P]
    stay_KPE = _proportional_parts(end_PE, n_PE, staying_KX.reshape(-1, *wanted_NE.shape)[:, node_P], np.maximum(wanted_NE, 1)[node_P],
                     np.arange(experts))
    keep_KC = _proportional_parts(_running_sums(quotas_KC, index.node_first_C), quotas_KC, staying_KX[:, index.cell_C],
                    np.maximum(offered_KX, 1)[:, index.cell_C], index.expert_C)
    away_KPE, take_KC = n_PE - stay_KPE, quotas_KC - keep_KC

    own_KC = np.minimum(stay_KPE[:, index.position_C, index.expert_C], keep_KC)
    stay_KPE[:, index.position_C, index.expert_C] -= own_KC                # no pair comes twice
    split_KPC = _overlap(stay_KPE, keep_KC - own_KC, index, first_P, index.node_first_C) * (node_P[:, None] == index.node_C)
    split_KPC[:, index.position_C, replicas] += own_KC
    return split_KPC + _overlap(away_KPE, take_KC, index, np.zeros_like(node_P), index.first_C)


def _candidate_quotas(split_PC: np.ndarray, index: ReplicaIndex, topology: Topology) -> np.ndarray:
    """Quotas [K, C], better balanced than those of `local_first`."""
    position, quotas_C, topology = index.position_C.tolist(), split_PC.sum(0), _within_nodes(topology)
    by_node_NC = np.add.reduceat(split_PC, np.arange(topology.nodes) * topology.per_node)
    on_node_C = level_quotas(by_node_NC, position, index.split_choices.on_node, topology.positions, SWEEPS)
    anywhere_C = level_quotas(on_node_C[None], position, index.split_choices.anywhere, topology.positions, SWEEPS)
    return np.concatenate([[on_node_C, anywhere_C], shed_between_nodes(quotas_C, position, index.split_choices, topology, SWEEPS)])


def _within_nodes(topology: Topology) -> Topology:
    """With one node every position is one: rows are best kept where they are."""
    return topology if topology.nodes > 1 else Topology(topology.positions, 1)


def _proportional_parts(end: np.ndarray, rows: np.ndarray, share: np.ndarray, whole: np.ndarray, offset: np.ndarray | int) -> np.ndarray:
    """part / whole of rows laid end to end (`end`: their running sums, of which each group sums to `whole`), in integers
    that sum to `part`. turn: which of a group come out larger where it does not divide evenly."""
    shift = offset % whole
    return (end * share + shift) // whole - ((end - rows) * share + shift) // whole


def _overlap(left_PE: np.ndarray, left_C: np.ndarray, index: ReplicaIndex, first_P: np.ndarray, first_C: np.ndarray) -> np.ndarray:
    """[…, P, C]: sources laid end to end against replicas laid end to end, from a first source and a first replica on."""
    end_PE = left_PE.cumsum(-2)
    end_PE = end_PE - (end_PE - left_PE)[..., first_P, :]
    end_C = _running_sums(left_C, first_C)
    end_PC, start_PC = end_PE[..., index.expert_C], (end_PE - left_PE)[..., index.expert_C]
    begin_C = (end_C - left_C)[..., None, :]
    return np.maximum(np.minimum(end_PC, end_C[..., None, :]) - np.maximum(start_PC, begin_C), 0)


def _running_sums(rows_C: np.ndarray, first_C: np.ndarray) -> np.ndarray:
    """Running sums that start anew at every first replica."""
    end_C = rows_C.cumsum(-1)
    return end_C - (end_C - rows_C)[..., first_C]


def _loads(split_PC: np.ndarray, index: ReplicaIndex, topology: Topology) -> np.ndarray:
    """Rows by position, […, P]."""
    return _sum_over(index.position_C, split_PC.sum(-2), topology.positions)


def _sum_over(index_C: np.ndarray, rows_C: np.ndarray, size: int) -> np.ndarray:
    """Sums of rows […, C] by index, […, size]."""
    lines = rows_C.reshape(-1, len(index_C))
    cell = np.arange(len(lines))[:, None] * size + index_C
    total = np.bincount(cell.ravel(), lines.ravel(), len(lines) * size)          # float64: exact far beyond any count of rows
    return total.astype(np.int64).reshape(*rows_C.shape[:-1], size)
