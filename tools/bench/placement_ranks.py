"""Ranks of tools/bench/placement.py: layers of experts, timed and metered under each plan.

    Stack     two layers through the real dispatcher, copies and collectives, forward and backward
    replay    every arm in turn at every step of a trace

There are no routers: the rows are those of a trace. Computing is *paced*: a rank sleeps for the rows it
received, and for the attention before a layer, because the ranks of one machine share its cores. Unpaced it
computes its experts for real, and no attention. What is sent is counted (tools/bench/placement_traffic.py).

Shapes: P positions, E experts, C replicas.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group, build_mesh, mesh_sizes
from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.pinned import DeviceTables
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.parallel.fssdp.rehoming import reshard
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, contiguous
from moetrain.plan.planners.base import LayerPlan, Planner, SupportsRehoming, loads_by_expert
from moetrain.plan.splitting.rules import rule_of
from tools.bench.placement_traffic import Meter, Traffic, by_link, traffic
from tools.netlab import lab as netlab

LAYERS, WINDOW, CEILING = 2, 5, "ceiling"
CUT = 4                                          # experts of a layer that may be cut up under `+cut`
SCALED = {"llep": ["planner.min_rows=64"]}       # published for runs with many more rows


class Arm(NamedTuple):
    """A planner and what it is told.

    Args:
        planner: name of the planner.
        oracle: it is told the loads of the step itself (`+oracle`) instead of a forecast.
        nodes: loads by node and expert (`+nodes`) instead of by expert.
        cut: experts may be sliced between positions (`+cut`, parallel.max_sliced_experts), where the planner
            decides so.
    """

    planner: str
    oracle: bool
    nodes: bool
    cut: bool

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Parse name[+oracle][+nodes][+cut]."""
        planner, *told = name.split("+")
        if set(told) - {"oracle", "nodes", "cut"}:
            raise SystemExit(f"{name}: a planner may be followed by +oracle, +nodes and +cut")
        return cls(planner, "oracle" in told, "nodes" in told, "cut" in told)

    def loads(self, trace: np.ndarray, step: int, per_node: int) -> np.ndarray:
        """Loads that the planner is told for a step, int64: [E], or with `nodes` [nodes, E]."""
        seen_PE = trace[step] if self.oracle else trace[step - WINDOW:step].mean(0)
        by_node_NE = np.add.reduceat(seen_PE, np.arange(0, len(seen_PE), per_node), axis=0)
        return (by_node_NE if self.nodes else by_node_NE.sum(0)).astype(np.int64)


# --- layers


class Pace(torch.autograd.Function):
    """Identity that sleeps forward and backward: computing that takes its time and no core."""

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
    """Sizes of a layer, and seconds of its computing.

    Args:
        dim: model width.
        expert_dim: expert width.
        row_s: seconds of computing a row, forward and backward.
        hidden_s: seconds of the attention before a layer, forward.
        inside: bytes per second inside a node.
        between: bytes per second between nodes.
    """

    dim: int
    expert_dim: int
    row_s: float
    hidden_s: float
    inside: float
    between: float

    @property
    def expert_numbers(self) -> int:
        return 3 * self.dim * self.expert_dim

    @property
    def costs(self) -> Costs:
        # Half the rate: over gloo two ranks that exchange blocks take turns (docs/howto/emulated_links.md).
        return Costs(row_s=self.row_s, row_bytes=4 * self.dim, expert_bytes=4 * self.expert_numbers,
                     latency_s=1e-3, hidden_s=self.hidden_s, inside=self.inside / 2,
                     between=self.between / 2)


