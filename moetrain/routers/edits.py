"""Edits of a router's decisions: masked and forced experts, other ranks of a choice, other gate weights.

A decision is made in three steps (`Router.decision` in routers/base.py), and an edit is a pure function of
what a step has made:

    scores    [T, C] -> [T, C]            before the choice. -inf is never chosen, so a masked expert's place
                                          goes to its successor by score; +inf is always chosen
    ids       [T, K] -> [T, K]            the choice, best first; -1 leaves a slot unused. No expert twice
    weights   [T, K], ids -> [T, K]       gate weights, which keep their gradient

    edits = {"layers.3.moe": RoutingEdits(scores=Edit(lambda scores_TC: ..., rows_T))}
    model(tokens_BS, context._replace(edits=edits))

With a row mask, only those tokens' decisions change. Counts are those of the edited decision; probabilities
and logits are the router's own.

Shapes: T tokens, C choices, K slots.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Edit(NamedTuple):
    """Pure function of one step of a decision, for all tokens or some.

    Attributes:
        function: returns a new tensor of the same shape and dtype.
        rows_T: bool [T], tokens whose decision it changes; None: all.
    """

    function: Callable[..., Tensor]
    rows_T: Tensor | None = None

    def apply(self, before: Tensor, *others: Tensor) -> Tensor:
        """Edit what a step has made.

        Args:
            before: [T, ...], result of the step.
            *others: further arguments of the function.

        Returns:
            The function's result in the chosen rows, and `before` in the others.
        """
        version = before._version
        after = self.function(before, *others)
        if before._version != version:
            raise ValueError("an edit of a decision wrote into its argument; it must return a new tensor")
        if after.shape != before.shape or after.dtype != before.dtype:
            raise ValueError(f"an edit of a decision made {after.dtype} {tuple(after.shape)} "
                             f"of {before.dtype} {tuple(before.shape)}")
        return after if self.rows_T is None else after.where(self.rows_T[:, None], before)


class RoutingEdits(NamedTuple):
    """Edits of the decisions of one router, at the three steps."""

    scores: Edit | None = None
    ids: Edit | None = None
    weights: Edit | None = None
