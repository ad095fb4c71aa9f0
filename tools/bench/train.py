"""Compare a training step with that of transformers' Qwen3-MoE: tokens per second and activation memory.

    python -m tools.bench.train                                   64 experts, float32
    python -m tools.bench.train --experts 8 --top-k 2 --dim 128 --layers 2 --heads 4 --kv-heads 2
    ... --profile       where the time of ours goes, by operator
    ... --device cuda --dtype bfloat16      transformers runs under autocast: both hold float32 parameters
    ... --device cuda --dtype bfloat16 --model qwen3_30b_a3b --layers 4 --vocab 151936 --batch 4 --seq 4096
        --head-chunk 2048 --zipf 1
                        a model of conf/model/ cut in depth, on one GPU; MOETRAIN_KERNELS=1: ours with kernels

Models of conf/model/ lend their sizes alone: both sides have norms on queries and keys, and softmax routing
with renormalized weights.

Both sides: the same weights, token sequences, dtype, threads, torch's scaled dot product attention, float32
cross-entropy, fused AdamW with one group. transformers runs with every experts implementation that it offers
and that runs here. Ours computes the sums of its routers for losses and metrics as in training; neither side
has a balance loss, and neither clips. Losses must agree before the clock starts.

Time: turns of a few steps, the order reversed every round; the lower quintile of the steps counts, and with a
median more than 1.3 times that the machine was busy and there is no verdict. `step` is forward, backward,
AdamW, gradients set to none; `fb` is forward and backward alone. `--clock cpu` counts the processor time of
one thread instead of seconds on the wall: what is left of a busy machine's noise is its caches.

Beside tokens per second: MFU, the operations of training by formula (moetrain/model/flops.py) over those of
the chip's data sheet, and the same over R, the rate of a matrix product of that dtype in this process (a CPU
has no other).

Memory, by the same meters for all: `kept` is the storages that autograd holds at the end of the forward pass,
each counted once, without parameters and inputs; `peak` is the allocator's highest point in forward and
backward above its start, with gradients already allocated (CPU: torch.profiler's allocation events; CUDA:
max_memory_allocated).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moetrain.data.batches.batch import Batch
from moetrain.model.flops import peak_flops, training_flops
from tools.bench.ops import seconds_of
from tools.bench.train_baselines import (
    Side,
    configured,
    copy_weights,
    implementations,
    make_ours,
    make_theirs,
    our_side,
    random_batch,
    their_side,
    too_large,
    why_not,
)
from tools.bench.train_report import (
    Seconds,
    figures,
    imbalance,
    lower_quintile,
    machine,
    ratios,
    shares,
    show,
)

SIZES = (                                                # of the model, unless --model names one
    ("dim", 256, "model width"), ("layers", 4, "blocks"),
    ("heads", 8, "attention heads"), ("kv-heads", 4, "key-value heads"),
    ("head-dim", None, "width of a head; dim / heads without it"), ("experts", 64, "routed experts a layer"),
    ("top-k", 8, "experts a token"), ("expert-dim", 64, "hidden width of an expert"),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}          # of the first loss, relative
HOPELESS = 4.0                                           # an implementation slower by this factor sits out


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = configured(args)
    unable = why_not(config, args)
    if unable:
        raise SystemExit(f"bench_train: {unable}")
    model, large = make_ours(config, args, device), too_large(config, args)
    batches = [random_batch(args, seed, device) for seed in range(4)]
    sides = [our_side(model, args.head_chunk)]
    if args.peers:
        peer = make_theirs(config, args, device)
        copy_weights(model, peer)
        sides += [their_side(peer, name, args) for name in args.peers if name not in large]
    sides, left_out = check(sides, batches[0], TOLERANCE[args.dtype])
    memory = {side.name: {"kept": kept_bytes(side, batches[0]), "peak": peak_bytes(side, batches[0], device)}
              for side in sides}
    seconds, slow = measure(sides, batches, args, make_clock(args, device))
    dtype = getattr(torch, args.dtype)
    rates = {"mfu": peak_flops(device, dtype), "of_r": product_rate(device, dtype)}
    flops = training_flops(config.model, args.vocab, args.seq)
    report = {
        "shape": vars(args), "machine": machine(device), "left_out": large | left_out | slow,
        "flops_per_token": flops, "rates": rates,
        "imbalance": imbalance(model, batches[0]),
        "sides": {name: figures(seconds[name], memory[name], args)
                  | shares(rates, flops * args.batch * args.seq / lower_quintile(seconds[name].step))
                  for name in seconds},
    }
    report["ratios"] = ratios(report["sides"])
    show(report)
    if args.profile:
        show_profile(sides, batches, report["ratios"].get("best_peer"))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="sizes of conf/model/<name>, but for those that are given")
    for name, default, help in SIZES:
        parser.add_argument(f"--{name}", type=int, help=f"{help} ({default})" if default else help)
    for name, default, help in (
        ("vocab", 256, "tokens of the vocabulary"), ("batch", 16, "sequences"),
        ("seq", 128, "tokens of a sequence"), ("threads", 2, "threads of torch on the CPU"),
        ("rounds", 8, "turns of every side"), ("steps", 3, "steps of a turn"),
        ("head-chunk", 0, "ours: train.head_chunk, tokens whose logits are in memory at once"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} ({default})")
    parser.add_argument("--zipf", type=float, default=0.0,
                        help="exponent of the law of tokens (0: all as often)")
    parser.add_argument("--peers", nargs="*", default=implementations(),
                        help="experts implementations of transformers (all); with none, ours alone")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: processor time, with --threads 1")
    parser.add_argument("--profile", action="store_true",
                        help="print time by operator, of ours and of the best peer")
    parser.add_argument("--out", help="write everything to this JSON file")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads, args.device) != (1, "cpu"):
        parser.error("--clock cpu needs --threads 1 and --device cpu")
    if args.model is None:
        args.model = "debug"
        for name, default, _ in SIZES:
            key = name.replace("-", "_")
            setattr(args, key, getattr(args, key) or default)
    return args


# --- measuring


def check(sides: list[Side], batch: Batch, tolerance: float) -> tuple[list[Side], dict[str, str]]:
    """Run every side once, and compare its first loss with that of the first side.

    Args:
        sides: ours first.
        batch: the batch.
        tolerance: largest relative difference of the losses.

    Returns:
        The sides that run here, and why the others do not.
    """
    kept, left_out, truth = [], {}, None
    for side in sides:
        try:
            loss = side.loss(batch)
            loss.backward()
        except Exception as error:                       # a missing kernel package, an unsupported device
            if side.name == "moetrain":
                raise
            left_out[side.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:140]}"
            continue
        norm = torch.stack([parameter.grad.norm() for parameter in side.parameters]).norm()
        values = torch.stack([loss.detach(), norm.to(loss.dtype)]).double()
        truth = values if truth is None else truth
        error = ((values - truth) / truth).abs()
        assert error[0] <= tolerance, f"{side.name}: loss {values[0]:.8f}, ours {truth[0]:.8f}"
        print(f"{side.name:26} loss {values[0]:.7f}  gradient norm {values[1]:.6f}  "
              f"(relative difference {error[0]:.0e}, {error[1]:.0e})")
        side.optimizer.zero_grad(set_to_none=True)
        kept.append(side)
    return kept, left_out


def measure(sides: list[Side], batches: list[Batch], args: argparse.Namespace,
            clock: Callable[[], float]) -> tuple[dict[str, Seconds], dict[str, str]]:
    """Time every step, after one turn that does not count; hopeless implementations sit out after it.

    Args:
        sides: the sides, which take turns.
        batches: batches of the steps.
        args: the options.
        clock: returns seconds.

    Returns:
        Seconds by side, and why sides were left out.
    """
    warm = {side.name: min(one_step(side, batch, clock)[0] for batch in batches[:2]) for side in sides}
    limit = HOPELESS * min(warm.values())
    slow = {name: f"{seconds * 1e3:.0f} ms a step in the warm-up"
            for name, seconds in warm.items() if seconds > limit}
    running = [side for side in sides if side.name not in slow]
    seconds = {side.name: Seconds([], []) for side in running}
    for round in range(args.rounds):
        for side in running[::-1] if round % 2 else running:
            for step in range(args.steps):
                whole, fb = one_step(side, batches[(round + step) % len(batches)], clock)
                seconds[side.name].step.append(whole)
                seconds[side.name].fb.append(fb)
    return seconds, slow


def one_step(side: Side, batch: Batch, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step, and of forward and backward in it."""
    start = clock()
    side.loss(batch).backward()
    middle = clock()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    return clock() - start, middle - start


