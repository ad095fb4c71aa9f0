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

from moetrain.ops.gating import decide, keep_best_groups, largest
from moetrain.ops.router import RouterRule, kernel_takes, route_tokens
from moetrain.routers.base import Decision, LinearRouter, RouterContext, Routing, edits_of
from moetrain.routers.edits import RoutingEdits


class GroupLimitedRouter(LinearRouter):
    """Base class of routers whose tokens choose inside their best groups of experts.

    Subclasses define `scores` and `op_rule`: the same scores and weights, by operators and by one op.

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

    @property
    def op_rule(self) -> RouterRule | None:
        """Rule by which the fused op routes (`rule`); None: it does not route so."""
        raise TypeError(f"{type(self).__name__} does not define op_rule")

    @property
    def selection_bias(self) -> Tensor | None:
        """Bias [E] that is added to the scores for the choice alone, without gradient."""
        return None

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose the largest scores in each token's best groups."""
        assert order_TC is not None
        return largest(keep_best_groups(order_TC, self.num_groups, self.topk_groups, self.group_score),
                       self.top_k)

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """Choose experts for the tokens [T, D]: by one op, where it has a kernel."""
        rule = self.op_rule
        if rule is not None and self.in_one(context):
            return self.route_in_one(self.logits(x_TD), rule, context, self.selection_bias)
        return super().route(x_TD, context)

    def in_one(self, context: RouterContext) -> bool:
        """Whether to use the one op: it has a kernel, and computes all that is asked for.

        It computes neither sums of each sequence nor edits, nor steps of the decision that a subclass defines
        below the class whose `op_rule` it follows.
        """
        like_logits_DE = self.weight.T                       # of their device, dtype and width
        rule = self.op_rule
        return (rule is not None and context.seq_offsets is None
                and not context.token_sums and not self.token_sums and not context.token_values
                and edits_of(context) == RoutingEdits() and not _changes_a_step(type(self))
                and kernel_takes(like_logits_DE, rule))

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


def _changes_a_step(cls: type[GroupLimitedRouter]) -> bool:
    """Whether a class defines a step of the decision below the class that has the rule of the one op."""
    of_rule = next(index for index, base in enumerate(cls.__mro__) if "op_rule" in vars(base))
    steps = ("scores", "choose", "weigh", "probabilities", "residual", "decision", "routing")
    return any(step in vars(base) for base in cls.__mro__[:of_rule] for step in steps)
