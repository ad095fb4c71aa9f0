"""Time every router's decision on this machine, relative to topk of the same number of experts a token.

    python -m tools.bench.routers                               every router, 64 experts, 8 a token
    ... --only cosine,topk --experts 128 --top-k 4              some of them, at other sizes
    ... --dim 2048 --tokens 8192 --repeats 30 --out times.csv

A decision is scores, choice, gate weights and statistics of one micro-batch in training, in float32: forward,
and forward with the backward of gate weights and probabilities to the tokens and the router. Routers take
turns, so that a slow moment of the machine meets all of them; time of the processor is counted. A ratio is
the median over turns of the time over that of topk in the same turn; the times beside it are medians. Without
the layer that surrounds it: a decision is a few percent of its time.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.check.router import context_of
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.errors import MoETrainError
from moetrain.model.build import router_of
from moetrain.routers.base import Router

# Overrides that a router needs, by its option.
NEEDS = {"sparsemixer": ["model.top_k=2"], "expert_choice": ["eval.allow_noncausal=true"]}
# Overrides that change what a decision costs, by option.
VARIANTS = {"topk": [["router.jitter_eps=0.01"], ["router.noise=gumbel"], ["router.noise=normal"],
                     ["router.noise=vmoe"], ["router.second_expert=random", "model.top_k=2"],
                     ["router.second_expert=sample", "model.top_k=2"], ["router.balance=quantile"]],
            "sigmoid": [["router.balance=quantile"]]}


class Subject(NamedTuple):
    """A router of conf/router, with its overrides."""

    name: str
    router: Router
    top_k: int


class Times(NamedTuple):
    """Medians over the turns."""

    forward_ms: float
    both_ms: float
    forward_ratio: float                     # to topk with as many experts a token
    both_ratio: float


def subjects(only: Sequence[str], sizes: list[str]) -> list[Subject]:
    """Build routers in float32, each preceded by the topk that it is compared with.

    Args:
        only: options of the group router; empty for all.
        sizes: overrides of `model.*`.
    """
    made: dict[str, Subject] = {}
    for option in only or group_options()["router"]:
        for overrides in ([], *VARIANTS.get(option, [])):
            words = [*NEEDS.get(option, []), *overrides]
            name = " ".join([option, *(word.removeprefix("router.") for word in words)])
            try:
                config = compose([*sizes, f"router={option}", *words])
            except MoETrainError as error:
                print(f"{name}: left out, {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            top_k = int(str(config.model.top_k))
            topk = f"topk model.top_k={top_k}" if f"model.top_k={top_k}" not in sizes else "topk"
            if topk not in made:
                made[topk] = Subject(topk, router_of(compose([*sizes, "router=topk", f"model.top_k={top_k}"]))
                                     .float(), top_k)
            made.setdefault(name, Subject(name, router_of(config).float(), top_k))
    return list(made.values())


def measure(found: Sequence[Subject], dim: int, tokens: int, repeats: int) -> dict[str, Times]:
    """Time the routers in turn.

    Args:
        found: the routers, topk of every number of experts a token among them.
        dim: D.
        tokens: T.
        repeats: number of turns.
    """
    context = context_of(tokens)
    x_TD = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(0))

    def forward(router: Router) -> tuple[Tensor, ...]:
        routing = router.route(x_TD.clone().requires_grad_(), context)
        return routing.weights_TK, routing.stats.prob_sum_E

    def both(router: Router) -> None:
        outputs = [output for output in forward(router) if output.requires_grad]
        if outputs:
            torch.autograd.backward([output.sum() for output in outputs])

    for subject in found:                                    # allocator, and what is built when first used
        both(subject.router)
    turns = [[(seconds_of(forward, subject.router), seconds_of(both, subject.router)) for subject in found]
             for _ in range(repeats)]
    times = {subject.name: list(zip(*(turn[i] for turn in turns))) for i, subject in enumerate(found)}
    topk = {subject.top_k: times[subject.name] for subject in found if subject.name.startswith("topk")
            and all(word.startswith("model.") for word in subject.name.split()[1:])}
    return {subject.name: Times(
        *(1e3 * statistics.median(of) for of in times[subject.name]),
        *(statistics.median(map(lambda a, b: a / b, of, its))
          for of, its in zip(times[subject.name], topk[subject.top_k]))) for subject in found}


def seconds_of(call: Callable[[Router], object], router: Router) -> float:
    """Seconds of all threads in one call: time for which others have the processor does not count."""
    start = time.process_time()
    call(router)
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="options of the group router, with commas between")
    for name, default in (("experts", 64), ("top-k", 8), ("dim", 1024), ("tokens", 4096), ("repeats", 11)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the table as csv, too")
    given = parser.parse_args(arguments)
    sizes = [f"model.num_experts={given.experts}", f"model.top_k={given.top_k}", f"model.dim={given.dim}"]
    found = subjects([option for option in given.only.split(",") if option], sizes)
    times = measure(found, given.dim, given.tokens, given.repeats)
    width = max(map(len, times))
    print(f"{'router':{width}}  forward ms  of topk  with backward ms  of topk")
    for name, each in times.items():
        print(f"{name:{width}}  {each.forward_ms:10.2f}  {each.forward_ratio:7.2f}"
              f"  {each.both_ms:16.2f}  {each.both_ratio:7.2f}")
    if given.out:
        with given.out.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["router", *Times._fields])
            table.writerows([name, *each] for name, each in times.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
