"""Training objective: language loss and weighted auxiliary losses, as sums over the global batch.

    total = language / M + lambda / D * sum over k of ahead_k / M
            + sum over losses of weight * mean over routers of loss

(A loss may ask for the sum over routers instead of the mean.) `ahead_k` is the language loss of the k-th of D
modules of multi-token prediction (model/multi_token_prediction.py). All are divided by M, as equation 24 of
DeepSeek-V3 (arXiv 2412.19437) divides all by the length T of the sequence, of which module k scores the first
T - k positions. The language loss is cross-entropy
(losses/language.py) and M the scored tokens of the *global batch*. Auxiliary losses are sums over tokens,
divided by N, the valid tokens of the global batch, of which prompts are not scored. Both are known before the
first forward pass (`Denominators`). A micro-batch contributes its share, and gradients are summed over
micro-batches and ranks, so loss and gradient do not depend on how the batch is split. The pooled counts are
an argument: nothing here communicates.

Shapes: R routers of a stack.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.losses.base import AuxLoss, Pooled, PoolRule
from moetrain.losses.language import CrossEntropy, LanguageLoss
from moetrain.ops.router_sums import TokenSum, TokenValue
from moetrain.routers.stack import Stack


class Denominators(NamedTuple):
    """Sums over the global batch by which the terms of the loss are divided; int64 scalars."""

    tokens: Tensor                           # valid tokens, as often as they are routed: of auxiliary losses
    terms: Tensor                            # what the language loss counts: scored tokens


class LossShare(NamedTuple):
    """Contribution of a micro-batch to the loss of the step."""

    total: Tensor                            # scalar: language loss and all terms
    terms: dict[str, Tensor]                 # of auxiliary losses by name, weights included, without graph


class Objective:
    """The loss of a run, and its backward pass.

    Args:
        losses: auxiliary losses by name, including `balance`.
        num_routers: routers of the whole model, over which means are taken; a process may hold only some of
            them.
        language: the language loss.
        mtp_layers: modules of multi-token prediction, D.
        mtp_weight: weight of the mean of their losses, lambda.
        attached: inject the gradients of auxiliary losses in backward (losses/attached.py) instead of adding
            the losses to the total before it.
    """

    def __init__(self, losses: Mapping[str, AuxLoss], num_routers: int, *,
                 language: LanguageLoss | None = None, mtp_layers: int = 0, mtp_weight: float = 0.0,
                 attached: bool = False) -> None:
        self.mtp_layers, self.mtp_weight = mtp_layers, mtp_weight
        self.losses, self.num_routers, self.attached = dict(losses), num_routers, attached
        self.language = language or CrossEntropy()

    @property
    def pool(self) -> PoolRule | None:
        """Rule by which counts are pooled, one for all losses; None if no loss pools counts.

        config/rules/losses.py refuses losses with different rules.
        """
        rules = {loss.pool for loss in self.losses.values()} - {None}
        assert len(rules) <= 1, rules
        return next(iter(rules), None)

    @property
    def token_sums(self) -> dict[str, TokenSum]:
        """Further sums that the losses need, by name."""
        found: dict[str, TokenSum] = {}
        for name in self.weights:
            for sum_name, form in self.losses[name].token_sums.items():
                assert found.setdefault(sum_name, form) is form, f"two losses form {sum_name} differently"
        return found

    @property
    def token_values(self) -> dict[str, TokenValue]:
        """Numbers of each token that the losses need, by name."""
        return {name: form for loss in self.weights for name, form in self.losses[loss].token_values.items()}

    @property
    def pooled_sums(self) -> tuple[str, ...]:
        """Names of the sums that are pooled before backward, by the rule `pool`."""
        return tuple(sorted({name for loss in self.weights for name in self.losses[loss].pooled_sums}))

    @property
    def per_sequence(self) -> bool:
        """Whether a loss needs sums of each sequence."""
        return any(getattr(loss, "per_sequence", False) for loss in self.losses.values())

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses that are trained on. A loss of weight 0 is never evaluated."""
        return {name: loss.weight for name, loss in self.losses.items() if loss.weight and self.num_routers}

    @property
    def term_weights(self) -> dict[str, float]:
        """Weights of all terms beside the language loss, by name."""
        return {**self.weights, **({"mtp": self.mtp_weight} if self.mtp_layers else {})}

    def backward(self, language: Tensor, stacks: Sequence[Stack], pooled: Callable[[], Sequence[Pooled]],
                 terms: Tensor, ahead: Tensor | None = None) -> LossShare:
        """Run backward from a micro-batch's contribution to the loss.

        Args:
            language: scalar, sum of the language loss over the micro-batch, with graph.
            stacks: statistics of its routers.
            pooled: returns the pooled counts of every stack, and waits for them. It is called when the loss
                is formed, or, if gradients are injected, after the backward pass of the head.
            terms: int64 scalar M, terms of the language loss in the global batch.
            ahead: scalar, the same as `language` of all modules of multi-token prediction, with graph.

        Returns:
            The contribution, without graph.
        """
        if self.attached:
            with record_function("backward"):
                # The identity node calls `pooled`.
                self.share(language, (), (), terms, ahead).total.backward()
            with torch.no_grad():
                return self.share(language, stacks, pooled(), terms, ahead)
        share = self.share(language, stacks, pooled(), terms, ahead)
        with record_function("backward"):
            share.total.backward()
        return share._replace(total=share.total.detach())

    @record_function("loss")
    def share(self, language: Tensor, stacks: Sequence[Stack], pooled: Sequence[Pooled],
              terms: Tensor, ahead: Tensor | None = None) -> LossShare:
        """Compute a micro-batch's contribution to the loss.

        Args:
            language: scalar, sum of the language loss over the micro-batch.
            stacks: statistics of its routers.
            pooled: pooled counts of every stack.
            terms: int64 scalar M, terms of the language loss in the global batch.
            ahead: scalar, sum of the losses of all modules of multi-token prediction.

        Returns:
            The contribution, with graph.
        """
        total, of_losses = language / terms.clamp(min=1), dict[str, Tensor]()
        if ahead is not None:
            term = self.mtp_weight / self.mtp_layers * (ahead / terms.clamp(min=1))
            total, of_losses["mtp"] = total + term, term.detach()
        for name in self.weights if stacks else ():
            loss = self.losses[name]
            values_R = torch.cat([_value(loss, stack, of_stack) for stack, of_stack in zip(stacks, pooled)])
            term = self._router_weight(loss) * values_R.sum()
            total, of_losses[name] = total + term, term.detach()
        return LossShare(total, of_losses)

    @torch.no_grad()
    def slopes(self, stacks: Sequence[Stack], pooled: Sequence[Pooled]) -> list[dict[str, Tensor]]:
        """Compute the gradient of a micro-batch's contribution with respect to the sums of its routers.

        Args:
            stacks: statistics of its routers.
            pooled: pooled counts of every stack.

        Returns:
            For each stack, gradients by field of RoutingStats, in the shape of the field.
        """
        found: list[dict[str, Tensor]] = [{} for _ in stacks]
        for loss in self.losses.values():
            for sums, stack, of_stack in zip(found, stacks, pooled) if loss.weight else ():
                for field, slope in loss.slopes(stack.stats, of_stack).items():
                    shape = stack.stats.named()[field].shape
                    assert slope.shape in ((), shape), (
                        f"{type(loss).__name__}.slopes: {field} has shape {list(slope.shape)}, "
                        f"not {list(shape)}")
                    slope = (self._router_weight(loss) * slope).expand(shape)
                    sums[field] = sums[field] + slope if field in sums else slope
        return found

    def _router_weight(self, loss: AuxLoss) -> float:
        """Factor of one router's value in the total."""
        return loss.weight / (self.num_routers if loss.reduction == "mean" else 1)


