"""Share of a layer's exchange that its experts hide, by number of chunks: forward and backward of one layer.

    python -m tools.bench.layer --out layer.json                      one process, an emulated link
    python -m tools.bench.layer --out layer.json --only qwen3/1.0     cells whose name contains this
    python -m tools.bench.layer --out ranks.json --between 400mbit --ratios 1
                                                real ranks over links limited by tools/netlab/lab.py
    python -m tools.bench.layer --device cuda --tokens 16384 --rate 350e9 --latency 20e-6 --out gpu.json

**Emulated link** (the default, tools/bench/emulated_link.py): one process is one rank of `--ep`, and receives
from every other rank what it sends there. Time is processor time plus the waits for the link (`--clock`), so
that other work on the machine does not count. Nothing else is emulated: routing, permutation, packing,
experts and autograd are the package's. Without `--rate` the rate is set so that the exchanges of a layer take
`ratio` times its computation, and is printed.

**Ranks** (`--between`): gloo between two ranks, each in its own emulated network. The experts' computation is
paced there (they wait as long as they would compute), because moving bytes is work for the same cores that
compute; `ratio` sets the wait. A rank waits `--wait` for the other, the whole run takes `--limit` at most;
then it ends with an error that names the rank, and the cells that are done are kept.

A cell is a shape and a ratio. Its arms, chunks x form of rows, take turns at every repeat; the lower quintile
counts. Written after every cell, and a cell that the file has is not measured again.

    comm       what the link was occupied with; of ranks: a step without computation
    compute    a step on a link that takes no time; of ranks: the pace
    hidden     compute + comm - step          hideable    the smaller of compute and comm
    predicted  forward: first dispatch + the larger of computation and the other exchanges + last combine;
               backward the same, with the gradients of weights over the last exchange
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.base import Exchange
from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import DispatchedRows, TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.overlap import overlapped_forward
from moetrain.plan.placement import contiguous
from tools.bench.emulated_link import Clock, EmulatedLink, WallClock
from tools.netlab import lab as netlab
from tools.netlab.rank import connected


class Shape(NamedTuple):
    """Sizes of a layer: model width, expert width, experts, experts of a token."""

    dim: int
    expert_dim: int
    experts: int
    top_k: int

    def divided(self, by: int) -> "Shape":
        """Divide the widths, for CPUs; as many experts."""
        return self._replace(dim=self.dim // by, expert_dim=self.expert_dim // by)


SHAPES = {"mixtral": Shape(4096, 14336, 8, 2), "qwen3": Shape(2048, 768, 128, 8),
          "olmoe": Shape(2048, 1024, 64, 8), "deepseek_v3": Shape(7168, 2048, 256, 8)}


class Pace(torch.autograd.Function):
    """Identity that waits as long as computing a chunk would take, forward and backward."""

    @staticmethod
    def forward(ctx, x_RD, weight_grad_barrier, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x_RD.view_as(x_RD)

    @staticmethod
    def backward(ctx, grad_RD):
        time.sleep(ctx.seconds)
        return grad_RD, grad_RD.new_zeros(1), None


class PacedWeights(torch.autograd.Function):
    """Identity whose backward waits as long as the gradients of weights would take."""

    @staticmethod
    def forward(ctx, x, row_s, rows):
        ctx.row_s, ctx.rows = row_s, rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.row_s * sum(ctx.rows))
        return grad, None, None


class Layer:
    """Routed experts of one position, with inputs.

    Args:
        shape: sizes.
        tokens: number of tokens.
        exchange: the exchange backend.
        device: where the layer computes.
        dtype: dtype of the tokens.
        clock: measures a step.
        paced: leave out the expert matrices, which may be more than the memory holds.
    """

    def __init__(self, shape: Shape, tokens: int, exchange: Exchange, device: torch.device,
                 dtype: torch.dtype, clock: Clock, *, paced: bool = False) -> None:
        placement = contiguous(shape.experts, exchange.positions)
        held = () if paced else placement.experts_of(exchange.position)
        self.bank = ExpertBank(
            experts=held, form=SwigluExpert(dim=shape.dim, expert_dim=shape.expert_dim)).to(device)
        for matrix in self.bank.parameters():
            torch.nn.init.normal_(matrix, std=0.02)
        generator = torch.Generator().manual_seed(exchange.position)
        order_TE = torch.rand(tokens, shape.experts, generator=generator).argsort(dim=1)
        self.ids_TK = order_TE[:, :shape.top_k].to(device)
        self.x_TD = torch.randn(tokens, shape.dim, generator=generator).to(device, dtype).requires_grad_()
        self.weights_TK = torch.rand(tokens, shape.top_k, generator=generator).to(device).requires_grad_()
        self.exchange, self.placement, self.device, self.clock = exchange, placement, device, clock

    def step(self, chunks: int, exact: bool, row_s: float | None = None) -> float:
        """Seconds of a forward and a backward pass; with `row_s` paced instead of computed."""
        dispatcher = TokenDispatcher(self.placement, self.exchange, self.device, exact=exact)
        experts = RoutedExperts(self.bank, dispatcher, chunks)
        routed = self.x_TD, self.ids_TK, self.weights_TK
        for tensor in (self.x_TD, self.weights_TK, *self.bank.parameters()):
            tensor.grad = None
        begin = self._now()
        combining = (experts(*routed) if row_s is None else
                     overlapped_forward(dispatcher, *routed, Paced(row_s), experts.num_chunks))
        combining.wait().sum().backward()
        return self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock.now()


class Paced:
    """Experts that hand rows on after the time that they would take.

    Args:
        row_s: seconds of a row, forward; backward of its gradients as many, and as many again of those of
            weights, when all rows have started to return.
    """

    def __init__(self, row_s: float) -> None:
        self.row_s, self.rows = row_s, []

    def begin(self) -> None:
        zero = torch.zeros(1, requires_grad=True)
        self.weight_grad_barrier = PacedWeights.apply(zero, self.row_s, self.rows)

    def __call__(self, sent: DispatchedRows) -> Tensor:
        order = sent.order
        rows_RD = sent.x_ND.index_select(0, order.slots_R // order.rows_TK.shape[1]) * sent.weights_R[:, None]
        self.rows.append(sum(sent.counts_e))
        return Pace.apply(rows_RD, self.weight_grad_barrier, self.row_s * self.rows[-1])


def emulated(options: argparse.Namespace, shape: Shape, ratio: float) -> dict:
    """Measure a cell over the emulated link."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    clock = Clock() if options.clock == "cpu" else WallClock()
    link = EmulatedLink(options.ep, float("inf"), 0.0, device, clock)
    layer = Layer(shape, options.tokens, link, device, dtype, clock)
    arms = [(chunks, exact) for exact in (False, True) for chunks in options.chunks]
    moved: dict[tuple[int, bool], tuple[int, int]] = {}

    def turns() -> dict[tuple[int, bool], float]:
        times = {arm: [] for arm in arms}
        for repeat in range(options.repeats + 1):
            for arm in arms[::1 if repeat % 2 else -1]:
                link.bytes = link.messages = 0
                link.free = 0.0
                times[arm].append(layer.step(*arm))
                moved[arm] = link.bytes, link.messages
        return {arm: low(each[1:]) for arm, each in times.items()}

    alone = turns()
    link.rate = options.rate or moved[1, False][0] / (ratio * alone[1, False] - 4 * options.latency)
    link.latency_s = options.latency
    steps = turns()
    busy = {arm: number / link.rate + messages * link.latency_s for arm, (number, messages) in moved.items()}
    return {"rate": link.rate, "latency_s": options.latency, "arms": [
        summary(*arm, steps[arm], alone[1, arm[1]], alone[arm], busy[1, arm[1]], busy[arm]) for arm in arms]}


