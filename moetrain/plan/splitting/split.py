"""Split the rows of each source over the replicas of their experts: rules over counts, before any row moves.

A *replica* is a home or a copy; `LayerPlacement.replicas` lists all of a layer's by (expert, position). A
split S_PC counts the rows that source p sends to replica c. Summed over an expert's replicas, it is what the
source has for that expert.

    local_first   the replica at the source, else evenly over those on its node, else evenly over all (Hecate,
                  arXiv 2502.02581). The rows of a source depend on its own counts alone, so a rank needs no
                  others
    waterfill     fills the least loaded replicas, and lets rows leave their node only while that pays. Needs
                  all counts
    shares        quotas that the planner has set, by global offset (LLEP), wherever rows are. Needs all
                  counts

Everything is int64 and exact. Where modeled times decide (`waterfill`), every rank computes them from the
same integers in the same way, so ranks with equal counts choose equally. The rules that need all counts run
on the host, where the exchange needs these counts anyway. They use numpy: on arrays this small an operation
of torch takes three times as long.

Shapes: P sources (= positions), E experts, C replicas, N nodes, K candidates, X cells (node, expert).
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

# At most, over all groups of rows. Loads converge sooner, except along chains of copies.
SWEEPS = 12
# local_first stands where its largest load is that close to the mean (1/64 above it): little is left to gain.
BALANCED_WITHIN = 64


class ReplicaIndex(NamedTuple):
    """Tables of a placement's replicas, all int64.

    Attributes:
        expert_C: expert of each replica.
        position_C: its position.
        node_C: its node.
        first_C: index of the first replica of the same expert.
        node_first_C: index of the first replica of the same expert on the same node.
        cell_C: index of its (node, expert) in a flattened [N, E].
        choices: groups of replicas that rows may be split over.
    """

    expert_C: np.ndarray
    position_C: np.ndarray
    node_C: np.ndarray
    first_C: np.ndarray
    node_first_C: np.ndarray
    cell_C: np.ndarray
    choices: SplitChoices


@lru_cache(maxsize=256)
def replica_index(placement: LayerPlacement, topology: Topology) -> ReplicaIndex:
    """Index the replicas of a placement.

    Cached, because a plan lives for many micro-batches; do not write to it.
    """
    assert placement.positions == topology.positions, (placement.positions, topology)
    expert_C, position_C, _ = np.array(placement.replicas, dtype=np.int64).T
    node_C = position_C // topology.per_node
    by_node_C = expert_C * topology.nodes + node_C
    return ReplicaIndex(expert_C, position_C, node_C,
                        first_C=np.searchsorted(expert_C, expert_C),
                        node_first_C=np.searchsorted(by_node_C, by_node_C),
                        cell_C=node_C * placement.num_experts + expert_C,
                        choices=split_choices(expert_C, position_C, _within_nodes(topology)))


@lru_cache(maxsize=256)
def _device_tables(placement: LayerPlacement, topology: Topology, device: torch.device) -> tuple[Tensor, ...]:
    """expert_C, position_C, node_C and first_C of the index, on the device."""
    tables_4C = torch.from_numpy(np.stack(replica_index(placement, topology)[:4]))
    if device.type == "cuda":
        # From pinned memory the copy is asynchronous: the host does not wait for the device.
        tables_4C = tables_4C.pin_memory().to(device, non_blocking=True)
    return tables_4C.unbind()


def local_first(n_PE: Tensor, placement: LayerPlacement, topology: Topology, first_source: int = 0) -> Tensor:
    """Split rows over the nearest replicas: at the source, else on its node, else all.

    Runs on the device of the counts. Rows that do not divide evenly start at a replica that depends on source
    and expert, so that sources do not all favor the same one.

    Args:
        n_PE: int64 [P, E], rows of consecutive sources; any block of them.
        placement: homes and copies.
        topology: positions and nodes.
        first_source: position of the first source of `n_PE`.

    Returns:
        Rows for each replica, int64 [P, C].
    """
    expert_C, position_C, node_C, first_C = _device_tables(placement, topology, n_PE.device)
    source_P1 = torch.arange(first_source, first_source + len(n_PE), device=n_PE.device)[:, None]
    same_node_PC = node_C == source_P1 // topology.per_node
    distance_PC = torch.where(position_C == source_P1, 0, torch.where(same_node_PC, 1, 2))
    nearest_PE = torch.full_like(n_PE, 2)
    nearest_PE = nearest_PE.scatter_reduce(1, expert_C.expand_as(distance_PC), distance_PC, "amin")
    eligible_PC = (distance_PC == nearest_PE[:, expert_C]).long()
    before_PC = eligible_PC.cumsum(1) - eligible_PC
    turn_PC = before_PC - before_PC[:, first_C] - source_P1 - expert_C
    count_PC = torch.zeros_like(n_PE).index_add_(1, expert_C, eligible_PC)[:, expert_C]
    rows_PC = n_PE[:, expert_C]
    return (rows_PC // count_PC + (turn_PC % count_PC < rows_PC % count_PC)) * eligible_PC


def waterfill(n_PE: Tensor, placement: LayerPlacement, topology: Topology, costs: Costs) -> Tensor:
    """Split rows by leveled quotas, with no larger load and no longer modeled time than `local_first`.

    Candidates are quotas leveled with rows kept on their node wherever it holds their expert, quotas leveled
    freely, and steps between the two (plan/splitting/water_filling.py). All are matched to sources and timed
    by the model, and the shortest is taken.

    Args:
        n_PE: int64 [P, E], rows of all sources, on the host.
        placement: homes and copies.
        topology: positions and nodes.
        costs: what a row, an expert and a link cost.

    Returns:
        Rows for each replica, int64 [P, C], on the host.
    """
    index, rows_PE = replica_index(placement, topology), n_PE.numpy()
    local_PC = local_first(n_PE, placement, topology)
    best_PC = local_PC.numpy()
    highest, total = int(_loads(best_PC, index, topology).max()), int(rows_PE.sum())
    balanced = highest * topology.positions * BALANCED_WITHIN <= total * (BALANCED_WITHIN + 1)
    if len(index.expert_C) == placement.num_experts or balanced:
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
    """Split rows in proportion to quotas that were planned for other counts.

    The rows of an expert, in the order of their sources, are cut where the running sums of its quotas say.
    Rows of an expert without any quota go to its home.

    Args:
        n_PE: int64 [P, E], rows of all sources, on the host.
        quotas_C: int64 [C], planned rows for each replica.
        placement: homes and copies.
        topology: positions and nodes.

    Returns:
        Rows for each replica, int64 [P, C], on the host.
    """
    index, rows_PE, quotas_C = replica_index(placement, topology), n_PE.numpy(), quotas_C.numpy()
    home_E = np.asarray(placement.home)
    planned_C = _sum_over(index.expert_C, quotas_C, placement.num_experts)[index.expert_C]
    quotas_C = np.where((planned_C == 0) & (index.position_C == home_E[index.expert_C]), 1, quotas_C)
    cut_C = _portions(_running_sums(quotas_C, index.first_C), quotas_C, rows_PE.sum(0)[index.expert_C],
                      np.maximum(planned_C, 1), 0)
    split_PC = _overlap(rows_PE, cut_C, index, np.zeros(len(rows_PE), dtype=np.int64), index.first_C)
    return torch.from_numpy(split_PC)


def match_sources(n_PE: np.ndarray, quotas_KC: np.ndarray, index: ReplicaIndex,
                  topology: Topology) -> np.ndarray:
    """Match the rows of sources to quotas, so that no link carries much more than others.

    As many rows stay on their node as it has quotas for. Where a node has more rows than quotas, each of its
    sources sends away an equal part of what it has; where it has more quotas than rows, each of its replicas
    takes in an equal part of its own. Rows that stay go to their own position first.

    Args:
        n_PE: int64 [P, E], rows of all sources.
        quotas_KC: int64 [K, C], K times quotas; those of an expert sum to its rows.
        index: the replicas.
        topology: positions and nodes.

    Returns:
        Rows for each replica, int64 [K, P, C].
    """
    sources, experts = n_PE.shape
    node_P, replicas = np.arange(sources) // topology.per_node, np.arange(quotas_KC.shape[1])
    first_P = node_P * topology.per_node
    wanted_NE = np.add.reduceat(n_PE, np.arange(topology.nodes) * topology.per_node)
    offered_KX = _sum_over(index.cell_C, quotas_KC, wanted_NE.size)
    staying_KX = np.minimum(wanted_NE.reshape(-1), offered_KX)

    end_PE = n_PE.cumsum(0)
    end_PE = end_PE - (end_PE - n_PE)[first_P]
    stay_KPE = _portions(end_PE, n_PE, staying_KX.reshape(-1, *wanted_NE.shape)[:, node_P],
                         np.maximum(wanted_NE, 1)[node_P], np.arange(experts))
    keep_KC = _portions(_running_sums(quotas_KC, index.node_first_C), quotas_KC, staying_KX[:, index.cell_C],
                        np.maximum(offered_KX, 1)[:, index.cell_C], index.expert_C)
    away_KPE, take_KC = n_PE - stay_KPE, quotas_KC - keep_KC

    own_KC = np.minimum(stay_KPE[:, index.position_C, index.expert_C], keep_KC)
    stay_KPE[:, index.position_C, index.expert_C] -= own_KC          # safe: no (position, expert) comes twice
    split_KPC = (_overlap(stay_KPE, keep_KC - own_KC, index, first_P, index.node_first_C)
                 * (node_P[:, None] == index.node_C))
    split_KPC[:, index.position_C, replicas] += own_KC
    return split_KPC + _overlap(away_KPE, take_KC, index, np.zeros_like(node_P), index.first_C)


def _candidate_quotas(split_PC: np.ndarray, index: ReplicaIndex, topology: Topology) -> np.ndarray:
    """Quotas that are better balanced than those of `local_first`, int64 [K, C]."""
    position, quotas_C, topology = index.position_C.tolist(), split_PC.sum(0), _within_nodes(topology)
    by_node_NC = np.add.reduceat(split_PC, np.arange(topology.nodes) * topology.per_node)
    on_node_C = level_quotas(by_node_NC, position, index.choices.on_node, topology.positions, SWEEPS)
    anywhere_C = level_quotas(on_node_C[None], position, index.choices.anywhere, topology.positions, SWEEPS)
    shed_KC = shed_between_nodes(quotas_C, position, index.choices, topology, SWEEPS)
    return np.concatenate([[on_node_C, anywhere_C], shed_KC])


def _within_nodes(topology: Topology) -> Topology:
    """Topology whose nodes rows are best kept on. With a single node, every position counts as one."""
    return topology if topology.nodes > 1 else Topology(topology.positions, 1)


def _portions(end: np.ndarray, rows: np.ndarray, part: np.ndarray, whole: np.ndarray,
              tie_shift: np.ndarray | int) -> np.ndarray:
    """Portions part / whole of the rows, in integers whose sum over each group is exactly `part`.

    Args:
        end: running sums of the rows, starting anew in every group.
        rows: rows that are laid end to end; those of a group sum to `whole`.
        part: rows to take of each group.
        whole: rows of each group.
        tie_shift: shifts which members of a group get the larger portions where it does not divide evenly.

    Returns:
        int64, of the broadcast shape of the arguments.
    """
    shift = tie_shift % whole
    return (end * part + shift) // whole - ((end - rows) * part + shift) // whole


def _overlap(left_PE: np.ndarray, left_C: np.ndarray, index: ReplicaIndex, first_P: np.ndarray,
             first_C: np.ndarray) -> np.ndarray:
    """Overlap of sources laid end to end with replicas laid end to end.

    Args:
        left_PE: int64 […, P, E], rows of each source that are not split yet.
        left_C: int64 […, C], rows that each replica still takes.
        index: the replicas.
        first_P: source at which the rows of each source's group start.
        first_C: replica at which the rows of each replica's group start.

    Returns:
        Rows of each source for each replica, int64 […, P, C].
    """
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
    """Rows by position, int64 […, P]."""
    return _sum_over(index.position_C, split_PC.sum(-2), topology.positions)


def _sum_over(index_C: np.ndarray, rows_C: np.ndarray, size: int) -> np.ndarray:
    """Sums of rows […, C] by index, int64 […, size].

    `bincount` adds in float64: exact far beyond any count of rows.
    """
    table_KC = rows_C.reshape(-1, len(index_C))
    cell_KC = np.arange(len(table_KC))[:, None] * size + index_C
    total = np.bincount(cell_KC.ravel(), table_KC.ravel(), len(table_KC) * size)
    return total.astype(np.int64).reshape(*rows_C.shape[:-1], size)
