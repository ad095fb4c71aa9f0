"""The loss of an optimizer step, defined once.

    total = CE + sum over losses of weight * mean over routers of loss

Every term is a sum over tokens divided by N, the valid tokens of the *global batch*, known at data time. A
micro-batch contributes its share, gradients are summed over micro-batches and ranks, and so loss and gradient
do not depend on how the batch is split. The pooled counts are an argument: nothing here communicates.

Shapes: B sequences, S positions, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.losses.base import AuxLoss, Pooled, PoolRule
from moetrain.routers.base import Stack


class LossShare(NamedTuple):
    """A micro-batch's share of the loss of the step."""

    total: Tensor                            # cross-entropy and all terms
    terms: dict[str, Tensor]                 # of the auxiliary losses by name, weights included, without graph


class Objective:
    """losses: auxiliary losses by name, `balance` among them. num_routers: of the whole model, over which a
    mean is taken, also where a process has only some of its layers. attached: gradients of the losses come by
    losses/attached.py.
    """

    def __init__(self, losses: Mapping[str, AuxLoss], num_routers: int, *, attached: bool = False) -> None:
        self.losses, self.num_routers, self.attached = dict(losses), num_routers, attached

    @property
    def pool(self) -> PoolRule | None:
        """What the counts are pooled over:

        one rule for all losses (config/rules/losses.py); None where none asks.
        """
        rules = {loss.pool for loss in self.losses.values()} - {None}
        assert len(rules) <= 1, rules
        return next(iter(rules), None)

    @property
    def per_sequence(self) -> bool:
        """Whether a loss wants sums for every sequence."""
        return any(getattr(loss, "per_sequence", False) for loss in self.losses.values())

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses that are trained on: one of weight 0 is never asked."""
        return {name: loss.weight for name, loss in self.losses.items() if loss.weight and self.num_routers}

    def backward(self, cross_entropy: Tensor, stacks: Sequence[Stack], pooled: Callable[[], Sequence[Pooled]], tokens: Tensor) -> LossShare:
        """Runs backward from this micro-batch's share of the loss; what it comes to, without graph.

        pooled: asked when the loss is formed, or, where gradients are attached, not before the head's
        backward has passed.
        """
        if self.attached:
            with record_function("backward"):
                (cross_entropy / tokens.clamp(min=1)).backward()         # the identity node asks
            with torch.no_grad():
                return self.share(cross_entropy, stacks, pooled(), tokens)
        share = self.share(cross_entropy, stacks, pooled(), tokens)
        with record_function("backward"):
            share.total.backward()
        return share._replace(total=share.total.detach())

    @record_function("loss")
    def share(self, cross_entropy: Tensor, stacks: Sequence[Stack], pooled: Sequence[Pooled], tokens: Tensor) -> LossShare:
        """This micro-batch's share of the loss.

        cross_entropy: its sum in nats; pooled: of every stack; tokens: N.
        """
        total, terms = cross_entropy / tokens.clamp(min=1), {}
        for name in self.weights if stacks else ():
            loss = self.losses[name]
            values_R = torch.cat([_value(loss, stack, of_stack) for stack, of_stack in zip(stacks, pooled)])
            term = self._router_weight(loss) * values_R.sum()
            total, terms[name] = total + term, term.detach()
        return LossShare(total, terms)

    @torch.no_grad()
    def slopes(self, stacks: Sequence[Stack], pooled: Sequence[Pooled]) -> list[dict[str, Tensor]]:
        """Gradient of this micro-batch's share with respect to the sums of every stack, by field."""
        found: list[dict[str, Tensor]] = [{} for _ in stacks]
        for loss in self.losses.values():
            for sums, stack, of_stack in zip(found, stacks, pooled) if loss.weight else ():
                for field, slope in loss.slopes(stack.stats, of_stack).items():
                    shape = getattr(stack.stats, field).shape
                    assert slope.shape in ((), shape), f"{type(loss).__name__}.slopes: {field} has shape {list(slope.shape)}, not {list(shape)}"
                    slope = (self._router_weight(loss) * slope).expand(shape)
                    sums[field] = sums[field] + slope if field in sums else slope
        return found

    def _router_weight(self, loss: AuxLoss) -> float:
        """What one router's value counts for."""
        return loss.weight / (self.num_routers if loss.reduction == "mean" else 1)


def _value(loss: AuxLoss, stack: Stack, pooled: Pooled) -> Tensor:
    value_R = loss.value(stack.stats, pooled)
    assert value_R.shape == (len(stack.routers),), f"{type(loss).__name__}.value has shape {list(value_R.shape)}, of {len(stack.routers)} routers"
    return value_R


def cross_entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over targets that are not -1; float32, or float64 in float64 runs."""
    logits = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), ignore_index=-1, reduction="sum")


def build_objective(config: Config, num_routers: int) -> Objective:
    """The objective of a config. num_routers: of the whole model."""
    losses = {"balance": build(config.balance, "balance"), **{name: build(node, "loss") for name, node in config.loss.items()}}
    return Objective(losses, num_routers, attached=config.train.aux_loss == "injected")
