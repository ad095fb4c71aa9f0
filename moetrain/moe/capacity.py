"""Capacity: what an expert takes at most, and which of its tokens are dropped beyond it (GShard, Switch).

A stage between router and dispatch, decision in, decision out. In every scope an expert takes up to

    C = max(min_capacity, ceil(factor * n / E))       n: slots chosen in the scope, top_k times its tokens

of the slots that chose it, and the others become unused (id -1, weight 0, used ones stay first):

    CapacityPolicy      none      takes everything: dropless, the default
    PositionCapacity    position  takes the first in token order; second choices queue behind all first choices
    ProbCapacity        prob      takes those of the largest gate weights, of equal ones the first token's

scope: `sequence` counts inside each sequence, so that a result does not depend on how sequences are spread over ranks and
micro-batches. `local` counts inside the micro-batch of a rank, as most trainers do, and does depend on it.

The statistics of a router are those before drops, but for `dropped`: balance losses and selection biases see what was
chosen. What is kept passes `decide`, so it is decided once in a step, and the weights are gathered after it.

A capacity looks at other tokens. `prob` never is causal; `position` is for first choices, and with order=token for all of
them: by the classic order a later first choice may displace an earlier token's second. In generation a sequence is what has
been written so far.

Shapes: T tokens, E experts, K slots, N = T*K slots in the order of their priority.
"""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.gating import decide, gather_weights, scatter_weights
from moetrain.routers.base import RouterContext, Routing


class CapacityPolicy:
    """Dropless: every slot is computed. The base of those that drop."""

    depends_on = ""                          # what of the split of the batch the result depends on, for the banner

    def apply(self, routing: Routing, context: RouterContext) -> Routing:
        return routing

    def describe(self) -> str:
        """One line for the banner."""
        return "dropless"


