"""Experts by domain: a fixed map from the domain of a sample to the experts that it may use.

    z = x W^T, and -inf at experts that the token's domain may not use;  p = softmax(z);  the k largest p are
    chosen; the gate weights follow `weights`, as in topk

What the domain of a sample stands for is the user's: a source of text, a task, a modality (examples/).
Experts in several lists are shared by these domains. An expert in one list belongs to it, as modality experts
do in Uni-MoE (2405.11273) and PILL (2311.02126), and task experts in JiuZhang 2.0 (2306.11027). The papers
also train in stages, which `init.from` and `train.frozen` do.

Probabilities, and so the losses, are those among the allowed experts. An expert that a token may not use has
no gradient from it. Balance over all experts is then also balance over the domains: with lists of different
lengths for domains of different sizes, balance=none or a small weight leaves the map alone.

The domain must be known, so generation is refused, and evaluation of other data than the run's own.

Shapes: T tokens, D model width, E experts, M domains.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.start import Start, values
from moetrain.routers.base import RouterContext, Scores
from moetrain.routers.topk import TopKRouter


class DomainRouter(TopKRouter):
    """Router whose tokens choose among the experts of their domain.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        experts: for each domain of the data, in its order, the ids of the experts that it may use, K or more;
            None: every domain may use all.
        weights: convention of the gate weights: renorm, raw or softmax_of_topk.
        scale: factor of the gate weights.
    """

    BOUNDS = {"scale": "above 0"}
    SHAPES = {"weight": ("E", "D")}
    depends_on = frozenset({"domains_T"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, experts: list[list[int]] | None = None,
                 weights: Literal["renorm", "raw", "softmax_of_topk"] = "renorm",
                 scale: float = 1.0) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k, weights=weights, scale=scale)
        self.lists = experts or []
        self.num_domains, self.holds_ids = len(self.lists) or None, bool(self.lists)
        assert all(len(set(own)) >= top_k and set(own) <= set(range(num_experts)) for own in self.lists), (
            self.lists, top_k, num_experts)
        self.register_buffer("allowed", torch.empty(max(1, len(self.lists)), num_experts, dtype=torch.bool),
                             persistent=False)

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "allowed": values(lambda generator: self._map())}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score the experts of the token's domain by their probability."""
        assert context.domains_T is not None, "the domain of a token is known"
        allowed_TE = self.allowed[context.domains_T if self.lists else torch.zeros_like(context.domains_T)]
        logits_TE = self.logits(x_TD).where(allowed_TE, float("-inf"))
        probs_TE = logits_TE.softmax(-1)
        return Scores(probs_TE.detach().where(allowed_TE, float("-inf")), probs_TE, logits_TE)

    def _map(self) -> Tensor:
        allowed_ME = torch.zeros(self.allowed.shape, dtype=torch.bool)
        for domain, experts in enumerate(self.lists or [range(self.num_experts)]):
            allowed_ME[domain, list(experts)] = True
        return allowed_ME
