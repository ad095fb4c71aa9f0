"""Expert capacity: a limit on the slots that an expert takes, and policies for dropping (GShard, Switch).

A stage between router and dispatch that maps a `Routing` to a `Routing`. In every scope an expert takes at
most

    C = max(min_capacity, ceil(factor * n / E))       n: slots chosen in the scope, top_k times its tokens

of the slots that chose it. The others become unused (id -1, weight 0), and used slots stay first:

    CapacityPolicy      none      takes every slot: dropless, the default
    PositionCapacity    position  takes the first in token order; second choices queue behind first choices
    ProbCapacity        prob      takes those of the largest gate weights; of equal ones, the first token's
    PriorityCapacity    priority  takes those of the tokens whose largest gate weight is largest (V-MoE's
                                  batch-prioritized routing); second choices queue behind first choices
    RandomCapacity      random    takes any at random, all with equal chances (DeepSpeed)

The scope `sequence` counts inside each sequence, so a result does not depend on how sequences are spread over
ranks and micro-batches. The scope `local` counts inside the micro-batch of a rank, as most trainers do. Its
result does depend on that spread.

A router's statistics are those before drops, except `dropped`: balance losses and selection biases see what
was chosen. The remaining ids pass through `decide` (ops/gating.py), so that recomputation replays them. The
weights are gathered after that.

Capacity makes a token depend on other tokens. `prob`, `priority` and `random` are never causal. `position` is
causal for first choices, and with order=token for all choices: in the classic order, a later token's first
choice may displace an earlier token's second. In generation, a sequence is what has been written so far.

Shapes: T tokens, E experts, K slots per token, N = T*K slots in the order of their priority.
"""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from moetrain.ops.gating import decide, gather_weights, in_steps, scatter_weights, used_first
from moetrain.ops.keyed_random import bits
from moetrain.ops.start import Start
from moetrain.routers.base import RouterContext, Routing
from moetrain.routers.context import sequence_of


class CapacityPolicy(nn.Module):
    """Dropless policy, which computes every slot, and base class of the policies that drop slots.

    A module, so that a policy may have parameters and buffers, which belong to its layer.
    """

    def starts(self) -> dict[str, Start]:
        """Rule by which each parameter and buffer starts (ops/start.py)."""
        return {}

    # Whether what a token loses depends on that token and earlier ones of its sequence alone.
    causal = True

    @property
    def depends_on(self) -> str:
        """Properties of the batch split that change the result, for the banner."""
        return ""

    def apply(self, routing: Routing, context: RouterContext) -> Routing:
        """Apply the policy to a router's decision; this one returns it unchanged."""
        return routing

    def describe(self) -> str:
        """Describe the policy in one line for the banner."""
        return "dropless"


