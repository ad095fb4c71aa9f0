"""Expert choice: experts choose tokens (Zhou et al. 2022, 2202.09368).

    z = x W^T,  S = softmax(z) over the experts;  of every group of n tokens an expert takes those with the

        C = ceil(n c / E)

    largest S; the gate weight of a token is S, not normalized again

c is the mean number of experts a token. A token has between none and E experts, and every expert exactly C
tokens of a group, so a balance loss has nothing to do. Padding belongs to no group. Scores are compared in
steps (`in_steps` in ops/gating.py); of equal ones the first token is taken.

The paper's groups are the tokens of a batch. With `group=batch` these are the tokens of a micro-batch of a
rank, and the result depends on ranks and accumulation. With `group=sequence`, the default, an expert
chooses inside each sequence, and the result does not.

**It is not causal**: whether a token is taken depends on later tokens of its group, and the loss that is
trained and measured knows of them. Training and evaluation are refused without eval.allow_noncausal=true, and
generation unless that is typed for it.

Shapes: T tokens, D model width, E experts.
"""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.gating import in_steps, largest
from moetrain.routers.base import LinearRouter, RouterContext, Scores
from moetrain.routers.context import sequence_of


class ExpertChoiceRouter(LinearRouter):
    """Router whose experts take equally many tokens.

    Args:
        dim: D.
        num_experts: E.
        top_k: c where `capacity` is None.
        capacity: c, mean number of experts of a token, at most E.
        group: tokens among which an expert chooses: those of a sequence, or of a micro-batch of a rank
            (batch).
    """

    BOUNDS = {"capacity": "above 0"}
    causal = False
    MEAN_EXPERTS = "capacity or K"
    SLOTS = "E"
    uses_few_slots = True                    # K = E slots, of which c are used on average
    depends_on = frozenset({"positions_T"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, capacity: float | None = None,
                 group: Literal["sequence", "batch"] = "sequence") -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=num_experts)
        assert group in ("sequence", "batch"), group
        self.capacity, self.group = top_k if capacity is None else capacity, group
        self.depends_on_split = "ranks, accumulation" if group == "batch" else ""

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability."""
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        return Scores(probs_TE, probs_TE, logits_TE)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Let every expert choose; the ids of those that took a token, best first."""
        assert order_TC is not None
        order_TC = order_TC.detach()
        group_T = self._groups(order_TC, context)
        valid_T = torch.ones_like(group_T, dtype=torch.bool) if context.valid_T is None else context.valid_T
        taken_TC = self._places(order_TC, group_T, valid_T) < self._limits(group_T, valid_T)[:, None]
        return largest(order_TC.where(taken_TC & valid_T[:, None], float("-inf")), self.top_k)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax as it is."""
        return scores.gates_TC

    def _groups(self, order_TC: Tensor, context: RouterContext) -> Tensor:
        """Number the group of each token, int64 [T]; tokens of a group are neighbors, in ascending order."""
        tokens, device = len(order_TC), order_TC.device
        if self.group == "sequence":
            return sequence_of(context, tokens, device)
        return torch.arange(context.draws, device=device).repeat_interleave(tokens // context.draws)

    def _limits(self, group_T: Tensor, valid_T: Tensor) -> Tensor:
        """Compute C of each token's group, int64 [T]: exactly, of the fraction that c's digits stand for."""
        valid = valid_T.long()
        n_T = torch.zeros_like(group_T).index_add(0, group_T, valid)[group_T]
        share = Fraction(self.capacity).limit_denominator(10**6) / self.num_experts
        return -(-n_T * share.numerator // share.denominator)

    @staticmethod
    def _places(order_TC: Tensor, group_T: Tensor, valid_T: Tensor) -> Tensor:
        """Count the tokens of its group that come before each token at each expert, int64 [T, C].

        One sort for each expert, by group, then score, then token.
        """
        most = 1 << 33                                   # more than any score; +inf and -inf are edits
        steps_TC = in_steps(order_TC).clamp(-1, most).long()
        key_TC = (most - steps_TC).where(valid_T[:, None], 2 * most) + (group_T << 35)[:, None]
        sorted_CT = key_TC.T.contiguous().argsort(dim=1, stable=True)
        first_T = torch.searchsorted(group_T, group_T)   # the groups lie in the sorted order as in this one
        place_T = torch.arange(len(group_T), device=group_T.device) - first_T
        return torch.empty_like(sorted_CT).scatter(1, sorted_CT, place_T.expand_as(sorted_CT)).T
