"""What every rank of tools/bench/placement.py runs: layers with experts and no routers, timed and metered under each plan.

    Stack     two layers through the real dispatcher, copies and collectives, forward and backward, on given rows
    Meter     bytes that this rank hands to its collectives, by destination, and how many it calls
    traffic   what these must be, from the rows, the plan and the sizes alone
    replay    every arm in turn at every step of a trace

Computing is *paced*: a rank sleeps for the rows it received, and for the attention before a layer, because the ranks of one
machine share its cores. Unpaced it computes its experts for real, and no attention.

Shapes: P positions, E experts, C replicas.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  before Meter stands in for its op
from torch import Tensor

from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group, build_mesh, mesh_sizes
from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.experts import RoutedExperts
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.pinned import DeviceTables
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.parallel.fssdp.rehoming import reshard
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, contiguous, slice_columns
from moetrain.plan.planners.base import LayerPlan, Planner, SupportsRehoming, loads_by_expert
from moetrain.plan.splitting.rules import rule_of
from tools.netlab import lab as netlab

LAYERS, WINDOW, CEILING = 2, 5, "ceiling"
CUT = 4                                          # experts of a layer that may be cut up under `+cut`
SCALED = {"llep": ["planner.min_rows=64"]}       # published for runs with many more rows


class Arm(NamedTuple):
    """A planner and what it is told: the forecast, or with `+oracle` the loads of the step itself; by expert, or with
    `+nodes` by node and expert. `+cut`: homes may be cut up (parallel.sliced), where the planner decides so."""

    planner: str
    oracle: bool
    nodes: bool
    cut: bool

    @classmethod
    def parse(cls, name: str) -> "Arm":
        planner, *told = name.split("+")
        if set(told) - {"oracle", "nodes", "cut"}:
            raise SystemExit(f"{name}: a planner may be followed by +oracle, +nodes and +cut")
        return cls(planner, "oracle" in told, "nodes" in told, "cut" in told)

    def loads(self, trace: np.ndarray, step: int, per_node: int) -> np.ndarray:
        seen_PE = trace[step] if self.oracle else trace[step - WINDOW:step].mean(0)
        by_node_NE = np.add.reduceat(seen_PE, np.arange(0, len(seen_PE), per_node), axis=0)
        return (by_node_NE if self.nodes else by_node_NE.sum(0)).astype(np.int64)


# --- counting


class Meter:
    """sent_P: bytes handed over for each rank since `clear`. calls: of collectives that move rows, counts or experts."""

    def __init__(self) -> None:
        self.sent_P = np.zeros(dist.get_world_size(), dtype=np.int64)
        self.calls = 0

    def clear(self) -> None:
        self.sent_P[:] = 0
        self.calls = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        plain, functional = dist.all_to_all_single, torch.ops._c10d_functional.all_to_all_single

        def all_to_all(output, message, received=None, sent=None, group=None, **options):
            self._add(message, sent, dist.get_process_group_ranks(group))
            return plain(output, message, received, sent, group=group, **options)

        def functional_all_to_all(message, received, sent, group_name):
            group = torch._C._distributed_c10d._resolve_process_group(group_name)
            self._add(message, sent, dist.get_process_group_ranks(group))
            return functional(message, received, sent, group_name)

        dist.all_to_all_single = all_to_all
        torch.ops._c10d_functional.all_to_all_single = functional_all_to_all
        try:
            yield
        finally:
            dist.all_to_all_single, torch.ops._c10d_functional.all_to_all_single = plain, functional

    def _add(self, message: Tensor, sent: list[int], ranks: list[int]) -> None:
        row = message.element_size() * message.shape[1:].numel()
        self.sent_P[ranks] += np.asarray(sent) * row
        self.calls += 1


class Traffic(NamedTuple):
    bytes_PP: np.ndarray         # from each position to each
    calls: int


def traffic(n_PE: Tensor, plan: LayerPlan, rule: object, shapes: list[tuple[int, int]]) -> Traffic:
    """Of one layer, forward and backward, in float32, one micro-batch.

    Rows go and come back, forward and again backward; with each goes its gate weight, and comes the gradient of that. Copies
    come from homes, or in pieces from everywhere, and their gradients go there. Counts are of slots, or of experts where a
    rule looks at all positions. shapes: of an expert's matrices.
    """
    dim = shapes[0][1]
    placement, looks = plan.placement, bool(plan.placement.copies) and rule.needs_all_counts
    positions = placement.positions
    split_PC = rule.split(n_PE, placement, 0) if placement.copies else n_PE
    rows_PP = np.zeros((positions, positions), dtype=np.int64)
    for c, (_, at, _) in enumerate(placement.replicas):
        rows_PP[:, at] += split_PC[:, c].numpy()
    numbers_PP = np.zeros_like(rows_PP)                          # of weights, on their way to copies
    for expert, at in placement.whole_copies:
        numbers_PP[placement.home[expert], at] += sum(rows * columns for rows, columns in shapes)
    for source in range(positions):
        piece = sum(part.stop - part.start for part in slice_columns(shapes, source, positions))
        for at in range(positions):
            numbers_PP[source, at] += piece * len(placement.assembled_at(at))
    counted = placement.num_experts if looks else placement.slots_per_position
    return Traffic((4 * dim + 4 + 4 * dim) * (rows_PP + rows_PP.T) + 4 * (numbers_PP + numbers_PP.T) + 8 * counted,
                   1 + 4 + 2 * bool(placement.whole_copies) + 2 * bool(placement.sliced))


def by_link(bytes_PP: np.ndarray, per_node: int) -> dict[str, int]:
    """Bytes inside nodes and between them; what stays at a position crosses no link."""
    node_P = np.arange(len(bytes_PP)) // per_node
    near_PP = node_P[:, None] == node_P
    return {"inside": int((bytes_PP * (near_PP & ~np.eye(len(node_P), dtype=bool))).sum()),
            "between": int((bytes_PP * ~near_PP).sum())}


# --- layers


class Pace(torch.autograd.Function):
    """Sleep forward and backward: computing that takes its time and no core."""

    @staticmethod
    def forward(ctx, x, forward_s, backward_s):
        ctx.seconds = backward_s
        if forward_s:
            time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.seconds:
            time.sleep(ctx.seconds)
        return grad, None, None


class Sizes(NamedTuple):
    """row_s, hidden_s: computing a row, forward and backward, and the attention before a layer, forward."""

    dim: int
    expert_dim: int
    row_s: float
    hidden_s: float
    inside: float                # bytes per second
    between: float

    @property
    def expert_numbers(self) -> int:
        return 3 * self.dim * self.expert_dim

    @property
    def costs(self) -> Costs:
        # Half the rate: over gloo two ranks that exchange blocks take turns (docs/howto/emulated_links.md).
        return Costs(row_s=self.row_s, row_bytes=4 * self.dim, expert_bytes=4 * self.expert_numbers, latency_s=1e-3,
                     hidden_s=self.hidden_s, inside=self.inside / 2, between=self.between / 2)


class Stack:
    """Layers with experts, without routers: the rows of each are given. paced: sleeps for the computing."""

    def __init__(self, sizes: Sizes, experts: int, group: Group, per_node: int, *, paced: bool) -> None:
        self.sizes, self.experts, self.group, self.paced = sizes, experts, group, paced
        self.topology = Topology(self.group.size, per_node)
        self.start(ExpertPlacement(tuple((f"layers.{layer}.moe", contiguous(experts, self.group.size))
                                         for layer in range(LAYERS))))

    def start(self, homes: ExpertPlacement) -> None:
        """Experts at these homes."""
        self.homes, at = homes, self.group.position
        self.banks = {name: ExpertBank(experts=layer.experts_of(at), dim=self.sizes.dim, expert_dim=self.sizes.expert_dim,
                                       cut=(at, self.group.size)) for name, layer in homes.whole.layers}
        parameters = [parameter for bank in self.banks.values() for parameter in bank.parameters()]
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        reshard(self.banks, torch.optim.SGD(parameters), homes.whole, homes, self.group)      # cuts up
        self.copies = CopyManager(self.banks, self.group, dtype=torch.float32, rematerialize=False, recompute=False)
        self.dispatchers = {name: TokenDispatcher(layer, FlatExchange(self.group), torch.device("cpu"), exact=True)
                            for name, layer in homes.layers}
        self.adopt("local_first", {name: LayerPlan(layer) for name, layer in homes.layers})

    def adopt(self, rule: str, plans: dict[str, LayerPlan]) -> None:
        self.plans, self.rules = plans, {name: rule_of(rule, plan, self.topology, self.sizes.costs)
                                         for name, plan in plans.items()}
        with DeviceTables(torch.device("cpu")) as tables:
            self.copies.set_placement(ExpertPlacement(tuple((name, plan.placement) for name, plan in plans.items())), tables)
            for name, plan in plans.items():
                self.dispatchers[name].set_placement(plan.placement, tables, self.rules[name])

    def expected(self, n_PE: Tensor) -> Traffic:
        """Of a step with these rows."""
        layers = [traffic(n_PE, self.plans[name], self.rules[name], self.banks[name].shapes) for name in self.plans]
        return Traffic(sum(layer.bytes_PP for layer in layers), sum(layer.calls for layer in layers))

    def step(self, n_E: Tensor) -> None:
        """Forward and backward of all layers with these rows from here."""
        ids_T1 = torch.arange(self.experts).repeat_interleave(n_E)[:, None]
        weights_T1 = torch.ones(ids_T1.shape)
        x_TD = torch.ones(len(ids_T1), self.sizes.dim, requires_grad=True)
        hidden_s, row_s = (self.sizes.hidden_s, self.sizes.row_s) if self.paced else (0.0, 0.0)
        self.copies.begin(1)
        for name, bank in self.banks.items():
            bank.prefetch()
            x_TD = Pace.apply(x_TD, hidden_s, 2 * hidden_s)
            dispatcher = self.dispatchers[name]
            rows = dispatcher.dispatch(bank.reduce_grads_in_backward(x_TD), ids_T1, weights_T1)
            out_RD = RoutedExperts(bank, dispatcher).compute(rows)
            seconds = row_s * sum(rows.counts_e)
            x_TD = x_TD + dispatcher.combine(Pace.apply(out_RD, seconds / 3, seconds * 2 / 3), rows.metadata)
        x_TD.sum().backward()
        self.copies.finish()
        self.copies.release()
        for bank in self.banks.values():
            bank.zero_grad(set_to_none=True)


# --- measuring


def work(options: argparse.Namespace, spec: Path) -> None:
    """All traces of a file, in a process group of all ranks; rank 0 writes the result."""
    torch.set_num_threads(1)
    rates = {name: (netlab.bits_per_second(getattr(options, name)) or 8e9) / 8 for name in ("inside", "between")}
    sizes = Sizes(options.dim, options.expert_dim, options.row_us * 1e-6, options.hidden_ms * 1e-3, **rates)
    real = sizes._replace(row_s=seconds_of_a_row(sizes, options.rows), hidden_s=0.0)
    group = build_mesh(mesh_sizes("fssdp", dist.get_world_size(), None), torch.device("cpu"))["ep"]
    results, total = {}, Meter()
    with np.load(spec) as traces, total.counting():
        for name in traces.files:
            results[name] = replay(options, sizes, group, traces[name], options.steps, paced=True)
            if options.real_steps:
                results[name]["unpaced"] = replay(options, real, group, traces[name], options.real_steps, paced=False)
            handed = torch.tensor(int(total.sent_P.sum() - total.sent_P[dist.get_rank()]))
            dist.all_reduce(handed)
            if dist.get_rank() == 0:                             # after every trace, so that a run that is cut short leaves something
                print(name, {arm: round(sum(values) * 1e3 / len(values)) for arm, values in results[name]["seconds"].items()},
                      flush=True)
                Path(options.out).write_text(json.dumps({"traces": results, "unpaced_row_us": real.row_s * 1e6,
                                                         "handed_over_bytes": int(handed)}))


def seconds_of_a_row(sizes: Sizes, rows: int) -> float:
    """What computing a row takes, forward and backward, while all ranks compute; the largest of the ranks' medians."""
    bank = ExpertBank(experts=(0, 1), dim=sizes.dim, expert_dim=sizes.expert_dim)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    times = []
    for _ in range(9):
        x_ND = torch.ones(rows, sizes.dim, requires_grad=True)
        dist.barrier()
        begin = time.perf_counter()
        grouped_experts(x_ND, torch.ones(rows), bank.gate_up, bank.down, [rows // 2, rows - rows // 2]).sum().backward()
        times.append((time.perf_counter() - begin) / rows)
    return _largest(statistics.median(times))


def replay(options: argparse.Namespace, sizes: Sizes, group: Group, trace: np.ndarray, steps: int, *, paced: bool) -> dict:
    """Seconds of every step under every arm, in turn, the order turned from step to step; what was sent; what the trace is
    like."""
    rank, experts, per_node = dist.get_rank(), trace.shape[2], options.per_node
    arms = {name: Arm.parse(name) for name in options.planners}
    planners = {name: build(compose([f"planner={arm.planner}", "parallel=fssdp", *SCALED.get(arm.planner, [])]).planner, "planner")
                for name, arm in arms.items()}
    stacks = {name: Stack(sizes, experts, group, per_node, paced=paced) for name in [*arms, CEILING]}
    for name, planner in planners.items():
        if isinstance(planner, SupportsRehoming):
            seen, stack = arms[name]._replace(oracle=False).loads(trace, WINDOW, per_node), stacks[name]
            homes = planner.rehome({router: seen for router, _ in stack.homes.layers}, stack.homes, stack.topology, sizes.costs)
            if arms[name].cut:
                homes = ExpertPlacement(tuple((router, layer.with_sliced(planner.choose_sliced(
                    loads_by_expert(seen), layer, stack.topology, sizes.costs, options.room, CUT))) for router, layer in homes.layers))
            stack.start(homes)
    used = trace[WINDOW:WINDOW + steps + 1]
    even = np.full(experts, round(used.sum() / used.shape[0] / used.shape[1] / experts))
    seconds, meter = {name: [] for name in stacks}, Meter()
    sent = {name: {"inside": 0, "between": 0, "calls": 0, "copies": 0} for name in stacks}
    with meter.counting():
        for step in range(WINDOW, WINDOW + len(used)):
            for name in np.roll(list(stacks), step).tolist():
                stack, n_PE = stacks[name], torch.from_numpy(trace[step])
                if name == CEILING:
                    n_PE = torch.from_numpy(even).expand(len(n_PE), -1)
                else:
                    stack.adopt(planners[name].rule, plans_of(stack, planners[name], arms[name].loads(trace, step, per_node),
                                                              options.room))
                expected = stack.expected(n_PE)
                meter.clear()
                dist.barrier()
                begin = time.perf_counter()
                stack.step(n_PE[rank])
                took = _largest(time.perf_counter() - begin)
                assert meter.sent_P.tolist() == expected.bytes_PP[rank].tolist() and meter.calls == expected.calls, (
                    name, step, meter.sent_P, expected.bytes_PP[rank], meter.calls, expected.calls)
                if step > WINDOW:                                # the first one warms up
                    seconds[name].append(took)
                    for key, value in {**by_link(expected.bytes_PP, per_node), "calls": expected.calls,
                                       "copies": sum(len(plan.placement.copies) for plan in stack.plans.values())}.items():
                        sent[name][key] += value
    return {"seconds": seconds, "sent": {name: {key: value / steps for key, value in values.items()} for name, values in sent.items()},
            "rank_load": rank_load(used[1:]), "experts": experts}


def plans_of(stack: Stack, planner: Planner, loads: np.ndarray, room: int) -> dict[str, LayerPlan]:
    plans = {}
    for router, homes in stack.homes.layers:
        plan = planner.plan(loads, homes, stack.topology, stack.sizes.costs, room)
        plans[router] = replace(plan, placement=plan.placement.with_sliced(homes.sliced))
    return plans


def rank_load(trace: np.ndarray) -> float:
    """Largest load of a position over the mean under plain expert parallelism, the mean over steps."""
    home = np.asarray(contiguous(trace.shape[2], trace.shape[1]).home)
    load_tP = np.stack([trace.sum(1)[:, home == at].sum(1) for at in range(trace.shape[1])], axis=1)
    return float((load_tP.max(1) / load_tP.mean(1)).mean())


def _largest(value: float) -> float:
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()
