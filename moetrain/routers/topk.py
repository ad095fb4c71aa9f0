"""Softmax top-k routing (Switch, GShard, V-MoE, Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2).

    z = x W^T,  p = softmax(z),  the k largest p are chosen; the gate weights are `scale` times

    raw               p at the chosen ids           Switch (k = 1), OLMoE, DeepSeekMoE, DeepSeek-V2 (scale 16)
    renorm            the same over their sum       Mixtral, Qwen3, GShard top-2
    softmax_of_topk   softmax of the chosen logits  GPT-OSS: the same function as renorm

In training, the decision may be random. Without these options, and in evaluation, it is the one above.

    jitter_eps           x (1 + eps u) in place of x, u uniform in (-1, 1) for each number of x (Switch,
                         2101.03961). With jitter_scope=layer the experts get it, too, as in some
                         implementations of Mixtral and Phi; in Switch the router alone does.
    noise=gumbel         z + Gumbel numbers choose; the gates stay those of z (DeepSpeed's RSample)
    noise=normal         z + N(0, 1) softplus(x V^T), with V learned from 0, in place of z, for choice and
                         gate weights (noisy top-k gating, Shazeer et al., 1701.06538). Reimplementations add
                         0.01 to the deviation; the paper does not.
    noise=vmoe           z + N(0, 1) / E in place of z, alike (V-MoE, 2106.05974)
    second_expert=sample the second of two experts is drawn from the softmax of the others (DeepSpeed)
    second_expert=random the second of two experts is kept with probability min(1, 2 g), g its share in
                         the two gates; the first keeps the weight that it has beside it (GShard, 2006.16668).
                         Not with noise=gumbel, whose choice is not by the gates.

Statistics are those of p without noise. Implementations of sample draw in evaluation, too.

With `logit_bias` z = x W^T + b, with a b [E] that is learned like W, from 0 (GPT-OSS, 2508.10925).

Padding chooses nothing. top_k = 1 with renormalized weights has no gradient of the cross-entropy;
config/rules refuses it. The choice may be limited to a few groups of experts (routers/groups.py). With
`balance=quantile` the k largest p + b are chosen, by a bias b that balances the loads (routers/quantile.py);
the gate weights are those of p.

Shapes: T tokens, D model width, E experts, K slots.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from moetrain.ops.gating import gather_weights, keep_best_groups, largest
from moetrain.ops.keyed_random import KEYED_BY, coarse_uniform, gumbel, normal, uniform
from moetrain.ops.router import RouterRule
from moetrain.ops.router_sums import Noise
from moetrain.ops.start import Start, constant
from moetrain.routers.base import RouterContext, Routing, Scores
from moetrain.routers.quantile import BiasedRouter


class TopKRouter(BiasedRouter):
    """Router with softmax probabilities.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token; 2 with another second_expert than top.
        weights: convention of the gate weights: renorm, raw or softmax_of_topk.
        scale: factor of the gate weights.
        jitter_eps: largest change of a number of x, as a share of it.
        jitter_scope: what gets the changed x: router, or layer, router and experts.
        noise: what is added to the logits in training: none, gumbel, normal or vmoe.
        second_expert: how the second of two experts is chosen in training: top, sample or random.
        balance: what balances the choice: none, or quantile, a bias that follows quantiles of margins.
        quantile_rate: with balance=quantile, share of the way to the quantile that a step moves the bias.
        logit_bias: add a learned bias to the logits.
        num_groups: number of groups of experts; 1 is no limit.
        topk_groups: number of groups that a token may use.
        group_score: score of a group: top2, the sum of its two best scores; max, its best.
    """

    BOUNDS = {"scale": "above 0", "jitter_eps": "in [0, 1)"}
    CONSTANT_WEIGHTS = {"weights": ["renorm", "softmax_of_topk"]}
    SHAPES = {"weight": ("E", "D"), "noise_weight": ("E", "D if noise == 'normal' else 0"),
              "logit_bias": ("E if logit_bias else 0",)}
    depends_on = KEYED_BY

    def __init__(self, *, dim: int, num_experts: int, top_k: int,
                 weights: Literal["renorm", "raw", "softmax_of_topk"] = "renorm", scale: float = 1.0,
                 jitter_eps: float = 0.0, jitter_scope: Literal["router", "layer"] = "router",
                 noise: Literal["none", "gumbel", "normal", "vmoe"] = "none",
                 second_expert: Literal["top", "sample", "random"] = "top",
                 balance: Literal["none", "quantile"] = "none", quantile_rate: float = 1.0,
                 logit_bias: bool = False,
                 num_groups: int = 1, topk_groups: int = 1,
                 group_score: Literal["top2", "max"] = "max") -> None:
        assert balance in ("none", "quantile"), balance
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k, biased=balance == "quantile",
                         quantile_rate=quantile_rate if balance == "quantile" else None,
                         num_groups=num_groups, topk_groups=topk_groups, group_score=group_score)
        assert weights in ("renorm", "raw", "softmax_of_topk"), weights
        assert jitter_scope in ("router", "layer") and noise in ("none", "gumbel", "normal", "vmoe")
        assert second_expert in ("top", "sample", "random") and (second_expert == "top" or top_k == 2)
        assert (noise, second_expert) != ("gumbel", "random")
        assert balance == "none" or second_expert == "top"
        self.weights, self.scale = weights, scale
        self.jitter_eps, self.jitter_scope = jitter_eps, jitter_scope
        self.noise, self.second_expert = noise, second_expert
        if noise == "normal":
            self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
            self.choice_tensors = self.choice_tensors | {"noise_weight"}
        self.logit_bias = nn.Parameter(torch.empty(num_experts)) if logit_bias else None
        if logit_bias:
            self.choice_tensors = self.choice_tensors | {"logit_bias"}

    def starts(self) -> dict[str, Start]:
        learned: dict[str, Start] = {"noise_weight": constant(0)} if self.noise == "normal" else {}
        if self.logit_bias is not None:
            learned["logit_bias"] = constant(0)
        return {**super().starts(), **learned}

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        return logits_TE if self.logit_bias is None else logits_TE + self.logit_bias

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """Choose experts for the tokens [T, D], or for tokens with jitter."""
        if not self.jitter_eps or not context.training:
            return super().route(x_TD, context)
        dtype = self.weight.dtype
        drawn_TD = coarse_uniform(context, x_TD.shape[1], use="jitter", dtype=dtype)
        jittered_TD = x_TD.to(dtype) * (1 + self.jitter_eps * (2 * drawn_TD - 1))
        if self.jitter_scope == "router":
            return super().route(jittered_TD, context)
        jittered_TD = jittered_TD.to(x_TD.dtype)
        return super().route(jittered_TD, context)._replace(input_TD=jittered_TD)

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability, with noise in training, for the choice with the bias if any."""
        logits_TE = self.logits(x_TD)
        if self.noise == "none" or not context.training:
            probs_TE = logits_TE.softmax(-1)
            return Scores(self._biased(probs_TE), probs_TE, logits_TE)
        if self.noise == "gumbel":
            drawn_TE = gumbel(context, self.num_experts, use="noise", dtype=logits_TE.dtype)
            order_TE = self._biased((logits_TE.detach() + drawn_TE).softmax(-1))
            return Scores(order_TE, logits_TE.softmax(-1), logits_TE)
        if self.noise == "normal":
            deviation_TE = softplus(linear(x_TD.to(self.noise_weight.dtype), self.noise_weight))
        else:
            deviation_TE = torch.full_like(logits_TE, 1 / self.num_experts)
        drawn_TE = normal(context, self.num_experts, use="noise", dtype=logits_TE.dtype)
        noisy_TE = logits_TE + deviation_TE * drawn_TE
        probs_TE = noisy_TE.softmax(-1)
        return Scores(self._biased(probs_TE), probs_TE, logits_TE, noise=Noise(noisy_TE, deviation_TE))

    def _biased(self, probs_TE: Tensor) -> Tensor:
        return probs_TE if self.bias is None else probs_TE.detach() + self.bias

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose the largest scores in each token's best groups; the second of two by `second_expert`."""
        assert order_TC is not None
        if self.second_expert == "top" or not context.training:
            return super().choose(order_TC, context)
        order_TC = keep_best_groups(order_TC, self.num_groups, self.topk_groups, self.group_score)
        if self.second_expert == "random":
            ids_TK = largest(order_TC, 2)
            pair_TK = gather_weights(order_TC, ids_TK)
            kept_T = 2 * pair_TK[:, 1] > pair_TK.sum(-1) * uniform(
                context, 1, use="second", dtype=pair_TK.dtype)[:, 0]
            return torch.stack([ids_TK[:, 0], ids_TK[:, 1].where(kept_T, -1)], 1)
        first_T1 = largest(order_TC, 1)
        # A probability that has underflowed to 0 can still be drawn; that of an excluded group stays -inf.
        tiny = torch.finfo(order_TC.dtype).tiny
        logs_TC = order_TC.clamp(min=tiny).log().where(order_TC > float("-inf"), float("-inf"))
        logs_TC = logs_TC + gumbel(context, self.num_experts, use="second", dtype=logs_TC.dtype)
        return torch.cat([first_T1, largest(logs_TC.scatter(1, first_T1, float("-inf")), 1)], 1)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights by the convention `weights`."""
        weights_TK = super().weigh(scores, ids_TK, context)
        if self.weights != "raw":
            # The weights of padding sum to 0: the floor keeps 0 / 0 out of forward and backward.
            total_T1 = self._shared(scores, ids_TK, weights_TK, context).sum(-1, keepdim=True)
            weights_TK = weights_TK / total_T1.clamp(min=1e-30)
        return self.scale * weights_TK

    def _shared(self, scores: Scores, ids_TK: Tensor, weights_TK: Tensor, context: RouterContext) -> Tensor:
        """Gates whose sum divides the weights: those of the slots, and of a second expert left out at random.

        Args:
            scores: from `scores`.
            ids_TK: int64 [T, K], decided.
            weights_TK: gates at the ids, 0 in unused slots.
            context: context of the call.

        Returns:
            Gates [T, K].
        """
        if self.second_expert != "random" or not context.training:
            return weights_TK
        assert scores.order_TC is not None and scores.gates_TC is not None
        both_TK = largest(keep_best_groups(scores.order_TC, self.num_groups, self.topk_groups,
                                           self.group_score), 2)
        return gather_weights(scores.gates_TC, both_TK.where(ids_TK[:, :1] >= 0, -1))

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax of the logits without noise."""
        if scores.noise is None:
            return scores.gates_TC
        assert scores.logits_TC is not None
        return scores.logits_TC.softmax(-1)

    @property
    def op_rule(self) -> RouterRule | None:
        """Rule of the same scores and weights for the fused op; None where they may be random."""
        if self.noise != "none" or self.second_expert != "top":
            return None
        return self.rule(sigmoid=False, renormalised=self.weights != "raw", scale=self.scale)
