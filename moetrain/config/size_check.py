"""Refuse a config that the machine cannot hold, before anything starts and with the size that it would take.

The need of a rank (config/sizes.py) is compared with SLACK times the memory that it has, and what the config
does not tell counts as zero. So nothing that might fit is refused; what just misses fails in the allocator.
"""

from dataclasses import replace
from typing import NamedTuple

from moetrain.config.checks import check
from moetrain.config.schema import Config
from moetrain.config.sizes import RankMemory, ids_of, rank_memory
from moetrain.config.values import flatten, schema_keys
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.machine import gpu_memory, total_memory
from moetrain.units import size

SLACK = 2
# Keys that multiply, in the order in which a smaller value is advised: first those that change the model
# least.
_SIZES = (
    "train.micro_batch", "eval.windows", "data.num_domains", "train.global_batch", "train.seq_len",
    "data.vocab_size", "model.vocab_size", "model.num_layers", "model.num_experts", "model.dim",
    "model.expert_dim", "model.dense_dim", "model.num_shared_experts", "model.num_heads", "model.head_dim",
    "model.top_k")
_VOCABULARY = ("data.vocab_size", "model.vocab_size")
_NAMES = {"state": "weights, gradients and moments", "activations": "activations of a micro-batch",
          "logits": "its logits", "tokens": "tokens of a step"}


class Available(NamedTuple):
    """Bytes that one rank has: its share of the machine's memory, and of a GPU where it computes on one."""

    host: int
    gpu: int | None = None


def too_large(config: Config, ranks: int, available: Available,
              vocab_size: int | None = None) -> ConfigError | None:
    """Compare the need of a rank with its memory.

    Args:
        config: the run's config.
        ranks: ranks of the run.
        available: bytes that one rank has.
        vocab_size: tokens of the vocabulary; None takes what the config tells.

    Returns:
        The error of a config that no rank can hold, or None.
    """
    vocabulary = vocabulary_of(config) if vocab_size is None else vocab_size
    need = rank_memory(config, vocabulary, ranks)
    if _fits(need, available, SLACK):
        return None
    there = f"a machine with {size(available.host)} of memory for it"
    if available.gpu:
        there = f"a GPU of {size(available.gpu)}"
    items = sorted(need._asdict().items(), key=lambda item: -item[1])
    values = flatten(config)
    return ConfigError(
        181, f"a rank would take about {size(need.total)}, on {there}",
        where=", ".join(f"{key}={values[key]}" for key in _involved(config)) or "model, train",
        why=", ".join(f"{_NAMES[name]} take {size(amount)}" for name, amount in items
                      if amount >= need.total / 1000),
        next=_advice(config, ranks, available, vocabulary))


def too_full(config: Config, ranks: int, total: int, free: int) -> ConfigError | None:
    """Compare the need of a rank with the free memory of a GPU that could hold it.

    Args:
        config: the run's config.
        ranks: ranks of the run.
        total: bytes of the GPU, this rank's share.
        free: bytes of those that are free.

    Returns:
        The error of a GPU with too little free memory, or None.
    """
    need = rank_memory(config, vocabulary_of(config), ranks)
    if need.total - need.tokens <= SLACK * free:
        return None
    return ConfigError(
        111, f"a rank would take about {size(need.total - need.tokens)}, and its GPU has {size(free)} free",
        where="run.device",
        why=f"other programs hold {size(total - free)} of its {size(total)}",
        next="end them (nvidia-smi names them), or CUDA_VISIBLE_DEVICES=<number of another GPU> before the "
             "same command")


def refuse_too_large(config: Config, ranks: int, local_ranks: int) -> None:
    """Raise what `too_large` finds on this machine, which runs `local_ranks` of the ranks."""
    gpu = None if config.run.device == "cpu" else gpu_memory()
    if error := too_large(config, ranks, Available(total_memory() // local_ranks, gpu)):
        raise ConfigErrors([error])


def vocabulary_of(config: Config) -> int:
    """Return the vocabulary of the model as far as the config tells, else 0."""
    return max(ids_of(config), config.model.vocab_size or 0)


def _fits(need: RankMemory, available: Available, slack: int = 1) -> bool:
    if available.gpu is None:
        return need.total <= slack * available.host
    return need.total - need.tokens <= slack * available.gpu and need.tokens <= slack * available.host


def _involved(config: Config) -> dict[str, int]:
    """List the sizes that are above their default, with that default."""
    values, keys = flatten(config), schema_keys()
    defaults = {key: 1 if key == "train.micro_batch" else keys[key].default for key in _SIZES}
    return {key: default or 1 for key, default in defaults.items()
            if isinstance(values[key], int) and values[key] > (default or 1)}


def _advice(config: Config, ranks: int, available: Available, vocabulary: int) -> str:
    """Advise a smaller value that fits and breaks no rule, a default times a power of two; or more ranks."""
    involved = _involved(config)
    if config.train.per_forward(ranks) > 1:
        involved = {"train.micro_batch": 1, **involved}

    def works(key: str, value: int) -> bool:
        changed = _with(config, key, value)
        need = rank_memory(changed, vocabulary_of(changed) if key in _VOCABULARY else vocabulary, ranks)
        return _fits(need, available) and not check(changed, ranks)

    for key, value in involved.items():
        if works(key, value):
            while works(key, 2 * value):
                value *= 2
            return f"{key}={value}"
    sharded = _with(_with(config, "parallel.mode", "ep_fsdp"), "parallel.ep", None)
    sharded = _with(sharded, "train.micro_batch", 1)
    for more in (2**n for n in range(ranks.bit_length(), 20)):
        if _fits(rank_memory(sharded, vocabulary, more), available):
            return ("smaller sizes together, or parallel=ep_fsdp train.micro_batch=1 on "
                    f"{more} ranks that have as much memory")
    return "smaller sizes together"


def _with(config: Config, key: str, value: object) -> Config:
    section, _, name = key.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
