"""Modules of multi-token prediction: each predicts one token further ahead, in training alone (DeepSeek-V3).

    h'^k_i = M_k [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h^{k-1}_i)]       M_k [D, 2 D], k = 1 ... depth
    h^k    = RMSNorm(block_k(h'^k))                                 own attention, experts and norm
    P^k_{i+k+1} = softmax(head h^k_i)                               embedding and head are those of the model

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 2.2, equations 21 to 23; the loss
is train/objective.py's. Where the paper leaves room, this follows the published weights and the programs
that run them (vLLM's deepseek_mtp, SGLang's deepseek_nextn):

    order           the embedding stands before the state in the columns of `eh_proj`; the paper writes
                    [state; embedding]
    h^0             is the input of the head, so behind the last norm of the model
    h^k, k > 1      begins from the normalized output of the module before it, as in SGLang and Megatron-Core

Names of the parts are those of the published files: enorm, hnorm, eh_proj; their shared_head.norm is `norm`.

Position i of module k has a token and a target as long as i + k is in the window, and, where documents are
masked, in the document of i (`Batch.ahead`). The other positions are neither routed nor scored; attention is
causal, so no position reads them.

Shapes: B sequences, S positions, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.model.attention import Attention
from moetrain.model.feed_forward import FeedForward
from moetrain.model.norms import LayerNorm, RMSNorm
from moetrain.model.projection import Projection
from moetrain.model.rotary import Rotary
from moetrain.model.transformer import Block, BlockOutput
from moetrain.moe.layer import SparseLayer
from moetrain.routers.base import RouterContext


class MultiTokenModule(Block):
    """Block that combines a state with the embedding of a token further ahead, and normalizes its output.

    Args:
        attention: self-attention.
        feed_forward: a sparse layer, such as an MoE layer, or a dense network.
        dim: D.
        eps: of the norms.
        norm: class of the norms.
        residual_multiplier: as of `Block`.
        recompute: as of `Block`.
    """

    def __init__(self, *, attention: Attention | SparseLayer, feed_forward: SparseLayer | FeedForward,
                 dim: int, eps: float, norm: type[RMSNorm] | type[LayerNorm] = RMSNorm,
                 residual_multiplier: float = 1.0,
                 recompute: Callable[..., BlockOutput] | None = None) -> None:
        super().__init__(attention=attention, feed_forward=feed_forward, dim=dim, eps=eps, norm=norm,
                         residual_multiplier=residual_multiplier, recompute=recompute)
        self.enorm, self.hnorm = norm(dim=dim, eps=eps), norm(dim=dim, eps=eps)
        self.eh_proj = Projection(in_dim=2 * dim, out_dim=dim)
        self.norm = norm(dim=dim, eps=eps)

    def forward(self, states_BSD: Tensor, embedded_BSD: Tensor, rotary: Rotary,  # type: ignore[override]
                mask: Tensor | None, context: RouterContext, route_only: bool = False) -> BlockOutput:
        """Run the module.

        Args:
            states_BSD: [B, S, D], normalized input of the head one token less far ahead.
            embedded_BSD: [B, S, D], embeddings of the tokens as far ahead as the module is deep.
            rotary: cos and sin of the positions, which are those of the states.
            mask: as of `Block.forward`.
            context: what routers may know of the tokens ahead.
            route_only: as of `Block.forward`.

        Returns:
            The normalized input of the head, and what the routers returned.
        """
        x_BSD = self.eh_proj(torch.cat([self.enorm(embedded_BSD), self.hnorm(states_BSD)], -1))
        out = super().forward(x_BSD, rotary, mask, context, route_only)
        return out if route_only else out._replace(x_BSD=self.norm(out.x_BSD))
