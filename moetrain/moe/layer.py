"""The sparse layer: route, drop what is beyond capacity, dispatch, experts, combine, shared expert.

Dispatch, experts and combine run chunk by chunk (moe/overlap.py); the shared expert runs while the last chunk is on its way back.

`forward` is the list of steps; each step's file says how. The layer knows neither who holds an expert (dispatch, bank)
nor what a loss does with the statistics it returns (losses/).

Shapes: T tokens on this rank, D model width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.experts import FeedForward, GroupedExperts
from moetrain.moe.overlap import Pipeline
from moetrain.routers.base import Router, RouterContext, RoutingStats


class MoEOutput(NamedTuple):
    out_TD: Tensor
    stats: RoutingStats
    carry: Tensor | None


class MoELayer(nn.Module):
    """name: the router's name, key of its statistics, loads and randomness. capacity: dropless unless given. chunks: of a
    micro-batch, on its way to the experts and back."""

    def __init__(self, *, name: str, router: Router, dispatcher: TokenDispatcher, experts: GroupedExperts,
                 shared: FeedForward | None = None, capacity: CapacityPolicy | None = None, chunks: int = 1) -> None:
        super().__init__()
        self.name = name
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.pipeline = dispatcher, Pipeline(dispatcher, chunks)
        self.capacity = capacity or CapacityPolicy()

    def post(self) -> None:
        """The bank's first seam: called at the block's start, before attention."""
        self.experts.bank.post()

    def forward(self, x_TD: Tensor, context: RouterContext, route_only: bool = False) -> MoEOutput:
        """route_only: decide and count, and hand x back."""
        context = context._replace(router=self.name)
        routing = self.router.route(x_TD, context)
        if context.counted is not None:
            context.counted(self.name, routing.stats.counts_E)
        routing = self.capacity.apply(routing, context)
        if route_only:
            return MoEOutput(x_TD, routing.stats, routing.carry)
        output = self.experts(self.experts.bank.depart(x_TD), routing.ids_TK, routing.weights_TK, self.pipeline)
        shared_TD = None if self.shared is None else self.shared(x_TD)
        out_TD = output.wait()
        return MoEOutput(out_TD if shared_TD is None else out_TD + shared_TD, routing.stats, routing.carry)