class Stack:
    """Layers with experts and without routers.

    Args:
        sizes: sizes of a layer.
        experts: number of experts of a layer.
        group: ranks that share them.
        per_node: ranks of a node.
        paced: sleep for the computing instead of doing it.
    """

    def __init__(self, sizes: Sizes, experts: int, group: Group, per_node: int, *, paced: bool) -> None:
        self.sizes, self.experts, self.group, self.paced = sizes, experts, group, paced
        self.topology = Topology(self.group.size, per_node)
        self.start(ExpertPlacement(tuple((f"layers.{layer}.moe", contiguous(experts, self.group.size))
                                         for layer in range(LAYERS))))

    def start(self, homes: ExpertPlacement) -> None:
        """Make the experts at these homes."""
        self.homes, at = homes, self.group.position
        form = SwigluExpert(dim=self.sizes.dim, expert_dim=self.sizes.expert_dim)
        self.banks = {name: ExpertBank(experts=layer.experts_of(at), form=form, cut=(at, self.group.size))
                      for name, layer in homes.whole.layers}
        parameters = [parameter for bank in self.banks.values() for parameter in bank.parameters()]
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        # Slices experts where the homes say so.
        reshard(self.banks, torch.optim.SGD(parameters), homes.whole, homes, self.group)
        self.copies = CopyManager(self.banks, self.group, passes=dict.fromkeys(self.banks, 1),
                                  dtype=torch.float32, rematerialize=False,
                                  recompute=False)
        cpu = torch.device("cpu")
        self.dispatchers = {name: TokenDispatcher(layer, FlatExchange(self.group), cpu, exact=True)
                            for name, layer in homes.layers}
        self.adopt("local_first", {name: LayerPlan(layer) for name, layer in homes.layers})

    def adopt(self, rule: str, plans: dict[str, LayerPlan]) -> None:
        """Place copies as planned, and split rows by the rule of that name."""
        self.plans, self.rules = plans, {name: rule_of(rule, plan, self.topology, self.sizes.costs)
                                         for name, plan in plans.items()}
        with DeviceTables(torch.device("cpu")) as tables:
            layers = tuple((name, plan.placement) for name, plan in plans.items())
            self.copies.set_placement(ExpertPlacement(layers), tables)
            for name, plan in plans.items():
                self.dispatchers[name].set_placement(plan.placement, tables, self.rules[name])

    def expected(self, n_PE: Tensor) -> Traffic:
        """Traffic of a step with these rows, int64 [P, E]."""
        layers = [traffic(n_PE, self.plans[name], self.rules[name], self.banks[name].shapes)
                  for name in self.plans]
        return Traffic(sum(layer.bytes_PP for layer in layers), sum(layer.calls for layer in layers))

    def step(self, n_E: Tensor) -> None:
        """Run all layers forward and backward with these rows of this rank, int64 [E]."""
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
    """Replay all traces of a file, in a process group of all ranks; rank 0 writes the result."""
    torch.set_num_threads(1)
    rates = {name: (netlab.bits_per_second(getattr(options, name)) or 8e9) / 8
             for name in ("inside", "between")}
    sizes = Sizes(options.dim, options.expert_dim, options.row_us * 1e-6, options.hidden_ms * 1e-3, **rates)
    real = sizes._replace(row_s=seconds_of_a_row(sizes, options.rows), hidden_s=0.0)
    group = build_mesh(mesh_sizes("fssdp", dist.get_world_size(), None), torch.device("cpu"))["ep"]
    results, total = {}, Meter()
    with np.load(spec) as traces, total.counting():
        for name in traces.files:
            results[name] = replay(options, sizes, group, traces[name], options.steps, paced=True)
            if options.real_steps:
                results[name]["unpaced"] = replay(options, real, group, traces[name], options.real_steps,
                                                  paced=False)
            handed = torch.tensor(int(total.sent_P.sum() - total.sent_P[dist.get_rank()]))
            dist.all_reduce(handed)
            if dist.get_rank() == 0:             # after every trace: a run that is cut short leaves something
                means = {arm: round(sum(values) * 1e3 / len(values))
                         for arm, values in results[name]["seconds"].items()}
                print(name, means, flush=True)
                found = {"traces": results, "unpaced_row_us": real.row_s * 1e6,
                         "handed_over_bytes": int(handed)}
                Path(options.out).write_text(json.dumps(found))


