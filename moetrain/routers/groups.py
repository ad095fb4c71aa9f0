"""Group-limited routing (DeepSeek-V2 and V3: device- and node-limited routing).

Experts are split into `num_groups` groups of consecutive ids. A token first chooses its `topk_groups` best
groups, then its experts inside them, so that its rows are sent to few places. Experts lie on the ranks of
`ep` in the order of their ids, and ranks are numbered node by node. So

    num_groups = parallel.ep                      limits the ranks to which a token is sent
    num_groups = nodes that share the experts     limits the nodes

With any other placement, a group is only a set of experts: the choice depends on the ids, never on the mesh.

Shapes: T tokens, E experts, K slots.
"""

from typing import Literal

from torch import Tensor

from moetrain.ops.gating import decide, keep_best_groups, top_k
from moetrain.ops.router import RouterRule, kernel_takes, route_tokens
from moetrain.routers.base import Decision, Router, RouterContext, Routing, drop_padding


class GroupLimitedRouter(Router):
    """Base class of routers whose tokens choose inside their best groups of experts.

    Args:
        dim: D.
        num_experts: E, a multiple of num_groups.
        top_k: K, at most the experts of topk_groups groups.
        num_groups: number of groups; 1 is no limit.
        topk_groups: number of groups that a token may use.
        group_score: score of a group: top2, the sum of its two best scores; max, its best.
    """

    BOUNDS = {"num_groups": "1 or more", "topk_groups": "1 or more"}

    def __init__(self, *, dim: int, num_experts: int, top_k: int, num_groups: int = 1, topk_groups: int = 1,
                 group_score: Literal["top2", "max"] = "top2") -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        sizes = num_experts, num_groups, topk_groups, top_k
        assert 1 <= topk_groups <= num_groups and num_experts % num_groups == 0, sizes
        assert topk_groups * (num_experts // num_groups) >= top_k, sizes
        assert group_score in ("top2", "max"), group_score
        self.num_groups, self.topk_groups, self.group_score = num_groups, topk_groups, group_score

    def choose(self, scores_TE: Tensor, context: RouterContext) -> Tensor:
        """Decide ids [T, K]: the largest scores [T, E] in each token's best groups; nothing for padding."""
        scores_TE = keep_best_groups(scores_TE, self.num_groups, self.topk_groups, self.group_score)
        _, ids_TK = top_k(scores_TE, self.top_k)
        return decide(drop_padding(ids_TK, context))

    def rule(self, *, sigmoid: bool, renormalised: bool, scale: float) -> RouterRule:
        """Make the rule by which the fused op routes.

        Args:
            sigmoid: scores are sigmoids of the logits; otherwise their softmax.
            renormalised: gate weights are divided by their sum.
            scale: factor of the gate weights.
        """
        return RouterRule(self.top_k, sigmoid, renormalised, scale, self.num_groups, self.topk_groups,
                          self.group_score == "top2")

    def route_in_one(self, logits_TE: Tensor, rule: RouterRule, context: RouterContext,
                     bias_E: Tensor | None = None) -> Routing:
        """Do all that `route` does after the logits by one op (ops/router.py).

        Args:
            logits_TE: logits [T, E].
            rule: from `rule`.
            context: context of the call.
            bias_E: added to the scores for the choice alone; None: no bias.

        Returns:
            The record of the decision.
        """
        ids_TK, weights_TK, sums = route_tokens(logits_TE, rule, bias_E, context.valid_T)
        ids_TK = decide(ids_TK)
        if context.decisions is not None:
            context.decisions.append(Decision(context.router, logits_TE.detach(), ids_TK))
        return Routing(ids_TK, weights_TK, ids_TK.numel(), sums)

    @staticmethod
    def in_one(logits_TE: Tensor, rule: RouterRule, context: RouterContext) -> bool:
        """Whether to use the one op: it has a kernel for this, and no loss asks for sums of each sequence."""
        return context.seq_offsets is None and kernel_takes(logits_TE, rule)