def make_clock(args: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    """The clock that `--clock` and the device ask for."""
    def after_the_gpu() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    if device.type == "cuda":
        return after_the_gpu
    return time.thread_time if args.clock == "cpu" else time.perf_counter


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """R: operations a second of a square product, 8192 a side on a GPU (as tools/bench/ops.py) or 2048."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / seconds_of(lambda _: a @ b, device.type, 20 if device.type == "cuda" else 5)


def kept_bytes(side: Side, batch: Batch) -> int:
    """Bytes of the storages that backward needs, beyond parameters and inputs."""
    others = {tensor.untyped_storage().data_ptr()
              for tensor in (*side.parameters, *batch) if tensor is not None}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor     # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = side.loss(batch)
    total = sum(tensor.untyped_storage().nbytes()
                for address, tensor in storages.items() if address not in others)
    del loss
    return total


def peak_bytes(side: Side, batch: Batch, device: torch.device) -> int:
    """Highest point of the allocator in forward and backward above its start, with gradients allocated."""
    for parameter in side.parameters:
        parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        side.loss(batch).backward()
        peak = torch.cuda.max_memory_allocated(device) - start
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            side.loss(batch).backward()
        peak = highest(recorded)
    side.optimizer.zero_grad(set_to_none=True)
    return peak


def highest(recorded: profile) -> int:
    """Highest sum of allocations minus frees, from the trace's memory events in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"]
                  if event.get("name") == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def show_profile(sides: list[Side], batches: list[Batch], best_peer: str | None) -> None:
    """Print the CPU time by operator of ours and of the best peer."""
    for side in sides:
        if side.name not in ("moetrain", best_peer):
            continue
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for batch in batches:
                side.loss(batch).backward()
                side.optimizer.step()
                side.optimizer.zero_grad(set_to_none=True)
        averages = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in averages)
        print(f"\n{side.name}: self CPU time by operator, {total / len(batches) / 1e3:.1f} ms a step")
        for event in averages[:28]:
            print(f"  {event.key[:54]:54} {event.self_cpu_time_total / total:6.1%} "
                  f"{event.self_cpu_time_total / len(batches) / 1e3:8.2f} ms "
                  f"{event.count // len(batches):6} calls")


if __name__ == "__main__":
    main()
