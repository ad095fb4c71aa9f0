"""Interface of routers, and the records that they exchange with layers and losses.

A router maps x and a context to a decision of fixed width and to additive statistics. It never communicates
and never sees an expert. Losses are functions of the statistics (losses/); the training step decides over
what counts are pooled (train/count_pool.py).

    RouterContext   what a router may know beside x
    Routing         the decision; stays inside the layer
    RoutingStats    sums over valid tokens; leave the layer beside its output
    Router          base class: scores, choice and gate weights make a decision (routers/edits.py changes it)
    LinearRouter    base class of routers with one matrix [C, D] in float32

All records are NamedTuples: FSDP2 finds the tensors that leave a module by flattening its output as a pytree,
and a plain dataclass would lose gradients silently.

Shapes: T tokens, D model width, E experts, C choices, K slots, S sequences. Without choices that
are no experts, C is E.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from moetrain.errors import ConfigError
from moetrain.ops.gating import (
    decide,
    equal_shares,
    gather_weights,
    largest,
    of_experts,
    scatter_weights,
    used_first,
)
from moetrain.ops.router_sums import (
    Decided,
    Noise,
    RouterSums,
    TokenSum,
    TokenValue,
    extra_sums,
    router_sums,
)
from moetrain.ops.start import Start, normal
from moetrain.routers.edits import RoutingEdits
from moetrain.routers.shared import TiedModules

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
    iteration: int = 0                       # how often it has decided in the layer before
    draw: int = 0                            # number of the draw of a micro-batch that runs several times
    draws: int = 1                           # equal parts of T, with draws from `draw` on
    sample_ids_T: Tensor | None = None       # int64: sample of each token
    positions_T: Tensor | None = None        # int64: its position in the sequence
    valid_T: Tensor | None = None            # bool, false for padding; None: every token is valid
    token_ids_T: Tensor | None = None        # int64: its id in the vocabulary
    domains_T: Tensor | None = None          # int64: index in Dataset.domains; None where it is not known
    seq_offsets: Tensor | None = None        # int64 [S + 1]; given if a loss asks for sums of each sequence
    carry: Tensor | None = None              # what the router of the previous layer handed on
    tied: Mapping[str, nn.Module] = {}       # modules that several routers use (TiedModules)
    # Called by each layer with its router's name and counts [E], before its tokens are dispatched.
    on_counts: Callable[[str, RoutingStats], None] | None = None
    # Called by routers with `margin_quantile`, with their name and their margins [T, C] (take_quantiles).
    on_margins: Callable[[str, Tensor], None] | None = None
    # Called by each layer with its router's name and input, its decision, and what capacity left of that.
    on_routing: "Callable[[str, Tensor, Routing, Routing], None] | None" = None
    token_sums: Mapping[str, TokenSum] = {}      # further sums that losses ask for, by name
    token_values: Mapping[str, TokenValue] = {}  # numbers of each token that losses ask for, by name
    decisions: list["Decision"] | None = None    # each router appends its own; None: not recorded
    edits: Mapping[str, RoutingEdits] | None = None    # changes of decisions, by router (routers/edits.py)


class Decision(NamedTuple):
    """What a router saw and chose, for the dump of routers (train/loggers/router_dump.py)."""

    router: str
    logits_TE: Tensor | None                 # None: the router has none
    ids_TK: Tensor


class Routing(NamedTuple):
    """Decision of a router. Used slots come first; an unused slot has id -1 and weight 0."""

    ids_TK: Tensor                           # int64: global expert ids
    weights_TK: Tensor                       # float32 (float64 in float64 runs), with gradient
    # Static bound on the number of used slots. None: T x K, most of them unused; the dispatcher counts them,
    # and a host waits for the number where it would not otherwise.
    max_rows: int | None
    stats: RoutingStats
    carry: Tensor | None = None              # for the router of the next layer
    # Output of choices that are no experts (moe/layer.py): residual_T * x + residual_TD.
    residual_T: Tensor | None = None         # with gradient
    residual_TD: Tensor | None = None        # with gradient
    # What the layer's experts get in place of x; None: x.
    input_TD: Tensor | None = None


class Scores(NamedTuple):
    """What a router decides by. A field is None where the router has nothing of the kind."""

    order_TC: Tensor | None                  # the largest are chosen; their gradient is not used
    gates_TC: Tensor | None = None           # gate weights are gathered from these
    logits_TC: Tensor | None = None          # for the z-loss and the dump of routers
    carry: Tensor | None = None              # for the router of the next layer
    noise: Noise | None = None               # for losses: normal noise, if it was chosen by


class Router(nn.Module):
    """Base class of routers, without parameters.

    A decision takes three steps, each a method:

        scores     what every choice is worth to a token            a subclass defines it
        choose     ids of the chosen ones, best first               the `top_k` largest
        weigh      gate weights of the ids that were decided        the gates at the ids

    Between choice and weights, `decision` fixes the ids, so that recomputation makes no other choice.

    A router may choose from more than the experts: ids E to C-1 are choices that no expert computes. They
    appear in the statistics. The layer gets the slots of experts alone, and adds `residual`.

    Args:
        num_experts: E.
        top_k: K, number of slots of a token.
        num_choices: C, E or more; None is E.
    """

    causal = True        # whether a decision depends on its token and earlier ones of the sequence alone
    depends_on_split = ""    # what of the split of a batch changes decisions, for the banner: "accumulation"
    num_domains: int | None = None           # that the data must have; None: any
    # Tensors of RouterContext that it reads, beside `valid_T`; those that key its random numbers, too.
    depends_on: frozenset[str] = frozenset()
    choice_tensors: frozenset[str] = frozenset()    # parameters and buffers with one row for each choice
    holds_ids = False                        # whether a table or an argument of it names experts by their ids
    # Literals for counts without torch (config/router_sizes.py), of D, E, K and arguments: shapes of the
    # parameters and of those in `tied`, by name, where 0 is none; experts of a token in the mean; its slots.
    SHAPES: Mapping[str, tuple[str | int, ...]] = {}
    SHARED_SHAPES: Mapping[str, tuple[str | int, ...]] = {}
    MEAN_EXPERTS = SLOTS = "K"
    token_sums: Mapping[str, TokenSum] = {}  # further sums over tokens, alike in all routers of a model
    BRINGS_SUMS: list[str] = []              # names that losses ask for (NEEDS_SUMS), a literal
    estimates_gradient = False               # whether that of its gate weights in training is no derivative
    uses_few_slots = False                   # whether most of K slots stay unused, as with K = E (`max_rows`)
    # Arguments of the constructor, and their values, with which a token's gate weights sum to a constant, and
    # so have no gradient with one expert a token; {} for always. Read from source (config/rules/model.py).
    # Whatever it says, a router is tried out (model/constant_gates.py). False: constant weights are meant.
    CONSTANT_WEIGHTS: dict[str, list[str]] | Literal[False] | None = None

    def __init__(self, *, num_experts: int, top_k: int, num_choices: int | None = None) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.num_choices = num_experts if num_choices is None else num_choices
        assert self.num_choices >= num_experts, (num_choices, num_experts)

    def starts(self) -> dict[str, Start]:
        """Rule by which each parameter and buffer starts (ops/start.py)."""
        return {}

    def shared_modules(self) -> dict[str, nn.Module]:
        """Make the modules that this router shares with those of other layers, by name.

        A model keeps one of each name (`Transformer.tied`); `shared` returns it.
        """
        return {}

    def shared(self, name: str, context: RouterContext) -> nn.Module:
        """Return the shared module of this name: the model's, or the router's own if it stands alone."""
        return context.tied[name] if name in context.tied else self.alone[name]

    def stand_alone(self) -> None:
        """Give a router without a model the shared modules as modules of its own, on the current device."""
        self.alone = TiedModules(self.shared_modules())

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """Choose experts for the tokens [T, D], with gate weights and statistics."""
        return self.decision(self.scores(x_TD, context), x_TD, context)

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score every choice for the tokens [T, D]."""
        raise TypeError(f"{type(self).__name__} does not define scores")

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose by the scores [T, C]: int64 [T, K], best first, -1 in unused slots at the end."""
        if order_TC is None:
            raise TypeError(f"{type(self).__name__} has no scores to choose by, and does not define choose")
        return largest(order_TC, self.top_k)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights [T, K] at the decided ids; 0 in unused slots. Equal ones without gates."""
        if scores.gates_TC is None:
            return equal_shares(ids_TK)
        return gather_weights(scores.gates_TC, ids_TK)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Probabilities [T, C] for the statistics, which sum to 1 for each token; None without gates."""
        if scores.gates_TC is None:
            return None
        return scores.gates_TC / scores.gates_TC.sum(-1, keepdim=True)

    def residual(self, x_TD: Tensor, ids_TK: Tensor,
                 weights_TK: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What choices that are no experts add to the output of the layer: r * x + v.

        Args:
            x_TD: tokens [T, D].
            ids_TK: int64 [T, K], decided choices, E to C-1 among them.
            weights_TK: their gate weights.

        Returns:
            r [T] and v [T, D]; None where there is none.
        """
        return None, None

    @property
    def needs_load_error(self) -> bool:
        """Whether `end_of_step` takes `signs_E`."""
        return False

    @property
    def margin_quantile(self) -> tuple[int, int] | None:
        """Share of the margins below those that `take_quantiles` takes, as a fraction; None: it takes none.

        A router with a share hands the margins [T, C] of each decision to `RouterContext.on_margins`, if that
        is given: any number for each token and choice, by which they are ordered, and infinity where there is
        none, as for padding.
        """
        return None

    def take_quantiles(self, margins_C: Tensor) -> None:
        """Update controllers by the margins of a step, before `end_of_step`; only with `margin_quantile`.

        Args:
            margins_C: float32 [C], for each choice the margin with exactly floor(n * share) margins below it,
                of the n finite ones of the global batch, rounded to float32; infinity without any. It has the
                same bits however the batch is split (train/margin_quantiles.py).
        """

    def end_of_step(self, counts_E: Tensor, tokens: int, signs_E: Tensor | None = None) -> None:
        """Update controllers, such as biases, by the loads of a step.

        Called once after every optimizer step of training, without gradient and alike on every rank. What
        changes here is a persistent buffer, and so is saved.

        Args:
            counts_E: int64 [C], slots per choice of the whole step, over ranks and accumulation, before any
                drop.
            tokens: valid tokens of the whole step; of every pass, for a router that decides in several.
            signs_E: float64, the mean over all micro-batches of all ranks of sign(mean(n) - n_i), n being the
                counts of the micro-batch; None for a router that does not want it.
        """

    @classmethod
    def end_of_step_together(cls, routers: Sequence[Self], counts: Sequence[Tensor], tokens: int) -> None:
        """Update what the routers of a model have in common, such as one threshold for all of its layers.

        Called once after every optimizer step of training, after `end_of_step`, for the routers of each
        class, without gradient and alike on every rank. Each router keeps the common value in a persistent
        buffer of its own, so that it is saved, and is there on every stage of a pipeline.

        Args:
            routers: the routers of this class in run order, one for each pass.
            counts: int64 [C] of each of them, slots per choice of the whole step, before any drop.
            tokens: valid tokens of the whole step, of one pass.
        """

    def resumed(self, step: int, before: int) -> str | None:
        """Warn where another run.steps than `before` changes decisions from a step on; else None."""
        return None

    def max_slots(self) -> int:
        """Return K, the static bound on the experts of a token."""
        return self.top_k

    def decision(self, scores: Scores, x_TD: Tensor, context: RouterContext) -> Routing:
        """Choose by the scores, weigh the choice, and make its record; with the edits of the context.

        Args:
            scores: from `scores`.
            x_TD: tokens [T, D].
            context: context of the call.

        Returns:
            The record of the decision.
        """
        self._refuse_other_widths(scores, len(x_TD), context)
        edits, order_TC = edits_of(context), scores.order_TC
        if edits.scores is not None:
            if order_TC is None:
                raise ValueError(f"{context.router}: {type(self).__name__} has no scores to edit")
            order_TC = edits.scores.apply(order_TC.detach())
            scores = scores._replace(order_TC=order_TC)
        ids_TK = self.choose(order_TC, context)
        if edits.ids is not None:
            ids_TK = used_first(edits.ids.apply(ids_TK))
        ids_TK = decide(drop_padding(ids_TK, context))
        weights_TK = self.weigh(scores, ids_TK, context)
        if scores.gates_TC is None:
            weights_TK = weights_TK.to(torch.promote_types(x_TD.dtype, torch.float32))
        if edits.weights is not None:
            weights_TK = edits.weights.apply(weights_TK, ids_TK).where(ids_TK >= 0, 0)
        residual_T, residual_TD = ((None, None) if self.num_choices == self.num_experts
                                   else self.residual(x_TD, ids_TK, weights_TK))
        routing = self.routing(ids_TK, weights_TK, self.probabilities(scores), scores.logits_TC,
                               context._replace(edits=None), scores.noise)
        return routing._replace(residual_T=residual_T, residual_TD=residual_TD, carry=scores.carry)

    def _refuse_other_widths(self, scores: Scores, tokens: int, context: RouterContext) -> None:
        """Raise ConfigError for scores of another shape than [T, C]."""
        given = {"order_TC": scores.order_TC, "gates_TC": scores.gates_TC, "logits_TC": scores.logits_TC}
        for field, values in given.items():
            if values is not None and values.shape != (tokens, self.num_choices):
                cls = type(self)
                raise ConfigError(
                    246, f"{context.router}: {field.removesuffix('_TC')} of {cls.__name__} have shape "
                         f"{list(values.shape)}", where=f"scores of {cls.__module__}.{cls.__qualname__}",
                    why=f"{tokens} tokens choose from num_choices={self.num_choices} choices",
                    next=f"return [{tokens}, {self.num_choices}], or give Router.__init__ the number of "
                         "choices as num_choices")

    def routing(self, ids_TK: Tensor, weights_TK: Tensor, probs_TC: Tensor | None,
                logits_TC: Tensor | None, context: RouterContext, noise: Noise | None = None) -> Routing:
        """Make the record of a decision, and its statistics.

        Args:
            ids_TK: int64 [T, K], from `decide` (ops/gating.py).
            weights_TK: gate weights [T, K], gathered at these ids.
            probs_TC: probabilities [T, C] for the statistics; None: a token's choices share 1 equally.
            logits_TC: logits [T, C]; None: the sum of their squared logsumexp is 0.
            context: context of the call.
            noise: normal noise by which was chosen, for sums of losses; None: there was none.

        Returns:
            The record, with slots of experts alone.
        """
        if edits_of(context) != RoutingEdits():
            raise ValueError(f"{context.router}: {type(self).__name__} defines route, so its decisions "
                             "cannot be edited; define scores, choose and weigh")
        if context.decisions is not None:
            logits = None if logits_TC is None else logits_TC.detach()
            context.decisions.append(Decision(context.router, logits, ids_TK))
        if probs_TC is None:
            probs_TC = scatter_weights(equal_shares(ids_TK).to(weights_TK.dtype), ids_TK, self.num_choices)
        stats = router_sums(probs_TC, logits_TC, ids_TK, context.valid_T, context.seq_offsets)
        forms = {**self.token_sums, **context.token_sums}
        decided = Decided(probs_TC, logits_TC, ids_TK, weights_TK, noise)
        if forms:
            stats = stats._replace(extra=extra_sums(forms, decided, context.valid_T))
        if context.token_values:
            stats = stats._replace(values=extra_sums(context.token_values, decided, context.valid_T))
        if self.num_choices > self.num_experts:
            ids_TK, weights_TK = of_experts(ids_TK, weights_TK, self.num_experts)
        return Routing(ids_TK, weights_TK, None if self.uses_few_slots else ids_TK.numel(), stats)


class LinearRouter(Router):
    """Base class of routers whose logits are a linear map of the token.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        num_choices: C, E or more; None is E.
    """

    SHAPES = {"weight": ("E", "D")}
    choice_tensors = frozenset({"weight"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, num_choices: int | None = None) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k, num_choices=num_choices)
        self.weight = nn.Parameter(torch.empty(self.num_choices, dim))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "weight": normal()}

    def logits(self, x_TD: Tensor) -> Tensor:
        """Compute logits [T, C] in the router's dtype, float32 or better, whatever the model computes in."""
        return nn.functional.linear(x_TD.to(self.weight.dtype), self.weight)


def edits_of(context: RouterContext) -> RoutingEdits:
    """The edits of this router's decisions."""
    return (context.edits or {}).get(context.router, RoutingEdits())


def drop_padding(ids_TK: Tensor, context: RouterContext) -> Tensor:
    """Set the ids [T, K] of padding tokens to -1: padding chooses nothing."""
    return ids_TK if context.valid_T is None else ids_TK.where(context.valid_T[:, None], -1)
