"""Union-of-Experts' attention: experts are the heads of one multi-head attention, and a token takes some.

Attention is cut as tensor parallelism cuts it: slice e has the rows of q, k and v of head e, and the columns
of the output matrix. A token computes q, k and v in its heads alone. In head e a token that chose it attends
to the earlier tokens of its document that chose it, too:

    y_i = sum_{e chosen by i} E g_ie W_o,e softmax_{j <= i, j chose e}(q_ie k_je / sqrt(h)) v_je

g: gate weights. With all heads chosen and equal weights this is plain attention.

So it is in the released code (YujiaoYang-work/UoE, SMHA_v3.py: the top half of the heads of each token),
with three differences. There, gates are normalized over the batch, and outputs are not multiplied by them, so
that the router has no gradient. There, rotary positions count the tokens of a head alone; here they are those
of the text. And there queries of a batch are packed head by head; here scores are computed for every head and
masked, so a head's scores cost what they cost in plain attention.

The slices are used in two passes over one bank, by one decision (attention_experts.py).

Shapes: B sequences, S positions, L keys, T = B*S tokens, E heads, K heads of a token, h head width, D model
width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.model.attention import Earlier
from moetrain.model.rotary import Rotary, rotate
from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.expert_form import ExpertForm, StackedParameters, weighted
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoEOutput, SparseLayer, add_residual
from moetrain.routers.base import Router, RouterContext


class HeadSlice(ExpertForm):
    """One head: rows of queries, then keys, then values; and the columns that map its result back."""

    SHAPES = {"qkv": ("3F", "D"), "out": ("D", "F")}

    def matrix_rows(self) -> dict[str, list[int]]:
        return {"qkv": [self.expert_dim] * 3}

    def to_heads(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        """Compute q, k and v [R, 3h] of rows; gate weights have no part in them."""
        return experts.linear("qkv", x_RD)

    def to_outputs(self, x_Rh: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        """Compute the weighted outputs [R, D] of what the heads have gathered."""
        return experts.linear("out", weighted(x_Rh, weights_R))


class SlicedAttention(SparseLayer):
    """Sparse layer in the place of a block's attention.

    The key-value cache holds keys and values of all heads. Behind each stands one number, whether the token
    chose the head: so a head of the cache is `head_dim` = h + 1 wide.

    Args:
        name: name of its router and bank.
        head_dim: h.
        router: chooses heads.
        experts: routed experts of the form `HeadSlice`, one for each head.
        capacity: drops choices beyond a limit; None drops nothing.
    """

    takes_input = True

    def __init__(self, *, name: str, head_dim: int, router: Router, experts: RoutedExperts,
                 capacity: CapacityPolicy | None = None) -> None:
        super().__init__(capacity)
        self.name, self.router, self.experts = name, router, experts
        self.num_kv_heads, self.head_dim = router.num_experts, head_dim + 1

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
        """Attend to earlier positions of the same sequence, or document, head by head.

        Args:
            x_BSD: [B, S, D], normalized hidden states.
            context: context of the micro-batch.
            route_only: route and count, and return x unchanged.
            rotary: cos and sin [S, h] of the positions.
            mask: bool [B, 1, S, S], True where a query attends to a key; None is causal.
            earlier: the layer's key-value cache, to which the new keys and values are appended. If it is not
                empty, x has one position, the newest.

        Returns:
            [B, S, D], to be added to the residual stream, with the statistics of the routing.
        """
        (B, S, _), x_TD, E = x_BSD.shape, x_BSD.flatten(0, 1), self.router.num_experts
        routing = self.route(self.name, x_TD, context)
        stats = {self.name: routing.stats}
        if route_only:
            return MoEOutput(x_BSD, stats, routing.carry)
        x_TD = x_TD if routing.input_TD is None else routing.input_TD
        assert rotary is not None
        ids_TK, weights_TK = routing.ids_TK, E * routing.weights_TK
        rows_TKR = self.experts(x_TD, ids_TK, weights_TK, routing.max_rows, part="to_heads",
                                reduce=False).wait()
        qkv_BESR = by_head(rows_TKR, ids_TK, E).view(B, S, E, -1).transpose(1, 2)
        chose_BES1 = by_head(torch.ones_like(rows_TKR[..., :1]), ids_TK, E).view(B, S, E, 1).transpose(1, 2)
        q_BESh, k_BESh, v_BELh = qkv_BESR.chunk(3, dim=-1)
        q_BESh, k_BELh = rotate(q_BESh, rotary), rotate(k_BESh, rotary)
        if earlier is not None:
            marked = (torch.cat([each, chose_BES1], -1) for each in (k_BELh, v_BELh))
            k_BELh, v_BELh = earlier.extend(*marked)
            chose_BES1, k_BELh, v_BELh = k_BELh[..., -1:], k_BELh[..., :-1], v_BELh[..., :-1]
            assert S in (1, k_BELh.shape[2]), f"{S} positions at once after earlier ones"
        mixed_BESh = F.scaled_dot_product_attention(
            q_BESh, k_BELh, v_BELh, attn_mask=attended_keys(chose_BES1, S, mask))
        # Every slot is a token with one head: its own.
        mixed_TEh = mixed_BESh.transpose(1, 2).reshape(B * S, E, -1)
        mixed_TKh = mixed_TEh.gather(1, ids_TK.clamp(min=0)[..., None].expand(-1, -1, mixed_TEh.shape[-1]))
        out_ND = self.experts(mixed_TKh.flatten(0, 1), ids_TK.reshape(-1, 1), weights_TK.reshape(-1, 1),
                              routing.max_rows, part="to_outputs").wait()
        out_TD = add_residual(out_ND.view(*ids_TK.shape, -1).sum(1), x_TD, routing)
        return MoEOutput(out_TD.view_as(x_BSD), stats, routing.carry)


def attended_keys(chose_BEL1: Tensor, positions: int, mask: Tensor | None) -> Tensor:
    """Keys of each query: those in reach that chose the head, and its own, so that no row is empty.

    Args:
        chose_BEL1: [B, E, L, 1], above 0 where a token chose the head.
        positions: S, the newest of L.
        mask: bool [B, 1, S, L], keys in reach; None is causal.

    Returns:
        bool [B, E, S, L].
    """
    keys = chose_BEL1.shape[2]
    every_SL = torch.ones(positions, keys, dtype=torch.bool, device=chose_BEL1.device)
    causal_SL = every_SL.tril(keys - positions)
    own_SL = causal_SL.triu(keys - positions)
    return (causal_SL if mask is None else mask) & (chose_BEL1.transpose(2, 3) > 0) | own_SL


def by_head(rows_TKR: Tensor, ids_TK: Tensor, heads: int) -> Tensor:
    """Sort the slots of each token by head.

    Args:
        rows_TKR: [T, K, R], one row for each slot.
        ids_TK: int64 [T, K], its head; -1 is unused.
        heads: E.

    Returns:
        [T, E, R], zeros in heads that a token did not choose.
    """
    T, _, R = rows_TKR.shape
    places_TK = ids_TK.where(ids_TK >= 0, heads)                 # one more head takes what is unused
    empty = rows_TKR.new_zeros(T, heads + 1, R)
    return empty.scatter(1, places_TK[..., None].expand(-1, -1, R), rows_TKR)[:, :heads]
