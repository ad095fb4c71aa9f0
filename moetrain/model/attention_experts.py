"""Attention whose queries and outputs are routed experts', with stick-breaking weights (ModuleFormer).

    q_e = W_q,e x            of each expert e that a token chose; k, v = W_kv x are shared by all experts
    beta_ij = sigmoid(q_i k_j / sqrt(h))                      for keys j <= i of the query's document
    A_ij    = beta_ij prod_{j < l <= i} (1 - beta_il)         newest key first: each breaks off its share
    y_i     = sum_e g_e W_o,e (A v)_i,e                       g: gate weights of the token

Shen et al. 2023, arXiv 2306.04640, and the released code (IBM/ModuleFormer). There are no positions: the
order of the keys is in the product. A row sums to 1 - prod_l (1 - beta_il), at most 1.

An expert has as many heads as there are key-value heads, so a token with `num_heads` heads takes
num_heads / num_kv_heads experts, and the scores cost as much as those of plain attention. The experts are
used in two passes over one bank, by one decision: tokens go out for queries and come back slot by slot; the
slots go out again for outputs. The scores of a sequence are kept for backward, which plain attention avoids.

The released code has biases in its keys and values, and its linear layers start as the other matrices do;
here, as in plain attention, keys and values have none, and W_o starts smaller. It multiplies the shares;
here the logarithms of 1 - beta are summed, which does not underflow.

Shapes: B sequences, S positions of queries, L positions of keys, T = B*S tokens, K experts of a token, H
key-value heads, h head width, F = H*h, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.model.attention import Earlier
from moetrain.model.projection import Projection
from moetrain.model.rotary import Rotary
from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.expert_form import ExpertForm, StackedParameters, weighted
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoEOutput, SparseLayer, add_residual
from moetrain.routers.base import Router, RouterContext


class QueryOutputExpert(ExpertForm):
    """Queries and outputs of an attention expert, which are used apart."""

    SHAPES = {"queries": ("F", "D"), "outputs": ("D", "F")}

    def to_queries(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        """Compute the queries [R, F] of rows; gate weights have no part in them."""
        return experts.linear("queries", x_RD)

    def to_outputs(self, x_RF: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        """Compute the weighted outputs [R, D] of what the heads [R, F] have gathered."""
        return experts.linear("outputs", weighted(x_RF, weights_R))


class AttentionExperts(SparseLayer):
    """Sparse layer in the place of a block's attention.

    Args:
        name: name of its router and bank.
        dim: D.
        num_kv_heads: H.
        head_dim: h.
        router: chooses experts.
        experts: routed experts of the form `QueryOutputExpert`.
        capacity: drops choices beyond a limit; None drops nothing.
    """

    takes_input = True

    def __init__(self, *, name: str, dim: int, num_kv_heads: int, head_dim: int, router: Router,
                 experts: RoutedExperts, capacity: CapacityPolicy | None = None) -> None:
        super().__init__(capacity)
        self.name, self.num_kv_heads, self.head_dim = name, num_kv_heads, head_dim
        self.kv = Projection(in_dim=dim, out_dim=2 * num_kv_heads * head_dim)
        self.router, self.experts = router, experts

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys and of the values that a cache keeps of a token."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim)

    @property
    def routers(self) -> dict[str, Router]:
        return {self.name: self.router}

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        return {self.name: self.experts}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        return {self.name: (self.name,)}

    @property
    def passes(self) -> dict[str, int]:
        return {self.name: 2}

    def forward(self, x_BSD: Tensor, context: RouterContext, route_only: bool = False, *,
                rotary: Rotary | None = None, mask: Tensor | None = None,
                earlier: Earlier | None = None) -> MoEOutput:
        """Attend to earlier positions of the same sequence, or document.

        Args:
            x_BSD: [B, S, D], normalized hidden states.
            context: context of the micro-batch.
            route_only: route and count, and return x unchanged.
            rotary: not used.
            mask: bool [B, 1, S, S], True where a query attends to a key; None is causal.
            earlier: the layer's key-value cache, to which the new keys and values are appended. If it is not
                empty, x has one position, the newest.

        Returns:
            [B, S, D], to be added to the residual stream, with the statistics of the routing.
        """
        (B, S, _), x_TD = x_BSD.shape, x_BSD.flatten(0, 1)
        routing = self.route(self.name, x_TD, context)
        stats = {self.name: routing.stats}
        if route_only:
            return MoEOutput(x_BSD, stats, routing.carry)
        x_TD = x_TD if routing.input_TD is None else routing.input_TD
        ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
        q_TKF = self.experts(x_TD, ids_TK, weights_TK, routing.max_rows, part="to_queries",
                             reduce=False).wait()
        K, H = ids_TK.shape[1], self.num_kv_heads
        k_BHLh, v_BHLh = self.kv(x_BSD).view(B, S, 2 * H, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        if earlier is not None:
            k_BHLh, v_BHLh = earlier.extend(k_BHLh, v_BHLh)
            assert S in (1, k_BHLh.shape[2]), f"{S} positions at once after earlier ones"
        q_BHKSh = q_TKF.view(B, S, K, H, self.head_dim).permute(0, 3, 2, 1, 4)
        shares_BHKSL = stick_breaking(q_BHKSh, k_BHLh[:, :, None], mask if mask is None else mask[:, None])
        mixed_BHKSh = shares_BHKSL.to(v_BHLh.dtype) @ v_BHLh[:, :, None]
        # Every slot is a token with one expert: its own. The outputs are read by the block's second norm.
        mixed_NF = mixed_BHKSh.permute(0, 3, 2, 1, 4).reshape(B * S * K, -1)
        out_ND = self.experts(mixed_NF, ids_TK.reshape(-1, 1), weights_TK.reshape(-1, 1), routing.max_rows,
                              part="to_outputs").wait()
        out_TD = add_residual(out_ND.view(B * S, K, -1).sum(1), x_TD, routing)
        return MoEOutput(out_TD.view_as(x_BSD), stats, routing.carry)


def stick_breaking(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute stick-breaking attention weights, in float32 or better.

    Args:
        q: queries [..., S, h], the last S of L positions.
        k: keys [..., L, h].
        mask: bool [..., S, L], True where a query attends to a key; None is causal.

    Returns:
        [..., S, L], weights; a row sums to 1 or less.
    """
    positions, keys = q.shape[-2], k.shape[-2]
    logits = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / q.shape[-1] ** 0.5
    if mask is None:
        mask = torch.ones(positions, keys, dtype=torch.bool, device=q.device).tril(keys - positions)
    log_rest = F.logsigmoid(-logits).where(mask, 0.0)
    after = log_rest.flip(-1).cumsum(-1).flip(-1) - log_rest          # of the keys behind this one
    return (F.logsigmoid(logits) + after).exp().where(mask, 0.0)
