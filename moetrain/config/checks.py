"""Rules between keys: one small pure function each, all in RULES.

A rule yields a ConfigError for every contradiction it finds. `where` names the keys involved, separated by ", ", the
one to change first; config/compose.py turns them into the override or the yaml file they came from.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING

from moetrain.config.build import NoSuchPart, arguments
from moetrain.config.schema import Config
from moetrain.config.values import flatten, show
from moetrain.errors import ConfigError


def world_size(config: Config) -> int:
    """Ranks of the run: what torchrun (or our launcher) says, else run.nproc."""
    world = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return int(world) if world.isdigit() and int(world) > 0 else config.run.nproc


def check(config: Config, ranks: int) -> list[ConfigError]:
    """Every contradiction of a config. When a value is out of its range, only that is said."""
    return list(ranges(config, ranks)) or [error for rule in RULES[1:] for error in rule(config, ranks)]


def ranges(config: Config, ranks: int) -> Iterator[ConfigError]:
    values = flatten(config)
    for text, (valid, example, keys) in _RANGES.items():
        for key in keys:
            entries = values[key] if isinstance(values[key], list) else [values[key]]
            if any(entry is not None and not (math.isfinite(entry) and valid(entry)) for entry in entries):
                yield ConfigError(20, f"{key}={show(values[key])} is out of range", where=key,
                                  why=f"it must be {text}", next=f"{key}={example}")


def run_name(config: Config, ranks: int) -> Iterator[ConfigError]:
    name = config.run.name
    if not name.strip() or "/" in name or "\\" in name or name.startswith("."):
        yield ConfigError(21, f"run.name={name!r} cannot name a directory", where="run.name",
                          why="the run's directory is runs/<name>, so a name has no slash and no leading dot",
                          next="run.name=demo, or run.dir=<path> for another place")


def stop(config: Config, ranks: int) -> Iterator[ConfigError]:
    run = config.run
    if run.stop_at is not None and run.stop_at > run.steps:
        yield ConfigError(22, f"run.stop_at={run.stop_at} is behind run.steps={run.steps}",
                          where="run.stop_at, run.steps", why="a run ends after run.steps",
                          next=f"run.stop_at={run.steps} or run.steps={run.stop_at}")


def heads(config: Config, ranks: int) -> Iterator[ConfigError]:
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield ConfigError(23, f"model.num_kv_heads={model.num_kv_heads} does not divide "
                              f"model.num_heads={model.num_heads}",
                          where="model.num_kv_heads, model.num_heads",
                          why="every key-value head serves the same number of heads",
                          next=_choose("model.num_kv_heads", _divisors(model.num_heads)))
    if model.head_dim is None and model.dim % model.num_heads:
        yield ConfigError(24, f"model.num_heads={model.num_heads} does not divide model.dim={model.dim}",
                          where="model.num_heads, model.dim",
                          why="model.head_dim is null, so a head is dim / num_heads wide",
                          next=f"{_choose('model.num_heads', _divisors(model.dim))}; or set model.head_dim")
        return
    head_dim = model.head_dim or model.dim // model.num_heads
    if head_dim % 2:
        yield ConfigError(25, f"a head is {head_dim} wide, an odd number",
                          where="model.head_dim" if model.head_dim else "model.dim, model.num_heads",
                          why="the rotary embedding turns pairs of numbers", next=f"model.head_dim={head_dim + 1}")


def layers(config: Config, ranks: int) -> Iterator[ConfigError]:
    model = config.model
    if model.first_dense_layers > model.num_layers:
        yield ConfigError(26, f"model.first_dense_layers={model.first_dense_layers} is more than "
                              f"model.num_layers={model.num_layers}",
                          where="model.first_dense_layers, model.num_layers",
                          why="the dense layers are the first of all layers",
                          next=f"model.first_dense_layers={model.num_layers} or less")
    for name in ("num_experts", "top_k"):
        entries = getattr(model, name)
        if isinstance(entries, list) and len(entries) != model.num_layers:
            repaired = (entries + entries[-1:] * model.num_layers)[:model.num_layers]
            yield ConfigError(27, f"model.{name} has {len(entries)} entries for {model.num_layers} layers",
                              where=f"model.{name}, model.num_layers",
                              why="a list has one entry per layer (those of leading dense layers are ignored)",
                              next=f"model.{name}={show(repaired)}" if entries else f"model.{name}=<number>")


def experts(config: Config, ranks: int) -> Iterator[ConfigError]:
    for layer, num_experts, top_k in moe_layers(config):
        if num_experts < 1 or top_k < 1:
            yield ConfigError(28, f"layer {layer} has num_experts={num_experts} and top_k={top_k}",
                              where="model.num_experts, model.top_k",
                              why="a layer with experts needs at least one of each",
                              next="model.first_dense_layers=<n> for leading layers without experts")
        elif top_k > num_experts:
            yield ConfigError(29, f"model.top_k={top_k} is more than model.num_experts={num_experts} (layer {layer})",
                              where="model.top_k, model.num_experts", why="a token takes each expert at most once",
                              next=f"model.top_k={num_experts} or model.num_experts={top_k}")
        else:
            continue
        return   # one layer shows it


def router_gradient(config: Config, ranks: int) -> Iterator[ConfigError]:
    weights = config.router.get("weights")
    try:
        weights = weights or arguments(str(config.router.get("_target_", "")))["weights"].default
    except (NoSuchPart, KeyError):
        return
    if weights not in (MISSING, "raw") and any(top_k == 1 for _, _, top_k in moe_layers(config)):
        yield ConfigError(30, f"model.top_k=1 with router.weights={weights} cannot train the router",
                          where="model.top_k, router.weights",
                          why="the renormalised weight of one expert is always 1: the task gives the router no gradient",
                          next="router.weights=raw")


def groups(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Groups of experts are equal, and those that a token may use hold enough experts, in every layer."""
    chosen = config.router.get("num_groups", 1), config.router.get("topk_groups", 1)
    sizes = [(num_experts, top_k) for _, num_experts, top_k in moe_layers(config) if 1 <= top_k <= num_experts]

    def works(number: int, used: int) -> bool:
        return 1 <= used <= number and all(n % number == 0 and used * (n // number) >= k for n, k in sizes)

    if sizes and not works(*chosen):
        most = max(n for n, _ in sizes)
        pairs = [(number, used) for number in _divisors(most) for used in range(1, number + 1) if works(number, used)]
        number, used = min(pairs, key=lambda pair: (pair[0] != chosen[0], pair[1] != chosen[1], pair))
        yield ConfigError(63, "router.num_groups={} with router.topk_groups={} does not fit the experts".format(*chosen),
                          where="router.num_groups, router.topk_groups, model.num_experts, model.top_k",
                          why="num_groups divides model.num_experts; topk_groups groups hold model.top_k experts or more",
                          next=f"router.num_groups={number} router.topk_groups={used}")


def mode(config: Config, ranks: int) -> Iterator[ConfigError]:
    parallel = config.parallel
    if parallel.mode == "single" and ranks != 1:
        yield ConfigError(31, f"parallel=single with {ranks} ranks", where="parallel.mode, run.nproc",
                          why="single is one process without a process group", next="parallel=ep or parallel=ddp")
    if parallel.mode not in ("ep", "ep_fsdp", "fssdp") and parallel.ep not in (None, 1):
        yield ConfigError(32, f"parallel.ep={parallel.ep} with parallel.mode={parallel.mode}",
                          where="parallel.ep, parallel.mode", why="only modes ep, ep_fsdp and fssdp split experts over ranks",
                          next=f"parallel=ep parallel.ep={parallel.ep}")
    if parallel.mode not in ("fsdp", "ep_fsdp", "fssdp") and parallel.shard not in (None, 1):
        yield ConfigError(60, f"parallel.shard={parallel.shard} with parallel.mode={parallel.mode}",
                          where="parallel.shard, parallel.mode", why="only modes fsdp, ep_fsdp and fssdp shard parameters",
                          next=f"parallel=fsdp parallel.shard={parallel.shard}")


def sharded(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Sharding groups are whole: they divide the ranks, and fit the groups of expert parallelism."""
    parallel = config.parallel
    if parallel.mode not in ("fsdp", "ep_fsdp", "fssdp") or parallel.shard is None:
        return
    ep = (parallel.ep or ranks) if parallel.mode == "ep_fsdp" else 1         # fssdp does not shard experts
    valid = [n for n in _divisors(ranks) if n % ep == 0 or ep % n == 0]
    if parallel.shard not in valid and ranks % ep == 0:
        rule = f"it divides the {_ranks(ranks)}" + (f", and one of it and parallel.ep={ep} divides the other" if ep > 1 else "")
        yield ConfigError(61, f"parallel.shard={parallel.shard} does not fit {_ranks(ranks)}",
                          where="parallel.shard, run.nproc, parallel.ep", why=rule, next=_choose("parallel.shard", valid))


def expert_parallel(config: Config, ranks: int) -> Iterator[ConfigError]:
    """ep divides the ranks, and the experts of every layer unless their homes may be uneven."""
    if config.parallel.mode not in ("ep", "ep_fsdp", "fssdp"):
        return
    ep, uneven = config.parallel.ep or ranks, config.parallel.mode == "fssdp"
    written = f"parallel.ep={ep}" if config.parallel.ep else f"parallel.ep=null ({ep} ranks)"
    counts = {num_experts for _, num_experts, _ in moe_layers(config)}
    fits_experts = _divisors(math.gcd(*counts)) if counts and not uneven else _divisors(ranks)
    valid = [n for n in fits_experts if ranks % n == 0]
    if ranks % ep:
        yield ConfigError(33, f"{written} does not divide the {_ranks(ranks)}", where="parallel.ep, run.nproc",
                          why="every group of ep ranks holds each expert once",
                          next=f"{_choose('parallel.ep', valid)}; or run.nproc={ep}")
    for num_experts in sorted(count for count in counts if count % ep and not uneven):
        yield ConfigError(34, f"{written} does not divide model.num_experts={num_experts}",
                          where="parallel.ep, model.num_experts, run.nproc",
                          why="each rank must hold the same number of experts",
                          next=_choose("parallel.ep", valid) if ranks % ep == 0
                          else f"{_choose('parallel.ep', fits_experts)}, with run.nproc a multiple of it")


def schedule(config: Config, ranks: int) -> Iterator[ConfigError]:
    kind, chunks = config.schedule.kind, config.schedule.chunks
    if (kind == "none") != (chunks == 1):
        yield ConfigError(85, f"schedule.chunks={chunks} with schedule.kind={kind}", where="schedule.chunks, schedule.kind",
                          why="without a schedule a micro-batch is one chunk, and a schedule of one chunk hides nothing",
                          next="schedule=none schedule.chunks=1" if chunks == 1 else f"schedule=fixed schedule.chunks={chunks}")


def sliced(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Homes are cut up where they are looked at; and an optimizer that needs whole matrices has no use for pieces."""
    parallel = config.parallel
    if parallel.mode != "fssdp" or not parallel.sliced:
        return
    if not parallel.rehome_interval:
        yield ConfigError(80, f"parallel.sliced={parallel.sliced} with parallel.rehome_interval=0",
                          where="parallel.sliced, parallel.rehome_interval",
                          why="which experts are cut up is decided when homes are looked at, which is never",
                          next="parallel.rehome_interval=100, or parallel.sliced=0")
    if config.optim.name == "muon":
        yield ConfigError(81, f"parallel.sliced={parallel.sliced} with optim=muon", where="parallel.sliced, optim.name",
                          why="Muon iterates whole matrices, and no rank has those of a sliced expert",
                          next="parallel.sliced=0, or optim=adamw")
    if parallel.calibrate:
        yield ConfigError(82, f"parallel.sliced={parallel.sliced} with parallel.calibrate=true", where="parallel.sliced, parallel.calibrate",
                          why="copies that come after the gate come from whole homes",
                          next="parallel.sliced=0, or parallel.calibrate=false")


def copies(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Copies of experts have room, and somebody who plans them."""
    parallel, planner = config.parallel, str(config.planner.get("_target_", "")).split(".")[-2:][0]
    if parallel.mode != "fssdp":
        for name in ("rematerialize", "calibrate"):
            if getattr(parallel, name):
                yield ConfigError(72, f"parallel.{name}=true with parallel.mode={parallel.mode}",
                                  where=f"parallel.{name}, parallel.mode", why="only mode fssdp copies experts",
                                  next=f"parallel=fssdp parallel.{name}=true, or parallel.{name}=false")
        return
    most = max((num_experts for _, num_experts, _ in moe_layers(config)), default=parallel.room)
    if parallel.room > most:
        yield ConfigError(70, f"parallel.room={parallel.room} is more than model.num_experts={most}",
                          where="parallel.room, model.num_experts", why="a rank copies an expert of a layer once at most",
                          next=f"parallel.room={most} or less")
    if parallel.room == 0 and planner != "ep":
        yield ConfigError(71, f"parallel.room=0 leaves no room for the copies of planner={planner}",
                          where="parallel.room, planner", why="room counts whole experts of a layer on a rank",
                          next="parallel.room=1, or planner=ep to copy none")
    if parallel.calibrate and planner == "ep":
        yield ConfigError(73, "parallel.calibrate=true with planner=ep", where="parallel.calibrate, planner",
                          why="what is added after the gate is what the planner wants then, and this one wants no copies",
                          next="planner=balanced, or parallel.calibrate=false")


def batch(config: Config, ranks: int) -> Iterator[ConfigError]:
    train = config.train
    together = ranks * (train.micro_batch or 1)          # sequences of one forward pass of all ranks, or a part of them
    if train.global_batch % together == 0:
        return
    if train.global_batch % ranks:
        advice = f"train.global_batch={math.ceil(train.global_batch / together) * together}"
    else:
        advice = _choose("train.micro_batch", _divisors(train.global_batch // ranks))
    micro = f"micro-batches of {train.micro_batch}" if train.micro_batch else "equal parts"
    yield ConfigError(35, f"train.global_batch={train.global_batch} cannot be split into {micro} on {_ranks(ranks)}",
                      where="train.micro_batch, train.global_batch, run.nproc",
                      why="global_batch = ranks x micro_batch x forward passes, a whole number of them",
                      next=advice)


def data_path(config: Config, ranks: int) -> Iterator[ConfigError]:
    place = {"tokens": "<folder written by moetrain data prepare>",
             "megatron": "<prefix of a .bin and .idx, or a folder of them>"}.get(config.data.kind)
    if place and not config.data.path:
        yield ConfigError(36, f"data={config.data.kind} without data.path", where="data.path, data.kind",
                          why="only text and generated tokens are built in", next=f"data.path={place}, or data=text")


def engine(config: Config, ranks: int) -> Iterator[ConfigError]:
    """ZeRO shards over ranks that hold the whole dense part, in float32."""
    if config.engine.name != "deepspeed":
        return
    mode = config.parallel.mode
    if mode not in ("ddp", "ep") or ranks == 1:
        yield ConfigError(67, f"engine=deepspeed with parallel={mode} on {_ranks(ranks)}",
                          where="engine.name, parallel.mode, run.nproc",
                          why="ZeRO cuts up what several ranks hold alike: the dense part under ddp and ep",
                          next="parallel=ep run.nproc=2, or engine=torch")
    wrong = ["run.dtype=float64"] * (config.run.dtype == "float64") + ["optim=muon"] * (config.optim.name == "muon")
    if wrong:
        yield ConfigError(68, f"engine=deepspeed with {' and '.join(wrong)}", where="engine.name, run.dtype, optim.name",
                          why="ZeRO steps the dense part by AdamW, in float32",
                          next="run.dtype=float32 optim=adamw, or engine=torch")


def betas(config: Config, ranks: int) -> Iterator[ConfigError]:
    if len(config.optim.betas) != 2:
        yield ConfigError(37, f"optim.betas has {len(config.optim.betas)} entries", where="optim.betas",
                          why="AdamW has two moments", next="optim.betas=[0.9,0.95]")


def loss_weights(config: Config, ranks: int) -> Iterator[ConfigError]:
    for name, part in {"balance": config.balance, **{f"loss.{name}": part for name, part in config.loss.items()}}.items():
        weight = part.get("weight", 0)
        if not (math.isfinite(weight) and weight >= 0):
            yield ConfigError(38, f"{name}.weight={show(weight)} is out of range", where=f"{name}.weight",
                              why="a negative weight would reward what the loss is against", next=f"{name}.weight=0.01")


def pools(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Counts are pooled by one rule for all losses."""
    parts = {"balance": config.balance, **{f"loss.{name}": part for name, part in config.loss.items()}}
    rules = {name: (part["scope"], part["mode"]) for name, part in parts.items()       # a value that is none has been taken away
             if part.get("scope") in ("global", "node") and part.get("weight") and "mode" in part}
    if len(set(rules.values())) > 1:
        text = ", ".join(f"{name}: {scope}, {mode}" for name, (scope, mode) in rules.items())
        yield ConfigError(75, "the losses want counts pooled in different ways", where=", ".join(rules), why=text,
                          next="one scope and mode for all of them; further ones may have scope=micro or scope=sequence")
    for name, rule in rules.items():
        if rule == ("node", "warm"):
            yield ConfigError(76, f"{name}.mode=warm with {name}.scope=node", where=f"{name}.mode",
                              why="every machine would need a memory of its own step before, and checkpoints hold none",
                              next=f"{name}.mode=buffer, or {name}.scope=global")


def part_numbers(config: Config, ranks: int) -> Iterator[ConfigError]:
    given = flatten(config)
    for text, (valid, example, keys) in _PART_RANGES.items():
        for key in keys:
            if key in given and not (math.isfinite(given[key]) and valid(given[key])):
                yield ConfigError(64, f"{key}={show(given[key])} is out of its range", where=key,
                                  why=f"it must be {text}", next=f"{key}={example}")


RULES: list[Callable[[Config, int], Iterator[ConfigError]]] = [
    ranges, run_name, stop, heads, layers, experts, router_gradient, groups, mode, sharded, expert_parallel, schedule, sliced, copies, batch,
    data_path, betas, loss_weights, pools, part_numbers, engine,
]

# What a number must be: the test, a value that passes, and the keys it holds for. null is always fine.
_RANGES: dict[str, tuple[Callable[[float], bool], str, list[str]]] = {
    "1 or more": (lambda x: x >= 1, "1", [
        "run.nproc", "run.steps", "run.stop_at", "run.timeout_s", "model.dim", "model.num_layers",
        "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.expert_dim", "model.dense_dim",
        "parallel.ep", "parallel.shard", "parallel.window", "schedule.chunks", "train.global_batch", "train.micro_batch", "train.seq_len",
        "data.domain_cap",
        "data.vocab_size", "data.num_domains", "eval.windows", "eval.batch", "log.interval", "generate.tokens",
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
    "in [0, 1)": (lambda x: 0 <= x < 1, "0.95", ["optim.muon_momentum"]),
    "from 1 to 99": (lambda x: 1 <= x <= 99, "5", ["optim.muon_ns_steps"]),
    "-1 or more": (lambda x: x >= -1, "-1", ["eval.ngram"]),
}


# The same for arguments of parts, where the chosen part has them.
_PART_RANGES: dict[str, tuple[Callable[[float], bool], str, list[str]]] = {
    "above 0": (lambda x: x > 0, "1.0", ["router.scale", "capacity.factor", "capacity.eval_factor", "planner.horizon",
                                           "planner.state_ratio", "planner.capacity", "planner.threshold"]),
    "1 or more": (lambda x: x >= 1, "1", ["planner.groups", "planner.min_rows"]),
    "in [0, 1]": (lambda x: 0 <= x <= 1, "0.3", ["balance.drift"]),
    "0 or more": (lambda x: x >= 0, "0", ["router.update_rate", "capacity.min_capacity", "planner.tolerance", "planner.min_gain"]),
}


def moe_layers(config: Config) -> list[tuple[int, int, int]]:
    """(layer, num_experts, top_k) of every layer with experts; lists that are too short end early."""
    model = config.model
    spread = [entries if isinstance(entries, list) else [entries] * model.num_layers
              for entries in (model.num_experts, model.top_k)]
    return [(layer, *sizes) for layer, sizes in enumerate(zip(*spread)) if layer >= model.first_dense_layers]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n > 0 else [1]


def _choose(key: str, values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:16])
    return f"{key}={values[0]}" if len(values) == 1 else f"choose {key} from {shown}"


def _ranks(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks} ranks"
