"""Ranges of numbers: those of the schema stand here, those of a part in the BOUNDS of its class."""

from collections.abc import Iterator

from moetrain.config.bounds import parse
from moetrain.config.build import NoSuchPart, arguments
from moetrain.config.rules.model import moe_layers
from moetrain.config.rules.wording import choose, divisors
from moetrain.config.schema import Config
from moetrain.config.values import Key, flatten, schema_keys, show, type_name
from moetrain.errors import ConfigError


def ranges(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that every number is within its bounds; null and text always pass."""
    values, keys = flatten(config), schema_keys()
    for text, paths in RANGES.items():
        for path in paths:
            yield from _outside(20, keys[path], text, values[path])
    for path, key in part_keys(config).items():
        if key.bounds and path in values:
            yield from _outside(64, key._replace(path=path), key.bounds, values[path])


def divisions(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check arguments of parts that have to divide a size of the model, in every layer with experts."""
    values = flatten(config)
    for path, key in part_keys(config).items():
        size = parse(key.bounds).divides if key.bounds else ""
        number = values.get(path, 1)
        for layer, num_experts, top_k in moe_layers(config) if size else ():
            whole = {"num_experts": num_experts, "top_k": top_k}[size]
            if whole % number:
                yield ConfigError(
                    104, f"{path}={number} does not divide model.{size}={whole} (layer {layer})",
                    where=f"{path}, model.{size}",
                    why="it divides their number in every layer with experts",
                    next=choose(path, divisors(whole)))
                break


def part_keys(config: Config) -> dict[str, Key]:
    """List the arguments of the chosen parts by path."""
    sections = ("router", "expert", "capacity", "language_loss", "balance", "planner")
    parts = {section: (section, getattr(config, section)) for section in sections}
    parts |= {f"loss.{name}": ("loss", part) for name, part in config.loss.items()}
    found: dict[str, Key] = {}
    for path, (family, part) in parts.items():
        try:
            accepted = arguments(str(part.get("_target_", "")), family)
        except NoSuchPart:  # reported where the part is checked
            continue
        found |= {f"{path}.{name}": key for name, key in accepted.items()}
    return found


def _outside(number: int, key: Key, text: str, value: object) -> list[ConfigError]:
    """List the error of a value, or of a list with an entry, that is outside the bounds `text`."""
    bounds, entries = parse(text), value if isinstance(value, list) else [value]
    if all(entry is None or isinstance(entry, str) or isinstance(entry, (int, float)) and bounds.hold(entry)
           for entry in entries):
        return []
    whole = type_name(key.type).startswith("int")
    example = key.default if isinstance(value, list) else bounds.example(key.default, whole)
    large = any(isinstance(entry, int) and abs(entry) >= 2**63 for entry in entries)
    return [ConfigError(
        number, f"{key.path}={show(value)} is out of range", where=key.path,
        why=f"it must be {bounds.text}" + ", and fit in 64 bits" * large,
        next=f"{key.path}={show(example)}")]


# Every numeric key of the schema, by the phrase of its bounds (config/bounds.py).
RANGES: dict[str, list[str]] = {
    "1 or more": [
        "run.nproc", "run.steps", "run.stop_at", "run.timeout_s", "model.dim", "model.num_layers",
        "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.expert_dim", "model.shared_dim",
        "model.dense_dim", "model.latent_dim", "model.chain_rounds", "model.vocab_size",
        "model.num_attention_experts", "model.top_k_heads", "model.sliding_window",
        "model.q_lora_rank", "model.kv_lora_rank",
        "model.qk_nope_head_dim", "model.qk_rope_head_dim", "model.v_head_dim",
        "parallel.ep", "parallel.shard", "parallel.window", "schedule.chunks", "train.global_batch",
        "train.micro_batch", "train.seq_len", "data.domain_cap", "data.vocab_size", "data.num_domains",
        "eval.windows", "eval.batch", "log.interval", "log.timeline_start", "generate.tokens",
        "checkpoint.max_failed_saves"],
    "2 or more": ["checkpoint.keep"],
    "0 or more": [
        "parallel.max_copies", "parallel.rehome_interval", "parallel.max_sliced_experts",
        "hardware.latency_s", "run.seed", "data.seed", "run.max_restarts", "run.grace_s",
        "model.num_experts", "model.top_k", "model.moe_layers", "model.sliding_layers",
        "model.num_shared_experts", "model.first_dense_layers", "model.mtp_layers", "train.clip",
        "train.head_chunk", "optim.weight_decay", "optim.router_lr_scale", "optim.expert_lr_scale",
        "optim.warmup",
        "eval.interval", "checkpoint.interval", "checkpoint.every_minutes", "log.heatmap_every",
        "log.timeline", "generate.temperature", "generate.seed"],
    "above 0": [
        "hardware.flops", "hardware.inside", "hardware.between", "optim.lr", "optim.muon_lr", "optim.eps",
        "model.init_std", "model.norm_eps", "model.rope_theta", "model.embedding_multiplier",
        "model.residual_multiplier", "model.logits_scaling", "model.clip_qkv",
        "model.attention_multiplier", "model.mtp_weight"],
    "from 0.0001 to 0.9": ["data.held_out_share"],
    "from 0 to 100000000": ["data.overlap"],
    "from 1 to 99": ["optim.muon_ns_steps"],
    "in (0, 1]": ["model.partial_rotary_factor", "generate.top_p", "data.min_length"],
    "in [0, 1]": ["parallel.max_forecast_error", "optim.min_lr_ratio", "optim.decay", "data.allow_left_out"],
    "in [0, 1)": ["optim.muon_momentum", "optim.betas"],
    "-1 or more": ["eval.ngram"],
}
