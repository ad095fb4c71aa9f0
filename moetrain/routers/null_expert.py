"""Top-k routing over experts and choices that compute nothing (AdaMoE; MoE++), so that tokens differ in cost.

    z = x W^T over C = E + null + copy + constant choices,  p = softmax(z),  the k most probable are chosen

    experts     0 to E-1      as in any layer
    null        the next      add nothing                                    AdaMoE, 2406.13233; MoE++'s zero
    copy        the next      add x                                          MoE++, 2410.07348
    constant    the last      add a_1 x + a_2 v,  (a_1, a_2) = softmax(x W_c)    MoE++; v is learned

A token takes k choices, as many of which are experts as it likes: none, or all. At equal probabilities these
are k E / C in the mean. Null choices are cheaper to use than to leave, so k is set higher than without them.

Gate weights, by `renorm`:

    real    p of the choices that are not null, over their sum: AdaMoE
    none    p

With `real` the null logits cancel out of the weights, which are computed as the softmax of the other chosen
logits: the task gives the null logits no gradient at all, and neither does it to a token with one such
choice, whose weight is 1. Only a loss moves them: `loss=[null_lbl]` (AdaMoE), or the balance loss, which
takes every null choice for an expert of its own. With `none` the task trains them.

With `map_logits` a router adds a learned map of the logits of the layer before, z += z' M^T (MoE++'s gating
residual), so a token knows the path that it came by. The first layer has none before it.

What differs from releases: AdaMoE averages the null loads over the wrong axis in one of its two experiments;
losses/null_lbl.py follows the formula. It keeps null rows in a matrix of their own, here they are the last
rows of the one matrix. MoE++ has one null, one copy and two constant choices, gives a null choice the weight
0 before the others are normalized (that is `real`), and multiplies x by k, which is not done here. Its v
starts with a standard deviation of 1, here with that of the model's matrices.

Shapes: T tokens, D model width, E experts, C choices, K slots, N constant choices.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moetrain.ops.gating import gather_weights
from moetrain.ops.start import Start, normal
from moetrain.routers.base import LinearRouter, RouterContext, Scores


class NullExpertRouter(LinearRouter):
    """Router whose tokens may choose to compute less.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, choices of a token.
        num_null: choices that add nothing.
        num_copy: choices that add the token.
        num_constant: choices that add a mixture of the token and a learned vector.
        renorm: gate weights: real (chosen ones that are not null sum to 1) or none (probabilities).
        map_logits: add a learned map of the logits of the layer before.
    """

    BOUNDS = {"num_null": "0 or more", "num_copy": "0 or more", "num_constant": "0 or more"}
    CONSTANT_WEIGHTS = {"renorm": ["real"]}
    SHAPES = {"weight": ("E + num_null + num_copy + num_constant", "D"), "constants": ("num_constant", "D"),
              "mixing": ("2 * num_constant", "D"),
              "logit_map": ("E + num_null + num_copy + num_constant if map_logits else 0",
                            "E + num_null + num_copy + num_constant")}
    MEAN_EXPERTS = "K * E / (E + num_null + num_copy + num_constant)"    # at equal probabilities
    uses_few_slots = True

    def __init__(self, *, dim: int, num_experts: int, top_k: int, num_null: int = 8, num_copy: int = 0,
                 num_constant: int = 0, renorm: Literal["real", "none"] = "real",
                 map_logits: bool = False) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k,
                         num_choices=num_experts + num_null + num_copy + num_constant)
        assert renorm in ("real", "none"), renorm
        self.renorm = renorm
        self.first_copy = num_experts + num_null
        self.first_constant = self.first_copy + num_copy
        self.constants = nn.Parameter(torch.empty(num_constant, dim)) if num_constant else None
        self.mixing = nn.Parameter(torch.empty(2 * num_constant, dim)) if num_constant else None
        self.logit_map = nn.Parameter(torch.empty(self.num_choices, self.num_choices)) if map_logits else None

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), **{name: normal() for name, _ in self.named_parameters(recurse=False)}}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score choices by their probability."""
        logits_TC = self.logits(x_TD)
        if self.logit_map is not None and context.carry is not None:
            logits_TC = logits_TC + nn.functional.linear(context.carry, self.logit_map)
        probs_TC = logits_TC.softmax(-1)
        return Scores(probs_TC, probs_TC, logits_TC, None if self.logit_map is None else logits_TC)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights by `renorm`: of null choices 0, or their probability."""
        if self.renorm == "none":
            return super().weigh(scores, ids_TK, context)
        assert scores.logits_TC is not None
        null_TK = (ids_TK >= self.num_experts) & (ids_TK < self.first_copy)
        real_TK = (ids_TK >= 0) & ~null_TK
        logits_TK = gather_weights(scores.logits_TC, ids_TK).where(real_TK, -torch.inf)
        # A row without any would be no number, in forward and backward.
        logits_TK = logits_TK.where(real_TK.any(-1, keepdim=True), 0)
        return logits_TK.softmax(-1).where(real_TK, 0)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax as it is."""
        return scores.gates_TC

    def residual(self, x_TD: Tensor, ids_TK: Tensor,
                 weights_TK: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weigh copies and constants (`Router.residual`)."""
        if self.num_choices == self.first_copy:
            return None, None
        copies_TK = (ids_TK >= self.first_copy) & (ids_TK < self.first_constant)
        of_x_T = weights_TK.where(copies_TK, 0).sum(-1)
        if self.constants is None or self.mixing is None:
            return of_x_T, None
        numbers_N = torch.arange(len(self.constants), device=ids_TK.device) + self.first_constant
        gates_TN = weights_TK[:, :, None].where(ids_TK[:, :, None] == numbers_N, 0).sum(1)
        mixed_TN2 = nn.functional.linear(x_TD.to(self.mixing.dtype), self.mixing).unflatten(1, (-1, 2))
        shares_TN2 = mixed_TN2.softmax(-1)
        return (of_x_T + (gates_TN * shares_TN2[..., 0]).sum(-1),
                (gates_TN * shares_TN2[..., 1]) @ self.constants)
