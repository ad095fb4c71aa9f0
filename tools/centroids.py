"""Centroids for router=cluster: k-means of what the routers of a trained run see.

    python -m tools.centroids runs/quickstart centroids.npz --experts 16 --tokens 20000
    moetrain train router=cluster router.centroids_path=centroids.npz

The inputs of each router are collected over held-out text of the run, and clustered by Lloyd's iteration from
the starting points of k-means++. The file has one float32 array [E, D] for each router, by its name.

Shapes: N tokens, D model width, E experts.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moetrain.config.compose import for_run, typed_keys
from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.routers.base import RouterContext, Routing
from moetrain.train.evaluation.evaluate_run import evaluate_run


def kmeans(points_ND: Tensor, clusters: int, *, seed: int = 0, steps: int = 50) -> Tensor:
    """Cluster points by Lloyd's iteration until no point moves, from k-means++.

    Args:
        points_ND: points [N, D], at least as many as clusters.
        clusters: E.
        seed: of the starting points.
        steps: most iterations.

    Returns:
        Centroids [E, D]. An empty cluster starts again at the point that is farthest from its centroid.
    """
    assert len(points_ND) >= clusters, (len(points_ND), clusters)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points_ND), (), generator=generator))]
    for _ in range(clusters - 1):
        squares_N = torch.cdist(points_ND, points_ND[chosen]).amin(1).double().square()
        squares_N = squares_N if squares_N.any() else torch.ones_like(squares_N)
        chosen.append(int(squares_N.multinomial(1, generator=generator)))
    centroids_ED, before_N = points_ND[chosen].clone(), None
    for _ in range(steps):
        distances_N, nearest_N = torch.cdist(points_ND, centroids_ED).min(1)
        if before_N is not None and nearest_N.equal(before_N):
            break
        before_N = nearest_N
        sizes_E = nearest_N.bincount(minlength=clusters)
        sums_ED = torch.zeros_like(centroids_ED).index_add_(0, nearest_N, points_ND)
        centroids_ED = sums_ED / sizes_E.clamp(min=1)[:, None]
        empty = (sizes_E == 0).nonzero()[:, 0]
        centroids_ED[empty] = points_ND[distances_N.argsort(descending=True)[:len(empty)]]
    return centroids_ED


class RouterInputs:
    """Collects the inputs of every router of a model, the first `tokens` valid tokens of each.

    Args:
        tokens: N.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.found: dict[str, list[Tensor]] = {}
        self.experts: dict[str, int] = {}

    def watch(self, model: Transformer, config: Config) -> None:
        """Watch the routers of a model: a `convert_model`."""
        self.experts = model.num_experts
        for router in dict.fromkeys(model.routers.values()):
            router.route = partial(self._route, router.route)

    def _route(self, route: Callable[[Tensor, RouterContext], Routing], x_TD: Tensor,
               context: RouterContext) -> Routing:
        kept = self.found.setdefault(context.router, [])
        valid_TD = x_TD if context.valid_T is None else x_TD[context.valid_T]
        kept.append(valid_TD[:self.tokens - sum(map(len, kept))].float().cpu())
        return route(x_TD, context)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="name or folder of a trained run")
    parser.add_argument("out", type=Path, help="file to write, .npz")
    parser.add_argument("--experts", type=int, help="clusters of each layer; by default its experts")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens that are clustered")
    parser.add_argument("--seed", type=int, default=0)
    given, overrides = parser.parse_known_args(arguments)
    inputs = RouterInputs(given.tokens)
    evaluate_run(for_run([given.run, *overrides]), typed_keys(overrides), inputs.watch)
    centroids = {}
    for name, experts in inputs.experts.items():
        points_ND, clusters = torch.cat(inputs.found[name]), given.experts or experts
        if len(points_ND) < clusters:
            raise SystemExit(f"{name}: {len(points_ND)} tokens for {clusters} clusters; raise eval.windows")
        centroids[name] = kmeans(points_ND, clusters, seed=given.seed).numpy()
        print(f"{name}: {len(points_ND)} tokens in {clusters} clusters")
    with given.out.open("wb") as file:
        np.savez(file, **centroids)


if __name__ == "__main__":
    main()
