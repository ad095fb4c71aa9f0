"""Consistency of two passes with random choices of their own (THOR, Zuo et al. 2021, 2110.04260).

    L = CE(p1) + CE(p2) + alpha * 1/2 sum over tokens of (p1 - p2) . (ln p1 - ln p2)

The last term is 1/2 (KL(p1, p2) + KL(p2, p1)): 0 where both passes predict alike. A micro-batch stands twice
along B in one forward pass, and routers draw for each half by itself (`RouterContext.draws`).

The loss is divided by the terms of both passes, so it is half of the paper's per token: `loss/ce` is the mean
of the two cross-entropies plus alpha / 2 times the divergence. The released code trains with alpha = 5.

Shapes: B sequences, S positions, D model width, V vocabulary, C rows of a chunk.
"""

from torch import Tensor

from moetrain.data.batches.batch import Batch
from moetrain.losses.language import Head, LanguageLoss, token_cross_entropy


class ConsistencyLoss(LanguageLoss):
    """Cross-entropy of two passes, and the symmetric KL divergence between them.

    Args:
        weight: alpha.
    """

    BOUNDS = {"weight": "0 or more"}
    draws = 2
    by_rows = True

    def __init__(self, *, weight: float = 5.0) -> None:
        self.weight = weight

    def score(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        """Sum over the scored tokens of both passes."""
        nats = head.per_row(token_cross_entropy, states_BSD, batch.targets_BS).sum()
        scored_BS = batch.scored_BS.chunk(2)[0]
        return nats + self.weight * head.per_row(symmetric_divergence, states_BSD.chunk(2), scored_BS).sum()


def symmetric_divergence(first_CV: Tensor, second_CV: Tensor, scored_C: Tensor) -> Tensor:
    """1/2 (KL(p, q) + KL(q, p)) of each row of logits, in nats; 0 where nothing is scored."""
    first_CV, second_CV = first_CV.log_softmax(-1), second_CV.log_softmax(-1)
    return ((first_CV.exp() - second_CV.exp()) * (first_CV - second_CV)).sum(-1).where(scored_C, 0) / 2
