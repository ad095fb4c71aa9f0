"""Sparse layers, wrappers and routers that exist in tests only, each the second user of an interface.

They enter a run through `convert_model`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config.schema import Config
from moetrain.model.attention import Attention
from moetrain.model.feed_forward import SharedExpert
from moetrain.model.latent import LatentSpace
from moetrain.model.residual import MixedResidual
from moetrain.model.rotary import Rotary
from moetrain.model.transformer import Transformer
from moetrain.moe.bank import ExpertBank
from moetrain.moe.chain import ChainLayer
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoELayer, MoEOutput, SparseLayer
from moetrain.moe.wrappers import LayerWrapper
from moetrain.ops.start import Start, normal
from moetrain.plan.placement import contiguous
from moetrain.routers.base import LinearRouter, Router, RouterContext, Routing, Scores


def pass_twice(model: Transformer, config: Config) -> None:
    """Let every MoE layer pass twice over its bank, with a second router."""
    for block in model.layers:
        if block.moe is not None:
            block.moe = ChainLayer(name=block.moe.name, experts=block.moe.experts,
                                   routers=[block.moe.router, _another(block.moe.router)])


def share_router(model: Transformer, config: Config) -> None:
    """Let every MoE layer pass twice over its bank, with one router that decides in both."""
    for block in model.layers:
        block.moe = ChainLayer(name=block.moe.name, experts=block.moe.experts, routers=[block.moe.router] * 2)


def _another(router: Router) -> Router:
    """Make a router of the same kind and size."""
    return type(router)(dim=router.weight.shape[1], num_experts=router.num_experts, top_k=router.top_k)


def one_bank(model: Transformer, config: Config) -> None:
    """Let all layers choose from the bank of the first: as many passes over it as there are layers."""
    first = model.layers[0].moe
    for block in model.layers[1:]:
        block.moe = OfAnotherLayer(name=block.moe.name, router=block.moe.router, experts=first.experts,
                                   bank=first.name)


class OfAnotherLayer(MoELayer):
    """MoE layer whose bank is that of another layer."""

    def __init__(self, *, bank: str, **parts: object) -> None:
        super().__init__(**parts)
        self.bank = bank

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        return {self.bank: self.experts}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        return {self.bank: (self.name,)}


# --- wrappers


class GatedSharedExpert(SharedExpert):
    """Shared expert times a sigmoid gate (Qwen2-MoE)."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__(dim=dim, hidden_dim=hidden_dim)
        self.gate = nn.Parameter(torch.empty(1, dim))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "gate": normal()}

    def beside(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return F.linear(x_TD, self.gate).sigmoid() * self(x_TD)


class Watch(LayerWrapper):
    """Hook that notes which stage of the layer begins."""

    reads_outputs = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def routed(self, routing: Routing, x_TD: Tensor, context: RouterContext) -> Routing:
        self.seen.append(f"routed by {context.router}")
        return routing

    def entering(self, x_TD: Tensor, routing: Routing) -> Tensor:
        self.seen.append("entering")
        return x_TD

    def beside(self, x_TD: Tensor, routing: Routing) -> None:
        self.seen.append("beside")

    def leaving(self, out_TD: Tensor, x_TD: Tensor, routing: Routing, beside_TD: Tensor | None) -> Tensor:
        self.seen.append("leaving")
        return out_TD


LATENT = 8


def surround(model: Transformer, config: Config) -> None:
    """Put a gated shared expert and a hook around the first layer, two projections around the second."""
    dim, hidden = config.model.dim, config.model.expert_dim
    first, second = (block.moe for block in model.layers)
    model.layers[0].moe = _with_wrappers(first, shared=GatedSharedExpert(dim=dim, hidden_dim=hidden),
                                         watch=Watch())
    bank = second.experts.bank
    second.experts.bank = ExpertBank(experts=bank.experts, cut=bank.cut,
                                     form=SwigluExpert(dim=LATENT, expert_dim=hidden))
    model.layers[1].moe = _with_wrappers(second, mixture=MixedResidual(dim=dim, hidden_dim=hidden),
                                         latent=LatentSpace(dim=dim, latent_dim=LATENT))


def _with_wrappers(layer: MoELayer, **wrappers: LayerWrapper) -> MoELayer:
    return MoELayer(name=layer.name, router=layer.router, experts=layer.experts, wrappers=wrappers,
                    capacity=layer.capacity)


# --- choices that are no experts


class NullChoicesRouter(LinearRouter):
    """Softmax top-k over the experts, an identity, a zero and a constant.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, choices of a token.
    """

    def __init__(self, *, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k, num_choices=num_experts + 3)
        self.constant = nn.Parameter(torch.empty(dim))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "constant": normal()}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        logits_TC = self.logits(x_TD)
        probs_TC = logits_TC.softmax(-1)
        return Scores(probs_TC, probs_TC, logits_TC)

    def residual(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        identity_T, constant_T = (weights_TK.where(ids_TK == choice, 0).sum(1)
                                  for choice in (self.num_experts, self.num_experts + 2))
        return identity_T, constant_T[:, None] * self.constant


def add_null_choices(model: Transformer, config: Config) -> None:
    """Let every router choose among three choices that are no experts, too."""
    for block in model.layers:
        old = block.moe.router
        block.moe.router = NullChoicesRouter(dim=config.model.dim, num_experts=old.num_experts,
                                             top_k=old.top_k)


# --- attention that routes


class RoutedAttention(SparseLayer):
    """Attention whose output passes through routed experts of its own, in the attention's place of a block.

    Args:
        name: name of its router and bank.
        heads: the attention.
        router: chooses experts.
        experts: the bank.
    """

    def __init__(self, name: str, heads: Attention, router: Router, experts: RoutedExperts) -> None:
        super().__init__()
        self.name, self.heads, self.router, self.experts = name, heads, router, experts
        self.cached = heads.cached                   # for the key-value cache

    @property
    def routers(self) -> dict[str, Router]:
        return {self.name: self.router}

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        return {self.name: self.experts}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        return {self.name: (self.name,)}

    def forward(self, x_BSD: Tensor, context: RouterContext, route_only: bool = False, *,
                rotary: Rotary, mask: Tensor | None, earlier: object) -> MoEOutput:
        out_BSD = self.heads(x_BSD, rotary, mask, earlier)
        x_TD = out_BSD.flatten(0, 1)
        routing = self.route(self.name, x_TD, context)
        if not route_only:
            routed_TD = self.experts(x_TD, routing.ids_TK, routing.weights_TK).wait()
            out_BSD = out_BSD + routed_TD.view_as(out_BSD)
        return MoEOutput(out_BSD, {self.name: routing.stats}, routing.carry)


def route_attention(model: Transformer, config: Config) -> None:
    """Let the attention of every block route, too, to half as many experts as its MoE layer has."""
    for layer, block in enumerate(model.layers):
        theirs, name = block.moe.experts, f"layers.{layer}.attention"
        exchange = theirs.dispatcher.exchange
        homes = contiguous(theirs.dispatcher.placement.num_experts // 2, exchange.positions)
        bank = ExpertBank(experts=homes.experts_of(exchange.position), form=theirs.bank.form,
                          cut=theirs.bank.cut)
        experts = RoutedExperts(bank, TokenDispatcher(homes, exchange, theirs.dispatcher.device),
                                theirs.num_chunks)
        router = type(block.moe.router)(dim=config.model.dim, num_experts=homes.num_experts, top_k=1,
                                        weights="raw")
        block.attention = RoutedAttention(name, block.attention, router, experts)
