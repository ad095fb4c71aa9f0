"""Random experts: every layer draws its experts, whatever the token (THOR, Zuo et al. 2021, 2110.04260).

    granularity    tokens that have one draw of K different experts, all choices alike likely
    token          each for itself
    sequence       those of a sequence
    batch          those of a micro-batch of a rank, in each of its draws

Every expert of a token has the weight 1 / K; the paper has K = 1. There is no parameter. Draws are keyed by
seed, step, router, draw and sample (ops/keyed_random.py), so they are the same on every mesh and in
recomputation, except those of `batch`, which are keyed by the first sequence of the micro-batch: they depend
on ranks and accumulation.

THOR trains two passes with draws of their own and pulls their predictions together: language_loss=consistency
(losses/consistency.py). Its released code draws for the whole batch in training, and for each token or
each sentence in inference. Here both use one granularity. `batch` puts all tokens of a rank on one expert,
the worst case of expert parallelism, so `sequence` is the default.

Shapes: T tokens, E experts, K slots.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.keyed_random import permutation
from moetrain.routers.base import Router, RouterContext, Scores


class StochasticRouter(Router):
    """Router without parameters, which draws experts.

    Args:
        num_experts: E.
        top_k: K, number of slots of a token.
        granularity: tokens that have one draw: token, sequence or batch.
    """

    depends_on = frozenset({"sample_ids_T", "positions_T"})

    def __init__(self, *, num_experts: int, top_k: int,
                 granularity: Literal["sequence", "token", "batch"] = "sequence") -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        assert granularity in ("sequence", "token", "batch"), granularity
        self.granularity = granularity
        self.depends_on_split = "ranks, accumulation" if granularity == "batch" else ""

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Nothing: chance alone decides."""
        return Scores(None)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Take the first K experts of a random order."""
        return permutation(self.key(context), self.num_experts)[:, :self.top_k]

    def key(self, context: RouterContext) -> RouterContext:
        """Give all tokens that share a draw the sample and position of one of them."""
        samples_T, positions_T = context.sample_ids_T, context.positions_T
        assert samples_T is not None and positions_T is not None, "draws are keyed by sample and position"
        if self.granularity == "token" or not len(samples_T):
            return context
        if self.granularity == "batch":
            first_d1 = samples_T.view(context.draws, -1)[:, :1]
            samples_T = first_d1.expand(-1, len(samples_T) // context.draws).flatten()
        return context._replace(sample_ids_T=samples_T, positions_T=torch.zeros_like(positions_T))
