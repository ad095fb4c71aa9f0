"""Routers and a capacity policy that exist in tests only, each with something of its own.

    convert_model=own_starts   tensors of every kind that start at values of their own; a controller; a policy
    convert_model=hashed       experts by token id: no parameter, no scores, no logits
    convert_model=edited       decisions of the configured routers, edited for some tokens

Shapes: T tokens, D model width, E experts, C choices, K slots.
"""

import torch
from torch import Tensor, nn

from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.moe.capacity import CapacityPolicy
from moetrain.ops.gating import decide, used_first
from moetrain.ops.start import Start, constant, normal, values
from moetrain.routers.base import LinearRouter, Router, RouterContext, Routing, Scores
from moetrain.routers.edits import Edit, RoutingEdits


def replace_routers(model: Transformer, make: type[Router], **more: object) -> None:
    """Put another router into every layer."""
    for layer, block in enumerate(model.layers):
        old = block.moe.router
        sizes = {"num_experts": old.num_experts, "top_k": old.top_k}
        sizes |= {"dim": model.embed.shape[1]} if issubclass(make, LinearRouter) else {"layer": layer}
        block.moe.router = make(**sizes, **more)


# --- start values


class OwnStartsRouter(LinearRouter):
    """Softmax top-k of a fixed rotation of x, with a temperature, a prior, and a penalty on expert 0.

    The penalty grows or shrinks by a factor, as the lambda of ReMoE does: from 0 it would never move.
    """

    def __init__(self, *, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.gain = nn.Parameter(torch.tensor([3.0]))
        self.rotation = nn.Parameter(torch.empty(dim, dim), requires_grad=False)
        self.register_buffer("penalty", torch.tensor(1e-8))
        self.register_buffer("order", torch.arange(num_experts))
        self.register_buffer("prior", torch.full((num_experts,), 5.0), persistent=False)

    def starts(self) -> dict[str, Start]:
        size, experts = len(self.rotation), self.num_experts
        return {**super().starts(), "weight": normal(0.1), "temperature": constant(0.07), "gain": constant(3),
                "rotation": values(lambda generator: torch.linalg.qr(
                    torch.randn(size, size, generator=generator, dtype=torch.float64))[0]),
                "order": values(lambda generator: torch.randperm(experts, generator=generator)),
                "penalty": constant(1e-8), "prior": constant(5)}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        logits_TC = self.logits(x_TD.to(self.weight.dtype) @ self.rotation.T) / self.temperature
        gates_TC = logits_TC.softmax(-1)[:, self.order]
        penalties_C = 1e7 * self.penalty * (torch.arange(self.num_experts) == 0)
        return Scores(gates_TC.detach() + self.prior - penalties_C, gates_TC, logits_TC[:, self.order])

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        return self.gain * super().weigh(scores, ids_TK, context) * self.prior[0]

    def end_of_step(self, counts_E: Tensor, tokens: int, signs_E: Tensor | None = None) -> None:
        share = counts_E[0].item() / (tokens * self.top_k)
        self.penalty *= 1.25 if share * self.num_experts > 1 else 0.8


class ThresholdCapacity(CapacityPolicy):
    """Drops choices after the first whose gate weight is below a threshold, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor([1.5]), persistent=False)

    def starts(self) -> dict[str, Start]:
        return {"threshold": constant(1.5)}

    def apply(self, routing: Routing, context: RouterContext) -> Routing:
        kept_TK = (routing.weights_TK.detach() >= self.threshold).index_fill(1, torch.tensor([0]), True)
        ids_TK = decide(used_first(routing.ids_TK.where(kept_TK, -1)))
        return routing._replace(ids_TK=ids_TK, weights_TK=routing.weights_TK.where(ids_TK >= 0, 0))


def own_starts(model: Transformer, config: Config) -> None:
    replace_routers(model, OwnStartsRouter)
    model.layers[1].moe.capacity = ThresholdCapacity()


# --- no parameter


class HashRouter(Router):
    """Experts by token id and layer, with equal weights."""

    depends_on = frozenset({"token_ids_T"})

    def __init__(self, *, num_experts: int, top_k: int, layer: int = 0) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.layer = layer

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        return Scores(None)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        first_T = 5 * context.token_ids_T + self.layer
        return (first_T[:, None] + torch.arange(self.top_k)) % self.num_experts


def hashed(model: Transformer, config: Config) -> None:
    replace_routers(model, HashRouter)


# --- edits


def edited(model: Transformer, config: Config) -> None:
    """Edit the decisions for some positions in every forward pass of the model."""
    model.register_forward_pre_hook(_with_edits)


def _with_edits(model: Transformer, arguments: tuple) -> tuple:
    tokens_BS, context, *rest = arguments
    third_T = context.positions_T % 3 == 0
    edits = {
        "layers.0.moe": RoutingEdits(scores=Edit(mask_expert_3),
                                     weights=Edit(lambda weights_TK, ids_TK: 1.5 * weights_TK, third_T)),
        "layers.1.moe": RoutingEdits(scores=Edit(force_expert_5, third_T),
                                     ids=Edit(lambda ids_TK: ids_TK.where(torch.tensor([True, False]), -1),
                                              context.positions_T % 5 == 0)),
    }
    return (tokens_BS, context._replace(edits=edits), *rest)


def mask_expert_3(scores_TC: Tensor) -> Tensor:
    return scores_TC.where(torch.arange(scores_TC.shape[1]) != 3, float("-inf"))


def force_expert_5(scores_TC: Tensor) -> Tensor:
    return scores_TC.where(torch.arange(scores_TC.shape[1]) != 5, float("inf"))
