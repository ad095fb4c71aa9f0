"""The sparse feed-forward layer: route, apply capacity, dispatch, experts, combine.

`MoELayer.forward` lists the steps. The file of each step says how it works:

    route       routers/        choose the experts of each token, with gate weights
    capacity    capacity.py     drop choices beyond the capacity of an expert
    experts     experts.py      dispatch, compute, start the combine
    wrappers    wrappers.py     what surrounds the experts, such as the shared expert

The layer knows neither which rank holds an expert (dispatch.py, bank.py) nor how losses use the statistics
that it returns (losses/). A block may hold sparse layers of another kind. `SparseLayer` is what the model
asks of each: its routers and its banks of experts, by name.

    statistics, loads, controllers    by router; a router that decides twice in a pass has two names
    homes, copies, forecasts          by bank; a bank lists the routers whose choices it computes

Shapes: T tokens on this rank, D model width.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from moetrain.errors import ConfigError
from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.wrappers import LayerWrapper
from moetrain.routers.base import Router, RouterContext, Routing, RoutingStats


class MoEOutput(NamedTuple):
    """Output of a sparse layer, and what its routers have produced.

    Attributes:
        out_TD: [T, D], hidden states.
        stats: statistics by router name, in run order.
        carry: tensor that the last router passes to the router of the next layer, or None.
    """

    out_TD: Tensor
    stats: dict[str, RoutingStats]
    carry: Tensor | None


class SparseLayer(nn.Module):
    """Base class of modules of a block that route tokens to experts.

    Subclasses define `routers`, `banks`, `feeds` and `forward`. `route` and `compute` are the steps of one
    pass. A sparse layer in place of a block's attention is called with the keyword arguments rotary, mask and
    earlier in addition, and with x [B, S, D]. One in place of its feed-forward part that `takes_stream` gets
    the residual stream itself, [B, S, D], with the block's norm as `norm`, and returns the stream.

    With `route_only`, a layer runs the same ops in the same order, and stops after its last router.

    Args:
        capacity: drops choices beyond a limit; None drops nothing.
    """

    takes_stream = False
    # Whether its experts get `Routing.input_TD` where a router gives it.
    takes_input = False

    def __init__(self, capacity: CapacityPolicy | None = None) -> None:
        super().__init__()
        self.capacity = capacity or CapacityPolicy()
        self._wrapper_names: tuple[str, ...] = ()

    @property
    def routers(self) -> dict[str, Router]:
        """Routers by name, in run order: a name for each pass over a bank."""
        raise TypeError(f"{type(self).__name__} does not define routers")

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        """Banks of experts by name, in run order. Layers that share a bank call it by one name."""
        raise TypeError(f"{type(self).__name__} does not define banks")

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Names of the routers of this layer that choose from a bank, by the name of the bank."""
        raise TypeError(f"{type(self).__name__} does not define feeds")

    @property
    def wrappers(self) -> dict[str, LayerWrapper]:
        """What surrounds the experts, by name, outermost first."""
        return {name: getattr(self, name) for name in self._wrapper_names}

    def _add_wrappers(self, layer: str, wrappers: Mapping[str, LayerWrapper]) -> None:
        """Make modules of the layer of them."""
        self._wrapper_names = tuple(wrappers)
        for name, wrapper in wrappers.items():
            assert not hasattr(self, name), f"{layer}: a wrapper named {name}, which the layer has"
            self.add_module(name, wrapper)

    @property
    def passes(self) -> dict[str, int]:
        """How often a call passes over a bank, by its name: once for each router that feeds it."""
        return {bank: len(routers) for bank, routers in self.feeds.items()}

    def prefetch(self) -> None:
        """Start gathering copies of experts. The block calls it before attention, which hides the gather."""
        for experts in self.banks.values():
            experts.bank.prefetch()

    def route(self, name: str, x_TD: Tensor, context: RouterContext,
              wrappers: Mapping[str, LayerWrapper] | None = None) -> Routing:
        """Choose the experts of the tokens, count the choices, and apply capacity.

        Args:
            name: name of the router.
            x_TD: [T, D], normalized hidden states.
            context: context of the micro-batch.
            wrappers: may change the decision before it is counted.

        Returns:
            The decision, with its statistics.
        """
        router = self.routers[name]
        passes = [each for each, module in self.routers.items() if module is router]
        context = context._replace(router=name, iteration=passes.index(name))
        routing = router.route(x_TD, context)
        assert routing.input_TD is None or self.takes_input, (
            f"{name} changes what its experts get, and {type(self).__name__} does not honor that")
        for wrapper in (wrappers or {}).values():
            routing = wrapper.routed(routing, x_TD, context)
        if context.on_counts is not None:
            context.on_counts(name, routing.stats)
        kept = self.capacity.apply(routing, context)
        if context.on_routing is not None:
            context.on_routing(name, x_TD, routing, kept)
        return kept

    def compute(self, experts: RoutedExperts, x_TD: Tensor, routing: Routing,
                wrappers: Mapping[str, LayerWrapper], *, read: bool) -> Tensor:
        """Send tokens to their experts, inside the wrappers, and sum the outputs of each token.

        Args:
            experts: bank of the pass.
            x_TD: [T, D], normalized hidden states.
            routing: the decision.
            wrappers: what surrounds the experts, by name, outermost first.
            read: whether what follows reads the values of the outputs in backward (`RoutedExperts`).

        Returns:
            The sum [T, D] of each token's routed experts, as the wrappers leave it.
        """
        # Of every wrapper, and then of the experts.
        inputs = [x_TD if routing.input_TD is None else routing.input_TD]
        for wrapper in wrappers.values():
            inputs.append(wrapper.entering(inputs[-1], routing))
        combining = experts(inputs[-1], routing.ids_TK, routing.weights_TK, routing.max_rows,
                            read=read or any(wrapper.reads_outputs for wrapper in wrappers.values()))
        # While the last chunk of the combine travels.
        beside = [wrapper.beside(own_TD, routing) for wrapper, own_TD in zip(wrappers.values(), inputs)]
        out_TD = add_residual(combining.wait(), inputs[-1], routing)
        for wrapper, own_TD, beside_TD in reversed(list(zip(wrappers.values(), inputs, beside))):
            out_TD = wrapper.leaving(out_TD, own_TD, routing, beside_TD)
        return out_TD

    def forward(self, x_TD: Tensor, context: RouterContext, route_only: bool = False) -> MoEOutput:
        """Map tokens [T, D] to [T, D], with statistics of the routing."""
        raise TypeError(f"{type(self).__name__} does not define forward")