class _LimitedCapacity(CapacityPolicy):
    """What the policies that drop have in common; they differ in who comes first."""

    name = ""
    BOUNDS = {"factor": "above 0", "eval_factor": "above 0", "min_capacity": "0 or more"}

    def __init__(self, *, num_experts: int, factor: float = 1.25, eval_factor: float = 2.0, min_capacity: int = 4,
                 scope: Literal["sequence", "local"] = "sequence", renorm: bool = False) -> None:
        assert factor > 0 and eval_factor > 0 and min_capacity >= 0, (factor, eval_factor, min_capacity)
        assert scope in ("sequence", "local"), scope
        self.num_experts, self.min_capacity, self.scope, self.renorm = num_experts, min_capacity, scope, renorm
        self.factor, self.eval_factor = factor, eval_factor

    @property
    def depends_on(self) -> str:
        return "ranks, accumulation" if self.scope == "local" else ""

    def describe(self) -> str:
        within = "sequence" if self.scope == "sequence" else "micro-batch of a rank"
        text = (f"{self.name}, factor {self.factor:g} (evaluation {self.eval_factor:g}), at least {self.min_capacity},"
                f" per {within}")
        return f"{text}   depends on: {self.depends_on}" if self.depends_on else text

    def priority(self, weights_TK: Tensor) -> Tensor:
        """The flat slots t*K + k, first come first: int64 [N]."""
        raise TypeError(f"{type(self).__name__} does not define priority")

    def apply(self, routing: Routing, context: RouterContext) -> Routing:
        """The decision without the slots beyond capacity; on the device, no synchronisation, no collective."""
        before_TK, weights_TK = routing.ids_TK, routing.weights_TK
        kept_TK = self.survivors(before_TK, weights_TK.detach(), context)
        ids_TK = decide(used_first(before_TK.where(kept_TK, -1)))
        after_TK = gather_weights(scatter_weights(weights_TK, before_TK, self.num_experts), ids_TK)
        if self.renorm:
            after_TK = _keep_total(after_TK, weights_TK)
        dropped = (before_TK >= 0).sum() - (ids_TK >= 0).sum()
        return routing._replace(ids_TK=ids_TK, weights_TK=after_TK,
                                stats=routing.stats._replace(dropped=routing.stats.dropped + dropped))

    def survivors(self, ids_TK: Tensor, weights_TK: Tensor, context: RouterContext) -> Tensor:
        """Slots that their experts take, bool [T, K].

        A slot's place in its expert's queue is a cumulative count: its place among the slots of the same scope and expert,
        in order of priority. It is found by sorting, without a [N, E] table.
        """
        tokens, slots = ids_TK.shape
        scope_T = sequence_of(context, tokens, ids_TK.device) if self.scope == "sequence" else ids_TK.new_zeros(tokens)
        capacity_T = self._capacity((ids_TK >= 0).sum(1), scope_T, context.training)
        order_N = self.priority(weights_TK)
        token_N, id_N = order_N // slots, ids_TK.flatten()[order_N]
        queue_N = (scope_T[token_N] * self.num_experts + id_N).where(id_N >= 0, -1)
        kept_N = (id_N >= 0) & (place_in_queue(queue_N) < capacity_T[token_N])
        return torch.zeros_like(kept_N).scatter(0, order_N, kept_N).view(tokens, slots)

    def _capacity(self, used_T: Tensor, scope_T: Tensor, training: bool) -> Tensor:
        """C of each token's scope, int64 [T]. In integers: the factor is taken as the fraction that it stands for."""
        n_T = torch.zeros_like(used_T).index_add(0, scope_T, used_T)[scope_T]
        factor = Fraction(self.factor if training else self.eval_factor).limit_denominator(10**6)
        top, bottom = factor.numerator, factor.denominator * self.num_experts
        return (-(-n_T * top // bottom)).clamp(min=self.min_capacity)


class PositionCapacity(_LimitedCapacity):
    """factor, eval_factor: capacity over the mean load, in training and in evaluation. min_capacity: slots an expert takes
    in any case. scope: sequence or local. renorm: what is left of a token keeps the sum of its weights.
    order: choice, by choice and then by token; token, by token and then by choice."""

    name = "position"

    def __init__(self, *, num_experts: int, factor: float = 1.25, eval_factor: float = 2.0, min_capacity: int = 4,
                 scope: Literal["sequence", "local"] = "sequence", renorm: bool = False,
                 order: Literal["choice", "token"] = "choice") -> None:
        super().__init__(num_experts=num_experts, factor=factor, eval_factor=eval_factor, min_capacity=min_capacity,
                         scope=scope, renorm=renorm)
        assert order in ("choice", "token"), order
        self.order = order

    def priority(self, weights_TK: Tensor) -> Tensor:
        slots_TK = torch.arange(weights_TK.numel(), device=weights_TK.device).view_as(weights_TK)
        return (slots_TK.T if self.order == "choice" else slots_TK).flatten()


class ProbCapacity(_LimitedCapacity):
    """factor, eval_factor, min_capacity, scope, renorm: as for PositionCapacity.

    Weights are compared in steps of 2^-16 (2^-32 in float64 runs): where a sequence begins with one token several times,
    these have the same weights but for rounding, which differs with the split of the batch, and must not decide.
    """

    name = "prob"

    def __init__(self, *, num_experts: int, factor: float = 1.25, eval_factor: float = 2.0, min_capacity: int = 4,
                 scope: Literal["sequence", "local"] = "sequence", renorm: bool = False) -> None:
        super().__init__(num_experts=num_experts, factor=factor, eval_factor=eval_factor, min_capacity=min_capacity,
                         scope=scope, renorm=renorm)

    def priority(self, weights_TK: Tensor) -> Tensor:
        steps = 2.0**32 if weights_TK.dtype == torch.float64 else 2.0**16
        return (weights_TK * steps).round().flatten().argsort(descending=True, stable=True)


def sequence_of(context: RouterContext, tokens: int, device: torch.device) -> Tensor:
    """Number of each token's sequence in the micro-batch, int64 [T] in [0, T): one begins at every position 0.

    Not by sample ids, which may occur twice. Without positions (generation) all tokens are one sequence.
    """
    if context.positions_T is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device)
    return ((context.positions_T == 0).cumsum(0) - 1).clamp(min=0)


def place_in_queue(queue_N: Tensor) -> Tensor:
    """How many entries before each one are equal to it, int64 [N]: an exclusive cumulative count for each value."""
    order_N = queue_N.argsort(stable=True)
    sorted_N = queue_N[order_N]
    place_N = torch.arange(len(queue_N), device=queue_N.device) - torch.searchsorted(sorted_N, sorted_N)
    return torch.zeros_like(queue_N).scatter(0, order_N, place_N)


def used_first(ids_TK: Tensor) -> Tensor:
    """The same ids in the same order, the unused slots last."""
    return ids_TK.gather(1, (ids_TK < 0).to(torch.uint8).argsort(dim=1, stable=True))


def _keep_total(after_TK: Tensor, before_TK: Tensor) -> Tensor:
    """The weights that are left, scaled to the sum of those before; a token that lost all of them has none."""
    left_T1 = after_TK.sum(1, keepdim=True)
    return after_TK * (before_TK.sum(1, keepdim=True) / left_T1.where(left_T1 > 0, 1))
