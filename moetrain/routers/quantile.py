"""Exact quantile balancing: a selection bias that gives every expert its share of the global batch.

For the scores s of a router and its bias b, let o = s + b. A token t takes the K experts with the largest
o_te. After a step of T tokens:

    a_t    the (K+1)-th largest o_t, which an expert must exceed to be taken
    m_te = a_t - o_te                       the margin: what b_e lacks for t to take e
    d_e  = the value of m_e with exactly floor(T K / E) values below it, over the T tokens of the global batch
    b_e <- b_e + rate d_e,   then b <- b - mean(b)

With rate 1, b_e + d_e is the bias with which exactly T K / E tokens exceed a_t at expert e: a step of
coordinate descent, for all experts at once, on the dual of the assignment that maximizes the sum of scores
under equal loads (Su 2025, "MoE Odyssey 6", kexue.fm/archives/11619). This is the update of

    Megatron-LM   `qb_dual_update`: beta_e = the (floor(T K / E) + 1)-th largest s_te - a_t, b = -beta. Each
                  micro-batch takes its own quantile. Its moving average with factor c is rate = 1 - c
    Kimi K3       (technical report 2.3.3 and appendix D; torchtitan's QuantileBalancedTopKRouter, Megatron's
                  global_batch): the K/E quantile of a_t - s_te over the global batch, by histograms of 1,000
                  bins in [min b - 1, max b + 1] and interpolation inside a bin; b loses its mean

Ours is the order statistic itself, over the global batch, without bins. It is found digit by digit in
integers (ops/order_statistics.py, train/margin_quantiles.py), so equal margins give the same bits for every
split over ranks and micro-batches. The margin contains b, unlike a_t - s_te, and the two definitions are
equal in exact arithmetic: b_e + (a_t - o_te) = a_t - s_te. In float32 the difference of the numbers by which
the choice was made is exact where it decides (they are within a factor of 2), and a bias near its end moves
by small numbers with all their digits. Margins are rounded to float32 in float64 runs too.

As published, the threshold a_t is that of the old bias; all experts move at once, and the next batch is
another one. So the loads of the next step are near their shares, not equal to them.

Groups are not supported, as in Megatron-LM: with them, what an expert lacks depends on other experts' biases.
Padding has no margin. With K = E there is nothing to balance, and the bias stays as it is.

Shapes: T tokens, E experts, K slots.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.gating import top_k
from moetrain.ops.start import Start, constant
from moetrain.routers.base import RouterContext
from moetrain.routers.groups import GroupLimitedRouter


class BiasedRouter(GroupLimitedRouter):
    """Base class of routers that may add a bias to the scores by which experts are chosen.

    Subclasses add `selection_bias` to the scores in `scores`.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        biased: whether there is a bias.
        quantile_rate: share of the way to the quantile that a step moves the bias; None: quantiles do not
            move it.
        center: subtract the mean of the bias after each move.
        num_groups: number of groups of experts; 1 is no limit.
        topk_groups: number of groups that a token may use.
        group_score: score of a group: top2, the sum of its two best scores; max, its best.
    """

    BOUNDS = {"quantile_rate": "in (0, 1]"}

    def __init__(self, *, dim: int, num_experts: int, top_k: int, biased: bool, quantile_rate: float | None,
                 center: bool = True, num_groups: int = 1, topk_groups: int = 1,
                 group_score: Literal["top2", "max"] = "top2") -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k, num_groups=num_groups,
                         topk_groups=topk_groups, group_score=group_score)
        assert quantile_rate is None or biased and topk_groups == num_groups, (quantile_rate, topk_groups)
        self.quantile_rate, self.center = quantile_rate, center
        self.register_buffer("bias", torch.zeros(num_experts) if biased else None)
        if biased:
            self.choice_tensors = self.choice_tensors | {"bias"}

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), **({} if self.bias is None else {"bias": constant(0)})}

    @property
    def selection_bias(self) -> Tensor | None:
        """The bias [E], if there is one."""
        return self.bias

    @property
    def margin_quantile(self) -> tuple[int, int] | None:
        """K of E tokens lie below the margin by which a bias moves."""
        balances = self.quantile_rate is not None and self.top_k < self.num_experts
        return (self.top_k, self.num_experts) if balances else None

    def in_one(self, context: RouterContext) -> bool:
        """Whether to use the one op, which gives no margins."""
        return not (self.margin_quantile and context.training) and super().in_one(context)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose the largest scores; in training, tell by how much each expert was missed or taken."""
        # Count passes and recomputation take the same way, told or not: they replay each other's ops.
        if self.margin_quantile is None or not context.training:
            return super().choose(order_TC, context)
        assert order_TC is not None
        values_TK, ids_TK = top_k(order_TC, self.top_k + 1)
        if context.on_margins is not None:
            margins_TE = values_TK[:, -1:] - order_TC.detach()
            if context.valid_T is not None:
                margins_TE = margins_TE.where(context.valid_T[:, None], float("inf"))
            context.on_margins(context.router, margins_TE)
        return ids_TK[:, :-1].where(values_TK[:, :-1] != float("-inf"), -1)

    @torch.no_grad()
    def take_quantiles(self, margins_C: Tensor) -> None:
        """Move the bias by the quantiles of the margins (`Router.take_quantiles`)."""
        assert self.bias is not None and self.quantile_rate is not None
        change_E = margins_C.nan_to_num(posinf=0, neginf=0).to(self.bias.dtype)
        self.move(self.quantile_rate * change_E)

    def move(self, change_E: Tensor) -> None:
        """Add a change to the bias, and subtract the mean if `center` says so."""
        assert self.bias is not None
        self.bias += change_E
        if self.center:
            self.bias -= self.bias.mean()
