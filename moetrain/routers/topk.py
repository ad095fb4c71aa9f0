"""Softmax top-k routing (GShard, Switch, Mixtral, OLMoE, Qwen3-MoE).

    z = x W^T,  p = softmax(z),  the k largest p are chosen; the gate weights are

    raw               p at the chosen ids               Switch (k = 1), OLMoE, DeepSeekMoE
    renorm            the same over their sum           Mixtral, Qwen3, GShard top-2
    softmax_of_topk   softmax of the chosen logits      GPT-OSS: the same function as renorm

Padding chooses nothing. top_k = 1 with renormalised weights has no task gradient; config/checks.py refuses it.

Shapes: T tokens, D model width, E experts, K slots.
"""

from typing import Literal

from torch import Tensor

from moetrain.ops.gating import decide, gather_weights, top_k
from moetrain.routers.base import Router, RouterContext, Routing, drop_padding


class TopKRouter(Router):
    """weights: the gate convention: renorm, raw or softmax_of_topk."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int, weights: Literal["renorm", "raw", "softmax_of_topk"] = "renorm") -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        assert weights in ("renorm", "raw", "softmax_of_topk"), weights
        self.weights = weights

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        _, ids_TK = top_k(probs_TE, self.top_k)
        ids_TK = decide(drop_padding(ids_TK, context))
        weights_TK = gather_weights(probs_TE, ids_TK)
        if self.weights != "raw":
            # A padding row sums to 0; the smallest normal number keeps 0 / 0 out of forward and backward.
            total_T1 = weights_TK.sum(-1, keepdim=True).clamp(min=1e-30)
            weights_TK = weights_TK / total_T1
        return self.routing(ids_TK, weights_TK, probs_TE, logits_TE, context)
