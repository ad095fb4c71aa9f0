"""The MoE layer against loops by hand: choices that are no experts, wrappers, the order of the stages."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.model.transformer import Transformer
from moetrain.moe.capacity import PositionCapacity
from moetrain.moe.chain import ChainLayer
from moetrain.moe.layer import MoELayer, add_residual
from moetrain.routers.base import RouterContext, Routing, Scores
from moetrain.routers.topk import TopKRouter
from tests.support import sparse_layers
from tests.support.training import make_run

TOKENS, DIM = 40, 16


def layers(convert: str, *overrides: str) -> list[MoELayer]:
    run = make_run(["run.dtype=float64", *overrides], None, getattr(sparse_layers, convert))
    return [block.moe for block in run.state.model.layers]


def tokens() -> tuple[Tensor, RouterContext]:
    x_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x_TD.requires_grad_(), RouterContext(valid_T=torch.arange(TOKENS) % 7 > 0,
                                                positions_T=torch.arange(TOKENS))


def expert(layer: MoELayer, number: int, x_D: Tensor) -> Tensor:
    gate, up = (layer.experts.bank.gate_up[number] @ x_D).chunk(2)
    return layer.experts.bank.down[number] @ (F.silu(gate) * up)


def assert_same_gradients(outs: tuple[Tensor, Tensor], layer: MoELayer, x_TD: Tensor) -> None:
    inputs = [x_TD, *layer.parameters()]
    slope_TD = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad((out * slope_TD).sum(), inputs) for out in outs)):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_choices_that_are_no_experts_give_what_a_loop_gives() -> None:
    layer, (x_TD, context) = layers("add_null_choices", "model.num_experts=3", "model.top_k=3")[0], tokens()
    router, out_TD = layer.router, []
    for x_D, valid in zip(x_TD, context.valid_T):
        probs_C, out_D = (router.weight @ x_D).softmax(-1), torch.zeros(DIM, dtype=torch.float64)
        for choice in probs_C.argsort(descending=True)[:3].tolist() if valid else []:
            output_D = (expert(layer, choice, x_D) if choice < 3 else
                        {3: x_D, 4: torch.zeros_like(x_D), 5: router.constant}[choice])
            out_D = out_D + probs_C[choice] * output_D
        out_TD.append(out_D)
    assert_same_gradients((layer(x_TD, context).out_TD, torch.stack(out_TD)), layer, x_TD)


def test_capacity_limits_experts_alone_and_leaves_other_choices() -> None:
    layer, (x_TD, context) = layers("add_null_choices")[0], tokens()
    free = layer(x_TD, context).stats[layer.name]
    layer.capacity = PositionCapacity(num_experts=8, factor=0.5, min_capacity=0)
    full = layer(x_TD, context).stats[layer.name]
    experts = int(free.counts_E[:8].sum())
    most = -(-experts // 16)                                             # half of the mean load of an expert
    assert free.counts_E.equal(full.counts_E) and int(free.counts_E[8:].sum()) > 0 == int(free.dropped)
    assert int(full.dropped) == int((full.counts_E[:8] - most).clamp(min=0).sum())
    layer.capacity = PositionCapacity(num_experts=8, factor=1e-6, min_capacity=1)
    routing = layer.router.route(x_TD, context)
    lone_TD = routing.residual_T[:, None] * x_TD + routing.residual_TD
    dropped_T = (layer.capacity.apply(routing, context).ids_TK < 0).all(1)
    assert dropped_T.any() and torch.allclose(layer(x_TD, context).out_TD[dropped_T], lone_TD[dropped_T])


def test_wrappers_give_what_their_formulas_give() -> None:
    gated, mixed = layers("surround")
    x_TD, context = tokens()
    plain_TD = gated.experts(x_TD, *gated.router.route(x_TD, context)[:2]).wait()
    share_T1 = (x_TD @ gated.shared.gate.T).sigmoid()
    by_hand_TD = plain_TD + share_T1 * gated.shared(x_TD)
    assert_same_gradients((gated(x_TD, context).out_TD, by_hand_TD), gated, x_TD)

    narrow_TD = x_TD @ mixed.latent.down.weight.T
    inner_TD = mixed.experts(narrow_TD, *mixed.router.route(x_TD, context)[:2]).wait()
    inner_TD = inner_TD @ mixed.latent.up.weight.T
    shares_T2 = F.linear(x_TD, mixed.mixture.mixing.weight, mixed.mixture.mixing.bias).softmax(-1)
    by_hand_TD = shares_T2[:, :1] * inner_TD + shares_T2[:, 1:] * mixed.mixture.dense(x_TD)
    assert_same_gradients((mixed(x_TD, context).out_TD, by_hand_TD), mixed, x_TD)


def test_a_hook_sees_every_stage_in_order_and_no_stage_after_the_router_alone() -> None:
    layer, (x_TD, context) = layers("surround")[0], tokens()
    layer(x_TD, context)
    layer(x_TD, context, route_only=True)
    routed = f"routed by {layer.name}"
    assert layer.watch.seen == [routed, "entering", "beside", "leaving", routed]


def named_twice(model: Transformer, config: object) -> None:
    model.layers[1].moe.name = model.layers[0].moe.name


def another_size(model: Transformer, config: object) -> None:
    model.layers[1].moe.router.num_experts = 7


def fed_by_nobody(model: Transformer, config: object) -> None:
    sparse_layers.pass_twice(model, config)

    class FedOnce(ChainLayer):
        feeds = property(lambda self: {self.name: (f"{self.name}.0",)})

    model.layers[1].moe.__class__ = FedOnce


def hidden(model: Transformer, config: object) -> None:
    """A bank inside a wrapper, which is the layer's own."""
    first, second = (block.moe for block in model.layers)
    model.layers[1].moe = MoELayer(name=second.name, router=second.router, experts=second.experts,
                                   wrappers={"inner": first})
    model.layers[0].moe = sparse_layers.OfAnotherLayer(name=first.name, router=first.router, bank=second.name,
                                                       experts=second.experts)