def _value(loss: AuxLoss, stack: Stack, pooled: Pooled) -> Tensor:
    """Value of a loss for each router of a stack, [R]."""
    value_R = loss.value(stack.stats, pooled)
    assert value_R.shape == (len(stack.routers),), (
        f"{type(loss).__name__}.value has shape {list(value_R.shape)}, of {len(stack.routers)} routers")
    return value_R


def build_objective(config: Config, num_routers: int, language: LanguageLoss | None = None) -> Objective:
    """Build the objective of a config.

    Args:
        config: the config of the run.
        num_routers: routers of the model.
        language: a user's language loss; None is cross-entropy.
    """
    losses = {"balance": build(config.balance, "balance"),
              **{name: build(node, "loss") for name, node in config.loss.items()}}
    for name, loss in losses.items():
        check_loss(name, loss)
        if config.model.mtp_layers and loss.weight and loss.token_values:
            raise ConfigError(
                306, f"model.mtp_layers={config.model.mtp_layers} with the loss {name}",
                where=f"loss.{name}, model.mtp_layers",
                why="it asks of every routed token whether the next one was predicted, and modules of "
                    "multi-token prediction route for a token further ahead",
                next=f"model.mtp_layers=0, or a run without the loss {name}")
    return Objective(losses, num_routers, language=language, mtp_layers=config.model.mtp_layers,
                     mtp_weight=config.model.mtp_weight, attached=config.train.aux_loss == "injected")