def low(seconds: list[float]) -> float:
    """Lower quintile: other work on the machine makes a step longer and never shorter."""
    return sorted(seconds)[len(seconds) // 5]


def summary(chunks: int, exact: bool, step_s: float, compute_s: float, cut_s: float, comm_s: float,
            comm_cut_s: float) -> dict:
    """Result of an arm.

    Args:
        chunks: number of chunks.
        exact: a row for every expert of a token, instead of one for every rank.
        step_s: seconds of a step.
        compute_s: seconds of its computation in one piece.
        cut_s: the same in chunks.
        comm_s: seconds that the link is occupied in one piece.
        comm_cut_s: the same in chunks.
    """
    hideable = min(compute_s, comm_s)
    hidden_s = compute_s + comm_s - step_s
    return {"chunks": chunks, "exact": exact, "step_s": step_s, "compute_s": compute_s, "comm_s": comm_s,
            "compute_in_chunks_s": cut_s, "hidden": hidden_s / comm_s,
            "hidden_of_hideable": hidden_s / hideable, "predicted_s": predicted(chunks, cut_s, comm_cut_s)}


def predicted(chunks: int, compute_s: float, comm_s: float) -> float:
    """Predict the seconds of a step.

    Forward is a third of the computation, and the gradients of weights are another. There are four exchanges.

    Args:
        chunks: number of chunks.
        compute_s: seconds of computation.
        comm_s: seconds of the link.
    """
    if chunks == 1:
        return compute_s + comm_s
    first, pass_s = comm_s / 4 / chunks, compute_s / 3
    forward = first + max(pass_s, comm_s / 2 - 2 * first) + first
    backward = first + max(pass_s, comm_s / 2 - 2 * first) + max(pass_s, first)
    return forward + backward


def over_ranks(options: argparse.Namespace, shape: Shape, ratio: float) -> dict | None:
    """Measure a cell between real ranks, paced; every rank returns the result."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group = Group("ep", tuple(range(world)), rank, dist.group.WORLD)
    layer = Layer(shape, options.tokens, FlatExchange(group), torch.device("cpu"), torch.float32, WallClock(),
                  paced=True)
    arms = [(chunks, exact) for exact in (False, True) for chunks in options.chunks]
    rows = options.tokens * shape.top_k

    def together(chunks: int, exact: bool, row_s: float) -> float:
        # It names the rank that is missing.
        dist.monitored_barrier(timeout=datetime.timedelta(seconds=options.wait), wait_all_ranks=True)
        seconds = torch.tensor(layer.step(chunks, exact, row_s))
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    comm = {arm: low([together(*arm, 0.0) for _ in range(options.repeats + 1)]) for arm in arms}
    row_s = comm[1, False] / ratio / (3 * rows)
    if rank == 0:
        ahead_s = options.repeats * sum(each + 3 * rows * row_s for each in comm.values())
        print(f"a step that only exchanges takes {comm[1, False]:.2g} s; about {ahead_s:.0f} s to go",
              file=sys.stderr, flush=True)
    times = {arm: [] for arm in arms}
    for repeat in range(options.repeats):
        for arm in arms[::1 if repeat % 2 else -1]:
            times[arm].append(together(*arm, row_s))
    compute = 3 * rows * row_s
    return {"between": options.between, "arms": [
        summary(*arm, low(times[arm]), compute, compute, comm[1, arm[1]], comm[arm]) for arm in arms]}


def work(options: argparse.Namespace) -> None:
    """Measure all cells that the file lacks."""
    torch.set_num_threads(options.threads)
    out, first = Path(options.out), not options.worker or int(os.environ["RANK"]) == 0
    result = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    for name in options.shapes:
        for ratio in options.ratios:
            cell = f"{name}/{ratio}"
            if cell in result["cells"] or options.only not in cell:
                continue
            if options.worker and first:
                print(cell, file=sys.stderr, flush=True)
            shape = SHAPES[name].divided(options.divide)
            measured = (over_ranks if options.worker else emulated)(options, shape, ratio)
            result["cells"][cell] = {"shape": shape._asdict(), "ratio": ratio, **measured}
            if first:
                result["facts"] = facts(options)
                out.write_text(json.dumps(result, indent=1))
    if first:
        print(table(result))


def facts(options: argparse.Namespace) -> dict:
    """Date, machine and options of the measurement."""
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    chosen = {key: value for key, value in vars(options).items() if key != "worker"}
    return {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "cores": os.cpu_count(),
            "processor": gpu or platform.machine(), "load": os.getloadavg()[0], **chosen}


def table(result: dict) -> str:
    lines = ["| shape, comm / compute | rows | chunks | step | compute | comm | hidden of comm "
             "| hidden of hideable | predicted step |", "|---|---|---|---|---|---|---|---|---|"]
    for name, cell in result["cells"].items():
        for arm in cell["arms"]:
            milliseconds = [f"{1e3 * arm[key]:.0f} ms" for key in ("step_s", "compute_s", "comm_s")]
            rows = "by expert" if arm["exact"] else "by rank"
            lines.append(f"| {name.replace('/', ', ')} | {rows} | {arm['chunks']} "
                         f"| {' | '.join(milliseconds)} | {arm['hidden']:.0%} "
                         f"| {arm['hidden_of_hideable']:.0%} | {1e3 * arm['predicted_s']:.0f} ms |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where results are kept, cell by cell")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", default="", help="cells whose name, shape/ratio, contains this")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 1.0],
                        help="exchanges over computation")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4], help="must contain 1")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ep", type=int, default=8, help="positions, of the emulated link")
    parser.add_argument("--divide", type=int, default=1, help="widths of the shapes over this")
    parser.add_argument("--rate", type=float, help="bytes per second each way; by the ratio unless given")
    parser.add_argument("--latency", type=float, default=0.0,
                        help="seconds of a message that carries nothing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu",
                        help="of the emulated link on CPUs: processor time and emulated waits, or wall time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--between",
                        help="rate of the links of two real ranks, as 400mbit; see tools/netlab/lab.py")
    parser.add_argument("--wait", type=int, default=300, help="seconds that a rank waits for the other")
    parser.add_argument("--limit", type=float, default=4 * 3600.0,
                        help="seconds of the whole run between ranks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.device == "cuda":
        options.clock = "wall"
    if options.worker:
        with connected(options.wait):
            work(options)
        return
    if options.between is None:
        work(options)
        return
    with netlab.Lab(nodes=2, per_node=1, between=options.between) as lab:
        command = [sys.executable, "-m", "tools.bench.layer", *sys.argv[1:], "--worker"]
        raise SystemExit(lab.run(command, limit_s=options.limit))


if __name__ == "__main__":
    main()
