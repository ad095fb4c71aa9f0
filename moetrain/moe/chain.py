"""Chain-of-Experts: the tokens pass C times through the experts of a layer, each time routed anew.

Wang et al. 2025, arXiv 2506.18945. One bank serves all rounds; round t has a router of its own, or all share
one. With K / C experts a round, the experts cost as much as K experts of an ordinary layer. Where the
residual is added, the paper leaves open. With u the residual stream before the layer, and M_t the routed and
shared experts as round t chooses them:

    stream          x_0 = u          x_t = x_{t-1} + M_t(norm(x_{t-1}))     the stream becomes x_C
    paper_literal   x_0 = norm(u)    x_t = x_{t-1} + M_t(x_{t-1})           u + x_C
    inner           x_0 = norm(u)    x_t = x_{t-1} + M_t(x_{t-1})           x_C
    outer           x_0 = norm(u)    x_t = M_t(x_{t-1})                     u + x_C

`stream` with one round is the ordinary block to the bit. `inner` and `outer` are those of the authors' code
(ZihanWang314/CoE, modeling_coe.py), whose default is `inner`: there the stream ends at the block, and goes on
from its norm. `outer` is the paper's worse ablation. The code adds a balance loss in every round, as here,
where the losses of all rounds are averaged over routers.

A router that carries a state hands it on from round to round. The rounds of a layer follow each other, so C
exchanges are exposed to latency, each with 1 / C of the rows.

Shapes: B sequences, S positions, T = B*S tokens, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoEOutput, SparseLayer
from moetrain.moe.wrappers import LayerWrapper
from moetrain.routers.base import Router, RouterContext, RoutingStats

Residual = Literal["stream", "paper_literal", "inner", "outer"]


class ChainLayer(SparseLayer):
    """Layer of several rounds over one bank of experts. It maps the residual stream.

    Args:
        name: name of the bank; the router of round t is `<name>.<t>`.
        routers: router of each round. One module may decide in all.
        experts: routed experts, with their dispatcher.
        wrappers: what surrounds the experts in every round, as of `MoELayer`.
        capacity: drops choices beyond a limit, in every round; None drops nothing.
        residual: where the residual is added.
    """

    takes_stream = takes_input = True

    def __init__(self, *, name: str, routers: Sequence[Router], experts: RoutedExperts,
                 wrappers: Mapping[str, LayerWrapper] | None = None,
                 capacity: CapacityPolicy | None = None, residual: Residual = "stream") -> None:
        super().__init__(capacity)
        self.name, self.residual = name, residual
        self.router, self.experts = nn.ModuleList(routers), experts
        self._add_wrappers(name, wrappers or {})

    @property
    def routers(self) -> dict[str, Router]:
        return {f"{self.name}.{number}": router for number, router in enumerate(self.router)}  # type: ignore[misc]

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        return {self.name: self.experts}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        return {self.name: tuple(self.routers)}

    def forward(self, x_BSD: Tensor, context: RouterContext, route_only: bool = False, *,
                norm: Callable[[Tensor], Tensor] | None = None) -> MoEOutput:
        """Run all rounds.

        Args:
            x_BSD: [B, S, D], residual stream.
            context: context of the micro-batch.
            route_only: stop after the last router.
            norm: of the block, which calls with it.

        Returns:
            The stream behind the layer [B, S, D], with the statistics of every round.
        """
        assert norm is not None
        stats: dict[str, RoutingStats] = {}
        stream = self.residual == "stream"
        state_BSD = x_BSD if stream else norm(x_BSD)
        wrappers, last = self.wrappers, f"{self.name}.{len(self.router) - 1}"
        for name in self.routers:
            inner_TD = (norm(state_BSD) if stream else state_BSD).flatten(0, 1)
            routing = self.route(name, inner_TD, context, wrappers)
            stats[name], context = routing.stats, context._replace(carry=routing.carry)
            if route_only and name == last:
                break
            # Norm and router of the next round read what the experts gave.
            out_TD = self.compute(self.experts, inner_TD, routing, wrappers, read=name != last)
            out_BSD = out_TD.view_as(state_BSD)
            state_BSD = out_BSD if self.residual == "outer" else state_BSD + out_BSD
        if self.residual in ("paper_literal", "outer"):
            state_BSD = x_BSD + state_BSD
        return MoEOutput(state_BSD, stats, context.carry)