class LimitedCapacity(CapacityPolicy):
    """Base class of the policies that drop slots. Subclasses define `priority`, the order of service.

    Args:
        num_experts: E.
        factor: capacity in training, as a multiple of the mean load.
        eval_factor: capacity in evaluation, as a multiple of the mean load.
        min_capacity: slots that an expert takes in any case.
        scope: count inside each `sequence`, or inside the `local` micro-batch of a rank.
        renorm: scale the remaining weights of a token to the sum of its weights before drops.
    """

    name = ""
    causal = False                           # the limit itself grows with the tokens that follow
    BOUNDS = {"factor": "above 0", "eval_factor": "above 0", "min_capacity": "0 or more"}

    def __init__(self, *, num_experts: int, factor: float = 1.25, eval_factor: float = 2.0,
                 min_capacity: int = 4, scope: Literal["sequence", "local"] = "sequence",
                 renorm: bool = False) -> None:
        super().__init__()
        assert factor > 0 and eval_factor > 0 and min_capacity >= 0, (factor, eval_factor, min_capacity)
        assert scope in ("sequence", "local"), scope
        self.num_experts, self.min_capacity, self.scope, self.renorm = (
            num_experts, min_capacity, scope, renorm)
        self.factor, self.eval_factor = factor, eval_factor

    @property
    def depends_on(self) -> str:
        return "ranks, accumulation" if self.scope == "local" else ""

    def describe(self) -> str:
        within = "sequence" if self.scope == "sequence" else "micro-batch of a rank"
        text = (f"{self.name}, factor {self.factor:g} (evaluation {self.eval_factor:g}),"
                f" at least {self.min_capacity}, per {within}")
        return f"{text}   depends on: {self.depends_on}" if self.depends_on else text

    def priority(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        """Order the flat slots t*K + k, those to keep first: int64 [N]."""
        raise TypeError(f"{type(self).__name__} does not define priority")

    def apply(self, routing: Routing, context: RouterContext) -> Routing:
        """Drop the slots beyond capacity from a router's decision.

        Runs on the device. The host waits for nothing, and nothing is communicated.
        """
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
        """Find the slots that their experts take.

        A slot is taken if fewer than C slots of the same scope and expert precede it in order of priority.
        This exclusive cumulative count is found by sorting, without an [N, E] table.

        Args:
            ids_TK: int64 [T, K], global expert ids; -1 is unused.
            weights_TK: [T, K], gate weights, detached.
            context: positions of the tokens, and whether the model trains.

        Returns:
            bool [T, K]; False where a slot is unused.
        """
        tokens, slots = ids_TK.shape
        # A micro-batch that runs several times counts each time by itself.
        each_T = torch.arange(context.draws, device=ids_TK.device).repeat_interleave(tokens // context.draws)
        scope_T = sequence_of(context, tokens, ids_TK.device) if self.scope == "sequence" else each_T
        capacity_T = self._capacity((ids_TK >= 0).sum(1), scope_T, context.training)
        order_N = self.priority(weights_TK, context)
        token_N, id_N = order_N // slots, ids_TK.flatten()[order_N]
        queue_N = (scope_T[token_N] * self.num_experts + id_N).where(id_N >= 0, -1)
        kept_N = (id_N >= 0) & (place_in_queue(queue_N) < capacity_T[token_N])
        return torch.zeros_like(kept_N).scatter(0, order_N, kept_N).view(tokens, slots)

    def _capacity(self, used_T: Tensor, scope_T: Tensor, training: bool) -> Tensor:
        """Compute C of each token's scope, int64 [T].

        The arithmetic is exact: a factor counts as the fraction that its decimal digits stand for.
        """
        n_T = torch.zeros_like(used_T).index_add(0, scope_T, used_T)[scope_T]
        factor = Fraction(self.factor if training else self.eval_factor).limit_denominator(10**6)
        top, bottom = factor.numerator, factor.denominator * self.num_experts
        return (-(-n_T * top // bottom)).clamp(min=self.min_capacity)


class PositionCapacity(LimitedCapacity):
    """Capacity policy that keeps the slots that come first in the batch.

    Args:
        num_experts: E.
        factor: capacity in training, as a multiple of the mean load.
        eval_factor: capacity in evaluation, as a multiple of the mean load.
        min_capacity: slots that an expert takes in any case.
        scope: count inside each `sequence`, or inside the `local` micro-batch of a rank.
        renorm: scale the remaining weights of a token to the sum of its weights before drops.
        order: `choice` orders slots by choice and then by token; `token`, by token and then by choice.
    """

    name = "position"

    def __init__(self, *, num_experts: int, factor: float = 1.25, eval_factor: float = 2.0,
                 min_capacity: int = 4, scope: Literal["sequence", "local"] = "sequence",
                 renorm: bool = False, order: Literal["choice", "token"] = "choice") -> None:
        super().__init__(num_experts=num_experts, factor=factor, eval_factor=eval_factor,
                         min_capacity=min_capacity, scope=scope, renorm=renorm)
        assert order in ("choice", "token"), order
        self.order = order

    def priority(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        slots_TK = torch.arange(weights_TK.numel(), device=weights_TK.device).view_as(weights_TK)
        return (slots_TK.T if self.order == "choice" else slots_TK).flatten()


class ProbCapacity(LimitedCapacity):
    """Capacity policy that keeps the slots of the largest gate weights. Arguments as in `LimitedCapacity`."""

    name = "prob"

    def priority(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        return in_steps(weights_TK).flatten().argsort(descending=True, stable=True)


class PriorityCapacity(LimitedCapacity):
    """Capacity policy that serves the tokens with the largest gate weights first, choice by choice.

    Batch-prioritized routing of V-MoE (2106.05974), by the largest weight of a token. Arguments as in
    `LimitedCapacity`.
    """

    name = "priority"

    def priority(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        tokens, slots = weights_TK.shape
        if not weights_TK.numel():
            return torch.zeros(0, dtype=torch.int64, device=weights_TK.device)
        order_T = in_steps(weights_TK.amax(1)).argsort(descending=True, stable=True)
        return (order_T * slots + torch.arange(slots, device=weights_TK.device)[:, None]).flatten()


class RandomCapacity(LimitedCapacity):
    """Capacity policy that keeps slots at random: each of an expert's slots with the same probability.

    Random token selection of DeepSpeed-MoE. A slot's place is a function of the key of its token
    (ops/keyed_random.py), so it is the same on every mesh. Arguments as in `LimitedCapacity`.
    """

    name = "random"

    def priority(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        return bits(context, weights_TK.shape[1], use="capacity").flatten().argsort(stable=True)




def place_in_queue(queue_N: Tensor) -> Tensor:
    """Count the equal entries before each one, int64 [N]: an exclusive cumulative count for each value."""
    order_N = queue_N.argsort(stable=True)
    sorted_N = queue_N[order_N]
    place_N = torch.arange(len(queue_N), device=queue_N.device) - torch.searchsorted(sorted_N, sorted_N)
    return torch.zeros_like(queue_N).scatter(0, order_N, place_N)


def _keep_total(after_TK: Tensor, before_TK: Tensor) -> Tensor:
    """Scale the remaining weights of each token to the sum before drops. If none remain, they stay 0."""
    left_T1 = after_TK.sum(1, keepdim=True)
    return after_TK * (before_TK.sum(1, keepdim=True) / left_T1.where(left_T1 > 0, 1))