@pytest.mark.parametrize("convert, code, text", [
    (hidden, 203, "no sparse layer of a block names the bank layers.1.moe.inner.experts"),
    (named_twice, 200, "two routers or two banks are named layers.0.moe"),
    (fed_by_nobody, 201, "router layers.1.moe.1 feeds no bank"),
    (another_size, 202, "router layers.1.moe chooses from 7 experts, and bank layers.1.moe has 8"),
])
def test_layers_whose_names_or_sizes_contradict_are_refused(convert, code: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        make_run([], None, convert)
    assert f"E-CONFIG-{code}" in str(raised.value)


def test_a_name_of_a_wrapper_that_the_layer_has_already_is_refused() -> None:
    layer = layers("surround")[0]
    with pytest.raises(AssertionError, match="a wrapper named router"):
        MoELayer(name="x", router=layer.router, experts=layer.experts, wrappers={"router": layer.watch})


def test_vectors_of_choices_do_not_fit_behind_a_projection_and_this_is_said():
    """A wrapper narrows what the experts compute in; the router's vectors have the width of the model."""
    routing = Routing(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), 6, None,
                      residual_TD=torch.ones(3, 16))
    with pytest.raises(ConfigError, match="vectors of width 16, and the experts compute in width 8"):
        add_residual(torch.zeros(3, 8), torch.zeros(3, 8), routing)


class TooNarrow(TopKRouter):
    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        scores = super().scores(x_TD, context)
        return scores._replace(gates_TC=scores.gates_TC[:, 1:])


def test_scores_of_another_width_are_said():
    router = TooNarrow(dim=4, num_experts=6, top_k=2)
    with pytest.raises(ConfigError, match=r"layers.0.moe: gates of TooNarrow have shape \[3, 5\]") as caught:
        router.route(torch.randn(3, 4), RouterContext(router="layers.0.moe"))
    assert "num_choices=6" in str(caught.value)
