"""Rules about the batch of a training step."""

import math
from collections.abc import Iterator

from moetrain.config.rules.wording import choose, counted_ranks, divisors
from moetrain.config.schema import Config
from moetrain.errors import ConfigError


def batch(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that the global batch splits into equal micro-batches on all ranks."""
    train = config.train
    together = ranks * (train.micro_batch or 1)  # sequences of one forward pass on all ranks
    if train.global_batch % together == 0:
        return
    if train.global_batch % ranks:
        advice = f"train.global_batch={math.ceil(train.global_batch / together) * together}"
    else:
        advice = choose("train.micro_batch", divisors(train.global_batch // ranks))
    micro = f"micro-batches of {train.micro_batch}" if train.micro_batch else "equal parts"
    yield ConfigError(
        35, f"train.global_batch={train.global_batch} cannot be split into {micro} on "
            f"{counted_ranks(ranks)}",
        where="train.micro_batch, train.global_batch, run.nproc",
        why="global_batch = ranks x micro_batch x forward passes, a whole number of them",
        next=advice)