class MoELayer(SparseLayer):
    """Sparse feed-forward layer of one block: one router, one pass over one bank of experts.

    Args:
        name: name of the router and of the bank.
        router: chooses experts and gate weights.
        experts: routed experts, with their dispatcher.
        wrappers: what surrounds the experts, by the name of its parameters in the layer; the first is
            outermost.
        capacity: drops choices beyond a limit; None drops nothing.
    """

    # Whether what follows in the block reads the values of the output in backward (`RoutedExperts`). `Block`
    # only adds them to the residual stream.
    outputs_are_read = False
    takes_input = True

    def __init__(self, *, name: str, router: Router, experts: RoutedExperts,
                 wrappers: Mapping[str, LayerWrapper] | None = None,
                 capacity: CapacityPolicy | None = None) -> None:
        super().__init__(capacity)
        self.name = name
        self.router, self.experts = router, experts
        self._add_wrappers(name, wrappers or {})

    @property
    def routers(self) -> dict[str, Router]:
        return {self.name: self.router}

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        return {self.name: self.experts}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        return {self.name: (self.name,)}

    def forward(self, x_TD: Tensor, context: RouterContext, route_only: bool = False) -> MoEOutput:
        """Send tokens to their experts and sum the outputs of each token.

        Args:
            x_TD: [T, D], normalized hidden states.
            context: positions, sample ids and other data of the micro-batch that routers may use.
            route_only: route and count, and return x unchanged (the count pass of `balance.mode=exact`).

        Returns:
            The sum [T, D] of each token's routed experts, as the wrappers leave it, with the statistics of
            the routing.
        """
        wrappers = self.wrappers
        routing = self.route(self.name, x_TD, context, wrappers)
        stats = {self.name: routing.stats}
        if route_only:
            return MoEOutput(x_TD, stats, routing.carry)
        out_TD = self.compute(self.experts, x_TD, routing, wrappers, read=self.outputs_are_read)
        return MoEOutput(out_TD, stats, routing.carry)


def add_residual(out_TD: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
    """Add the outputs of choices that are no experts: they need no matrices, so no rank and no exchange.

    Args:
        out_TD: [T, D], sum of the outputs of each token's experts.
        x_TD: [T, D], what the experts were given.
        routing: the decision: `residual_T` weighs identity choices, `residual_TD` is the sum of the others.

    Returns:
        [T, D], the sum over all choices.
    """
    if routing.residual_T is not None:
        out_TD = out_TD + (routing.residual_T[:, None] * x_TD).to(out_TD.dtype)
    if routing.residual_TD is not None:
        if routing.residual_TD.shape != out_TD.shape:
            raise ConfigError(
                245, f"choices that are no experts give vectors of width {routing.residual_TD.shape[1]}, and "
                     f"the experts compute in width {out_TD.shape[1]}",
                where="a wrapper that changes the width, and Router.residual",
                why="both are added where the experts' outputs are combined",
                next="choices that return nothing or the token itself, or no wrapper that changes the width")
        out_TD = out_TD + routing.residual_TD.to(out_TD.dtype)
    return out_TD
