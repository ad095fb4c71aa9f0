"""Wrappers of an MoE layer: what surrounds its routed experts, given when the layer is built.

    route → routed → entering → experts → combine → leaving
                        beside, while the combine travels

Shared experts, a dense network beside the experts, projections to a narrower width and hooks that observe a
stage are wrappers. A layer has any number of them, one around the other: the first is outermost. The router
always reads the layer's own input.

Parameters of a wrapper belong to the block: they are sharded, initialized, stepped and saved like those of
attention. A wrapper keeps nothing between calls, since a layer may run again in backward, or for another
micro-batch before its backward.

Shapes: T tokens, D width, which a wrapper may change for those inside it.
"""

from torch import Tensor, nn

from moetrain.routers.base import RouterContext, Routing


class LayerWrapper(nn.Module):
    """Base class of wrappers, which changes nothing. Subclasses override the places that they need."""

    # Whether backward of `leaving` reads the values of the experts' outputs, as that of a product does. Where
    # no wrapper does, activation checkpointing does not exchange them again, and they are NaN there.
    reads_outputs = True

    def routed(self, routing: Routing, x_TD: Tensor, context: RouterContext) -> Routing:
        """Change the decision, before it is counted and before capacity.

        Statistics are counted from what is returned. Another choice of experts therefore needs statistics of
        its own, and goes through `decide` (ops/gating.py).

        Args:
            routing: decision of the router.
            x_TD: [T, D], input of the layer.
            context: context of the call; `router` is the name of the router.
        """
        return routing

    def entering(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Map the tokens [T, D] before they are dispatched."""
        return x_TD

    def beside(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """Compute what does not need the experts' outputs, while these travel back.

        Args:
            x_TD: [T, D], what `entering` was given.
            routing: the decision.

        Returns:
            A tensor for `leaving`, or None.
        """
        return None

    def leaving(self, out_TD: Tensor, x_TD: Tensor, routing: Routing, beside_TD: Tensor | None) -> Tensor:
        """Map the outputs of the experts.

        Args:
            out_TD: [T, D], summed outputs of each token's choices.
            x_TD: [T, D], what `entering` was given.
            routing: the decision.
            beside_TD: result of `beside`.
        """
        return out_TD
