"""What the statistics of routers and the balance loss cost of a training step on the CPU.

    .venv/bin/python tools/bench_balance.py                        writes docs/results/balance_cost.md
    .venv/bin/python tools/bench_balance.py --pairs 8 --out /tmp/page.md

Two runs of one model train in turn in one process, a step each, the order reversed every time. One is training as it is. In the
other no sum of a router is computed (its record is made of zeros that were there before), no loss but the cross-entropy, no
sums of routers for the metrics, no counts: forward and backward of all that is what is missed. Choice and gate weights stay. Processor
time of one thread, medians of the steps; the difference is that of neighbours.
"""

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from moetrain.config.compose import compose
from moetrain.ops.router_sums import RouterSums
from moetrain.routers import base
from moetrain.train import passes, step
from moetrain.train.metrics import SumBuffer
from moetrain.train.setup import Run, join, set_up
from moetrain.train.step import train_step

COMMON = ["data=synthetic", "data.vocab_size=257", "log.wandb=off", "run.device=cpu", "run.steps=100000"]
CASES = {
    "debug": ["experiment=debug"],
    "four layers": ["experiment=debug", "model.dim=128", "model.num_layers=4", "model.num_kv_heads=4", "model.expert_dim=128",
                    "train.global_batch=16", "train.seq_len=256"],
    "quickstart": ["experiment=quickstart"],
    "quickstart, accumulation 4": ["experiment=quickstart", "train.micro_batch=4"],
    "quickstart, 64 experts, top 8": ["experiment=quickstart", "model.num_experts=64", "model.top_k=8", "model.expert_dim=32"],
}


class Cost(NamedTuple):
    """Of a step, medians, in milliseconds of processor time; share: of the difference in the step without."""

    with_it: float
    without: float
    difference: float
    spread: float                            # half the distance between the quartiles of the difference, over the root of their number


@contextlib.contextmanager
def nothing_counted(routers: dict[str, int]) -> Iterator[None]:
    """No statistics."""
    zero, zeros_E = torch.zeros((), dtype=torch.int64), torch.zeros(next(iter(routers.values())), dtype=torch.int64)
    sums = RouterSums(zero, zeros_E, zeros_E.float(), zero.float(), zero.float(), zero, zero)

    def add(self: SumBuffer, cross_entropy: torch.Tensor, total: torch.Tensor, stacks: object) -> None:
        self.flat[:2] += torch.stack([cross_entropy.detach().double(), total.detach().double()])
        self.flat[6] += 1                    # micro-batches

    def flat(stacks: object, device: torch.device) -> torch.Tensor:
        return torch.zeros(sum(routers.values()), dtype=torch.int64)

    with (patch.object(base, "router_sums", lambda *arguments: sums), patch.object(SumBuffer, "add", add),
          patch.object(passes, "stacks", lambda stats: []), patch.object(passes, "pool", lambda *arguments: []),
          patch.object(passes, "flat_counts", flat), patch.object(step, "flat_counts", flat),
          patch.object(step, "balance_metrics", lambda *arguments: {})):
        yield


def make_run(words: list[str]) -> Run:
    config = compose([*COMMON, *words])
    return set_up(config, Path("unused"), join(config))


def measure(words: list[str], pairs: int) -> Cost:
    full, bare = make_run(words), make_run(words)
    bare.objective.losses.clear()

    def timed(run: Run, number: int) -> float:
        with nothing_counted(run.state.model.routers) if run is bare else contextlib.nullcontext():
            start = time.process_time()
            train_step(run, number)
            return 1e3 * (time.process_time() - start)

    found = {id(full): [], id(bare): []}
    for number in range(1, pairs + 4):                   # the first three warm up
        for run in (full, bare)[::1 if number % 2 else -1]:
            found[id(run)].append(timed(run, number))
    ours, without = (found[id(run)][3:] for run in (full, bare))
    differences = [a - b for a, b in zip(ours, without)]
    low, middle, high = statistics.quantiles(differences, n=4)
    return Cost(statistics.median(ours), statistics.median(without), middle, (high - low) / 2 / pairs**0.5)


def page(costs: dict[str, Cost], pairs: int) -> str:
    rows = "".join(f"| {name} | {cost.with_it:.1f} | {cost.difference:.2f} ± {cost.spread:.2f} | {cost.difference / cost.with_it:.1%} |\n"
                   for name, cost in costs.items())
    return f"""# What statistics and balance loss cost

Written by `tools/bench_balance.py`. Training as it is (`balance=global`, mode `exact`) and training without any sum of a router, without
balance loss and without what the metrics add up, in turn in one process: {pairs} pairs of steps. Milliseconds of processor time of one thread, torch
{torch.__version__}, {platform.machine()}; the machine had other work, so these are not seconds on a wall. Medians, of the differences of
neighbours in the third column.

| | ms a step | of it, statistics and loss | share |
|---|---|---|---|
{rows}
The models are tiny: `debug` has two layers of width 64 and 512 tokens a step, `quickstart` two of width 128 and 2,048, the one of four
layers width 128, 8 experts, top 2, and 4,096. At such sizes the cost is that of calling operators, not of what they compute. It has not
been measured on a GPU.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results" / "balance_cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    costs = {}
    for name in args.cases:
        costs[name] = measure(CASES[name], args.pairs)
        print(f"{name}: {costs[name]}", flush=True)
    args.out.write_text(page(costs, args.pairs))


if __name__ == "__main__":
    main()
