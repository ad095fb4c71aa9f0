"""What a number must be, by key."""

import math
from collections.abc import Callable, Iterator

from moetrain.config.schema import Config
from moetrain.config.values import flatten, show
from moetrain.errors import ConfigError


def ranges(config: Config, ranks: int) -> Iterator[ConfigError]:
    values = flatten(config)
    for text, (valid, example, keys) in RANGES.items():
        for key in keys:
            entries = values[key] if isinstance(values[key], list) else [values[key]]
            if any(entry is not None and not (math.isfinite(entry) and valid(entry)) for entry in entries):
                yield ConfigError(20, f"{key}={show(values[key])} is out of range", where=key,
                                  why=f"it must be {text}", next=f"{key}={example}")


def part_numbers(config: Config, ranks: int) -> Iterator[ConfigError]:
    given = flatten(config)
    for text, (valid, example, keys) in PART_RANGES.items():
        for key in keys:
            if key in given and not (math.isfinite(given[key]) and valid(given[key])):
                yield ConfigError(64, f"{key}={show(given[key])} is out of its range", where=key,
                                  why=f"it must be {text}", next=f"{key}={example}")


# What a number must be: the test, a value that passes, and the keys it holds for. null is always fine.
RANGES: dict[str, tuple[Callable[[float], bool], str, list[str]]] = {
    "1 or more": (lambda x: x >= 1, "1", [
        "run.nproc", "run.steps", "run.stop_at", "run.timeout_s", "model.dim", "model.num_layers",
        "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.expert_dim", "model.dense_dim",
        "parallel.ep", "parallel.shard", "parallel.window", "schedule.chunks", "train.global_batch", "train.micro_batch", "train.seq_len",
        "data.domain_cap",
        "data.vocab_size", "data.num_domains", "eval.windows", "eval.batch", "log.interval", "log.timeline_start", "generate.tokens",
        "checkpoint.max_failed_saves"]),
    "2 or more": (lambda x: x >= 2, "2", ["checkpoint.keep"]),
    "0 or more": (lambda x: x >= 0, "0", [
        "parallel.room", "parallel.rehome_interval", "parallel.sliced", "hardware.latency_s", "run.seed", "run.max_restarts", "run.grace_s",
        "model.num_experts", "model.top_k", "model.num_shared_experts", "model.first_dense_layers",
        "train.clip", "train.head_chunk", "optim.weight_decay", "optim.router_lr_scale", "optim.expert_lr_scale", "optim.warmup",
        "eval.interval", "checkpoint.interval", "log.heatmap_every", "log.timeline", "generate.temperature", "generate.seed"]),
    "above 0": (lambda x: x > 0, "1e-3", [
        "hardware.flops", "hardware.inside", "hardware.between",
        "optim.lr", "optim.muon_lr", "optim.eps", "model.init_std", "model.norm_eps", "model.rope_theta"]),
    "from 0 to 1000": (lambda x: 0 <= x <= 1000, "150", ["parallel.fallback"]),
    "in (0, 1]": (lambda x: 0 < x <= 1, "1.0", ["generate.top_p", "data.min_length"]),
    "in [0, 1]": (lambda x: 0 <= x <= 1, "0.1", ["optim.min_lr_ratio", "optim.decay"]),
    "in [0, 1), both": (lambda x: 0 <= x < 1, "[0.9,0.95]", ["optim.betas"]),
    "from 0.0001 to 0.9": (lambda x: 0.0001 <= x <= 0.9, "0.05", ["data.held_out_share"]),
    "from 0 to 100,000,000": (lambda x: 0 <= x <= 1e8, "1000000", ["data.overlap"]),
    "in [0, 1)": (lambda x: 0 <= x < 1, "0.95", ["optim.muon_momentum"]),
    "from 1 to 99": (lambda x: 1 <= x <= 99, "5", ["optim.muon_ns_steps"]),
    "-1 or more": (lambda x: x >= -1, "-1", ["eval.ngram"]),
}

# The same for arguments of parts, where the chosen part has them.
PART_RANGES: dict[str, tuple[Callable[[float], bool], str, list[str]]] = {
    "above 0": (lambda x: x > 0, "1.0", ["router.scale", "capacity.factor", "capacity.eval_factor", "planner.horizon",
                                           "planner.state_ratio", "planner.capacity", "planner.threshold"]),
    "1 or more": (lambda x: x >= 1, "1", ["planner.groups", "planner.min_rows"]),
    "in [0, 1]": (lambda x: 0 <= x <= 1, "0.3", ["balance.drift"]),
    "0 or more": (lambda x: x >= 0, "0", ["router.update_rate", "capacity.min_capacity", "planner.tolerance", "planner.min_gain"]),
}
