"""Training objective: cross-entropy and weighted auxiliary losses, as sums over the global batch.

    total = CE + sum over losses of weight * mean over routers of loss

(A loss may ask for the sum over routers instead of the mean.) Every term is a sum over tokens divided by N,
the valid tokens of the *global batch*, which is known before the first forward pass. A micro-batch
contributes its share, and gradients are summed over micro-batches and ranks, so loss and gradient do not
depend on how the batch is split. The pooled counts are an argument: nothing here communicates.

Shapes: B sequences, S positions, V vocabulary, R routers of a stack.
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
    """Contribution of a micro-batch to the loss of the step."""

    total: Tensor                            # scalar: cross-entropy and all terms
    terms: dict[str, Tensor]                 # of auxiliary losses by name, weights included, without graph


class Objective:
    """The loss of a run, and its backward pass.

    Args:
        losses: auxiliary losses by name, including `balance`.
        num_routers: routers of the whole model, over which means are taken; a process may hold only some of
            them.
        attached: inject the gradients of auxiliary losses in backward (losses/attached.py) instead of adding
            the losses to the total before it.
    """

    def __init__(self, losses: Mapping[str, AuxLoss], num_routers: int, *, attached: bool = False) -> None:
        self.losses, self.num_routers, self.attached = dict(losses), num_routers, attached

    @property
    def pool(self) -> PoolRule | None:
        """Rule by which counts are pooled, one for all losses; None if no loss pools counts.

        config/rules/losses.py refuses losses with different rules.
        """
        rules = {loss.pool for loss in self.losses.values()} - {None}
        assert len(rules) <= 1, rules
        return next(iter(rules), None)

    @property
    def per_sequence(self) -> bool:
        """Whether a loss needs sums of each sequence."""
        return any(getattr(loss, "per_sequence", False) for loss in self.losses.values())

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses that are trained on. A loss of weight 0 is never evaluated."""
        return {name: loss.weight for name, loss in self.losses.items() if loss.weight and self.num_routers}

    def backward(self, cross_entropy: Tensor, stacks: Sequence[Stack],
                 pooled: Callable[[], Sequence[Pooled]], tokens: Tensor) -> LossShare:
        """Run backward from a micro-batch's contribution to the loss.

        Args:
            cross_entropy: scalar, sum in nats over the micro-batch, with graph.
            stacks: statistics of its routers.
            pooled: returns the pooled counts of every stack, and waits for them. It is called when the loss
                is formed, or, if gradients are injected, after the backward pass of the head.
            tokens: int64 scalar N, valid tokens of the global batch.

        Returns:
            The contribution, without graph.
        """
        if self.attached:
            with record_function("backward"):
                (cross_entropy / tokens.clamp(min=1)).backward()         # the identity node calls `pooled`
            with torch.no_grad():
                return self.share(cross_entropy, stacks, pooled(), tokens)
        share = self.share(cross_entropy, stacks, pooled(), tokens)
        with record_function("backward"):
            share.total.backward()
        return share._replace(total=share.total.detach())

    @record_function("loss")
    def share(self, cross_entropy: Tensor, stacks: Sequence[Stack], pooled: Sequence[Pooled],
              tokens: Tensor) -> LossShare:
        """Compute a micro-batch's contribution to the loss.

        Args:
            cross_entropy: scalar, sum in nats over the micro-batch.
            stacks: statistics of its routers.
            pooled: pooled counts of every stack.
            tokens: int64 scalar N, valid tokens of the global batch.

        Returns:
            The contribution, with graph.
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
                    shape = getattr(stack.stats, field).shape
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


def cross_entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum -log p(target), in nats, over targets that are not -1.

    Args:
        logits_BSV: logits [B, S, V].
        targets_BS: int64 [B, S]; -1 is no target.

    Returns:
        Scalar, float32, or float64 for float64 logits.
    """
    logits = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), ignore_index=-1, reduction="sum")


def build_objective(config: Config, num_routers: int) -> Objective:
    """Build the objective of a config for a model of so many routers."""
    losses = {"balance": build(config.balance, "balance"),
              **{name: build(node, "loss") for name, node in config.loss.items()}}
    return Objective(losses, num_routers, attached=config.train.aux_loss == "injected")