def seconds_of_a_row(sizes: Sizes, rows: int) -> float:
    """Seconds of computing a row, forward and backward, while all ranks compute: the largest median."""
    bank = ExpertBank(experts=(0, 1), form=SwigluExpert(dim=sizes.dim, expert_dim=sizes.expert_dim))
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    times = []
    for _ in range(9):
        x_ND = torch.ones(rows, sizes.dim, requires_grad=True)
        dist.barrier()
        begin = time.perf_counter()
        halves = [rows // 2, rows - rows // 2]
        grouped_experts(x_ND, torch.ones(rows), bank.gate_up, bank.down, halves).sum().backward()
        times.append((time.perf_counter() - begin) / rows)
    return _largest(statistics.median(times))


def replay(options: argparse.Namespace, sizes: Sizes, group: Group, trace: np.ndarray, steps: int, *,
           paced: bool) -> dict:
    """Replay a trace under every arm, in turn, the order turned from step to step.

    Args:
        options: the options.
        sizes: sizes of a layer.
        group: ranks that share the experts.
        trace: int64 [steps, P, E], rows.
        steps: number of steps that count.
        paced: sleep for the computing.

    Returns:
        Seconds of every step by arm, what was sent, and what the trace is like.
    """
    rank, experts, per_node = dist.get_rank(), trace.shape[2], options.per_node
    arms = {name: Arm.parse(name) for name in options.planners}
    planners = {name: _planner(arm) for name, arm in arms.items()}
    stacks = {name: Stack(sizes, experts, group, per_node, paced=paced) for name in [*arms, CEILING]}
    for name, planner in planners.items():
        if isinstance(planner, SupportsRehoming):
            seen = arms[name]._replace(oracle=False).loads(trace, WINDOW, per_node)
            stacks[name].start(_homes(planner, arms[name], stacks[name], seen, options.max_copies))
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
                    loads = arms[name].loads(trace, step, per_node)
                    plans = plans_of(stack, planners[name], loads, options.max_copies)
                    stack.adopt(planners[name].rule, plans)
                expected = stack.expected(n_PE)
                meter.clear()
                dist.barrier()
                begin = time.perf_counter()
                stack.step(n_PE[rank])
                took = _largest(time.perf_counter() - begin)
                sent_P = expected.bytes_PP[rank]
                assert meter.sent_P.tolist() == sent_P.tolist() and meter.calls == expected.calls, (
                    name, step, meter.sent_P, sent_P, meter.calls, expected.calls)
                if step > WINDOW:                                # the first one warms up
                    seconds[name].append(took)
                    copies = sum(len(plan.placement.copies) for plan in stack.plans.values())
                    moved = by_link(expected.bytes_PP, per_node)
                    for key, value in {**moved, "calls": expected.calls, "copies": copies}.items():
                        sent[name][key] += value
    per_step = {name: {key: value / steps for key, value in values.items()} for name, values in sent.items()}
    return {"seconds": seconds, "sent": per_step, "rank_load": rank_load(used[1:]), "experts": experts}


def _planner(arm: Arm) -> Planner:
    words = [f"planner={arm.planner}", "parallel=fssdp", *SCALED.get(arm.planner, [])]
    return build(compose(words).planner, "planner")


def _homes(planner: SupportsRehoming, arm: Arm, stack: Stack, seen: np.ndarray,
           max_copies: int) -> ExpertPlacement:
    """Homes that a planner chooses by the loads seen before the trace, sliced where the arm allows it."""
    costs = stack.sizes.costs
    by_layer = {router: seen for router, _ in stack.homes.layers}
    homes = planner.rehome(by_layer, stack.homes, stack.topology, dict.fromkeys(by_layer, costs))
    if not arm.cut:
        return homes
    loads = loads_by_expert(seen)
    return ExpertPlacement(tuple(
        (router, layer.with_sliced(planner.choose_sliced(
            loads, layer, stack.topology, costs, max_copies, CUT)))
        for router, layer in homes.layers))


def plans_of(stack: Stack, planner: Planner, loads: np.ndarray, max_copies: int) -> dict[str, LayerPlan]:
    """Plan of every layer of a stack by these loads, with at most `max_copies` copies on a position."""
    plans = {}
    for router, homes in stack.homes.layers:
        plan = planner.plan(loads, homes, stack.topology, stack.sizes.costs, max_copies)
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
