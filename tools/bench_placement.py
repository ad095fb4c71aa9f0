"""Step time of every planner on given loads, over emulated links: who gets copies of which experts, and what it saves.

    python tools/bench_placement.py --loads runs/mine/loads.npz --out placement.json
    python tools/bench_placement.py --loads synthetic --out placement.json          # the seeded family of plan/loads.py

A trace is the rows of every source rank for every expert, step by step: of a loads.npz recorded with log.sources=true, or
its totals dealt out evenly. Every rank replays them through the real dispatcher, copies and collectives, forward and backward,
over two layers, in its own emulated network (tools/netlab.py). Computing is *paced*: a rank sleeps for the rows it received
(and for the attention before a layer), because the ranks of one machine share its cores; --real computes without sleeping.

Planners get the same forecasts (mean of the last steps), room and figures of the links, and take turns at every step. Two
lines of reference: `ep`, and the *ceiling*: what force-balanced routing takes in the same set-up. `recovered` is the share of
the time between them that a planner wins back. Needs what netlab needs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import moetrain
import netlab
from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import build_mesh, mesh_sizes
from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.experts import GroupedExperts
from moetrain.parallel.fssdp import CopyManager
from moetrain.plan.costs import Costs, Topology
from moetrain.plan.loads import NAMES, generate
from moetrain.plan.placement import ExpertPlacement, contiguous
from moetrain.plan.planners.base import Rehomes
from moetrain.plan.rules import rule_of
from moetrain.routers.base import Routing

LAYERS, WINDOW, CEILING = 2, 5, "ceiling"
SCALED = {"llep": ["planner.min_rows=64"]}       # published for runs with many more rows
PLANNERS = ("ep", "hecate", "eplb", "shadow", "llep", "laer", "balanced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", required=True, help="loads.npz of a run, or `synthetic`")
    parser.add_argument("--out", required=True, help="where the result goes, .json")
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS))
    parser.add_argument("--traces", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--per-node", type=int, default=2)
    parser.add_argument("--inside", default="900mbit", help="link of a rank to others of its node")
    parser.add_argument("--between", default="100mbit", help="link of a rank to other nodes")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--expert-dim", type=int, default=64)
    parser.add_argument("--experts", type=int, default=16, help="synthetic: experts of a layer")
    parser.add_argument("--rows", type=int, default=512, help="rows of a rank and layer, on average")
    parser.add_argument("--row-us", type=float, default=100.0, help="computing a row, forward and backward, in microseconds")
    parser.add_argument("--hidden-ms", type=float, default=10.0, help="attention before a layer, forward; backward twice that")
    parser.add_argument("--room", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a trace")
    parser.add_argument("--oracle", action="store_true", help="planners see the loads of the step itself, not a forecast")
    parser.add_argument("--real", action="store_true", help="compute without sleeping")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options, Path(options.worker))
        return
    positions = options.nodes * options.per_node
    traces = {name: scaled(trace, options.rows) for name, trace in read_traces(options.loads, positions, options.experts,
                                                                              options.steps)
              if not options.traces or any(part in name for part in options.traces)}
    out = Path(options.out)
    spec = out.with_suffix(".traces.npz")
    np.savez(spec, **traces)
    code = netlab.run([__file__, *sys.argv[1:], "--worker", str(spec)], nodes=options.nodes, per_node=options.per_node,
                      inside=options.inside, between=options.between,
                      env={"PYTHONPATH": str(Path(moetrain.__file__).parents[1])})
    spec.unlink()
    if code:
        sys.exit(code)
    print(table(json.loads(out.read_text())))


# --- traces


def read_traces(source: str, positions: int, experts: int, steps: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, int64 [steps, positions, experts])."""
    if source == "synthetic":
        for name in NAMES:
            yield name, generate(name, seed=0, steps=steps + WINDOW, positions=positions, experts=experts, rows=4096)
        return
    with np.load(source) as file:
        names, sizes = file["routers"].tolist(), file["experts"].tolist()
        for index, (name, size) in enumerate(zip(names, sizes)):
            if "sources" in file and file["sources"].shape[2] % positions == 0:
                by_rank = file["sources"][-(steps + WINDOW):, index, :, :size]
                yield name, by_rank.reshape(len(by_rank), positions, -1, size).sum(2)
            else:
                totals = file["loads"][-(steps + WINDOW):, index, :size]
                shares = [(totals + (positions - 1 - p)) // positions for p in range(positions)]
                yield f"{name} (sources alike)", np.stack(shares, axis=1)


def scaled(trace: np.ndarray, rows: int) -> np.ndarray:
    """The same proportions with `rows` rows a position and step on average."""
    mean = trace.sum((1, 2), keepdims=True) / trace.shape[1]
    return np.rint(trace * (rows / mean)).astype(np.int64)


# --- what every rank runs


class Pace(torch.autograd.Function):
    """Sleep forward and backward: computing that takes its time and no core."""

    @staticmethod
    def forward(ctx, x, forward_s, backward_s):
        ctx.seconds = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


class Stack:
    """Layers with experts, without routers: the rows of each are given."""

    def __init__(self, options: argparse.Namespace, experts: int) -> None:
        self.options, self.experts = options, experts
        self.mesh = build_mesh(mesh_sizes("fssdp", dist.get_world_size(), None), torch.device("cpu"))
        self.group = self.mesh["ep"]
        self.topology = Topology(self.group.size, options.per_node)
        pace = 0.0 if options.real else 1.0
        self.row_s, self.hidden_s = pace * options.row_us * 1e-6, pace * options.hidden_ms * 1e-3
        numbers = 3 * options.dim * options.expert_dim
        # Half the rate: over gloo two ranks that exchange blocks take turns (docs/howto/emulated_links.md).
        bandwidth = {name: _bytes_per_second(getattr(options, name)) / 2 for name in ("inside", "between")}
        self.costs = Costs(row_s=options.row_us * 1e-6, row_bytes=4 * options.dim, expert_bytes=4 * numbers, latency_s=1e-3,
                           hidden_s=options.hidden_ms * 1e-3, **bandwidth)
        self.start(ExpertPlacement(tuple((f"layers.{layer}.moe", contiguous(experts, self.group.size))
                                         for layer in range(LAYERS))))

    def start(self, homes: ExpertPlacement) -> None:
        """Experts at these homes."""
        self.homes = homes
        options, at = self.options, self.group.position
        self.banks = {name: ExpertBank(experts=layer.experts_of(at), dim=options.dim, expert_dim=options.expert_dim)
                      for name, layer in homes.layers}
        for bank in self.banks.values():
            for parameter in bank.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        self.copies = CopyManager(self.banks, self.group, dtype=torch.float32, rematerialize=False, recompute=False)
        self.dispatchers = {name: TokenDispatcher(layer, FlatExchange(self.group), torch.device("cpu"))
                            for name, layer in homes.layers}

    def adopt(self, rule: str, plans: dict) -> None:
        self.copies.adopt(ExpertPlacement(tuple((name, plan.placement) for name, plan in plans.items())))
        for name, plan in plans.items():
            self.dispatchers[name].adopt(plan.placement, rule_of(rule, plan, self.topology, self.costs))

    def step(self, n_E: Tensor) -> None:
        """Forward and backward of all layers with these rows from here."""
        ids_T1 = torch.arange(self.experts).repeat_interleave(n_E)[:, None]
        routing = Routing(ids_T1, torch.ones(ids_T1.shape), len(ids_T1), None)
        x_TD = torch.ones(len(ids_T1), self.options.dim, requires_grad=True)
        self.copies.begin(1)
        for name, bank in self.banks.items():
            bank.post()
            x_TD = Pace.apply(x_TD, self.hidden_s, 2 * self.hidden_s)
            sent = self.dispatchers[name].dispatch(x_TD, routing)
            rows_RD = GroupedExperts(bank)(sent.x_ND, sent.weights_R, sent.counts_e, sent.order)
            seconds = self.row_s * sum(sent.counts_e)
            x_TD = x_TD + self.dispatchers[name].combine(Pace.apply(rows_RD, seconds / 3, seconds * 2 / 3), sent.ticket)
        x_TD.sum().backward()
        self.copies.finish()
        self.copies.release()
        for bank in self.banks.values():
            bank.zero_grad(set_to_none=True)


def _bytes_per_second(rate: str) -> float:
    bits = netlab.bits_per_second(rate)
    return bits / 8 if bits else 1e9


def work(options: argparse.Namespace, spec: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {}
    with np.load(spec) as traces:
        for name in traces.files:
            results[name] = replay(options, traces[name])
            if dist.get_rank() == 0:
                print(name, {planner: round(seconds * 1e3, 1) for planner, seconds in results[name]["seconds"].items()}, flush=True)
    if dist.get_rank() == 0:
        facts = {"torch": torch.__version__, "paced": not options.real, **{key: value for key, value in vars(options).items()
                                                                           if key not in ("worker", "out")}}
        Path(options.out).write_text(json.dumps({"options": facts, "traces": results}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def replay(options: argparse.Namespace, trace: np.ndarray) -> dict:
    """Median step time of each planner, in turn at every step, and what the trace is like."""
    rank, experts = dist.get_rank(), trace.shape[2]
    planners = {name: build(compose([f"planner={name}", "parallel=fssdp", *SCALED.get(name, [])]).planner)
                for name in options.planners}
    stacks = {name: Stack(options, experts) for name in planners}
    for name, planner in planners.items():
        loads = forecast(trace, WINDOW)
        if isinstance(planner, Rehomes):
            stack = stacks[name]
            stack.start(planner.rehome({router: loads for router, _ in stack.homes.layers}, stack.homes, stack.topology,
                                       stack.costs))
    stacks[CEILING] = Stack(options, experts)
    even = np.full(experts, round(trace[WINDOW:].sum() / trace[WINDOW:].shape[0] / trace.shape[1] / experts))
    seconds: dict[str, list[float]] = {name: [] for name in stacks}
    copies: dict[str, list[int]] = {name: [] for name in planners}
    for step in range(WINDOW, len(trace)):
        loads = trace[step].sum(0) if options.oracle else forecast(trace, step)
        for name, stack in stacks.items():
            if name != CEILING:
                plans = {router: planners[name].plan(loads, homes, stack.topology, stack.costs, options.room)
                         for router, homes in stack.homes.layers}
                copies[name].append(sum(len(plan.placement.copies) for plan in plans.values()))
                stack.adopt(planners[name].rule, plans)
            n_E = torch.from_numpy(even if name == CEILING else trace[step, rank])
            dist.barrier()
            begin = time.perf_counter()
            stack.step(n_E)
            took = torch.tensor([time.perf_counter() - begin])
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[name].append(took.item())
    by_rank = trace[WINDOW:].sum(1)[:, :, None] * (np.array(stacks[CEILING].homes.layers[0][1].home)[:, None]
                                                  == np.arange(trace.shape[1]))
    rank_load = by_rank.sum(1)
    return {"seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
            "imbalance": float((rank_load.max(1) / rank_load.mean(1)).mean()),
            "copies": {name: statistics.mean(values) for name, values in copies.items()}}


def forecast(trace: np.ndarray, step: int) -> np.ndarray:
    return trace[step - WINDOW:step].sum(1).mean(0).astype(np.int64)




# --- the result


def table(result: dict) -> str:
    """Milliseconds a step, speed-up over ep and share recovered, by trace and planner."""
    planners = result["options"]["planners"]
    lines = ["| trace | rank load max/mean | ceiling ms | " + " | ".join(planners) + " |", "|---|---|---|" + "---|" * len(planners)]
    for name, trace in result["traces"].items():
        seconds, ep, ceiling = trace["seconds"], trace["seconds"]["ep"], trace["seconds"][CEILING]
        cells = []
        for planner in planners:
            cell = f"{seconds[planner] * 1e3:.0f}"
            if planner != "ep":
                cell += f" ({ep / seconds[planner]:.2f}x"
                cell += f", {(ep - seconds[planner]) / (ep - ceiling):.0%})" if ep > 1.1 * ceiling else ")"
            cells.append(cell)
        lines.append(f"| {name} | {trace['imbalance']:.2f} | {ceiling * 1e3:.0f} | " + " | ".join(cells) + " |")
    means = [statistics.geometric_mean(trace["seconds"]["ep"] / trace["seconds"][planner] for trace in result["traces"].values())
             for planner in planners]
    return "\n".join([*lines, "| geometric mean over ep | | | " + " | ".join(f"{mean:.2f}x" for mean in means) + " |"])


if __name__ == "__main__":
    main()
