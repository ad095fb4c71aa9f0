"""Rules about how work is split: modes, mesh, chunks of a micro-batch, copies of experts, engine."""

import math
from collections.abc import Iterator

from moetrain.config.rules.model import moe_layers
from moetrain.config.rules.wording import choose, counted_ranks, divisors
from moetrain.config.schema import Config
from moetrain.errors import ConfigError


def mode(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse parallel=single with several ranks."""
    parallel = config.parallel
    if parallel.mode == "single" and ranks != 1:
        yield ConfigError(
            31, f"parallel=single with {ranks} ranks", where="parallel.mode, run.nproc",
            why="single is one process without a process group",
            next="parallel=ep or parallel=ddp")


def sharded(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that sharding groups divide the ranks and are nested with the groups of expert parallelism."""
    parallel = config.parallel
    if parallel.mode not in ("fsdp", "ep_fsdp", "fssdp") or parallel.shard is None:
        return
    ep = (parallel.ep or ranks) if parallel.mode == "ep_fsdp" else 1  # fssdp does not shard experts
    valid = [n for n in divisors(ranks) if n % ep == 0 or ep % n == 0]
    if parallel.shard not in valid and ranks % ep == 0:
        nested = f", and one of it and parallel.ep={ep} divides the other" if ep > 1 else ""
        yield ConfigError(
            61, f"parallel.shard={parallel.shard} does not fit {counted_ranks(ranks)}",
            where="parallel.shard, run.nproc, parallel.ep",
            why=f"it divides the {counted_ranks(ranks)}{nested}",
            next=choose("parallel.shard", valid))


def expert_parallel(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that ep divides the ranks, and the experts of every layer unless homes may be uneven (fssdp)."""
    if config.parallel.mode not in ("ep", "ep_fsdp", "fssdp"):
        return
    ep, uneven = config.parallel.ep or ranks, config.parallel.mode == "fssdp"
    written = f"parallel.ep={ep}" if config.parallel.ep else f"parallel.ep=null ({ep} ranks)"
    counts = {num_experts for _, num_experts, _ in moe_layers(config)}
    fits_experts = divisors(math.gcd(*counts)) if counts and not uneven else divisors(ranks)
    valid = [n for n in fits_experts if ranks % n == 0]
    if ranks % ep:
        yield ConfigError(
            33, f"{written} does not divide the {counted_ranks(ranks)}", where="parallel.ep, run.nproc",
            why="every group of ep ranks holds each expert once",
            next=f"{choose('parallel.ep', valid)}; or run.nproc={ep}")
    for num_experts in sorted(count for count in counts if count % ep and not uneven):
        yield ConfigError(34, f"{written} does not divide model.num_experts={num_experts}",
                          where="parallel.ep, model.num_experts, run.nproc",
                          why="each rank must hold the same number of experts",
                          next=choose("parallel.ep", valid) if ranks % ep == 0
                          else f"{choose('parallel.ep', fits_experts)}, with run.nproc a multiple of it")


def schedule(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that chunks fit the kind of schedule."""
    kind, chunks = config.schedule.kind, config.schedule.chunks
    if (kind == "none") != (chunks == 1):
        yield ConfigError(
            85, f"schedule.chunks={chunks} with schedule.kind={kind}",
            where="schedule.chunks, schedule.kind",
            why="without a schedule a micro-batch is one chunk, and a schedule of one chunk hides nothing",
            next=f"schedule={'none' if chunks == 1 else 'fixed'} schedule.chunks={chunks}")


def chunks(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that a micro-batch has a token for every chunk."""
    chunks = config.schedule.chunks
    tokens = config.train.per_forward(max(ranks, 1)) * config.train.seq_len
    if chunks > tokens > 0:
        yield ConfigError(
            83, f"schedule.chunks={chunks} of a micro-batch of {tokens} tokens",
            where="schedule.chunks, train.seq_len",
            why="a chunk has at least one token",
            next=f"schedule.chunks={min(2, tokens)}")


def sliced(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse sliced experts without rehoming, with Muon, which needs whole matrices, and with calibration."""
    parallel = config.parallel
    if parallel.mode != "fssdp" or not parallel.max_sliced_experts:
        return
    written = f"parallel.max_sliced_experts={parallel.max_sliced_experts}"
    if not parallel.rehome_interval:
        yield ConfigError(
            80, f"{written} with parallel.rehome_interval=0",
            where="parallel.max_sliced_experts, parallel.rehome_interval",
            why="which experts are sliced is decided when homes are reviewed, which is never",
            next="parallel.rehome_interval=100, or parallel.max_sliced_experts=0")
    if config.optim.name == "muon":
        yield ConfigError(
            81, f"{written} with optim=muon", where="parallel.max_sliced_experts, optim.name",
            why="Muon iterates whole matrices, and no rank has those of a sliced expert",
            next="parallel.max_sliced_experts=0, or optim=adamw")
    if parallel.calibrate:
        yield ConfigError(
            82, f"{written} with parallel.calibrate=true",
            where="parallel.max_sliced_experts, parallel.calibrate",
            why="copies that are added after the gate come from whole homes",
            next="parallel.max_sliced_experts=0, or parallel.calibrate=false")


def copies(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that ranks have places for copies of experts, and a planner that wants copies."""
    parallel, planner = config.parallel, str(config.planner.get("_target_", "")).split(".")[-2:][0]
    if parallel.mode != "fssdp":
        return
    most = max((num_experts for _, num_experts, _ in moe_layers(config)), default=parallel.max_copies)
    if parallel.max_copies > most:
        yield ConfigError(
            70, f"parallel.max_copies={parallel.max_copies} is more than model.num_experts={most}",
            where="parallel.max_copies, model.num_experts",
            why="a rank copies an expert of a layer once at most",
            next=f"parallel.max_copies={most} or less")
    if parallel.max_copies == 0 and planner != "ep":
        yield ConfigError(
            71, f"parallel.max_copies=0 leaves no place for the copies of planner={planner}",
            where="parallel.max_copies, planner",
            why="it counts whole experts of a layer on a rank",
            next="parallel.max_copies=1, or planner=ep to copy none")
    if parallel.calibrate and planner == "ep":
        yield ConfigError(
            73, "parallel.calibrate=true with planner=ep", where="parallel.calibrate, planner",
            why="copies are added after the gate where the planner wants them, and this one wants none",
            next="planner=balanced, or parallel.calibrate=false")


def engine(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Require what DeepSpeed's ZeRO needs: several ranks with the whole dense part, float32 and AdamW."""
    if config.engine.name != "deepspeed":
        return
    mode = config.parallel.mode
    if mode not in ("ddp", "ep") or ranks == 1:
        yield ConfigError(67, f"engine=deepspeed with parallel={mode} on {counted_ranks(ranks)}",
                          where="engine.name, parallel.mode, run.nproc",
                          why="ZeRO shards what several ranks hold alike: the dense part under ddp and ep",
                          next="parallel=ep run.nproc=2, or engine=torch")
    wrong = ["run.dtype=float64"] * (config.run.dtype == "float64")
    wrong += ["optim=muon"] * (config.optim.name == "muon")
    if wrong:
        yield ConfigError(
            68, f"engine=deepspeed with {' and '.join(wrong)}", where="engine.name, run.dtype, optim.name",
            why="ZeRO steps the dense part by AdamW, in float32",
            next="run.dtype=float32 optim=adamw, or engine=torch")
