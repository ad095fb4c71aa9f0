"""Refuse what a machine cannot hold before anything starts, with the size that it would take.

The need of a rank (config/sizes.py) is compared with SLACK times what it has, and what the config does not tell counts as
nothing: nothing that might fit is refused. What only just does not fit, the allocator finds.
"""

from dataclasses import replace
from typing import NamedTuple

from moetrain.config.checks import check
from moetrain.config.schema import Config
from moetrain.config.sizes import RankMemory, rank_memory
from moetrain.config.values import flatten, schema_keys
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.machine import gpu_memory, total_memory
from moetrain.units import size

SLACK = 2
# Keys that multiply, in the order in which a smaller value is offered: first those that change least of what is learned.
_SIZES = ("train.micro_batch", "eval.windows", "data.num_domains", "train.global_batch", "train.seq_len", "data.vocab_size",
          "model.num_layers", "model.num_experts", "model.dim", "model.expert_dim", "model.dense_dim", "model.num_shared_experts",
          "model.num_heads", "model.head_dim", "model.top_k")
_NAMES = {"state": "weights, gradients and moments", "activations": "activations of a micro-batch", "logits": "its logits",
          "tokens": "tokens of a step"}


class Available(NamedTuple):
    """Bytes that one rank has: its part of the machine's memory, and of a GPU where it computes on one."""

    host: int
    gpu: int | None = None


def too_large(config: Config, ranks: int, available: Available, vocab_size: int | None = None) -> ConfigError | None:
    """The error of a config that a rank cannot hold; None where it might. vocab_size: None, what the config tells of it."""
    vocabulary = vocabulary_of(config) if vocab_size is None else vocab_size
    need = rank_memory(config, vocabulary, ranks)
    if _fits(need, available, SLACK):
        return None
    there = f"a GPU of {size(available.gpu)}" if available.gpu else f"a machine with {size(available.host)} of memory for it"
    items = sorted(need._asdict().items(), key=lambda item: -item[1])
    values = flatten(config)
    return ConfigError(
        181, f"a rank would take about {size(need.total)}, on {there}",
        where=", ".join(f"{key}={values[key]}" for key in _involved(config)) or "model, train",
        why=", ".join(f"{_NAMES[name]} take {size(bytes_)}" for name, bytes_ in items if bytes_ >= need.total / 1000),
        next=_advice(config, ranks, available, vocabulary))


def too_full(config: Config, ranks: int, total: int, free: int) -> ConfigError | None:
    """The error of a GPU that could hold the config and has too little free; None where it might do. Both are bytes of this rank's part."""
    need = rank_memory(config, vocabulary_of(config), ranks)
    if need.total - need.tokens <= SLACK * free:
        return None
    return ConfigError(
        111, f"a rank would take about {size(need.total - need.tokens)}, and its GPU has {size(free)} free", where="run.device",
        why=f"other programs hold {size(total - free)} of its {size(total)}",
        next="end them (nvidia-smi names them), or CUDA_VISIBLE_DEVICES=<number of another GPU> before the same command")


def refuse_too_large(config: Config, ranks: int, local_ranks: int) -> None:
    """Raise what `too_large` finds on this machine, which has local_ranks of the ranks."""
    gpu = None if config.run.device == "cpu" else gpu_memory()
    if error := too_large(config, ranks, Available(total_memory() // local_ranks, gpu)):
        raise ConfigErrors([error])


def vocabulary_of(config: Config) -> int:
    """The tokens of the vocabulary as far as the config tells: a tokenizer's file is not opened here."""
    data = config.data
    if data.kind == "synthetic" or (data.kind in ("megatron", "memmap") and data.tokenizer == "none"):
        return data.vocab_size
    return 257 if data.kind == "text" and data.tokenizer == "bytes" else 0


def _fits(need: RankMemory, available: Available, slack: int = 1) -> bool:
    if available.gpu is None:
        return need.total <= slack * available.host
    return need.total - need.tokens <= slack * available.gpu and need.tokens <= slack * available.host


def _involved(config: Config) -> dict[str, int]:
    """Default by key, of the keys that are above it."""
    values, keys = flatten(config), schema_keys()
    defaults = {key: 1 if key == "train.micro_batch" else keys[key].default for key in _SIZES}
    return {key: default or 1 for key, default in defaults.items()
            if isinstance(values[key], int) and values[key] > (default or 1)}


def _advice(config: Config, ranks: int, available: Available, vocabulary: int) -> str:
    """One smaller value that fits and breaks no rule, its key's default times a power of two; else more ranks."""
    involved = _involved(config)
    if config.train.per_forward(ranks) > 1:
        involved = {"train.micro_batch": 1, **involved}

    def works(key: str, value: int) -> bool:
        changed = _with(config, key, value)
        need = rank_memory(changed, value if key == "data.vocab_size" else vocabulary, ranks)
        return _fits(need, available) and not check(changed, ranks)

    for key, value in involved.items():
        if works(key, value):
            while works(key, 2 * value):
                value *= 2
            return f"{key}={value}"
    sharded = _with(_with(_with(config, "parallel.mode", "ep_fsdp"), "parallel.ep", None), "train.micro_batch", 1)
    for more in (2**n for n in range(ranks.bit_length(), 20)):
        if _fits(rank_memory(sharded, vocabulary, more), available):
            return f"smaller sizes together, or parallel=ep_fsdp train.micro_batch=1 on {more} ranks that have as much memory"
    return "smaller sizes together"


def _with(config: Config, key: str, value: object) -> Config:
    section, _, name = key.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
