"""The sparse feed-forward layer: route, apply capacity, dispatch, experts, combine, shared expert.

`MoELayer.forward` lists the steps. The file of each step says how it works:

    route       routers/        choose the experts of each token, with gate weights
    capacity    capacity.py     drop choices beyond the capacity of an expert
    experts     experts.py      dispatch, compute, start the combine
    shared      the model's     compute the shared expert, while the last chunk of the combine travels

The layer knows neither which rank holds an expert (dispatch.py, bank.py) nor how losses use the statistics
that it returns (losses/).

Shapes: T tokens on this rank, D model width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.experts import RoutedExperts
from moetrain.routers.base import Router, RouterContext, RoutingStats


class MoEOutput(NamedTuple):
    """Output of a layer, and what its router has produced.

    Attributes:
        out_TD: [T, D], hidden states.
        stats: statistics of the router.
        carry: tensor that the router passes to the router of the next layer, or None.
    """

    out_TD: Tensor
    stats: RoutingStats
    carry: Tensor | None


class MoELayer(nn.Module):
    """Sparse feed-forward layer of one block.

    Args:
        name: name of the router, by which its statistics, loads and randomness are keyed.
        router: chooses experts and gate weights.
        experts: routed experts, with their dispatcher.
        shared: expert that every token takes, or None.
        capacity: drops choices beyond a limit; None drops nothing.
    """

    def __init__(self, *, name: str, router: Router, experts: RoutedExperts,
                 shared: nn.Module | None = None, capacity: CapacityPolicy | None = None) -> None:
        super().__init__()
        self.name = name
        self.router, self.experts, self.shared = router, experts, shared
        self.capacity = capacity or CapacityPolicy()

    def prefetch(self) -> None:
        """Start gathering copies of experts. The block calls it before attention, which hides the gather."""
        self.experts.bank.prefetch()

    def forward(self, x_TD: Tensor, context: RouterContext, route_only: bool = False) -> MoEOutput:
        """Send tokens to their experts and sum the outputs of each token.

        Args:
            x_TD: [T, D], normalized hidden states.
            context: positions, sample ids and other data of the micro-batch that routers may use.
            route_only: route and count, and return x unchanged (the count pass of `balance.mode=exact`).

        Returns:
            The sum [T, D] of each token's routed and shared experts, with the statistics of the routing.
        """
        context = context._replace(router=self.name)
        routing = self.router.route(x_TD, context)
        assert routing.residual_T is None, f"{self.name}: identity experts (residual_T) are not implemented"
        if context.on_counts is not None:
            context.on_counts(self.name, routing.stats.counts_E)
        routing = self.capacity.apply(routing, context)
        if route_only:
            return MoEOutput(x_TD, routing.stats, routing.carry)
        to_experts_TD = self.experts.bank.reduce_grads_in_backward(x_TD)
        combining = self.experts(to_experts_TD, routing.ids_TK, routing.weights_TK)
        shared_TD = None if self.shared is None else self.shared(x_TD)
        out_TD = combining.wait()
        return MoEOutput(out_TD if shared_TD is None else out_TD + shared_TD, routing.stats, routing.carry)
