"""Logits of a checkpoint's model, and the largest difference between those of two.

    max |delta logit| = max over all positions and ids of |before - after|

A transform says what to expect of it:

    exact            the same function: differences are those of float32 sums in another order
    approximate      nearly the same, such as rounded to fewer bits
    not preserving   another function, such as with fewer experts; the figure says how different
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import lone_mesh
from moetrain.config.parallel_schema import ParallelConfig
from moetrain.config.trained_keys import without_starts
from moetrain.model.build import ConvertModel, build_model
from moetrain.parallel.state_shards import weights
from moetrain.routers.context import token_context
from moetrain.transform.reader import WeightsReader

Expected = Literal["exact", "approximate", "not preserving"]
# Logits [B, S, V] of tokens, int64 [B, S].
Logits = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4                   # of the largest logit, or of 1 where all are smaller
_SEQUENCES, _LENGTH = 2, 64


class LogitDifference(NamedTuple):
    """How far the logits of two models are apart.

    Attributes:
        tokens: sequences and their length.
        max_abs_delta: the largest difference, over the ids that both vocabularies have.
        max_abs_logit: the largest logit before.
    """

    tokens: tuple[int, int]
    max_abs_delta: float
    max_abs_logit: float

    @property
    def is_exact(self) -> bool:
        """Whether no more differs than the order of sums; false for NaN."""
        return self.max_abs_delta <= TOLERANCE * max(1.0, self.max_abs_logit)


def model_logits(reader: WeightsReader, convert_model: ConvertModel | None = None) -> Logits:
    """Return the function from tokens to logits that a checkpoint's model is, on the CPU.

    The model is built when the function is called and gone when it returns, so that no two are in memory.

    Args:
        reader: the weights.
        convert_model: that of the model, if it has one.
    """
    def logits(tokens_BS: Tensor) -> Tensor:
        config = without_starts(replace(reader.config, parallel=ParallelConfig()))
        config = replace(config, run=replace(
            config.run, device="cpu", dtype="float64" if config.run.dtype == "float64" else "float32"))
        model = build_model(config, reader.vocab_size, lone_mesh(torch.device("cpu")), convert_model).eval()
        context = token_context(tokens_BS, seed=config.run.seed, step=0, training=False,
                                sample_ids_B=torch.arange(len(tokens_BS)))
        with torch.no_grad():
            for shard in weights(model):
                shard.rows.copy_(reader[shard.name])
            logits_BSV = model(tokens_BS, context).logits_BSV
        assert logits_BSV is not None
        return logits_BSV

    return logits


def compare_logits(before: Logits, after: Logits, vocab_size: int, seq_len: int) -> LogitDifference:
    """Run a batch of random tokens, always the same, through both models.

    Args:
        before: logits of the first model.
        after: logits of the second.
        vocab_size: ids that both know.
        seq_len: tokens of a sequence at most.
    """
    size = (_SEQUENCES, min(_LENGTH, seq_len))
    tokens_BS = torch.randint(vocab_size, size, generator=torch.Generator().manual_seed(0))
    first_BSV, second_BSV = (logits(tokens_BS)[..., :vocab_size].double() for logits in (before, after))
    return LogitDifference(size, float((first_BSV - second_BSV).abs().max()), float(first_BSV.abs().max()))
