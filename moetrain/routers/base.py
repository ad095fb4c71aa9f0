"""Interface of routers, and the records that they exchange with layers and losses.

A router maps x and a context to a decision of fixed width and to additive statistics. It never communicates
and never sees an expert. Losses are functions of the statistics (losses/); the training step decides over
what counts are pooled (train/count_pool.py).

    RouterContext   what a router may know beside x
    Routing         the decision; stays inside the layer
    RoutingStats    sums over valid tokens; leave the layer beside its output
    Stack           statistics of several routers as one: a loss costs the same for one layer and for fifty
    Router          base class: one weight [E, D] in float32, `route`, `routing`, `end_of_step`

All records are NamedTuples: FSDP2 finds the tensors that leave a module by flattening its output as a pytree,
and a plain dataclass would lose gradients silently.

Shapes: T tokens, D model width, E experts, K slots, R routers, S sequences.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.ops.router_sums import RouterSums, router_sums

RoutingStats = RouterSums


class RouterContext(NamedTuple):
    """What a router may know beside x. `token_context` (routers/context.py) builds it.

    Randomness (ops/keyed_random.py) is keyed by seed, step, router, draw, sample ids and positions, so that
    it is the same on every mesh.
    """

    training: bool = True
    step: int = 0
    seed: int = 0
    router: str = ""                         # name of the router
    iteration: int = 0
    draw: int = 0                            # number of the draw of a micro-batch that runs several times
    sample_ids_T: Tensor | None = None       # int64: sample of each token
    positions_T: Tensor | None = None        # int64: its position in the sequence
    valid_T: Tensor | None = None            # bool, false for padding; None: every token is valid
    token_ids_T: Tensor | None = None        # int64: its id in the vocabulary
    domains_T: Tensor | None = None          # int64: index in Dataset.domains; None where it is not known
    seq_offsets: Tensor | None = None        # int64 [S + 1]; given if a loss asks for sums of each sequence
    carry: Tensor | None = None              # what the router of the previous layer handed on
    tied: Mapping[str, nn.Module] = {}       # modules that several routers use (TiedModules)
    # Called by each layer with its router's name and counts [E], before its tokens are dispatched.
    on_counts: Callable[[str, Tensor], None] | None = None
    decisions: list["Decision"] | None = None    # each router appends its own; None: not recorded


class Decision(NamedTuple):
    """What a router saw and chose, for the dump of routers (train/loggers/router_dump.py)."""

    router: str
    logits_TE: Tensor
    ids_TK: Tensor


class Routing(NamedTuple):
    """Decision of a router. Used slots come first; an unused slot has id -1 and weight 0."""

    ids_TK: Tensor                           # int64: global expert ids
    weights_TK: Tensor                       # float32 (float64 in float64 runs), with gradient
    max_rows: int                            # static bound on the number of used slots
    stats: RoutingStats
    carry: Tensor | None = None              # for the router of the next layer
    # Output of choices that are no experts (moe/layer.py): residual_T * x + residual_TD.
    residual_T: Tensor | None = None         # with gradient
    residual_TD: Tensor | None = None        # with gradient


class Stack(NamedTuple):
    """Statistics of consecutive routers with the same number of experts."""

    routers: tuple[str, ...]                 # their names
    stats: RoutingStats                      # each field has a leading R: counts [R, E], tokens [R]


def stacks(stats: Mapping[str, RoutingStats]) -> list[Stack]:
    """Stack the statistics of routers, in their order: one stack if all have the same number of experts."""
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
    """Split a flat buffer of all routers into views [R, E], one for each stack of `stacks`.

    Args:
        flat_L: one number for each expert of each router, in their order.
        routers: number of experts by router.
    """
    alike = [(experts, len(list(group))) for experts, group in groupby(routers.values())]
    parts = flat_L.split([experts * many for experts, many in alike])
    return [part.view(many, experts) for part, (experts, many) in zip(parts, alike)]


class Router(nn.Module):
    """Base class of routers. Subclasses define `route`.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
    """

    # C, width of scores and statistics. Ids from E on are choices that are no experts: they are counted, and
    # never dispatched.
    num_choices: int
    # Whether the decision for a token depends on that token and earlier ones of its sequence alone.
    causal = True
    # Fields of RouterContext that it reads, beside `valid_T` and `training`.
    depends_on: frozenset[str] = frozenset()

    def __init__(self, *, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.num_choices = num_experts, top_k, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """Choose experts for the tokens [T, D], with gate weights and statistics."""
        raise TypeError(f"{type(self).__name__} does not define route")

    @property
    def needs_load_error(self) -> bool:
        """Whether `end_of_step` takes `signs_E`."""
        return False

    def end_of_step(self, counts_E: Tensor, signs_E: Tensor | None = None) -> None:
        """Update controllers, such as biases, by the loads of a step.

        Called once after every optimizer step of training, without gradient and alike on every rank. What
        changes here is a persistent buffer, and so is saved.

        Args:
            counts_E: int64, slots per expert of the whole step, over ranks and accumulation, before any drop.
            signs_E: float64, the mean over all micro-batches of all ranks of sign(mean(n) - n_i), n being the
                counts of the micro-batch; None for a router that does not want it.
        """

    def logits(self, x_TD: Tensor) -> Tensor:
        """Compute logits [T, E] in the router's dtype, float32 or better, whatever the model computes in."""
        return nn.functional.linear(x_TD.to(self.weight.dtype), self.weight)

    def max_slots(self) -> int:
        """Return K, the static bound on the experts of a token."""
        return self.top_k

    def routing(self, ids_TK: Tensor, weights_TK: Tensor, probs_TE: Tensor, logits_TE: Tensor,
                context: RouterContext) -> Routing:
        """Make the record of a decision, and its statistics.

        Args:
            ids_TK: int64 [T, K], from `decide` (ops/gating.py).
            weights_TK: gate weights [T, K], gathered at these ids.
            probs_TE: probabilities [T, E] for the statistics.
            logits_TE: logits [T, E].
            context: context of the call.

        Returns:
            The record.
        """
        if context.decisions is not None:
            context.decisions.append(Decision(context.router, logits_TE.detach(), ids_TK))
        stats = router_sums(probs_TE, logits_TE, ids_TK, context.valid_T, context.seq_offsets)
        return Routing(ids_TK, weights_TK, ids_TK.numel(), stats)


class TiedModules(nn.ModuleDict):
    """Modules that several routers use, such as one recurrent cell for all layers.

    The model holds them at its root (`Transformer.tied`) and hands them to routers as `RouterContext.tied`. A
    router that held such a module itself would have FSDP2 shard it with one block, while others need it.
    """


def load_error_sign(counts_E: Tensor) -> Tensor:
    """Sign of mean(n) - n_i, int64 [..., E]. Computed in integers: 0 for a load that is exactly the mean."""
    return (counts_E.sum(-1, keepdim=True) - counts_E.shape[-1] * counts_E).sign()


def drop_padding(ids_TK: Tensor, context: RouterContext) -> Tensor:
    """Set the ids [T, K] of padding tokens to -1: padding chooses nothing."""
    return ids_TK if context.valid_T is None else ids_TK.where(context.valid_T[:, None], -1)