def check_loss(name: str, loss: AuxLoss) -> None:
    """Raise ConfigError for a loss that would fail in the first step, or be wrong without a word."""
    source = f"{type(loss).__module__}.{type(loss).__qualname__}"
    if missing := [member for member in ("weight", "reduction") if not hasattr(loss, member)]:
        raise ConfigError(
            239, f"the loss {name} has no {missing[0]}", where=source,
            why="the objective is the sum of weight * the mean or sum over routers of every loss",
            next='self.weight, a number, and self.reduction, "mean" or "sum", in the constructor')
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ConfigError(
            241, f"the loss {name} owns parameters", where=source,
            why="losses are no part of the model: nobody would sum their gradients, train or save them",
            next="numbers as arguments of the constructor; what is trained belongs to a router")
    if not loss.weight or not loss.pooled_sums:
        return
    if loss.pool is None:
        raise ConfigError(
            240, f"the loss {name} asks for pooled sums, and does not say over what they are pooled",
            where=source,
            why="sums of a micro-batch alone would make its gradient depend on the split of the batch",
            next='pool = PoolRule("global", "exact")')
    if loss.pool.mode == "warm":
        raise ConfigError(
            237, f"the sums that the loss {name} pools cannot be estimated", where=source,
            why="in mode warm the previous step stands for micro-batches to come, and only counts are kept",
            next="another mode of its pool, and the same balance.mode")


def check_language_loss(config: Config, language: LanguageLoss | None, ranks: int) -> None:
    """Raise ConfigError if a user's language loss is none, or a run splits its work as it cannot be split.

    Args:
        config: the config of the run.
        language: the loss; None is cross-entropy, which no split hinders.
        ranks: ranks with different tokens.
    """
    if language is None:
        return
    if not isinstance(language, LanguageLoss):
        raise ConfigError(
            235, f"language_loss is {language!r}, no LanguageLoss", where="language_loss",
            why="it is called by the methods of moetrain.losses.language.LanguageLoss",
            next="an object of a subclass, as language_loss=MyLoss()")
    name, sequences = type(language).__name__, config.train.per_forward(ranks)
    if config.model.mtp_layers and not language.ahead:
        raise ConfigError(
            305, f"model.mtp_layers={config.model.mtp_layers} with the language loss {name}",
            where="model.mtp_layers, language_loss",
            why="modules of multi-token prediction are scored by the language loss on the tokens further "
                "ahead, and this one does not say that it may be",
            next="model.mtp_layers=0; or ahead = True in the class, if it reads no more of a batch than the "
                 "targets, of which -1 is none")
    if config.train.head_chunk and not language.by_rows:
        raise ConfigError(
            233, f"train.head_chunk={config.train.head_chunk} with the language loss {name}",
            where="train.head_chunk",
            why="it needs the logits of a whole micro-batch, or does not say that it computes rows by rows",
            next="train.head_chunk=0; or compute it with head.per_row and set by_rows = True in the class")
    if sequences % language.together:
        raise ConfigError(
            234, f"{sequences} sequences of a micro-batch, which the language loss {name} takes by "
                 f"{language.together}",
            where="train.micro_batch", why="sequences that are scored together must be in one micro-batch",
            next=f"a train.micro_batch that {language.together} divides")
