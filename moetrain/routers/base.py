"""The router interface and its records.

A router maps (x, context) to a decision of fixed width and to additive statistics. It never communicates and never sees
an expert; losses are functions of the statistics (losses/), and the trainer owns the pool over which they are summed.

    RouterContext   what a router may know besides x
    Routing         the decision; stays inside the layer
    RoutingStats    sums over valid tokens; leave the layer beside its output
    Stack           those of several routers at once: what is made of them costs the same for one layer and for fifty
    Router          the base class: one weight [E, D] in float32, `route`, `routing`, `end_of_step`

All records are NamedTuples: FSDP2 finds the tensors that leave a module by flattening its output as a pytree, and a
plain dataclass would lose gradients silently.

Shapes: T tokens, D model width, E experts, K slots, R routers.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.ops.router_sums import RouterSums, router_sums

RoutingStats = RouterSums


class RouterContext(NamedTuple):
    """training, step, seed and the router's name; sample ids and positions [T] key all randomness, on any mesh."""

    training: bool = True
    step: int = 0
    seed: int = 0
    router: str = ""
    iteration: int = 0
    sample_ids_T: Tensor | None = None
    positions_T: Tensor | None = None
    valid_T: Tensor | None = None            # bool; None: every token is valid
    token_ids_T: Tensor | None = None
    seq_offsets: Tensor | None = None
    carry: Tensor | None = None
    on_counts: Callable[[str, Tensor], None] | None = None    # told by every layer its router's name and counts [E], before tokens travel
    decisions: list["Decision"] | None = None    # where every router adds its own, if somebody wants to see them


class Decision(NamedTuple):
    """What a router saw and chose, for records (train/loggers/router_dump.py)."""

    router: str
    logits_TE: Tensor
    ids_TK: Tensor


class Routing(NamedTuple):
    """A decision: used slots first, unused slots have id -1 and weight 0."""

    ids_TK: Tensor                           # int64 global expert ids
    weights_TK: Tensor                       # float32 (float64 in float64 runs), with gradient
    max_rows: int                            # static bound on used slots
    stats: RoutingStats
    carry: Tensor | None = None
    residual_T: Tensor | None = None         # weight of identity experts


class Stack(NamedTuple):
    """Routers that follow each other and have equally many experts."""

    routers: tuple[str, ...]
    stats: RoutingStats                      # every field with R in front: counts [R, E], tokens [R]


def stacks(stats: Mapping[str, RoutingStats]) -> list[Stack]:
    """Of all routers, in their order: one stack where all have the same number of experts."""
    found = []
    for _, alike in groupby(stats.items(), key=lambda item: len(item[1].counts_E)):
        routers, parts = zip(*alike)
        found.append(Stack(routers, RoutingStats(*map(_stacked, zip(*parts)))))
    return found


def _stacked(values: tuple[Tensor | None, ...]) -> Tensor | None:
    missing = [value is None for value in values]
    assert all(missing) or not any(missing), "some routers have sums of sequences and others have not"
    return None if missing[0] else torch.stack(values)


def by_stack(flat_L: Tensor, routers: Mapping[str, int]) -> list[Tensor]:
    """Views [R, E] of a flat buffer of all routers, as `stacks` puts them together. routers: experts by name."""
    alike = [(experts, len(list(group))) for experts, group in groupby(routers.values())]
    parts = flat_L.split([experts * many for experts, many in alike])
    return [part.view(many, experts) for part, (experts, many) in zip(parts, alike)]


class Router(nn.Module):
    """Base of all routers. Subclasses define `route`."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        raise TypeError(f"{type(self).__name__} does not define route")

    @property
    def wants_leans(self) -> bool:
        """Whether `end_of_step` wants `leans_E`."""
        return False

    def end_of_step(self, counts_E: Tensor, leans_E: Tensor | None = None) -> None:
        """Called once after every optimizer step of training, without gradient, on every rank alike: for controllers.

        counts_E: int64, slots per expert of the whole step, over ranks and accumulation, before any drop.
        leans_E: float64, of routers that want it: sign(mean(n) - n_i) of the counts n of every micro-batch of every rank, the
        mean over these. What changes here is kept in persistent buffers, which are saved.
        """

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] in the router's own dtype, float32 or better, whatever the model computes in."""
        return nn.functional.linear(x_TD.to(self.weight.dtype), self.weight)

    def max_slots(self) -> int:
        """K: static bound on the experts of a token."""
        return self.top_k

    def routing(self, ids_TK: Tensor, weights_TK: Tensor, probs_TE: Tensor, logits_TE: Tensor,
                context: RouterContext) -> Routing:
        """The record of a decision: `ids_TK` have passed `decide`, `weights_TK` were gathered at them."""
        if context.decisions is not None:
            context.decisions.append(Decision(context.router, logits_TE.detach(), ids_TK))
        stats = router_sums(probs_TE, logits_TE, ids_TK, context.valid_T, context.seq_offsets)
        return Routing(ids_TK, weights_TK, ids_TK.numel(), stats)


def lean(counts_E: Tensor) -> Tensor:
    """sign(mean(n) - n_i), int64 [..., E]; in integers, so that a load that is exactly the mean is 0."""
    return (counts_E.sum(-1, keepdim=True) - counts_E.shape[-1] * counts_E).sign()


def drop_padding(ids_TK: Tensor, context: RouterContext) -> Tensor:
    """No used slot for padding."""
    return ids_TK if context.valid_T is None else ids_TK.where(context.valid_T[:, None], -1)


