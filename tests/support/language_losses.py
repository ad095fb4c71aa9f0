"""Language losses that exist in tests only, and training on them; each also as a plain formula of logits.

    distillation    KL divergence from given logits
    consistency     a batch with two draws: cross-entropy of both, and how far they are apart
    preference      pairs of sequences: the sum over the first should beat the sum over the second

Shapes: B sequences, S positions, V vocabulary, C rows of a chunk.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.data.batches.batch import Batch
from moetrain.losses.consistency import ConsistencyLoss
from moetrain.losses.language import Head, LanguageLoss, token_cross_entropy
from moetrain.train.state import Run
from tests.support.told_routers import noisy
from tests.support.training import Trained, make_run, train_run

VOCABULARY = 48


class Distillation(LanguageLoss):
    """KL(teacher || model) at scored positions; the teacher knows the last token alone."""

    by_rows = True

    def score(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        return head.per_row(divergence, states_BSD, teacher()[batch.tokens_BS], batch.scored_BS).sum()


class Preference(LanguageLoss):
    """-log sigmoid of how much more the first of a pair gains over a reference than the second."""

    together, by_rows, beta = 2, True, 0.1

    def count(self, batch: Batch) -> Tensor:
        return _pairs(batch).sum()

    def score(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        return preferred(-head.per_row(token_cross_entropy, states_BSD, batch.targets_BS), batch, self.beta)


class WholeLogits(LanguageLoss):
    """Cross-entropy that needs all logits at once."""

    def score(self, states_BSD: Tensor, head: Head, batch: Batch) -> Tensor:
        return token_cross_entropy(head.logits(states_BSD).flatten(0, 1), batch.targets_BS.flatten()).sum()


LOSSES = {"cross-entropy": None, "distillation": Distillation(), "consistency": ConsistencyLoss(weight=1.0),
          "preference": Preference()}


def divergence(logits_CV: Tensor, teacher_CV: Tensor, scored_C: Tensor) -> Tensor:
    ours_CV, theirs_CV = logits_CV.log_softmax(-1), teacher_CV.to(logits_CV.dtype).log_softmax(-1)
    return (theirs_CV.exp() * (theirs_CV - ours_CV)).sum(-1).where(scored_C, 0)


def apart(first_CV: Tensor, second_CV: Tensor, scored_C: Tensor) -> Tensor:
    return divergence(first_CV, second_CV, scored_C) + divergence(second_CV, first_CV, scored_C)


def preferred(log_probs_BS: Tensor, batch: Batch, beta: float) -> Tensor:
    gained_B = log_probs_BS.sum(1) - 20 * batch.sample_ids_B.to(log_probs_BS.dtype).sin()
    first_P, second_P = gained_B.view(-1, 2).unbind(1)
    return -F.logsigmoid(beta * (first_P - second_P)).where(_pairs(batch), 0).sum()


def _pairs(batch: Batch) -> Tensor:
    return batch.scored_BS.any(1).view(-1, 2).all(1)


@cache
def teacher() -> Tensor:
    """Logits [V, V] of the next token by the last one."""
    return 2 * torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64,
                           generator=torch.Generator().manual_seed(5))


def plain(kind: str, logits: list[Tensor], batch: Batch) -> tuple[Tensor, int]:
    """A loss and its number of terms, from the logits of each pass over a whole batch."""
    scored_BS = batch.scored_BS
    nats = [-one.log_softmax(-1).gather(-1, batch.targets_BS.clamp(min=0)[..., None])[..., 0] * scored_BS
            for one in logits]
    if kind == "cross-entropy":
        return nats[0].sum(), int(scored_BS.sum())
    if kind == "distillation":
        return divergence(logits[0], teacher()[batch.tokens_BS], scored_BS).sum(), int(scored_BS.sum())
    if kind == "consistency":
        both = sum(one.sum() for one in nats)
        return both + 0.5 * apart(*logits, scored_BS).sum(), 2 * int(scored_BS.sum())
    return preferred(-nats[0], batch, 0.1), len(scored_BS) // 2


class Prompted:
    """A dataset whose sequences begin with a prompt, of 1 to 4 tokens, that is not scored."""

    def __init__(self, dataset: object) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> object:
        return getattr(self.dataset, name)

    def batch(self, sample_ids: np.ndarray) -> Batch:
        batch = self.dataset.batch(sample_ids)
        prompt_B1 = 1 + batch.sample_ids_B[:, None] % 4
        positions_S = torch.arange(batch.tokens_BS.shape[1])
        return batch._replace(targets_BS=batch.targets_BS.where(positions_S >= prompt_B1, -1))


def prompted_run(kind: str, overrides: list[str]) -> Run:
    """A run whose sequences have prompts; that of two draws has routers that draw."""
    run = make_run([f"data.vocab_size={VOCABULARY}", *overrides], None,
                   noisy if kind == "consistency" else None, LOSSES[kind])
    run.loader._dataset = Prompted(run.loader._dataset)
    return run


def prompted_steps(kind: str, overrides: list[str], steps: int) -> Trained:
    return train_run(prompted_run(kind, overrides), steps)
