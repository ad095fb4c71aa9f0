"""Cost of the routers' statistics and of the balance loss, as a share of a training step.

    python -m tools.bench.balance                        writes docs/results/balance_cost.md
    python -m tools.bench.balance --pairs 8 --out /tmp/page.md
    python -m tools.bench.balance --device cuda --pairs 20
                        at the shape of Qwen3-30B-A3B; docs/results/balance_cost_gpu.md
    ... --out /tmp/page.md model.dim=64 model.num_experts=8
                        every case with these overrides of moetrain train

One model trains by two kinds of steps in turn in one process, the order reversed every time. One is training
as it is. In the other no sum of a router is computed (its record is made of zeros that were there before), no
loss but the cross-entropy, no sums of routers for the metrics, no counts: forward and backward of all that is
what is missing. Choice and gate weights stay. On the CPU the clock is the processor time of one thread, on a
GPU the seconds until it has finished; the results are medians of the steps, and the difference is that of
neighboring steps.
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
from moetrain.train import micro_batches as passes, step
from moetrain.train.metrics import SumBuffer
from moetrain.train.objective import LossShare
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.state import Run
from moetrain.train.step import train_step

COMMON = ["data=synthetic", "log.wandb=off", "run.steps=100000"]
SMALL = ["data.vocab_size=257", "run.device=cpu"]
QWEN3 = ["model=qwen3_30b_a3b", "optim=adamw", "data.vocab_size=151936", "run.device=cuda",
         "run.dtype=bfloat16", "train.seq_len=4096", "train.head_chunk=2048", "train.global_batch=2"]
CASES = {
    "debug": ["experiment=debug"],
    "four layers": ["experiment=debug", "model.dim=128", "model.num_layers=4", "model.num_kv_heads=4",
                    "model.expert_dim=128", "train.global_batch=16", "train.seq_len=256"],
    "quickstart": ["experiment=quickstart"],
    "quickstart, accumulation 4": ["experiment=quickstart", "train.micro_batch=4"],
    "quickstart, 64 experts, top 8": ["experiment=quickstart", "model.num_experts=64", "model.top_k=8",
                                      "model.expert_dim=32"],
}
# Parts of the model: training all of its layers takes more memory than one GPU has.
CUDA_CASES = {
    f"qwen3 30b a3b, {layers} layers{text}": [*QWEN3, f"model.num_layers={layers}", *words]
    for layers, text, words in ((2, "", []), (4, "", []), (4, ", 2 micro-batches", ["train.micro_batch=1"]))
}


RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = {"cpu": "balance_cost.md", "cuda": "balance_cost_gpu.md"}


class Cost(NamedTuple):
    """Milliseconds of a step, medians; on the CPU of processor time."""

    with_it: float
    without: float
    difference: float
    spread: float                            # half the interquartile range of the difference, over root n


@contextlib.contextmanager
def nothing_counted(run: Run) -> Iterator[None]:
    """Patch a run so that it takes no statistics, and no loss made of them."""
    routers, device = run.state.model.num_choices, run.mesh.device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    zeros_E = torch.zeros(next(iter(routers.values())), dtype=torch.int64, device=device)
    sums = RouterSums(zero, zeros_E, zeros_E.float(), zero.float(), zero.float(), zero, zero)

    def add(self: SumBuffer, language: torch.Tensor, share: LossShare, stacks: object) -> None:
        self.flat[:2] += torch.stack([language.detach().double(), share.total.detach().double()])
        self.flat[6] += 1                    # micro-batches

    def flat(stacks: object, device: torch.device) -> torch.Tensor:
        return torch.zeros(sum(routers.values()), dtype=torch.int64, device=device)

    with (patch.object(base, "router_sums", lambda *arguments: sums), patch.object(SumBuffer, "add", add),
          patch.object(passes, "stacks", lambda stats: []),
          patch.object(passes, "pool", lambda *arguments: []),
          patch.object(passes, "flat_counts", flat), patch.object(step, "flat_counts", flat),
          patch.object(step, "balance_metrics", lambda *arguments: {}),
          patch.object(run.objective, "losses", {})):
        yield


def make_run(words: list[str]) -> Run:
    config = compose([*COMMON, *words])
    return set_up(config, Path("unused"), join(config))


def measure(words: list[str], pairs: int) -> Cost:
    """Cost of the statistics for one case, from steps with them and without in turn."""
    run = make_run(words)
    clock = time.process_time if run.mesh.device.type == "cpu" else finished

    def timed(number: int, counted: bool) -> float:
        with contextlib.nullcontext() if counted else nothing_counted(run):
            start = clock()
            train_step(run, number)
            return 1e3 * (clock() - start)

    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1, pairs + 4):                   # the first three warm up
        for turn, counted in enumerate((True, False) if number % 2 else (False, True)):
            found[counted].append(timed(2 * number + turn, counted))
    ours, without = (found[counted][3:] for counted in (True, False))
    differences = [a - b for a, b in zip(ours, without)]
    low, middle, high = statistics.quantiles(differences, n=4)
    return Cost(statistics.median(ours), statistics.median(without), middle, (high - low) / 2 / pairs**0.5)


def finished() -> float:
    """Seconds on the clock once the GPU has finished its work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def page(costs: dict[str, Cost], pairs: int, device: str, overrides: list[str]) -> str:
    rows = "".join(f"| {name} | {cost.with_it:.1f} | {cost.difference:.2f} ± {cost.spread:.2f} "
                   f"| {cost.difference / cost.with_it:.1%} |\n"
                   for name, cost in costs.items())
    on = f"Milliseconds on {torch.cuda.get_device_name()}" if device == "cuda" else (
        "Milliseconds of processor time of one thread (the machine had other work)")
    about = """
The models are tiny: `debug` has two layers of width 64 and 512 tokens per step, `quickstart` two layers of
width 128 and 2,048 tokens, `four layers` has width 128, 8 experts, top 2, and 4,096 tokens. At such sizes the
cost is that of calling operators, not of their computation. It has not been measured on a GPU.
""" if device == "cpu" else """
Widths, experts and choices of the model, fewer layers; 2 sequences of 4,096 tokens a step, synthetic.
"""
    if overrides:
        about = f"\nSizes are not those of the names, but changed by `{' '.join(overrides)}`.\n"
    return f"""# Cost of router statistics and balance loss

Written by `tools/bench/balance.py`. Two trainings alternate in one process for {pairs} pairs of steps: the
usual one (`balance=global`, mode `exact`), and one without the routers' sums, the balance loss and the sums
of the metrics. {on}, torch {torch.__version__}, {platform.machine()}. Numbers are
medians; the third column is the median difference of neighboring steps.

| | ms per step | of it, statistics and loss | share |
|---|---|---|---|
{rows}{about}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps of each case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *CUDA_CASES],
                        help="of the device; all of them without it")
    parser.add_argument("--out", type=Path, help="the page (docs/results/balance_cost.md; "
                                                 "with --device cuda balance_cost_gpu.md)")
    parser.add_argument("overrides", nargs="*", help="of moetrain train, for every case; needs --out")
    args = parser.parse_intermixed_args()
    if args.overrides and not args.out:
        parser.error("overrides change what the page of the repository says it measured: --out names another")
    args.out = args.out or RESULTS / PAGES[args.device]
    torch.set_num_threads(1)
    cases = {name: [*SMALL, *words] for name, words in CASES.items()} if args.device == "cpu" else CUDA_CASES
    costs = {}
    for name in args.cases or cases:
        costs[name] = measure([*cases[name], *args.overrides], args.pairs)
        print(f"{name}: {costs[name]}", flush=True)
    args.out.write_text(page(costs, args.pairs, args.device, args.overrides))


if __name__ == "__main__":
    main()
