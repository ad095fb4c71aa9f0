"""SparseMixer routing (Phi-3.5-MoE; Liu et al., 2310.00811 and 2409.12136): two experts, drawn one by one.

    z = x W^T, and twice:
    1  experts with (max - z_i) / max(|z_i|, max) > 2 eps are out of reach      max: the largest logit left
    2  the expert is drawn from the softmax of those in reach; in evaluation it is the best
    3  its gate weight w is that softmax at the expert
    4  in training, w is multiplied by 1 if the expert is the best, and otherwise by 1 or 1/3 with
       probability 1/4 and 3/4; the gradient is that of w: dw/dz = w (onehot - softmax)
    and the first expert is left out of the second round

Step 4 is the midpoint of Heun's third-order method: it makes the gradient of w an estimate of the gradient
of the expected output with respect to z, through the draw. For an expert that is not the best, the mean
factor is 1/2.

The two weights are not normalized against each other. In evaluation each is 1 if no other logit is within
2 eps of the largest, so the sum of a token's weights is about 2, and a loader that renormalizes them is
wrong. Losses use the softmax of all logits. The released code writes 1/3 as 0.3333; draws here are keyed.

Shapes: T tokens, D model width, E experts, K = 2 slots.
"""

import torch
from torch import Tensor

from moetrain.ops.gating import gather_weights, largest
from moetrain.ops.keyed_random import KEYED_BY, gumbel, uniform
from moetrain.routers.base import LinearRouter, RouterContext, Scores

ROUNDS = ("first", "second")


class SparseMixerRouter(LinearRouter):
    """Router that draws two experts of those whose logits are close to the best.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, which is 2.
        eps: half of the relative distance from the best logit within which an expert is in reach.
    """

    BOUNDS = {"eps": "above 0"}
    TOP_K = 2
    depends_on = KEYED_BY
    estimates_gradient = True

    def __init__(self, *, dim: int, num_experts: int, top_k: int, eps: float = 0.01) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        assert top_k == self.TOP_K, top_k
        self.eps = eps

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Order experts by their logits."""
        logits_TE = self.logits(x_TD)
        return Scores(logits_TE, logits_TE.softmax(-1), logits_TE)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Draw the two experts; in evaluation, take the best."""
        assert order_TC is not None
        left_TC, chosen = order_TC.detach(), []
        for use in ROUNDS:
            near_TC = self._in_reach(left_TC, order_TC)
            if context.training:
                near_TC = near_TC + gumbel(context, self.num_experts, use=use, dtype=near_TC.dtype)
            chosen.append(largest(near_TC, 1))
            left_TC = _without(left_TC, chosen[-1])
        return torch.cat(chosen, 1)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute the softmax of the experts in reach at each id, scaled with the gradient left as it is."""
        assert scores.logits_TC is not None and scores.order_TC is not None
        # What an edit has taken out is out of reach here, too.
        left_TC = scores.logits_TC.masked_fill(scores.order_TC.detach() == float("-inf"), float("-inf"))
        weights = []
        drawn_TK = uniform(context, len(ROUNDS), use="midpoint") if context.training else None
        for slot, ids_T1 in enumerate(ids_TK.split(1, dim=1)):
            gates_TC = self._in_reach(left_TC, scores.logits_TC).softmax(-1)
            weight_T1 = gather_weights(gates_TC, ids_T1)
            if drawn_TK is not None:
                whole_T1 = (ids_T1 == largest(gates_TC, 1)) | (drawn_TK[:, slot:slot + 1] < 0.25)
                scaled_T1 = weight_T1.where(whole_T1, weight_T1 / 3)
                weight_T1 = weight_T1 + (scaled_T1 - weight_T1).detach()
            weights.append(weight_T1)
            left_TC = _without(left_TC, ids_T1)
        return torch.cat(weights, 1)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax of all logits."""
        return scores.gates_TC

    def _in_reach(self, left_TC: Tensor, logits_TC: Tensor) -> Tensor:
        """Set the logits that are too far below the best one left to -inf.

        Without the quotient: of logits that are all 0, each is in reach.
        """
        best_T1, logits_TC = left_TC.detach().amax(-1, keepdim=True), logits_TC.detach()
        far_TC = best_T1 - logits_TC > 2 * self.eps * logits_TC.abs().maximum(best_T1)
        return left_TC.masked_fill(far_TC, float("-inf"))


def _without(left_TC: Tensor, ids_T1: Tensor) -> Tensor:
    """Leave a token's expert out; an unused slot leaves out the first, which then changes nothing."""
    return left_TC.scatter(1, ids_T1.clamp(min=0), float("-inf"))
