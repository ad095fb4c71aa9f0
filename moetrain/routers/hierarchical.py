"""Two levels: a token chooses groups of experts by a matrix of their own, then experts inside these.

    u = x U^T,  q = softmax(u)                     U [G, D], a row for each group
    z = x W^T,  r = softmax of z inside a group    W [E, D]
    p_i = q_g(i) r_i                               sums to 1 over all experts

    the k largest p among the experts of the `topk_groups` groups of largest u are chosen; the gate weights
    are p at the chosen ids (raw), or that over their sum (renorm)

The product of two softmax gates is the hierarchical mixture of Jordan and Jacobs (1994) and of Shazeer et al.
(arXiv 1701.06538, appendix B). Groups of consecutive experts are on the same ranks, as in routers/groups.py,
whose groups have no matrix and are judged by the scores of their experts.

With unit=sequence, u is its mean over the valid tokens of the sequence, so that all tokens of a sequence
choose the same groups: the idea of Union-of-Experts (arXiv 2503.02495), which routes sequences and parts of
them. Its release maps the flattened sequence, of one length, and multiplies no output by a gate, which leaves
its router without gradient; here any length may come, and the gates train U and W. A token then knows of
later ones: such a router is not causal.

Shapes: T tokens, D model width, E experts, K slots, G groups, S sequences.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.ops.gating import largest, shares, top_k
from moetrain.ops.start import Start, normal
from moetrain.routers.base import LinearRouter, RouterContext, Scores


class HierarchicalRouter(LinearRouter):
    """Router whose probabilities are products of a group's and of an expert's inside it.

    Args:
        dim: D.
        num_experts: E, a multiple of num_groups.
        top_k: K, at most the experts of topk_groups groups.
        num_groups: G, groups of consecutive experts.
        topk_groups: number of groups that a token may use.
        unit: what chooses groups: each token, or a whole sequence, which is not causal.
        weights: convention of the gate weights: renorm or raw.
    """

    BOUNDS = {"num_groups": "1 or more", "topk_groups": "1 or more"}
    CONSTANT_WEIGHTS = {"weights": ["renorm"]}
    SHAPES = {"weight": ("E", "D"), "group_weight": ("num_groups", "D")}
    depends_on = frozenset({"sample_ids_T", "positions_T"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, num_groups: int = 2, topk_groups: int = 1,
                 unit: Literal["token", "sequence"] = "token",
                 weights: Literal["renorm", "raw"] = "renorm") -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        sizes = num_experts, num_groups, topk_groups, top_k
        assert 1 <= topk_groups <= num_groups and num_experts % num_groups == 0, sizes
        assert topk_groups * (num_experts // num_groups) >= top_k, sizes
        assert unit in ("token", "sequence") and weights in ("renorm", "raw"), (unit, weights)
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.unit, self.weights = unit, weights
        self.causal = unit == "token"
        self.group_weight = nn.Parameter(torch.empty(num_groups, dim))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "group_weight": normal()}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability, those outside the chosen groups by -inf."""
        groups_TG = linear(x_TD.to(self.group_weight.dtype), self.group_weight)
        if self.unit == "sequence":
            groups_TG = mean_of_sequences(groups_TG, context)
        inside_TGe = self.logits(x_TD).unflatten(1, (self.num_groups, -1)).log_softmax(-1)
        logits_TE = (groups_TG[:, :, None] + inside_TGe).flatten(1)
        probs_TE = logits_TE.softmax(-1)
        _, kept_TK = top_k(groups_TG, self.topk_groups)
        kept_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter(1, kept_TK, True)
        kept_TE = kept_TG.repeat_interleave(self.num_experts // self.num_groups, dim=1)
        return Scores(probs_TE.detach().where(kept_TE, float("-inf")), probs_TE, logits_TE)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose the most probable experts of the chosen groups."""
        assert order_TC is not None
        return largest(order_TC, self.top_k)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights by the convention `weights`."""
        weights_TK = super().weigh(scores, ids_TK, context)
        return weights_TK if self.weights == "raw" else shares(weights_TK)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax as it is."""
        return scores.gates_TC


def mean_of_sequences(values_TG: Tensor, context: RouterContext) -> Tensor:
    """Give every token the mean over the valid tokens of its sequence; 0 in a sequence without any.

    The sum of a sequence is one segment of a reduction, so that it has the same bits in every batch. On a
    GPU the host waits for the places where sequences begin.

    Args:
        values_TG: values [T, G].
        context: context of the call, with samples and positions.

    Returns:
        [T, G].
    """
    samples_T, positions_T = context.sample_ids_T, context.positions_T
    assert samples_T is not None and positions_T is not None, "sequences are told apart by these"
    if len(values_TG) == 0:
        return values_TG
    begins_T = torch.ones_like(samples_T, dtype=torch.bool)
    begins_T[1:] = (samples_T[1:] != samples_T[:-1]) | (positions_T[1:] <= positions_T[:-1])
    first_S = begins_T.nonzero()[:, 0]
    offsets = torch.cat([first_S, first_S.new_tensor([len(values_TG)])])
    valid_T = context.valid_T if context.valid_T is not None else torch.ones_like(begins_T)
    kept_TG = values_TG.where(valid_T[:, None], 0)
    sums_SG = torch.segment_reduce(kept_TG, "sum", offsets=offsets, axis=0)
    tokens_S = torch.segment_reduce(valid_T.to(values_TG.dtype), "sum", offsets=offsets, axis=0)
    return (sums_SG / tokens_S.clamp(min=1)[:, None])[begins_T.cumsum(0) - 1]
