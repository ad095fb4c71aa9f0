"""Our training step beside transformers' Qwen3-MoE: tokens per second and activation memory, measured side by side.

    .venv/bin/python tools/bench_train.py                                   64 experts, float32
    .venv/bin/python tools/bench_train.py --experts 8 --top-k 2 --dim 128 --layers 2 --heads 4 --kv-heads 2 --expert-dim 128
    ... --profile       where our time goes, by operator
    ... --device cuda --dtype bfloat16      transformers runs under autocast: both hold float32 parameters

Both sides: the same weights, token sequences, dtype, threads, torch's scaled dot product attention, float32
cross-entropy, fused AdamW with one group. transformers runs with every experts implementation that it offers and that
runs here. Ours computes the sums of its routers for losses and metrics as in training; neither side has a balance loss,
and neither clips. Losses must agree before the clock starts.

Time: turns of a few steps, the order reversed every round; the lower quintile of the steps counts, and with a median more
than 1.3 times that the machine was busy and there is no verdict. `step` is forward, backward, AdamW, gradients set to
none; `fb` is forward and backward alone. `--clock cpu` counts the processor time of one thread instead of seconds on the
wall: what is left of a busy machine's noise is its caches.

Memory, by the same meters for all: `kept` is the storages that autograd holds at the end of the forward pass, each
counted once, without parameters and inputs; `peak` is the allocator's highest point in forward and backward above its start,
with gradients already allocated (CPU: torch.profiler's allocation events; CUDA: max_memory_allocated).
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetrain.comm.mesh import build_mesh, mesh_sizes
from moetrain.config.compose import compose
from moetrain.data.batch import Batch
from moetrain.model.build import build_model
from moetrain.model.transformer import Transformer
from moetrain.train.objective import cross_entropy_sum
from moetrain.train.passes import step_context

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}          # of the first loss, relative
BUSY = 1.3                                               # median over lower quintile
GATHERED_GB = 4.0
HOPELESS = 4.0                                           # an implementation this much slower than the best sits out


class Side(NamedTuple):
    """One programme: its loss on a batch, and the parameters that are trained."""

    name: str
    loss: Callable[[Batch], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer


class Seconds(NamedTuple):
    step: list[float]
    fb: list[float]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model, peer = make_ours(args, device), make_theirs(args, device)
    copy_weights(model, peer)
    batches = [random_batch(args, seed, device) for seed in range(4)]
    large = too_large(args)
    sides = [our_side(model), *(their_side(peer, name, args) for name in args.peers if name not in large)]
    sides, left_out = check(sides, batches[0], TOLERANCE[args.dtype])
    memory = {side.name: {"kept": kept_bytes(side, batches[0]), "peak": peak_bytes(side, batches[0], device)}
              for side in sides}
    seconds, slow = measure(sides, batches, args, make_clock(args, device))
    report = {
        "shape": vars(args), "machine": machine(device), "left_out": large | left_out | slow,
        "imbalance": imbalance(model, batches[0]),
        "sides": {name: figures(seconds[name], memory[name], args) for name in seconds},
    }
    report["ratios"] = ratios(report["sides"])
    show(report)
    if args.profile:
        show_profile(sides, batches, report["ratios"]["best_peer"])
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, help in (
        ("dim", 256, "model width"), ("layers", 4, "blocks"), ("heads", 8, "attention heads"),
        ("kv-heads", 4, "key-value heads"), ("experts", 64, "routed experts a layer"), ("top-k", 8, "experts a token"),
        ("expert-dim", 64, "hidden width of an expert"), ("vocab", 256, "tokens of the vocabulary"),
        ("batch", 16, "sequences"), ("seq", 128, "tokens of a sequence"), ("threads", 2, "threads of torch on the CPU"),
        ("rounds", 8, "turns of every side"), ("steps", 3, "steps of a turn"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} ({default})")
    parser.add_argument("--peers", nargs="+", default=implementations(),
                        help="experts implementations of transformers (all)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, with --threads 1")
    parser.add_argument("--profile", action="store_true", help="print time by operator, of ours and of the best peer")
    parser.add_argument("--out", help="write everything to this JSON file")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads, args.device) != (1, "cpu"):
        parser.error("--clock cpu needs --threads 1 and --device cpu")
    return args


# --- the two programmes


def make_ours(args: argparse.Namespace, device: torch.device) -> Transformer:
    config = compose([
        f"model.dim={args.dim}", f"model.num_layers={args.layers}", f"model.num_heads={args.heads}",
        f"model.num_kv_heads={args.kv_heads}", f"model.num_experts={args.experts}", f"model.top_k={args.top_k}",
        f"model.expert_dim={args.expert_dim}", "model.qk_norm=true", "model.init_std=0.05", f"run.dtype={args.dtype}",
    ])
    return build_model(config, args.vocab, build_mesh(mesh_sizes("single", 1, None), device))


def make_theirs(args: argparse.Namespace, device: torch.device) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=args.vocab, hidden_size=args.dim, intermediate_size=args.expert_dim, num_hidden_layers=args.layers,
        moe_intermediate_size=args.expert_dim, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        head_dim=args.dim // args.heads, num_experts=args.experts, num_experts_per_tok=args.top_k, norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False)
    return Qwen3MoeForCausalLM(config).to(device).train()


def implementations() -> list[str]:
    return ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def too_large(args: argparse.Namespace) -> dict[str, str]:
    """`batched_mm` gathers the matrices of its expert for every row, and autograd keeps them."""
    rows, per_row = args.batch * args.seq * args.top_k, 3 * args.dim * args.expert_dim
    gathered = args.layers * rows * per_row * (4 if args.dtype == "float32" else 2) / 1e9
    if gathered <= GATHERED_GB:
        return {}
    return {"batched_mm": f"would gather {gathered:.0f} GB of weights (limit {GATHERED_GB:.0f} GB)"}


@torch.no_grad()
def copy_weights(model: Transformer, peer: Qwen3MoeForCausalLM) -> None:
    """Ours into theirs; every parameter of theirs is filled."""
    pairs = [(model.embed, peer.model.embed_tokens.weight), (model.norm.weight, peer.model.norm.weight),
             (model.head, peer.lm_head.weight)]
    for ours, theirs in zip(model.layers, peer.model.layers):
        attention, peer_attention, moe = ours.attention, theirs.self_attn, ours.moe
        projections = [peer_attention.q_proj.weight, peer_attention.k_proj.weight, peer_attention.v_proj.weight]
        pairs += zip(attention.qkv.split([len(weight) for weight in projections]), projections)
        pairs += [(ours.attention_norm.weight, theirs.input_layernorm.weight),
                  (ours.ffn_norm.weight, theirs.post_attention_layernorm.weight),
                  (attention.out, peer_attention.o_proj.weight), (moe.router.weight, theirs.mlp.gate.weight),
                  (attention.q_norm.weight, peer_attention.q_norm.weight),
                  (attention.k_norm.weight, peer_attention.k_norm.weight),
                  (moe.experts.bank.gate_up, theirs.mlp.experts.gate_up_proj),
                  (moe.experts.bank.down, theirs.mlp.experts.down_proj)]
    assert {id(theirs) for _, theirs in pairs} == {id(parameter) for parameter in peer.parameters()}
    for ours, theirs in pairs:
        theirs.copy_(ours)


def our_side(model: Transformer) -> Side:
    def loss(batch: Batch) -> Tensor:
        logits_BSV, _ = model(batch.tokens_BS, step_context(0, 1, batch))
        return cross_entropy_sum(logits_BSV, batch.targets_BS) / batch.valid_BS.sum()

    return Side("moetrain", loss, *trained(model))


def their_side(peer: Qwen3MoeForCausalLM, implementation: str, args: argparse.Namespace) -> Side:
    def loss(batch: Batch) -> Tensor:
        peer.config._experts_implementation = implementation
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return peer(batch.tokens_BS, labels=batch.targets_BS, shift_labels=batch.targets_BS, use_cache=False).loss

    return Side(f"transformers {implementation}", loss, *trained(peer))


def trained(model: nn.Module) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """A small rate: routing stays what it is while the clock runs."""
    parameters = list(model.parameters())
    return parameters, torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def random_batch(args: argparse.Namespace, seed: int, device: torch.device) -> Batch:
    rows_BS = torch.randint(args.vocab, (args.batch, args.seq + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    tokens_BS, targets_BS = rows_BS[:, :-1].contiguous(), rows_BS[:, 1:].contiguous()
    ids_B = torch.arange(args.batch, device=device)
    return Batch(tokens_BS, targets_BS, torch.ones_like(tokens_BS, dtype=torch.bool), ids_B, torch.zeros_like(ids_B), None)


# --- measuring


def check(sides: list[Side], batch: Batch, tolerance: float) -> tuple[list[Side], dict[str, str]]:
    """The sides that run here, after comparing their first losses and gradient norms with ours; why the others do not."""
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
    """Seconds of every step, after one turn that does not count; hopeless implementations sit out after it."""
    warm = {side.name: min(one_step(side, batch, clock)[0] for batch in batches[:2]) for side in sides}
    limit = HOPELESS * min(warm.values())
    slow = {name: f"{seconds * 1e3:.0f} ms a step in the warm-up" for name, seconds in warm.items() if seconds > limit}
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
    """(seconds of the step, of forward and backward in it)."""
    start = clock()
    side.loss(batch).backward()
    middle = clock()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    return clock() - start, middle - start


def make_clock(args: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    def after_the_gpu() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    if device.type == "cuda":
        return after_the_gpu
    return time.thread_time if args.clock == "cpu" else time.perf_counter


def kept_bytes(side: Side, batch: Batch) -> int:
    """Bytes of storages that backward needs, beyond parameters and inputs."""
    others = {tensor.untyped_storage().data_ptr() for tensor in (*side.parameters, *batch) if tensor is not None}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor     # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = side.loss(batch)
    total = sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in others)
    del loss
    return total


def peak_bytes(side: Side, batch: Batch, device: torch.device) -> int:
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
    """The highest sum of allocations minus frees, from the trace's memory events in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


