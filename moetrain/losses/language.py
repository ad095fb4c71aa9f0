"""Language term of the objective: cross-entropy, or a user's loss in its place.

    CrossEntropy     sum of -log p(target) over the scored targets
    LanguageLoss     interface of other losses: distillation, consistency of two draws, preferences
    Head             what a loss sees of the output head

A loss returns the sum over its terms in a micro-batch, and `count` says how many these are. The sum of the
counts over the global batch, known before the first forward pass, divides the loss, so loss and gradients do
not depend on how the batch is split over ranks and micro-batches. Auxiliary losses have a denominator of
their own, the valid tokens: a prompt is routed and balanced, and not scored.

Shapes: B sequences, S positions, R = B*S rows, D model width, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.data.batches.batch import Batch
from moetrain.ops.linear_cross_entropy import linear_cross_entropy


class Head(NamedTuple):
    """Output head of the model, for the hidden states that a loss is given."""

    weight_VD: Tensor
    chunk: int = 0      # train.head_chunk: rows whose logits are in memory at a time; 0 is all
    bias_V: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits [..., V] of hidden states [..., D], in float32 or better."""
        assert not self.chunk, "a loss that is computed in chunks asks for `per_row`"
        return self._logits(states)

    def per_row(self, value: Callable[..., Tensor], states: Tensor | tuple[Tensor, ...],
                *rows: Tensor) -> Tensor:
        """Compute one number for each row, in chunks of rows if the run asks for it.

        A chunk's logits are computed again in backward, so that only those of one chunk are in memory.

        Args:
            value: called with the logits [C, V] of each of `states`, then with the rows [C, ...] of each of
                `rows`; returns [C].
            states: hidden states [B, S, D], one tensor or several of one shape.
            rows: further tensors [B, S, ...].

        Returns:
            [B, S].
        """
        several = (states,) if isinstance(states, Tensor) else states
        flat = [tensor.flatten(0, 1) for tensor in (*several, *rows)]

        def of(*parts: Tensor) -> Tensor:
            logits = [self._logits(x_CD) for x_CD in parts[:len(several)]]
            return value(*logits, *parts[len(several):])

        if not self.chunk:
            return of(*flat).view(several[0].shape[:2])
        parts = zip(*(tensor.split(self.chunk) for tensor in flat))
        values = [checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(values).view(several[0].shape[:2])

    def _logits(self, states: Tensor) -> Tensor:
        bias_V = None if self.bias_V is None else self.bias_V.to(states.dtype)
        logits = F.linear(states, self.weight_VD.to(states.dtype), bias_V)
        return logits if logits.dtype == torch.float64 else logits.float()


class LanguageLoss:
    """Interface of the language term; subclasses override `score`, and `count` if terms are no tokens.

    It has no state that changes: nothing of it is saved. `train(config, language_loss=...)` trains on it.
    """

    draws: int = 1          # times that a micro-batch stands along B in one pass, each with a draw of its own
    together: int = 1       # neighboring sequences that must be in one micro-batch, as the two of a pair
    ahead: bool = False     # whether it scores modules of multi-token prediction, on a batch shifted for them
    by_rows: bool = False   # whether the head is used by `per_row` alone, as `train.head_chunk` needs

    def count(self, batch: Batch) -> Tensor:
        """Number of terms of a micro-batch, int64 scalar: its scored tokens."""
        return batch.scored_BS.sum()

    def score(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        """Sum over the terms of a micro-batch.

        Args:
            states_BSD: [B, S, D], normalized hidden states before the head.
            head: the head.
            batch: the micro-batch, `draws` times, one after the other along B.

        Returns:
            Scalar with graph, float32 or better.
        """
        raise TypeError(f"{type(self).__name__} does not define score")


    @torch.no_grad()
    def predicted(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        """Compare the most probable tokens with the targets, for auxiliary losses. Arguments as of `score`.

        Returns:
            int64 [T]: 1 where the most probable token is the target, 0 where not, -1 where none is scored.
        """
        best_BS = head.per_row(lambda logits_CV: logits_CV.argmax(-1), states_BSD)
        return (best_BS == batch.targets_BS).long().where(batch.scored_BS, -1).flatten()


class CrossEntropy(LanguageLoss):
    """Cross-entropy of the scored targets, in nats."""

    ahead = True
    by_rows = True

    def score(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        if head.chunk:
            return linear_cross_entropy(states_BSD.flatten(0, 1), head.weight_VD, batch.targets_BS.flatten(),
                                        head.chunk, head.bias_V)
        return cross_entropy_sum(head.logits(states_BSD), batch.targets_BS)


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


def token_cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Cross-entropy of each target, in nats; 0 for -1. A value for `Head.per_row`."""
    return F.cross_entropy(logits_CV, targets_C, ignore_index=-1, reduction="none")
