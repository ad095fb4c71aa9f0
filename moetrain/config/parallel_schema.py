"""Keys that say how the work of a run is spread: sections parallel, schedule, hardware and engine."""

from dataclasses import dataclass
from typing import Literal

from moetrain.config.key import key


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is split over ranks, and how `fssdp` copies experts."""

    mode: Literal["single", "ddp", "fsdp", "ep", "ep_fsdp", "fssdp"] = key(
        "single", "single: one process, no process group")
    ep: int | None = key(
        None, "ranks that share the experts of a layer; all ranks when null (modes ep, ep_fsdp, fssdp)")
    shard: int | None = key(
        None, "ranks that hold every parameter once between them; all ranks when null (modes fsdp, ep_fsdp, "
        "fssdp: the dense part)")
    exchange: Literal["flat", "two_level", "peer", "peer_push", "deepep", "vdev"] = key(
        "flat",
        "how tokens travel to experts: one all-to-all; inside nodes first and then between them; into the "
        "memory of ranks on the same machine, by copies or by a kernel; by DeepEP; by torch's all-to-all "
        "over NVSHMEM (the last two, and peer on GPUs, have never run)")
    exact_combine: bool = key(
        False,
        "dispatch one row for each expert of a token instead of one for each rank, so that sums do not "
        "depend on who holds an expert")
    max_copies: int = key(2, "fssdp: copies of other ranks' experts that a rank may hold in a layer")
    rematerialize: bool = key(
        False, "fssdp: drop copies after a layer's forward and gather them again for its backward")
    collective: Literal["packed", "two_level"] = key(
        "packed",
        "fssdp: how copies travel: from their homes straight to every rank, or over one rank of each other "
        "node")
    forecast: Literal["mean", "trend"] = key(
        "mean",
        "fssdp: loads of the next step: the mean of the last ones, or a moving average that follows their "
        "slope")
    window: int = key(5, "fssdp: steps of the mean")
    max_forecast_error: float = key(
        0.15,
        "fssdp: fraction of a layer's rows, in steps of 0.001; if its forecast misplaced more in the last "
        "step, that step's loads are expected again (1: never)")
    calibrate: bool = key(
        False,
        "fssdp: once a layer has routed, add copies that were not planned, where the cost model predicts a "
        "gain")
    rehome_interval: int = key(
        100, "fssdp: steps between reviews of the homes of experts, which the planner may move (0: never)")
    max_sliced_experts: int = key(
        0, "fssdp: most experts of a layer, the hottest, whose parameters are sliced over the ranks; "
        "planner=balanced slices them where the cost model predicts a gain, other planners slice all; chosen "
        "when homes are reviewed")


@dataclass(frozen=True)
class ScheduleConfig:
    """How a micro-batch is cut into chunks, so that exchange and computation overlap."""

    kind: Literal["none", "fixed"] = key(
        "none",
        "none: a micro-batch is dispatched to the experts of a layer in one piece; fixed: in a number of "
        "chunks, the same for all layers")
    chunks: int = key(
        1, "fixed: chunks of a micro-batch; while the experts compute one, its neighbours are exchanged")


@dataclass(frozen=True)
class HardwareConfig:
    """Rates of the machine, for the cost model of the planners."""

    flops: float = key(5e10, "operations per second that a rank reaches in matrix products")
    inside: float = key(1e9, "bytes per second from a rank to others on its node")
    between: float = key(1e9, "bytes per second from a rank to other nodes")
    latency_s: float = key(2e-4, "seconds of a message that carries nothing")


@dataclass(frozen=True)
class EngineConfig:
    """The engine of the dense part's gradients and optimizer."""

    name: Literal["torch", "deepspeed"] = key(
        "torch", "who sums gradients and steps the dense part: torch, or DeepSpeed's ZeRO")
    zero_stage: Literal[1, 2] = key(
        1, "deepspeed: what ZeRO shards over ranks; 1: moments, 2: summed gradients too")