# --- reporting


def figures(seconds: Seconds, memory: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    tokens = args.batch * args.seq
    step, fb = lower_quintile(seconds.step), lower_quintile(seconds.fb)
    return {"step_ms": step * 1e3, "fb_ms": fb * 1e3, "median_ms": median(seconds.step) * 1e3, "tokens_per_s": tokens / step,
            "kept_mb": memory["kept"] / 1e6, "peak_mb": memory["peak"] / 1e6,
            "busy": median(seconds.step) / step, "steps": len(seconds.step)}


def ratios(sides: dict[str, dict[str, float]]) -> dict[str, float | str]:
    """Ours against the peer with the fastest step; memory against that one, and against the leanest of them."""
    ours, peers = sides["moetrain"], {name: side for name, side in sides.items() if name != "moetrain"}
    best = min(peers, key=lambda name: peers[name]["step_ms"])
    worst_busy = max(side["busy"] for side in sides.values())
    return {
        "best_peer": best,
        "speed_step": peers[best]["step_ms"] / ours["step_ms"],
        "speed_fb": min(side["fb_ms"] for side in peers.values()) / ours["fb_ms"],
        "speed_median": min(side["median_ms"] for side in peers.values()) / ours["median_ms"],
        "kept": ours["kept_mb"] / peers[best]["kept_mb"],
        "peak": ours["peak_mb"] / peers[best]["peak_mb"],
        "peak_of_leanest": ours["peak_mb"] / min(side["peak_mb"] for side in peers.values()),
        "busy": worst_busy,
        "verdict": "machine busy, no verdict" if worst_busy > BUSY else "steady",
    }


def show(report: dict) -> None:
    print(f"\n{'':26} {'step ms':>9} {'median':>9} {'fb ms':>9} {'tokens/s':>9} {'kept MB':>9} {'peak MB':>9}")
    for name, side in report["sides"].items():
        print(f"{name:26}" + "".join(f" {side[key]:9.1f}" for key in ("step_ms", "median_ms", "fb_ms"))
              + f" {side['tokens_per_s']:9.0f} {side['kept_mb']:9.1f} {side['peak_mb']:9.1f}")
    for name, reason in report["left_out"].items():
        print(f"{name:26} left out: {reason}")
    ratio = report["ratios"]
    print(f"\nours against {ratio['best_peer']}: {ratio['speed_step']:.3f}x a step, {ratio['speed_fb']:.3f}x forward and "
          f"backward, {ratio['speed_median']:.3f}x by medians; kept {ratio['kept']:.2f}, peak {ratio['peak']:.2f} "
          f"({ratio['peak_of_leanest']:.2f} of the leanest)")
    print(f"heaviest expert over the mean {report['imbalance']:.2f}; median over lower quintile {ratio['busy']:.2f}: "
          f"{ratio['verdict']}; {report['machine']}")


def show_profile(sides: list[Side], batches: list[Batch], best_peer: str) -> None:
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
                  f"{event.self_cpu_time_total / len(batches) / 1e3:8.2f} ms {event.count // len(batches):6} calls")


@torch.no_grad()
def imbalance(model: Transformer, batch: Batch) -> float:
    """Rows of the heaviest expert over the mean, the largest over layers."""
    _, stats = model(batch.tokens_BS, step_context(0, 1, batch))
    return max((sums.counts_E.max() / sums.counts_E.double().mean()).item() for sums in stats.values())


def machine(device: torch.device) -> dict[str, str | int | float]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "commit": commit.stdout.strip()}


def lower_quintile(values: list[float]) -> float:
    return sorted(values)[len(values) // 5]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
